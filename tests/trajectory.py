"""A short sparsity training whose loss adds up over images, so that how images are grouped must not matter.

    python tests/trajectory.py OUT.pt BATCH_SIZE -- flags of train_sparsity.py

BatchNorms stay in eval mode. OUT.pt holds the state after each step of the main process. Works under torchrun.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_sparsity  # noqa: E402
from train import Hook, Run  # noqa: E402


class Additive(Hook):
    """Swaps the detection loss for a sum over images, holds BatchNorm still, and notes every step's prunable gammas."""

    def __init__(self, sparsity: train_sparsity.SparsityHook):
        self.sparsity, self.steps, self.increments = sparsity, [], []

    def start(self, run: Run) -> None:
        self.run = run
        for module in run.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
                module.train = lambda mode=True, module=module: module
        run.loss = lambda outputs, targets: (sum(y.float().square().sum() for y in outputs) / 1e5, torch.zeros(3))

    def before_step(self) -> None:
        self.before = [p.grad.clone() for p in self.sparsity.penalty.gammas]

    def after_step(self, skipped: bool) -> None:
        self.steps.append(torch.cat(self.sparsity.penalty.gammas).detach().clone())


class Increment(Hook):
    """Comes after the sparsity hook, and notes what that has added to the gradients."""

    def __init__(self, first: Additive):
        self.first = first

    def before_step(self) -> None:
        penalty = self.first.sparsity.penalty
        self.first.increments.append(torch.cat([p.grad - b for p, b in zip(penalty.gammas, self.first.before)]))


def go(argv: list[str], batch_size: int, convert: bool = False) -> tuple[Tensor, Tensor]:
    """(gammas, penalty's increments), each (steps, channels), of a run of train_sparsity.py with these flags."""
    import train as loop

    made: list[Additive] = []
    plain, plain_model = train_sparsity.train, loop.start_model

    def train(opt, hooks):  # the script's own way of starting, with two hooks more
        opt.hyp = {**opt.hyp, "warmup_epochs": 0.0}
        made.append(Additive(hooks[0]))
        return plain(opt, [made[0], hooks[0], Increment(made[0])])

    train_sparsity.train = train
    if convert:
        loop.start_model = lambda *a: nn.SyncBatchNorm.convert_sync_batchnorm(plain_model(*a))
    try:
        train_sparsity.main([*argv, "--batch-size", str(batch_size), "--noplots", "--noval", "--workers", "0", "--imgsz", "64"])
    finally:
        train_sparsity.train, loop.start_model = plain, plain_model
    return torch.stack(made[0].steps), torch.stack(made[0].increments)


if __name__ == "__main__":
    out, size, _, *flags = sys.argv[1:]
    result = go(flags, int(size))
    torch.save(result, f"{out}.{os.environ.get('RANK', 0)}")
