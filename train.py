"""Train a YOLOv5 detector.

    python train.py                                              # the built-in data set
    python train.py --data data/VOC.yaml --weights yolov5s.pt --adam --epochs 100

This file is the only training loop. Sparsity, image weights and whatever you invent are hooks on it: see
training/run.py.
"""
from __future__ import annotations

import math
import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from models import checkpoint
from models.yolo import Model, fused, on_device, whole_strides
from training.autobatch import settle_batch
from training.distributed import World, barrier, broadcast, process_group, share_buffers, wrapped
from training.interruption import Listener, listen
from training.loggers import LOSSES, EpochTable, RunLogger, duration
from training.loss import DetectionLoss, scale_gains
from training.optimizer import EarlyStopping, ModelEMA, Schedule, build_optimizer, ema_tau, suited_nbs
from training.resume import go_on, mend, require_finite, restore, restore_hooks, save, save_epoch, start_hooks
from training.run import Hook, Run, Step, amp_name
from training.start import (
    adapt_anchors,
    freeze,
    seed_and_kernels,
    shared_run_folder,
    standard_hooks,
    start_model,
    start_options,
    synchronised,
)
from utils.data.config import DataConfig, read_data
from utils.data.dataset import DetectionDataset
from utils.data.loader import Batch, DetectionLoader, build_loader, frozen_objects, validation_loader
from utils.errors import NonFiniteError, UserError, run_cli
from utils.files import write_yaml
from utils.options import training_parser
from utils.parser import Argv, from_python
from utils.slimming.cost import profile
from val import Evaluation, evaluate, plot_curves, print_table

DRAWN_BATCHES = 3  # of the first epoch
MOST_SKIPPED = 50  # steps in a row that the scaler may skip; it needs some twenty to go down from its first scale


def train(opt: Namespace, hooks: Sequence[Hook] = ()) -> Run:
    """A whole run, from the options of the command line to the last picture."""
    with ExitStack() as locks:  # the run's folder, which no other process may have
        opt, resumed = go_on(opt, locks) if opt.resume else (opt, {})
        world = locks.enter_context(process_group(opt.device))
        signals = locks.enter_context(listen(world.size))
        run = build_run(opt, resumed, world, hooks, signals, locks)
        table = EpochTable(run.epoch, run.opt.epochs, {title: show for hook in run.hooks
                                                       for title, show in hook.columns().items()})
        if world.main:
            describe(run)
            print(table.header())
            if not run.opt.resume:
                save(run, "last.pt")  # there is something to resume before the first step
        with frozen_objects():  # from before the loaders start their workers
            for epoch in range(run.epoch, run.opt.epochs):
                run.epoch = epoch
                if not complete_epoch(run, table):
                    break
        if world.main:
            finish(run, table.seconds)
        barrier(world.size)
    return run


def complete_epoch(run: Run, table: EpochTable) -> bool:
    """Train, validate and save; False where early stopping ends the run. `Interrupted` where a signal does."""
    opt, world, signals = run.opt, run.world, run.signals
    final = run.epoch + 1 == opt.epochs
    log = train_epoch(run)
    share_buffers((run.model, run.ema.ema), world.size)  # all validate the model that is saved
    require_finite(run)
    validated = final or not opt.noval
    fitness = validate(run, log) if validated else -1.0
    eligible = validated and all(hook.may_be_best() for hook in run.hooks)
    best = eligible and run.stopper.better(run.epoch, fitness)
    for hook in run.hooks:
        hook.epoch_end(log)
    stop = eligible and not final and run.stopper.over(run.epoch)
    if run.logger is not None:
        run.metrics = log
        print(table.line(run.epoch, log), flush=True)
        run.logger.epoch(run.epoch, log)
        if not opt.nosave or final or stop or signals.requested:
            save_epoch(run, best)
    if broadcast(stop, world.size):
        if world.main:
            print(f"No better fitness for {opt.patience} epochs (best: epoch {run.stopper.best_epoch + 1}); "
                  "stopping. --patience 0 goes on.")
        return False
    if not final:
        signals.stop_if_requested(run.folder)
    return True


