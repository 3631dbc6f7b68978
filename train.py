"""Train a YOLOv5 detector.

    python train.py                                              # the built-in data set
    python train.py --data data/VOC.yaml --weights yolov5s.pt --adam --epochs 100

This file is the only training loop. Sparsity, fine-tuning of a slim model and whatever you invent are hooks on it: see Hook.
"""
from __future__ import annotations

import math
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from models import checkpoint
from models.resume import require_finite, restore, resumed_options, save, save_epoch
from models.start import adapt_anchors, freeze, start_model, synchronised
from models.yolo import Model, on_device
from utils.data_config import DataConfig, read_data
from utils.dataloaders import Batch, DetectionDataset, EpochBatchSampler, build_loader, image_weights
from utils.distributed import World, barrier, broadcast, share_buffers, world
from utils.errors import NonFiniteError, UserError, run_cli
from utils.files import new_run_folder, write_yaml
from utils.interruption import Listener, listen
from utils.loggers import RunLog
from utils.loss import DetectionLoss, scale_gains
from utils.optim import EarlyStopping, ModelEMA, Schedule, build_optimizer, ema_tau
from utils.options import resolve, training_parser
from utils.slimming.cost import profile
from val import Evaluation, evaluate, plot_curves, validation_loader

LOSSES = ("box_loss", "obj_loss", "cls_loss")


class Hook:
    """The one extension point of the loop: override what you need.

    In a step the order is: backward of every micro-batch, unscale, clip, before_step, optimizer, EMA, after_step.
    """

    def start(self, run: Run) -> None:
        """Everything is built, nothing has been trained."""

    def extra_loss(self, batch: Batch, outputs: list[Tensor]) -> Tensor | None:
        """A term to add to the loss of a micro-batch."""
        return None

    def before_step(self) -> None:
        """Gradients are complete, unscaled and clipped; the optimizer has not used them yet."""

    def after_step(self, skipped: bool) -> None:
        """The weights have moved, unless the scaler skipped the step."""

    def epoch_end(self, log: dict[str, float]) -> None:
        """Add what results.csv and TensorBoard should carry for this epoch."""

    def end(self) -> None:
        """The last epoch is over. Called in the main process only: time for pictures."""

    def state_dict(self) -> dict:
        """What a resumed run needs, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take state_dict()'s data back."""


