"""What is saved of a training run, when, and how a run goes on from it."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from models import checkpoint
from models.yolo import BUILD_ERRORS
from training.distributed import device_of_before, first_process
from training.run import Run
from training.settings import resolve, trained_data
from utils.data.config import read_data
from utils.errors import UserError, first_line
from utils.files import command_line, in_use, newest
from utils.text import read_yaml_mapping


def require_finite(run: Run) -> None:
    """Raise NonFiniteError where a weight, an averaged weight or a statistic is NaN or infinite.

    Such a model is neither validated nor saved.
    """
    after = f" after epoch {run.iteration // len(run.loader) + 1}; nothing of it was saved, {mend(run)}"
    for model in (run.model, run.ema.ema):
        checkpoint.require_finite(model.state_dict(), "", after)


def mend(run: Run) -> str:
    """The second half of a NonFiniteError's message."""
    last = run.folder / "weights" / "last.pt"
    return f"{last} is whole; try a smaller lr0 in --hyp, --amp off, or a smaller --sr"


def save(run: Run, name: str) -> None:
    """Write a checkpoint with the whole training state into the run's folder."""
    require_finite(run)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    training = {"epoch": run.epoch, "batches_done": run.batches_done, "mean": run.mean.cpu(),
                "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
                "updates": run.ema.updates,
                "stopper": {"best": run.stopper.best, "best_epoch": run.stopper.best_epoch},
                "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
                "hooks": {hook.name: hook.state_dict() for hook in run.hooks}}
    checkpoint.save(run.folder / "weights" / name, run.model, run.ema.ema, training=training, **provenance(run))


def save_epoch(run: Run, best: bool) -> None:
    """best.pt (the averaged weights only), what --save-period asks for and last.pt, after an epoch.

    last.pt comes last: a run that is killed in between goes on from the one before and writes the others again.
    """
    done, run.epoch = run.epoch, run.epoch + 1  # the files say which epoch comes next
    if run.opt.save_period > 0 and run.epoch % run.opt.save_period == 0:
        save(run, f"epoch{run.epoch}.pt")
    if best:
        checkpoint.save(run.folder / "weights" / "best.pt", run.ema.ema, **provenance(run))
    save(run, "last.pt")
    run.epoch = done


def provenance(run: Run) -> dict[str, Any]:
    """What every checkpoint tells about where it came from."""
    from_hooks = {key: value for hook in run.hooks for key, value in hook.record().items()}
    images = {split: len(loader.dataset) for split, loader in (("train", run.loader), ("val", run.val_loader))}
    return {"opt": run.settings, "folder": str(run.folder.resolve()), "data": run.opt.data, "images": images,
            "imgsz": run.imgsz, "hyp": run.opt.hyp, "epochs_done": run.epoch, "command": command_line(),
            "metrics": dict(run.metrics), **from_hooks}


# Flags that --resume takes. All others belong to the schedule, the optimizer's state or the model, and stay.
CHANGEABLE = ("resume", "data", "amp", "patience", "sync_bn", "workers", "cache", "device", "epochs", "project",
              "teacher")


def go_on(opt: Namespace, locks: ExitStack) -> tuple[Namespace, dict[str, Any]]:
    """--resume: resumed_options() of its last.pt. `locks` gets the lock of the run's folder.

    The lock comes first: a process that has it may still write what is read here.
    """
    path = resume_file(opt)
    if path.is_file() and first_process():
        locks.enter_context(in_use(path.resolve().parent.parent))
    return resumed_options(opt, path)


def resumed_options(opt: Namespace, path: Path) -> tuple[Namespace, dict[str, Any]]:
    """The options of the interrupted run of a last.pt, but for those that this command gives and a run can change.

    Also returns the checkpoint. Raises UserError for a flag that can't change, and a file that is not in a run.
    """
    data = checkpoint.read(path)
    if not data.get("training"):
        raise UserError(f"{path}: holds weights only, nothing to resume; start from it with --weights {path}")
    if path.resolve().parent.name != "weights":  # the folder above it would become the run's
        raise UserError(f"{path}: lies in no run's weights folder; put it back as run/weights/{path.name}, or start "
                        f"from it with --weights {path}")
    before = Namespace(**{**vars(opt), **(data.get("opt") or {})})  # a flag that is newer than the file has its default
    if before.script != opt.script:
        raise UserError(f"{path}: was made by {before.script}; resume it with: python {before.script} --resume {path}")
    for name in opt.given:
        was, now = getattr(before, name), getattr(opt, name)
        if name not in CHANGEABLE and was != now:
            raise UserError(f"--{name.replace('_', '-')}: a run that goes on keeps it ({was}), its schedule, optimizer "
                            f"or model depends on it; leave it out, or start from the weights: --weights {path}")
        setattr(before, name, now)
    before.resume = str(path.absolute())
    config = read_data(opt.data, needed=()) if opt.data else trained_data(data, str(path), before.single_cls)
    before.data = str(config.file) if config else before.data
    if "device" not in opt.given:
        before.device = device_of_before(before.device)
    if before.amp == "fp16" and "amp" not in opt.given:
        before.amp = None  # on a GPU it is the default; the run may go on on a CPU
    on_cpu = before.device == "cpu" or not torch.cuda.is_available()
    before.sync_bn &= not on_cpu or "sync_bn" in opt.given  # a CPU has none; who asks for it is told
    before = resolve(before)
    if data["training"]["epoch"] >= before.epochs:
        raise UserError(f"{path}: all {before.epochs} epochs are done; give more, "
                        f"as in --resume {path} --epochs {before.epochs * 2}")
    data["folder"] = str(path.resolve().parent.parent)
    return before, data