def train_epoch(run: Run) -> dict[str, float]:
    """One pass over the training images; returns the epoch's mean losses and learning rates."""
    run.wrapped.train()
    run.loader.batch_sampler.set_epoch(run.epoch, run.batches_done)
    batches, mean, step = len(run.loader), run.mean.to(run.world.device), Step()
    bar = tqdm(run.loader, total=batches, initial=run.batches_done, leave=False,
               disable=None if run.world.main else True)
    for i, batch in enumerate(bar, run.batches_done):
        run.iteration = run.epoch * batches + i
        run.schedule.apply(run.optimizer, run.iteration)
        complete = step.batches + 1 >= run.schedule.accumulate(run.iteration) or i + 1 == batches
        with gradient_sync(run, complete):
            loss, items = forward(run, batch)
            run.scaler.scale(loss * run.world.size).backward()
        mean = (mean * i + items) / (i + 1)
        step.add(batch, loss, run.world.size)
        draw_batch(run, i, batch)
        if complete:
            bar.set_description(progress(run, optimizer_step(run, step, mean)))
            step = Step()
            if run.signals.requested and i + 1 < batches:
                stop_between_steps(run, i + 1, mean)
    run.batches_done, run.mean = 0, torch.zeros(3)
    log = {f"train/{name}": value for name, value in zip(LOSSES, mean.tolist())}
    return log | {f"x/lr{j}": group["lr"] for j, group in enumerate(run.optimizer.param_groups)}


def optimizer_step(run: Run, step: Step, mean: Tensor) -> list[float]:
    """What follows the backward passes of a step: gradients, hooks, optimizer, average. Returns `mean` as numbers."""
    shown, skipped = complete_gradients(run, step, mean)
    run.batch_fraction = step.images / run.nbs
    for hook in run.hooks:  # after unscaling: AMP would shrink what they add to nothing
        hook.before_step()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if not skipped:
        run.ema.update()
    for hook in run.hooks:
        hook.after_step(skipped)
    return shown