@dataclass
class Run:
    """Everything of a training run; hooks may look at all of it."""

    opt: Namespace
    world: World
    folder: Path
    config: DataConfig
    model: Model
    wrapped: nn.Module            # the model, in DistributedDataParallel where there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    ema: ModelEMA[Model]
    loss: DetectionLoss
    loader: DataLoader
    val_loader: DataLoader        # this process's share of the val images
    hooks: Sequence[Hook]
    stopper: EarlyStopping
    log: RunLog | None            # None on all processes but the main one
    signals: Listener             # SIGINT and SIGTERM
    epoch: int = 0
    iteration: int = 0            # batches since the beginning of epoch 0
    batches_done: int = 0         # of this epoch, when it begins: not 0 only where an interrupted one goes on
    mean: Tensor = field(default_factory=lambda: torch.zeros(3))  # of the losses over those
    step_share: float = 1.0       # images this step has seen / nominal batch: 1 for a whole step
    results: dict[str, float] = field(default_factory=dict)
    _statistics: list[Tensor] | None = None
    class_map: np.ndarray = field(default_factory=lambda: np.zeros(1))  # (nc,) mAP50-95 at the last validation, for --image-weights

    def statistics_norm(self) -> Tensor:
        """A number that is finite exactly where all running means and variances of BatchNorm are."""
        if self._statistics is None:  # collected once; the tensors stay the same objects
            self._statistics = [b for n, b in self.model.named_buffers() if n.endswith((".running_mean", ".running_var"))]
        return torch.stack(torch._foreach_norm(self._statistics)).sum() if self._statistics else torch.zeros((), device=self.world.device)

    @property
    def progress(self) -> float:
        """Share of the run that is done when this iteration is, 0..1."""
        return (self.iteration + 1) / (self.opt.epochs * len(self.loader))

    @property
    def amp(self) -> torch.dtype | None:
        """Type of autocast, or None."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.opt.amp)


def train(opt: Namespace, hooks: Sequence[Hook] = ()) -> Run:
    """A whole run, from the options of the command line to the last picture."""
    with world(opt.device) as place, listen(place.size) as signals:
        run = build_run(opt, place, hooks, signals)
        first, started = run.epoch, time.time()
        if place.main:
            describe(run)
            if not opt.resume:
                save(run, "last.pt")  # there is something to resume before the first step
        for epoch in range(first, run.opt.epochs):
            run.epoch = epoch
            final = run.epoch + 1 == run.opt.epochs
            log = train_epoch(run)
            share_buffers((run.model, run.ema.ema), place.size)  # all validate the model that is saved
            require_finite(run)
            validated = final or not run.opt.noval
            best = validated and validate(run, log)
            run.class_map = np.array(broadcast(run.class_map.tolist(), place.size))
            for hook in run.hooks:
                hook.epoch_end(log)
            stop = False
            if run.log is not None:
                run.results = log
                run.log.epoch(run.epoch, log)
                stop = validated and not final and run.stopper.over(run.epoch)
                if not run.opt.nosave or final or stop or signals.heard:
                    save_epoch(run, best)
            if broadcast(stop, place.size):
                if place.main:
                    print(f"No better fitness for {run.opt.patience} epochs (best: epoch {run.stopper.best_epoch}); stopping. --patience 0 goes on.")
                break
            if not final:
                signals.check(run.folder)
        if place.main:
            finish(run, (time.time() - started) / 3600)
        barrier(place.size)
    return run


def train_epoch(run: Run) -> dict[str, float]:
    """One pass over the training images; returns the epoch's mean losses and learning rates."""
    run.wrapped.train()
    sampler: EpochBatchSampler = run.loader.batch_sampler  # type: ignore[assignment]
    sampler.set_epoch(run.epoch, run.batches_done)
    if run.opt.image_weights:
        sampler.weights = image_weights(run.loader.dataset.labels, run.class_map)  # type: ignore[attr-defined]
    device, batches = run.world.device, len(run.loader)
    mean, waiting = run.mean.to(device), torch.zeros(1, device=device)
    gathered, images = 0, 0
    names: list[str] = []
    bar = tqdm(run.loader, total=batches, initial=run.batches_done, disable=None if run.world.main else True, leave=False)
    for i, batch in enumerate(bar, run.batches_done):
        run.iteration = run.epoch * batches + i
        run.schedule.apply(run.optimizer, run.iteration)
        gathered, images, names = gathered + 1, images + len(batch.images) * run.world.size, names + batch.paths
        stepping = gathered >= run.schedule.accumulate(run.iteration) or i + 1 == batches
        x = batch.images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last) / 255
        if run.opt.multi_scale:
            x = rescaled(run, x)
        with nullcontext() if stepping or run.world.size == 1 else run.wrapped.no_sync():  # type: ignore[operator]
            with torch.autocast(device.type, run.amp, enabled=run.amp is not None):
                outputs = run.wrapped(x)
            loss, items = run.loss(outputs, batch.targets.to(device, non_blocking=True))
            for hook in run.hooks:
                extra = hook.extra_loss(batch, outputs)
                loss = loss if extra is None else loss + extra
            run.scaler.scale(loss * run.world.size).backward()
        mean, waiting = (mean * i + items) / (i + 1), waiting + loss.detach()
        if stepping:
            norm = complete_gradients(run)
            # The one read a step that waits for a GPU.
            *shown, total, length, statistics = torch.cat((mean, waiting, norm.view(1), run.statistics_norm().view(1))).tolist()
            check_finite(run, {"loss": total, "gradient": length, "running statistic of a BatchNorm": statistics}, names)
            run.step_share = images / run.opt.nbs
            optimizer_step(run)
            gathered, images, names = 0, 0, []
            waiting.zero_()
            if not bar.disable:
                bar.set_description(f"epoch {run.epoch + 1}/{run.opt.epochs}  " + "  ".join(
                    f"{name[:3]} {value:.4f}" for name, value in zip(LOSSES, shown)))
            if run.signals.heard and i + 1 < batches:
                run.batches_done, run.mean = i + 1, mean
                save(run, "last.pt")
                run.signals.check(run.folder)
        if run.epoch == 0 and i < 3 and run.world.main and not run.opt.noplots:
            from utils.plots import plot_batch

            plot_batch(batch.images, batch.targets, batch.paths, run.model.names, run.folder / f"train_batch{i}.png")
    run.batches_done, run.mean = 0, torch.zeros(3)
    return {**{f"train/{name}": value for name, value in zip(LOSSES, mean.tolist())},
            **{f"x/lr{j}": group["lr"] for j, group in enumerate(run.optimizer.param_groups)}}