def resume_file(opt: Namespace) -> Path:
    """The last.pt that --resume means."""
    if isinstance(opt.resume, str):
        path = Path(opt.resume)
        return path / "weights" / "last.pt" if path.is_dir() else path
    if last := newest(f"{opt.project}/*/weights/last.pt"):
        return last
    raise UserError(f"--resume: no run under {opt.project}; give the file: --resume path/to/last.pt")


def newest_run(script: str) -> Path:
    """last.pt of the newest run under runs/ that `script` made. UserError where there is none."""
    def made_by_script(weights: Path) -> bool:
        options = weights.parent.parent / "opt.yaml"
        return options.is_file() and read_yaml_mapping(options, "").get("script") == script

    files = [weights for weights in Path().glob("runs/*/*/weights/last.pt") if made_by_script(weights)]
    if not files:
        raise UserError(f"--weights: no sparsity run under runs/ yet; make one with {script}, "
                        "or give a checkpoint: --weights path/to/last.pt")
    return max(files, key=lambda weights: weights.stat().st_mtime)


def fitting(put_back: Callable[[Run, dict[str, Any]], None]) -> Callable[[Run, dict[str, Any]], None]:
    """A function that gives a run what a checkpoint holds. UserError where it does not fit there."""
    @wraps(put_back)
    def put_back_or_refuse(run: Run, saved: dict[str, Any]) -> None:
        try:
            put_back(run, saved)
        except BUILD_ERRORS as error:
            if not run.resumed:
                raise
            raise UserError(f"{run.opt.resume}: its training state does not fit its model ({first_line(error)}); "
                            f"start from the weights: --weights {run.opt.resume}") from error

    return put_back_or_refuse


@fitting
def restore(run: Run, data: dict[str, Any]) -> None:
    """Put a resumed checkpoint's training state back. NonFiniteError where it holds a NaN."""
    training = data["training"]
    run.epoch, run.batches_done = training["epoch"], training.get("batches_done", 0)
    run.mean = training.get("mean", run.mean)
    if run.batches_done >= len(run.loader) or run.mean.shape != (3,):
        raise ValueError(f"{run.batches_done} of {len(run.loader)} batches of an epoch are done")
    for split, loader in (("train", run.loader), ("val", run.val_loader)):
        was, now = data.get("images", {}).get(split), len(loader.dataset)
        if was not in (None, now) and run.world.main:
            print(f"note: {run.opt.data}: {split} has {now} images now, {was} when the run was saved")
    restore_optimizer(run.optimizer, training["optimizer"])
    if training["scaler"] and run.scaler.is_enabled():  # empty where the run had none
        run.scaler.load_state_dict(training["scaler"])
    checkpoint.require_finite(data["ema"], f"{run.opt.resume}: ema.", "; start from another checkpoint")
    run.ema.ema.load_state_dict(data["ema"])
    run.ema.updates = training["updates"]
    run.stopper.best, run.stopper.best_epoch = training["stopper"]["best"], training["stopper"]["best_epoch"]


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer its momenta back; rates and decay are those of the options.

    ValueError where they are of other parameters, or of another optimizer.
    """
    own = optimizer.state_dict()["param_groups"]
    if [list(group["params"]) for group in saved["param_groups"]] != [group["params"] for group in own]:
        raise ValueError("the optimizer has other parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    for i, state in saved["state"].items():
        values = {key: torch.as_tensor(value) for key, value in state.items() if value is not None}
        if state.keys() != keys or any(value.shape != (() if key == "step" else parameters[i].shape)
                                       or not bool(value.isfinite().all()) for key, value in values.items()):
            raise ValueError(f"the optimizer's state of parameter {i} is of another optimizer or shape, or not finite")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


@fitting
def start_hooks(run: Run, resumed: dict[str, Any]) -> None:
    """Start every hook; those of a run that goes on look into its checkpoint, `resumed`."""
    for hook in run.hooks:
        hook.start(run)


@fitting
def restore_hooks(run: Run, training: dict[str, Any]) -> None:
    """Give every hook its state back, and the random generators, which the start of a hook may have used.

    Prints a note for a hook that has no state there, and for a state that no hook takes.
    """
    torch.set_rng_state(training["rng"]["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(training["rng"]["cuda"][:torch.cuda.device_count()])
    states = training["hooks"]
    for hook in run.hooks:
        if hook.name in states:
            hook.load_state_dict(states[hook.name])
        elif run.world.main and hook.state_dict():
            print(f"note: the checkpoint has no state of {hook.name}; it starts anew")
    unused = states.keys() - {hook.name for hook in run.hooks}
    if unused and run.world.main:
        print(f"note: the checkpoint's state of {', '.join(sorted(unused))} is not used")