def forward(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Forward pass and loss of a micro-batch: (loss (1,) with the hooks' terms, (3,) box, obj, cls detached)."""
    device = run.world.device
    x = batch.images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last) / 255
    if run.opt.multi_scale:
        x = rescaled(run, x)
    run.images = x
    with torch.autocast(device.type, run.amp, enabled=run.amp is not None):
        outputs = run.wrapped(x)
    loss, items = run.loss(outputs, batch.targets.to(device, non_blocking=True))
    for hook in run.hooks:
        extra = hook.extra_loss(batch, outputs)
        loss = loss if extra is None else loss + extra
    return loss, items


def rescaled(run: Run, x: Tensor) -> Tensor:
    """--multi-scale: the batch at 0.5 to 1.5 times the size, in whole strides.

    The size is a pure function of the iteration: a resumed run sees the same.
    """
    stride, imgsz = run.model.divisor, run.imgsz
    rng = np.random.default_rng([run.opt.seed, run.iteration])
    size = int(rng.integers(imgsz // 2, imgsz * 3 // 2 + stride)) // stride * stride
    scale = max(size, min(2 * stride, imgsz)) / max(x.shape[2:])  # a map of 1x1 has no variance for BatchNorm
    sides = [math.ceil(s * scale / stride) * stride for s in x.shape[2:]]
    return nn.functional.interpolate(x, sides, mode="bilinear", align_corners=False)


def gradient_sync(run: Run, stepping: bool) -> AbstractContextManager:
    """Gradients are summed over the processes in the last micro-batch of a step only."""
    if stepping or not isinstance(run.wrapped, DistributedDataParallel):
        return nullcontext()
    return run.wrapped.no_sync()


def complete_gradients(run: Run, step: Step, mean: Tensor) -> tuple[list[float], bool]:
    """Unscale, clip, and stop where something is not finite.

    Returns the mean losses, and whether the scaler is going to skip the step.
    """
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=10.0, foreach=True)
    # The one read in a step that waits for a GPU.
    values = torch.cat((mean, step.loss.view(1), norm.view(1), run.statistics_norm().view(1)))
    *shown, total, length, statistics = values.tolist()
    # With a scaler an infinite gradient is normal now and then: it skips the step and tries a smaller scale.
    skipped = run.scaler.is_enabled() and not math.isfinite(length)
    run.skipped = run.skipped + 1 if skipped else 0
    where = f"in epoch {run.epoch + 1}, batch of {', '.join(Path(p).name for p in step.paths[:4])} ...; {mend(run)}"
    if run.skipped >= MOST_SKIPPED:
        raise NonFiniteError(f"the gradient was not finite in {run.skipped} steps in a row, the last {where}")
    figures = {"loss": total, "gradient": 0.0 if skipped else length, "running statistic of a BatchNorm": statistics}
    for what, value in figures.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"a {what} is not finite {where}")
    return shown, skipped


def progress(run: Run, losses: Sequence[float]) -> str:
    """The text of the progress bar."""
    means = "  ".join(f"{name[:3]} {value:.4f}" for name, value in zip(LOSSES, losses))
    return f"epoch {run.epoch + 1}/{run.opt.epochs}  {means}"


def draw_batch(run: Run, i: int, batch: Batch) -> None:
    """A picture of each of the run's first batches, as the model sees them."""
    if run.epoch == 0 and i < DRAWN_BATCHES and run.world.main and not run.opt.noplots:
        from utils.plots.detections import plot_batch

        plot_batch(batch.images, batch.targets, batch.paths, run.model.names, run.folder / f"train_batch{i}.jpg")


def stop_between_steps(run: Run, batches_done: int, mean: Tensor) -> None:
    """A signal has asked for it: save where the epoch stands, and end the script."""
    run.batches_done, run.mean = batches_done, mean
    save(run, "last.pt")
    run.signals.stop_if_requested(run.folder)


def validate(run: Run, log: dict[str, float]) -> float:
    """Evaluate the EMA model, every process on its share of the images; returns the fitness.

    Adds the numbers to `log`. A GPU computes in the training's precision.
    """
    amp = run.amp if run.world.device.type == "cuda" else None
    device, size = run.world.device, run.world.size
    result = evaluate(on_device(fused(run.ema.ema), device), run.val_loader, device, loss=run.loss, processes=size,
                      amp=amp)
    run.ap = result.ap
    log.update(result.metrics())
    log.update({f"val/{name}": float(value) for name, value in zip(LOSSES, result.losses)})
    return result.fitness


# Beginning and end ----------------------------------------------------------------------------------------------------

def build_run(opt: Namespace, resumed: dict[str, Any], world: World, hooks: Sequence[Hook], signals: Listener,
              locks: ExitStack) -> Run:
    """Options -> a run that is ready for its first, or its next, epoch. `locks` gets the lock of a new folder."""
    seed_and_kernels(opt)
    config = read_data(opt.data)
    model = start_model(opt, {0: "object"} if opt.single_cls else config.names, resumed, world)
    stride = model.divisor
    imgsz = whole_strides(opt.imgsz, stride)
    opt = settle_batch(opt, model, imgsz, world)
    loader = training_loader(opt, config, imgsz, stride, world, signals)
    if not resumed:
        adapt_anchors(opt, imgsz, model, loader.dataset, world)
    if opt.sync_bn:
        model = synchronised(model, world)
    model = on_device(model, world.device)
    freeze(model, opt.freeze)
    val = val_loader(opt, config, imgsz, stride, world, cache=opt.cache, shutdown=signals.shutdown)
    folder = Path(resumed["folder"]) if resumed else shared_run_folder(opt, world, locks)
    nbs = opt.nbs or suited_nbs(opt.epochs * len(loader), opt.batch_size)
    schedule = Schedule(opt.hyp, opt.epochs, len(loader), opt.batch_size, nbs, opt.cos_lr)
    step_fraction = opt.batch_size * schedule.accumulate(schedule.warmup) / nbs
    scaled = amp_name(opt, world.device) == "fp16"
    scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
    optimizer = build_optimizer(model, opt.optimizer, opt.hyp["lr0"], opt.hyp["momentum"],
                                opt.hyp["weight_decay"] * step_fraction, scaled)
    gains = scale_gains(opt.hyp, model.detect.nl, model.detect.nc, imgsz)
    loss = DetectionLoss(model, gains | {"label_smoothing": opt.label_smoothing})
    hooks = [*standard_hooks(opt), *hooks]
    if len({hook.name for hook in hooks}) < len(hooks):
        raise ValueError("two hooks have the same name, under which a checkpoint keeps their state")
    run = Run(opt, imgsz, nbs, world, folder, config, model, model, optimizer, scaler, schedule,
              ModelEMA(model, tau=ema_tau(schedule.steps)), loss, loader, val, hooks,
              EarlyStopping(opt.patience), signals, resumed=resumed)
    if resumed:
        restore(run, resumed)
    run.wrapped = wrapped(model, world)
    start_hooks(run, resumed)
    if resumed:
        restore_hooks(run, resumed["training"])
    if world.main:
        # The first file of the run: what hooks refuse leaves none.
        run.logger = RunLogger(folder, run.epoch if resumed else None)
    return run


def training_loader(opt: Namespace, config: DataConfig, imgsz: int, stride: int, world: World,
                    signals: Listener) -> DetectionLoader:
    """Loader of the augmented training images."""
    if opt.batch_size % world.size:
        raise UserError(f"--batch-size {opt.batch_size}: must be a multiple of the {world.size} processes")
    if not config.train:
        raise UserError(f"{config.file}: has no 'train:' entry")
    per_process = opt.batch_size // world.size
    dataset = DetectionDataset(config.train, imgsz, hyp=opt.hyp, augment=True, rect=opt.rect,
                               batch_size=per_process, stride=stride, cache=opt.cache, single_cls=opt.single_cls,
                               nc=config.nc, seed=opt.seed, prefix="train")
    if world.main:
        print(dataset.summary())
    dataset.require_labels()
    return build_loader(dataset, per_process, opt.workers, shuffle=not opt.rect, seed=opt.seed, rank=world.rank,
                        world_size=world.size, shutdown=signals.shutdown, pin_memory=world.device.type == "cuda")


def val_loader(opt: Namespace, config: DataConfig, imgsz: int, stride: int, world: World, every: bool = False,
               **options: Any) -> DetectionLoader:
    """Loader of the validation images: this process's share of them, or `every` one."""
    rank, size = (0, 1) if every else (world.rank, world.size)
    return validation_loader(config, "val", imgsz, max(opt.batch_size // world.size, 1) * 2, stride, opt.workers,
                             single_cls=opt.single_cls, rank=rank, world_size=size,
                             pin_memory=world.device.type == "cuda", **options)


def describe(run: Run) -> None:
    """Say what is about to be trained, and write it down."""
    opt, world, schedule = run.opt, run.world, run.schedule
    cost = profile(run.model, run.imgsz)
    kind, processes = "slim" if run.model.masks else "dense", "processes" if world.size > 1 else "process"
    print(f"results: {run.folder}")
    print(f"{kind} model: {cost.parameters:,} parameters, {cost.gflops:.2f} GFLOPs at {run.imgsz} px; "
          f"{world.device}, {world.size} {processes}, amp {amp_name(opt, world.device)}")
    if opt.resume:
        now, end = (opt.hyp["lr0"] * schedule.factor(epoch) for epoch in (run.epoch, opt.epochs))
        print(f"resumed at epoch {run.epoch + 1}, batch {run.batches_done + 1}; the learning rate follows the schedule "
              f"of a run of {opt.epochs} epochs: {now:.3g} now, {end:.3g} at the end")
    print(f"{opt.optimizer}, {len(run.loader.dataset)} training images, "
          f"{len(run.loader)} batches of {opt.batch_size} an epoch, "
          f"a step every {schedule.accumulate(schedule.warmup)} (--nbs {run.nbs}), {schedule.steps} steps; "
          f"epochs {run.epoch + 1} to {opt.epochs}")
    write_yaml(run.folder / "opt.yaml", {key: value for key, value in run.settings.items() if key != "hyp"})
    write_yaml(run.folder / "hyp.yaml", opt.hyp)
    if not opt.noplots:
        from utils.plots.training import plot_labels

        plot_labels(run.loader.dataset.labels.flat(), run.model.names, run.folder / "labels.png")


def finish(run: Run, seconds: float) -> Evaluation:
    """The best model's table and the run's pictures."""
    opt, device, weights = run.opt, run.world.device, run.folder / "weights"
    file, epoch = weights / "best.pt", run.stopper.best_epoch
    if not file.is_file():  # --nosave keeps the last epoch, and only that
        file, epoch = weights / "last.pt", run.epoch
    model: Model = checkpoint.load(file, device)
    loader = run.val_loader
    if run.world.size > 1:  # it has this process's images only
        loader = val_loader(opt, run.config, run.imgsz, model.divisor, run.world, every=True)
    result = evaluate(on_device(model, device), loader, device, confusion=True)
    print(f"\n{run.epoch + 1} epochs in {duration(seconds)}. {file.name}, epoch {epoch + 1}:")
    print_table(result, run.model.names, per_class=run.config.nc <= 20)
    if not opt.noplots:
        from utils.plots.training import plot_results

        plot_curves(result, run.model.names, run.folder)
        plot_results(run.folder / "results.csv", run.folder / "results.png")
    for hook in run.hooks:
        hook.end()
    if run.logger is not None:
        run.logger.close()
    print(f"Results in {run.folder}")
    return result


def main(argv: Argv = None, hooks: Sequence[Hook] = ()) -> Run:
    """Command line, and hooks -> training."""
    parser = training_parser(__doc__)
    parser.needs(["--teacher-weight"], "--teacher")
    opt = parser.parse_args(argv)
    opt.script = os.path.basename(__file__)
    run = train(opt if opt.resume else start_options(opt), hooks)
    if argv is None:
        say_next(run, "train_sparsity.py", "--target flops=0.5 --shrink")
    return run


def say_next(run: Run, script: str, flags: str, name: str = "best.pt") -> None:
    """The last line of a training from the command line: what may come next, with this checkpoint."""
    if run.world.main:
        weights = run.folder / "weights" / name
        weights = weights if weights.is_file() else weights.with_name("last.pt")
        print(f"now: python {script} --weights {shlex.quote(str(weights))} {flags}")


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