def rescaled(run: Run, x: Tensor) -> Tensor:
    """--multi-scale: the batch at 0.5 to 1.5 times the size, whole strides; the size is a pure function of the iteration."""
    stride, imgsz = int(run.model.stride.max()), run.opt.imgsz
    size = int(np.random.default_rng([run.opt.seed, run.iteration]).integers(imgsz // 2, imgsz * 3 // 2 + stride)) // stride * stride
    sides = [math.ceil(s * max(size, stride) / max(x.shape[2:]) / stride) * stride for s in x.shape[2:]]
    return nn.functional.interpolate(x, sides, mode="bilinear", align_corners=False)


def complete_gradients(run: Run) -> Tensor:
    """Unscale and clip; returns the gradients' norm before the clip."""
    run.scaler.unscale_(run.optimizer)
    return nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=10.0, foreach=True)


def optimizer_step(run: Run) -> None:
    """Hooks, step, EMA. What hooks do to gradients comes after unscaling, or AMP would shrink it to nothing."""
    for hook in run.hooks:
        hook.before_step()
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    skipped = run.scaler.get_scale() < scale  # the scaler backs off exactly when it met an infinity and skipped
    run.optimizer.zero_grad(set_to_none=True)
    if not skipped:
        run.ema.update()
    for hook in run.hooks:
        hook.after_step(skipped)


def check_finite(run: Run, values: dict[str, float], names: Sequence[str]) -> None:
    """Stop before a NaN or an infinity gets into the weights; `names` are the images of this step."""
    for what, value in values.items():
        # With loss scaling an infinite gradient is normal now and then: the scaler skips the step and tries a smaller scale.
        if not math.isfinite(value) and not (what == "gradient" and run.scaler.is_enabled()):
            raise NonFiniteError(f"a {what} is not finite in epoch {run.epoch + 1}, batch of {', '.join(Path(p).name for p in names[:4])} ...; "
                                 f"{run.folder / 'weights' / 'last.pt'} is whole; try a smaller lr0 in --hyp, --amp off, or a smaller --sr")


def validate(run: Run, log: dict[str, float]) -> bool:
    """Evaluate the EMA model, every process its share of the images; print the epoch's line, add the numbers to `log`. The best so far?"""
    result = evaluate(run.ema.ema, run.val_loader, run.world.device, loss=run.loss, processes=run.world.size)
    log.update(result.metrics())
    log.update({f"val/{name}": float(value) for name, value in zip(LOSSES, result.losses)})
    run.class_map = result.class_map(run.model.detect.nc)
    if run.world.main:
        losses = "  ".join(f"{log[f'train/{name}']:>7.4f}" for name in LOSSES)
        print(f"{run.epoch + 1:>5}/{run.opt.epochs:<5}{losses}  " + "".join(f"{v:>10.3f}" for v in result.metrics().values()), flush=True)
    return run.stopper.better(run.epoch, result.fitness)


# ---------------------------------------------------------------------------------------------------------- building


def build_run(opt: Namespace, place: World, hooks: Sequence[Hook], signals: Listener) -> Run:
    """Options -> a run that is ready for its first, or its next, epoch."""
    data: dict[str, Any] = {}
    if opt.resume:
        opt, data = resumed_options(opt)
    torch.manual_seed(opt.seed)
    config = read_data(opt.data)
    names = {0: "object"} if opt.single_cls else config.names
    opt.amp = opt.amp or ("fp16" if place.device.type == "cuda" else "off")
    model = start_model(opt, names, data, place)
    stride = int(model.stride.max())
    opt.imgsz = math.ceil(opt.imgsz / stride) * stride
    loader = training_loader(opt, config, stride, place, signals)
    if not data:
        adapt_anchors(opt, model, loader.dataset, place)
    if opt.sync_bn:
        model = synchronised(model, place)
    model = on_device(model, place.device)
    freeze(model, opt.freeze)
    val_loader = validation_loader(config, "val", opt.imgsz, max(opt.batch_size // place.size, 1) * 2, stride, opt.workers,
                                   opt.cache, opt.single_cls, rank=place.rank, world_size=place.size, ending=signals.ending)
    folder = Path(data["folder"]) if data else Path(str(broadcast(str(new_run_folder(opt.project, opt.name, opt.exist_ok)) if place.main else "", place.size)))
    schedule = Schedule(opt.hyp, opt.epochs, len(loader), opt.batch_size, opt.nbs, opt.cos_lr)
    share = opt.batch_size * schedule.accumulate(schedule.warmup) / opt.nbs
    optimizer = build_optimizer(model, opt.optimizer, opt.hyp["lr0"], opt.hyp["momentum"], opt.hyp["weight_decay"] * share)
    gains = {**scale_gains(opt.hyp, model.detect.nl, model.detect.nc, opt.imgsz), "label_smoothing": opt.label_smoothing}
    run = Run(opt=opt, world=place, folder=folder, config=config, model=model, wrapped=model, optimizer=optimizer,
              scaler=torch.amp.GradScaler(place.device.type, enabled=opt.amp == "fp16"), schedule=schedule,
              ema=ModelEMA(model, tau=ema_tau(schedule.steps)), loss=DetectionLoss(model, gains), loader=loader, val_loader=val_loader, hooks=hooks,
              stopper=EarlyStopping(opt.patience), log=None, signals=signals, class_map=np.zeros(len(names)))
    if data:
        restore(run, data)
    if place.size > 1:
        gpu = [place.device.index] if place.device.type == "cuda" else None
        run.wrapped = DistributedDataParallel(model, device_ids=gpu)
    for hook in hooks:
        hook.start(run)
    for hook, state in zip(hooks, data.get("training", {}).get("hooks", [])):
        hook.load_state_dict(state)
    if place.main:
        run.log = RunLog(folder, run.epoch if data else None)  # the first file of the run: what hooks refuse leaves none
    return run


def training_loader(opt: Namespace, config: DataConfig, stride: int, place: World, signals: Listener) -> DataLoader:
    """Loader of the augmented training images."""
    if opt.batch_size % place.size:
        raise UserError(f"--batch-size {opt.batch_size}: must be a multiple of the {place.size} processes")
    if not config.train:
        raise UserError(f"{config.file}: has no 'train:' entry")
    per_process = opt.batch_size // place.size
    dataset = DetectionDataset(config.train, opt.imgsz, hyp=opt.hyp, augment=True, rect=opt.rect, batch_size=per_process,
                               stride=stride, cache=opt.cache, single_cls=opt.single_cls, nc=config.nc, seed=opt.seed, prefix="train")
    if place.main and dataset.summary():
        print(dataset.summary())
    return build_loader(dataset, per_process, opt.workers, shuffle=not opt.rect, seed=opt.seed, rank=place.rank, world_size=place.size,
                        ending=signals.ending)


# ------------------------------------------------------------------------------------------------- beginning and end


def describe(run: Run) -> None:
    """Say what is about to be trained, and write it down."""
    cost = profile(run.model, run.opt.imgsz)
    shape = "slim" if run.model.masks else "dense"
    print(f"{shape} model: {cost.parameters:,} parameters, {cost.gflops:.2f} GFLOPs at {run.opt.imgsz} px; {run.world.device}, "
          f"{run.world.size} process{'es' if run.world.size > 1 else ''}, amp {run.opt.amp}")
    if run.opt.resume:
        now, end = (run.opt.hyp["lr0"] * run.schedule.factor(e) for e in (run.epoch, run.opt.epochs))
        print(f"resumed at epoch {run.epoch + 1}, batch {run.batches_done + 1}; the learning rate follows the schedule of a run of "
              f"{run.opt.epochs} epochs: {now:.3g} now, {end:.3g} at the end")
    print(f"{run.opt.optimizer}, {len(run.loader.dataset)} training images, {len(run.loader)} batches of {run.opt.batch_size} an epoch, "  # type: ignore[arg-type]
          f"a step every {run.schedule.accumulate(run.schedule.warmup)}; epochs {run.epoch + 1} to {run.opt.epochs}")
    write_yaml(run.folder / "opt.yaml", {k: v for k, v in vars(run.opt).items() if k != "hyp"})
    write_yaml(run.folder / "hyp.yaml", run.opt.hyp)
    if not run.opt.noplots:
        from utils.plots import plot_labels

        plot_labels(np.concatenate(run.loader.dataset.labels), run.model.names, run.folder / "labels.png")  # type: ignore[attr-defined]
    print(f"{'epoch':>8}" + "".join(f"{name[:3]:>9}" for name in LOSSES) + "".join(f"{n:>10}" for n in ("P", "R", "mAP50", "mAP50-95")))


def finish(run: Run, hours: float) -> Evaluation:
    """The best model's table and the run's pictures."""
    from val import print_table

    best = run.folder / "weights" / "best.pt"
    model = checkpoint.load(best if best.is_file() else run.folder / "weights" / "last.pt", run.world.device)
    assert run.log is not None
    loader = run.val_loader if run.world.size == 1 else validation_loader(
        run.config, "val", run.opt.imgsz, run.val_loader.dataset.batch_size, int(model.stride.max()), run.opt.workers, single_cls=run.opt.single_cls)  # type: ignore[attr-defined]
    result = evaluate(on_device(model, run.world.device), loader, run.world.device, confusion=True)
    print(f"\n{run.epoch + 1} epochs in {hours:.3f} hours. {best.name}, epoch {run.stopper.best_epoch + 1}:")
    print_table(result, run.model.names, per_class=run.config.nc <= 20)
    if not run.opt.noplots:
        from utils.plots import plot_results

        plot_curves(result, run.model.names, run.folder)
        plot_results(run.folder / "results.csv", run.folder / "results.png")
    for hook in run.hooks:
        hook.end()
    run.log.close()
    print(f"Results in {run.folder}")
    return result


def main(argv: list[str] | None = None) -> Run:
    """Command line -> training."""
    opt = training_parser(__doc__).parse_args(argv)
    opt.script = os.path.basename(__file__)
    return train(opt if opt.resume else resolve(opt))


if __name__ == "__main__":
    run_cli(main)
