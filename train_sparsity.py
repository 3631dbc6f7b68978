"""Train so that channels can be told apart and cut: with an L1 penalty on the BatchNorm scales, or to a share of zeros.

    python train_sparsity.py --st --sr 0.0001                    # the penalty: you choose its strength
    python train_sparsity.py --target-sparsity 0.5               # half of the prunable channels end at exactly 0
    python train_sparsity.py --target flops=0.5 --shrink         # as many as half of the FLOPs take, cut in the run
    tensorboard --logdir runs/train                              # bn_weights/hist: watch the gammas go to zero

This is train.py with one hook. The next step is: python prune.py --percent 0.5
"""
from __future__ import annotations

import os
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from models.formats import runtimes
from models.yolo import Model
from train import say_next, train
from training.loggers import Cell
from training.narrow import RemainingChannels, narrow
from training.run import Hook, Run
from training.sparsity_plan import SparsityPlan, frozen_norms, shared_stopwatch
from training.sparsity_report import SparsityReport
from training.start import start_options
from utils.errors import UserError, run_cli
from utils.options import training_parser
from utils.parser import Argv, HelpfulParser, as_latency, at_least, fraction, from_python, named_fraction
from utils.slimming.cost import profile
from utils.slimming.surgery import slim
from val import evaluate

# Of TARGETS: those that are known without a validation.
TARGET_NAMES = ("flops", "params", "latency", "speedup")
ENOUGH_NEW_ZEROS = 0.1  # share of the channels: --shrink cuts when so many more are 0; a cut takes a second or two


