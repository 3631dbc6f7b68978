"""A short training whose loss adds up over images, so that how images are grouped must not matter.

    python tests/trajectory.py OUT.pt BATCH_SIZE SCRIPT flags of the script

BatchNorms stay in eval mode. OUT.pt holds the state after each step of the main process. Works under torchrun.
"""
from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.gradual import GradualCut
from training.run import Hook, Run  # noqa: E402


class Additive(Hook):
    """Swaps the detection loss for a sum over images, holds BatchNorm still, and notes every step's gammas.

    Under sparsity training the prunable ones only.
    """

    def __init__(self, sparsity: Any):
        self.sparsity = None if isinstance(sparsity, GradualCut) else sparsity
        self.steps, self.increments = [], []

    def start(self, run: Run) -> None:
        norms = [m for m in run.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.run, self.all = run, [norm.weight for norm in norms]
        for norm in norms:
            norm.eval()
            norm.train = lambda mode=True, norm=norm: norm
        # Small enough for the sparsity to show; without any, large enough to move gammas.
        scale = 1e-5 if self.sparsity else 1e-3
        run.loss = lambda outputs, targets: (sum(y.float().square().sum() for y in outputs) * scale, torch.zeros(3))
        # Of what a teacher says, objectness adds up over images.
        run.loss.balance, run.loss.hyp = (1.0, 1.0, 1.0), {"box": 0.0, "obj": 1000 * scale, "cls": 0.0}

    @property
    def gammas(self) -> list[Tensor]:
        return self.sparsity.plan.penalty.gammas if self.sparsity else self.all

    def before_step(self) -> None:
        self.before = [p.grad.clone() for p in self.gammas]

    def after_step(self, skipped: bool) -> None:
        self.steps.append(torch.cat(self.gammas).detach().clone())


class Increment(Hook):
    """Comes after the sparsity hook, and notes what that has added to the gradients."""

    def __init__(self, first: Additive):
        self.first = first

    def before_step(self) -> None:
        self.first.increments.append(torch.cat([p.grad - b for p, b in zip(self.first.gammas, self.first.before)]))


def go(argv: list[str], batch_size: int, convert: bool = False,
       script: str = "train_sparsity") -> tuple[Tensor, Tensor]:
    """(gammas, penalty's increments), each (steps, channels), of a run of a training script with these flags."""
    import train as loop

    module, made = importlib.import_module(script), []
    plain, plain_model = module.train, loop.start_model

    def train(opt: Any, hooks: Any = ()) -> Any:  # the script's own way of starting, with two hooks more
        opt.hyp = {**opt.hyp, "warmup_epochs": 0.0}
        made.append(Additive(hooks[0] if hooks else None))
        return plain(opt, [made[0], *hooks, Increment(made[0])])

    module.train = train
    if convert:
        loop.start_model = lambda *a: nn.SyncBatchNorm.convert_sync_batchnorm(plain_model(*a))
    try:
        module.main([*argv, "--batch-size", str(batch_size), "--noplots", "--noval", "--workers", "0", "--imgsz", "64"])
    finally:
        module.train, loop.start_model = plain, plain_model
    steps, increments = (pad_sequence(values, batch_first=True) for values in (made[0].steps, made[0].increments))
    return steps, increments  # a model that shrinks ends with fewer gammas: zeros fill up


if __name__ == "__main__":
    out, size, script, *flags = sys.argv[1:]
    result = go(flags, int(size), script=script)
    torch.save(result, f"{out}.{os.environ.get('RANK', 0)}")
