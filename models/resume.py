"""What is saved of a training run, when, and how a run goes on from it."""
from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models import checkpoint
from utils.errors import NonFiniteError, UserError
from utils.files import command_line
from utils.options import resume_file

if TYPE_CHECKING:
    from train import Run


def require_finite(run: Run) -> None:
    """Raise NonFiniteError where a weight, an averaged weight or a statistic is NaN or infinite: it is not to be validated, nor saved."""
    broken = [k for model in (run.model, run.ema.ema) for k, v in model.state_dict().items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise NonFiniteError(f"{broken[0]} is not finite after epoch {run.iteration // len(run.loader) + 1}; nothing of it was saved, "
                             f"{run.folder / 'weights' / 'last.pt'} is whole; try a smaller lr0 in --hyp, --amp off, or a smaller --sr")


def save(run: Run, name: str) -> None:
    """Write a checkpoint with the whole training state into the run's folder."""
    require_finite(run)
    training = {"epoch": run.epoch, "batches_done": run.batches_done, "mean": run.mean.cpu(),
                "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
                "updates": run.ema.updates, "stopper": {"best": run.stopper.best, "best_epoch": run.stopper.best_epoch},
                "rng": {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []},
                "hooks": [hook.state_dict() for hook in run.hooks], "class_map": run.class_map.tolist()}
    checkpoint.save(run.folder / "weights" / name, run.model, run.ema.ema, training=training, **record(run))


def save_epoch(run: Run, best: bool) -> None:
    """best.pt (the averaged weights only), what --save-period asks for and last.pt, after an epoch.

    last.pt comes last: whoever is killed in between goes on from the one before, and the others are written again.
    """
    done, run.epoch = run.epoch, run.epoch + 1  # the files say which epoch comes next
    if run.opt.save_period > 0 and run.epoch % run.opt.save_period == 0:
        save(run, f"epoch{run.epoch}.pt")
    if best:
        checkpoint.save(run.folder / "weights" / "best.pt", run.ema.ema, **record(run))
    save(run, "last.pt")
    run.epoch = done


def record(run: Run) -> dict[str, Any]:
    """What every checkpoint tells about where it came from."""
    return {"opt": vars(run.opt), "folder": str(run.folder.resolve()), "data": run.opt.data, "imgsz": run.opt.imgsz, "hyp": run.opt.hyp,
            "epochs_done": run.epoch, "command": command_line(), "metrics": dict(run.results)}


def resumed_options(opt: Namespace) -> tuple[Namespace, dict[str, Any]]:
    """--resume: the options of the interrupted run, with the device, workers, --cache and --epochs of this command."""
    path = resume_file(opt)
    data = checkpoint.read(path)
    if not data.get("training"):
        raise UserError(f"{path}: holds weights only, nothing to resume; start from it with --weights {path}")
    before = Namespace(**{**vars(opt), **data["opt"]})  # a flag that is newer than the file has its default
    if before.script != opt.script:
        raise UserError(f"{path}: was made by {before.script}; resume it with: python {before.script} --resume {path}")
    before.device, before.workers, before.cache = opt.device, opt.workers, opt.cache or before.cache
    before.epochs, before.resume = opt.epochs or before.epochs, str(path)
    if data["training"]["epoch"] >= before.epochs:
        raise UserError(f"{path}: all {before.epochs} epochs are done; give more, as in --resume {path} --epochs {before.epochs * 2}")
    data["folder"] = str(path.resolve().parent.parent)
    return before, data


def restore(run: Run, data: dict[str, Any]) -> None:
    """Put a resumed checkpoint's training state back."""
    training = data["training"]
    run.epoch, run.batches_done = training["epoch"], training.get("batches_done", 0)
    run.mean = training.get("mean", run.mean)
    run.optimizer.load_state_dict(training["optimizer"])
    run.scaler.load_state_dict(training["scaler"])
    run.ema.ema.load_state_dict(data["ema"])
    run.ema.updates = training["updates"]
    run.stopper.best, run.stopper.best_epoch = training["stopper"]["best"], training["stopper"]["best_epoch"]
    run.class_map = np.array(training.get("class_map", [0.0]))
    torch.set_rng_state(training["rng"]["torch"])
    if training["rng"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(training["rng"]["cuda"])