class SparsityHook(Hook):
    """A SparsityPlan in the training loop: it observes, shrinks and cuts. SparsityReport shows what comes of it."""

    settled = False  # --shrink has cut the last channel: none is left for the target to look at

    def start(self, run: Run) -> None:
        self.run, earlier = run, run.resumed.get("shrunk", {})
        self.difference = earlier.get("difference") or 0.0  # largest relative one that a cut has made
        self.remaining = RemainingChannels(earlier.get("before", run.model.masks), run.model)
        wide = deepcopy(run.model)
        if self.remaining.fewer:  # a model of the shape that the interrupted run started with
            wide = slim(Model(run.model.yaml), self.remaining.before).to(run.world.device)
        self.plan = SparsityPlan(run.opt, run.imgsz, wide, frozen_norms(run.model),
                                 run.resumed.get("sparsity", {}).get("round_to", 0),
                                 shared_stopwatch(run.opt, run.imgsz, run.world))
        self.narrowed()
        self.report = SparsityReport(run, self.plan, self.remaining, lambda model: evaluate(
            model, run.val_loader, run.world.device, processes=run.world.size).ap)
        self.report.describe()

    def narrowed(self) -> None:
        self.remaining.update(self.run.model)
        self.plan.attach(self.run.model, self.run.ema.ema, self.remaining)

    def columns(self) -> dict[str, Cell]:
        return self.report.columns()

    def before_step(self) -> None:
        if self.plan.target and not self.settled:
            self.plan.target.observe()  # the loss's gradients, without the penalty's
        self.plan.penalty.add_to_gradients(self.run.epoch, self.run.batch_fraction)

    def after_step(self, skipped: bool) -> None:
        target, progress = self.plan.target, self.run.progress
        if target is None or skipped or self.settled:
            return
        if self.run.opt.target and target.due(progress):
            self.plan.aim(target)
        target.shrink(progress)

    def epoch_end(self, log: dict[str, float]) -> None:
        plan = self.plan
        plan.update_pruner(self.run.ema.ema, self.remaining)
        self.report.epoch_end(log)
        if self.run.opt.target and plan.target and not plan.target.settled:
            plan.aim(plan.target, measurements=1)
        self.shrink()

    def shrink(self) -> None:
        """--shrink: cut the channels that are 0 for good, once the zeros are final or there are enough new ones."""
        plan, target = self.plan, self.plan.target
        if not self.run.opt.shrink or target is None or self.settled:
            return
        new = self.remaining.to_present(plan.pruner.graph.masks(plan.kept_without(target.gone)))
        channels = sum(int((~new[name]).sum()) for name in plan.norms)
        if not target.settled and channels < ENOUGH_NEW_ZEROS * target.total:
            return
        self.settled = target.settled
        if not channels:
            return
        zeroed = self.run.ema.ema
        narrow(self.run, new)
        try:
            self.difference = max(self.difference, plan.pruner.check_equivalence(zeroed, self.run.ema.ema))
        except ValueError as error:
            raise UserError(f"--shrink: {error}; last.pt is whole, as of the epoch before") from None
        if self.run.world.main:
            cost = profile(self.run.model, self.run.imgsz)
            print(f"{'':>11}slim from here on: {cost.parameters:,} parameters, {cost.gflops:.2f} GFLOPs; "
                  f"equivalence check: largest relative difference {self.difference:.1e}", flush=True)

    def end(self) -> None:
        self.report.end()

    def may_be_best(self) -> bool:
        """With --target-sparsity: once the zeros are final. Epochs before have more channels than the run ends with."""
        return self.plan.target is None or self.plan.target.settled

    def state_dict(self) -> dict[str, Any]:
        target = self.plan.target.state_dict() if self.plan.target else None
        return {"history": self.report.history, "target": target, "flops": self.plan.flops, "done": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.report.history, self.settled = list(state["history"]), state["done"]
        channels = sum(len(norm.weight) for norm in self.plan.shown.values())
        if any(len(gammas) != channels for gammas in self.report.history):
            raise ValueError(f"the sparsity training's history is not of {channels} channels")
        self.plan.flops = state.get("flops", self.plan.flops)
        if self.plan.target:
            self.plan.target.load_state_dict(state["target"])

    def record(self) -> dict[str, Any]:
        """For prune.py: a cut follows the sparsity training's blocks and shortcuts. For a resumed run: what is cut."""
        entries: dict[str, Any] = {"sparsity": {"round_to": self.plan.round_to, "shortcuts": self.run.opt.shortcuts,
                                                "layers": self.run.opt.layers}}
        if self.remaining.fewer:
            entries["shrunk"] = {"before": self.remaining.before, "done": self.settled, "difference": self.difference}
        return entries


def settle(opt: Namespace) -> Namespace:
    """Fill in what follows from the flags that were given: the strength, the target and the percent of the preview."""
    if opt.sparsity == "target" and not (opt.target or opt.target_sparsity):
        opt.target_sparsity = 0.5
    opt.target = as_latency(opt.target)
    aimed = opt.target or opt.target_sparsity
    if opt.sr is None:
        opt.sr = 0.0 if aimed or not opt.st else 0.0001
    if opt.percent is None and not opt.target:
        opt.percent = opt.target_sparsity or 0.5
    return opt


def add_sparsity_flags(parser: HelpfulParser) -> None:
    """The flags of train_sparsity.py that train.py does not have."""
    add = parser.add_argument
    half = "0.5 takes half of the prunable channels to 0"
    add("--st", action=BooleanOptionalAction, default=True, help="sparsity training; --no-st trains without it")
    add("--sparsity", choices=["l1", "target"],
        help="l1: the penalty of --sr (default); target: --target-sparsity, 0.5 where that is not given")
    add("--sr", type=at_least(0, float),
        help="strength of the L1 penalty on the BN scales (0.0001; 0 with --target-sparsity)")
    add("--sr-bias", type=at_least(0, float), help="strength of the L1 penalty on the BN shifts (10 * sr)")
    add("--target-sparsity", type=fraction(zero=False, one=False, hint=half),
        help="share of the prunable channels that are exactly 0 in the end, 0..1 "
             "(as many as fill up blocks of --round-to)")
    add("--target", type=named_fraction(TARGET_NAMES, "flops=0.5, params=0.5, latency=0.6 or speedup=1.5"),
        help="instead of a share of channels: as many as leave this share of the FLOPs, of the parameters, or of the "
             "milliseconds of an image; speedup=2 is latency=0.5")
    add("--runtime", choices=["torch", *runtimes()], default="torch", help="what milliseconds are measured in")
    add("--int8", action="store_true", help="... in 8 bits, where the runtime has it")
    add("--shrink", action="store_true",
        help="with --target-sparsity or --target: cut the zeros in the run, which goes on, faster, with the slim model")
    add("--per-flop", action=BooleanOptionalAction, default=True,
        help="with --target-sparsity: rank channels by importance per FLOP, which makes the slim model faster; "
             "--no-per-flop: by importance")
    add("--round-to", type=at_least(1), metavar="N",
        help="with --target-sparsity: channels go in blocks, so that what is left of a layer is a multiple of N, as "
             "fast kernels want it; 1: one by one (16, or less where layers are too narrow for a choice)")
    add("--shortcuts", choices=["skip", "joint"], default="skip",
        help="channels that shortcuts couple are left alone (skip), or taken as one (joint)")
    add("--layers", action=BooleanOptionalAction, default=False,
        help="with --target-sparsity: whole branches around which a shortcut leads go, too, ranked beside the blocks "
             "of channels")
    add("--keep", nargs="+", default=[], metavar="PATTERN", help="BatchNorms to leave alone, such as 'model.0.*'")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="act on no BatchNorms but these")
    add("--percent", type=fraction(one=False),
        help="the prune.py --percent that every epoch's preview is for (0.5, or --target-sparsity)")
    add("--masked-val", type=at_least(0), default=0, metavar="N",
        help="every N epochs also validate the model without those channels (0: never)")
    parser.needs(["--teacher-weight"], "--teacher")
    targets = ["--target-sparsity", "--target"]
    parser.apart("--no-st", [*targets, "--sparsity", "--sr", "--sr-bias", "--shrink", "--round-to", "--layers"],
                 "trains without sparsity, {} asks for some")
    parser.apart("--sparsity l1", [*targets, "--shrink", "--round-to", "--layers"], "knows no {}")
    parser.apart("--target", ["--target-sparsity"], "{} says it in another way")
    parser.needs(["--runtime", "--int8"], "--target latency", "--target speedup")
    parser.apart("--layers", ["--shortcuts joint"], "takes branches as a whole, {} their channels with others'")
    parser.needs(["--shrink", "--round-to", "--layers", "--per-flop", "--no-per-flop"], *targets, "--sparsity target")


def parse(argv: Argv = None) -> Namespace:
    """Command line -> options; those of a run that does not go on are resolved."""
    parser = training_parser(__doc__)
    add_sparsity_flags(parser)
    opt = parser.parse_args(argv)
    opt.script = os.path.basename(__file__)
    return opt if opt.resume else start_options(settle(opt))


def main(argv: Argv = None, hooks: Sequence[Hook] = ()) -> Run:
    """Command line, and further hooks -> sparsity training."""
    opt = parse(argv)
    run = train(opt, [SparsityHook(), *hooks])
    if argv is None:
        if run.opt.shrink:
            say_next(run, "export.py", "--include onnx")
        else:
            say_next(run, "prune.py", f"--percent {run.opt.percent or 0.5:g}", "last.pt")
    return run


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
