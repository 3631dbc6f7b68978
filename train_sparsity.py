"""Train with an L1 penalty on the BatchNorm scales, so that channels can be told apart and cut.

    python train_sparsity.py --st --sr 0.0001
    tensorboard --logdir runs/train                              # bn_weights/hist: watch the gammas go to zero

This is train.py with one hook. The next step is: python prune.py --percent 0.5
"""
from __future__ import annotations

import os
from argparse import BooleanOptionalAction

import torch

from train import Hook, Run, train
from utils.errors import UserError, run_cli
from utils.options import resolve, training_parser
from utils.slimming.graph import trace
from utils.slimming.sparsity import GammaL1, gauge


class SparsityHook(Hook):
    """L1 on every prunable BatchNorm and on no other, and what TensorBoard and results.csv show of it.

    The channel graph tells which are prunable: not those whose channels a shortcut's addition ties to others.
    """

    def __init__(self, sr: float, sr_bias: float | None = None):
        self.sr, self.sr_bias = sr, sr_bias

    def start(self, run: Run) -> None:
        self.run = run
        names = trace(run.model).prunable_norms()
        modules, averaged = dict(run.model.named_modules()), dict(run.ema.ema.named_modules())
        self.penalty = GammaL1([modules[n] for n in names], self.sr, run.opt.epochs, self.sr_bias)
        self.norms = {n: averaged[n] for n in names}  # what is shown is what is saved: the averaged weights
        if run.world.main:
            every = sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in modules.values())
            channels = sum(len(m.weight) for m in self.norms.values())  # type: ignore[arg-type]
            print(f"sparsity: sr {self.sr:g} on {len(names)} of {every} BatchNorms, {channels} channels; the others are tied by shortcuts")

    def before_step(self) -> None:
        self.penalty.add_to_gradients(self.run.epoch, self.run.step_share)

    def epoch_end(self, log: dict[str, float]) -> None:
        gammas = [m.weight for m in self.norms.values()]
        log["sparsity/sr"] = self.penalty.coefficient(self.run.epoch)
        shares = gauge(gammas)  # type: ignore[arg-type]
        log.update({f"sparsity/{k}": v for k, v in shares.items()})
        if self.run.log is None:
            return
        print(f"{'':>11}gammas " + ", ".join(f"{k.replace('_', ' ')}: {v:.1%}" for k, v in shares.items()), flush=True)
        tb, epoch = self.run.log.tb, self.run.epoch
        tb.add_histogram("bn_weights/hist", torch.cat([g.detach().abs() for g in gammas]), epoch)  # type: ignore[operator, union-attr]
        tb.add_histogram("bn_bias/hist", torch.cat([m.bias.detach().abs() for m in self.norms.values()]), epoch)  # type: ignore[operator, union-attr]
        for name, module in self.norms.items():
            tb.add_histogram(f"bn_layers/{name}", module.weight.detach().abs(), epoch)  # type: ignore[operator, union-attr]


def main(argv: list[str] | None = None) -> Run:
    """Command line -> sparsity training."""
    parser = training_parser(__doc__)
    parser.add_argument("--st", action=BooleanOptionalAction, default=True, help="sparsity training; --no-st trains without the penalty")
    parser.add_argument("--sr", type=float, default=0.0001, help="strength of the L1 penalty on the BN scales")
    parser.add_argument("--sr-bias", type=float, help="strength of the L1 penalty on the BN shifts (10 * sr)")
    opt = parser.parse_args(argv)
    opt.script = os.path.basename(__file__)
    if opt.sr < 0:
        raise UserError(f"--sr {opt.sr}: must not be negative")
    if opt.resume:
        from models import checkpoint
        from utils.options import resume_file

        earlier = checkpoint.read(resume_file(opt))["opt"]
        opt.st, opt.sr, opt.sr_bias = (earlier.get(k, getattr(opt, k)) for k in ("st", "sr", "sr_bias"))
    else:
        opt = resolve(opt)
    return train(opt, [SparsityHook(opt.sr if opt.st else 0.0, opt.sr_bias if opt.st else 0.0)])


if __name__ == "__main__":
    run_cli(main)
