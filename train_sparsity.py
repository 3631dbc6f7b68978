"""Train so that channels can be told apart and cut: with an L1 penalty on the BatchNorm scales, or to a share of zeros.

    python train_sparsity.py --st --sr 0.0001                    # the penalty: you choose its strength
    python train_sparsity.py --target-sparsity 0.5               # half of the prunable channels end at exactly 0
    tensorboard --logdir runs/train                              # bn_weights/hist: watch the gammas go to zero

This is train.py with one hook. The next step is: python prune.py --percent 0.5
"""
from __future__ import annotations

import math
import os
from argparse import BooleanOptionalAction, Namespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from train import train
from utils.errors import UserError, run_cli
from utils.files import write_array
from utils.options import HelpfulParser, at_least, fraction, resolve, training_parser
from utils.plots.slimming import plot_gamma_history, plot_gammas
from utils.slimming.graph import batch_norms, matching
from utils.slimming.pruner import Pruner
from utils.slimming.ranking import MIN_SHARE, NOTHING_TO_CUT, Rules
from utils.slimming.sparsity import GammaL1, gamma_stats, l1_reach
from utils.slimming.surgery import masked
from utils.slimming.target_sparsity import TargetSparsity
from utils.training.run import Hook, Run
from val import evaluate

# AVX-512 kernels compute 16 channels at a time, AVX2 and GPUs 8; a multiple of 16 suits them all.
BLOCK_SIZES = (16, 8, 4, 2, 1)
NO_NORMS = ("sparsity: no BatchNorm is left to act on; give fewer --keep, --only or --freeze, "
            "or a model with BatchNorms")


class SparsityHook(Hook):
    """Sparsity on every prunable BatchNorm and on no other, and what TensorBoard and results.csv show of it.

    The channel graph tells which BatchNorms are prunable: not those whose channels a shortcut's addition couples to
    others, unless --shortcuts joint takes such channels as one.
    """

    def start(self, run: Run) -> None:
        self.run = run
        # What is shown is what is saved, the averaged weights: the pruner looks at them.
        try:
            self.pruner = Pruner(run.ema.ema, run.opt.imgsz)
        except ValueError as error:
            raise UserError(f"sparsity: {error}" if str(error) != NOTHING_TO_CUT else NO_NORMS) from None
        names = self.sparsified_norms()
        self.averaged = {name: self.pruner.norms[name] for name in names}
        self.norms = batch_norms(run.model, names)
        self.penalty = GammaL1(list(self.norms.values()), run.opt.sr, run.opt.epochs, run.opt.sr_bias)
        self.round_to = 1
        self.target = self.build_target() if run.opt.target_sparsity else None
        self.history: list[torch.Tensor] = []  # |gamma| of all channels, an entry an epoch
        if run.world.main:
            print(self.summary())
            if run.opt.sr:
                print(l1_note(run, self.penalty))

    def sparsified_norms(self) -> list[str]:
        """Names of the BatchNorms to act on, as --shortcuts, --only, --keep and --freeze leave them."""
        opt, graph = self.run.opt, self.pruner.graph
        every = set(graph.norms)
        try:
            keep = flag_matches("--keep", every, opt.keep)
            only = flag_matches("--only", every, opt.only) if opt.only else every
        except ValueError as error:
            raise UserError(f"{error}; prune.py's table shows the names") from None
        names = graph.prunable_norms(opt.shortcuts == "joint", self.frozen_norms() | keep | (every - only))
        if not names:
            raise UserError(NO_NORMS)
        return names

    def frozen_norms(self) -> set[str]:
        """The BatchNorms that --freeze froze."""
        norms = batch_norms(self.run.model, self.pruner.graph.norms)
        return {name for name, norm in norms.items() if not norm.weight.requires_grad}

    def build_target(self) -> TargetSparsity:
        """The rule of --target-sparsity, in blocks of --round-to.

        Without that flag they are of the largest size that leaves a choice of blocks.
        """
        opt, graph = self.run.opt, self.pruner.graph
        flops = self.pruner.costs.flops_per_channel()
        costs = [flops[name] for name in self.norms] if opt.per_flop else None
        groups = [graph.group[graph.norms[name]] for name in self.norms]
        # The average of a gamma that is 0 comes near 0 but never there, so it is set to 0 as well.
        norms, averaged = list(self.norms.values()), list(self.averaged.values())
        for size in self.block_sizes():
            target = TargetSparsity(norms, opt.target_sparsity, averaged, costs, groups, size)
            if opt.target_sparsity <= 0.9 * target.most:
                break
        self.round_to = size
        if opt.target_sparsity > target.most:
            most = math.floor(1000 * target.most) / 1000
            mend = f" in blocks of {size}; give less, or a smaller --round-to"
            raise UserError(f"--target-sparsity {opt.target_sparsity:g}: at most {most} of the channels can go"
                            + (mend if size > 1 else "; every layer keeps some; give less"))
        return target

    def block_sizes(self) -> tuple[int, ...]:
        """The sizes of blocks to try, in order. A resumed run goes on with its own."""
        if self.run.opt.round_to:
            return (self.run.opt.round_to,)
        if self.run.resumed:
            return (self.run.resumed.get("sparsity", {}).get("round_to", 1),)  # 1: the run is older than blocks
        return BLOCK_SIZES

    def summary(self) -> str:
        """What is sparsified and how, in a line."""
        opt = self.run.opt
        how = f"sr {opt.sr:g}"
        if self.target:
            how = f"target {opt.target_sparsity:.0%}" + (f" in blocks of {self.round_to}" if self.round_to > 1 else "")
        others = []
        if opt.shortcuts == "skip":
            others.append("tied by shortcuts")
        if opt.keep or opt.only:
            others.append("left out by --keep or --only")
        if self.frozen_norms():
            others.append("frozen")
        total = sum(isinstance(module, _BatchNorm) for module in self.run.model.modules())
        channels = sum(len(norm.weight) for norm in self.norms.values())
        text = f"sparsity: {how}, on {len(self.norms)} of {total} BatchNorms, {channels} channels"
        text += f"; the others are {' or '.join(others)}" if others else ""
        if self.target:
            text += (f"\nsparsity: the zeros are final after {self.target.LAST:.0%} of the run; best.pt is one of the "
                     "epochs from there on, and --patience counts from there")
        return text

    def before_step(self) -> None:
        if self.target:
            self.target.observe()  # the loss's gradients, without the penalty's
        self.penalty.add_to_gradients(self.run.epoch, self.run.batch_fraction)

    def after_step(self, skipped: bool) -> None:
        if self.target and not skipped:
            self.target.shrink(self.run.progress)

    def epoch_end(self, log: dict[str, float]) -> None:
        opt = self.run.opt
        gammas: list[torch.Tensor] = [norm.weight for norm in self.averaged.values()]
        self.history.append(torch.cat(gammas).detach().abs().half().cpu())
        stats = gamma_stats(gammas)
        rules = Rules(min_share=MIN_SHARE, round_to=self.round_to, coupled=opt.shortcuts == "joint",
                      keep=tuple(opt.keep))
        ranking = self.pruner.rank(rules=rules).ranking
        limit = self.pruner.safe_threshold(ranking.prunable).percent
        log["sparsity/sr"] = self.penalty.coefficient(self.run.epoch)
        log.update({f"sparsity/{key}": value for key, value in stats.items()})
        log["sparsity/limit"] = limit
        if self.run.world.main:
            shares = ", ".join(f"{key.replace('_', ' ')}: {value:.1%}" for key, value in stats.items())
            print(f"{'':>11}gammas {shares}; limit: {limit:.1%}", flush=True)
        log.update(self.preview_cut())
        self.add_histograms()

    def preview_cut(self) -> dict[str, float]:
        """What prune.py --percent would make of the model as it is now: size and, now and then, mAP."""
        run, opt = self.run, self.run.opt
        masks, parameters, flops = self.pruner.preview(opt.percent)
        log = {"sparsity/parameters_left": float(parameters), "sparsity/gflops_left": flops / 1e9}
        text = f"--percent {opt.percent:g} would leave {parameters:,} parameters, {flops / 1e9:.3f} GFLOPs"
        if opt.masked_val and (run.epoch + 1) % opt.masked_val == 0:
            candidate = masked(run.ema.ema, masks)
            ap = evaluate(candidate, run.val_loader, run.world.device, processes=run.world.size).ap
            log.update({"sparsity/masked_mAP_0.5": ap.map50, "sparsity/masked_mAP_0.5:0.95": ap.map})
            text += f", mAP50 {ap.map50:.3f}, mAP50-95 {ap.map:.3f}"
        if run.world.main:
            print(f"{'':>11}{text}", flush=True)
        return log

    def add_histograms(self) -> None:
        """|gamma| and |beta| of all channels, and |gamma| of every layer, for TensorBoard."""
        if self.run.log is None:
            return
        tb, epoch = self.run.log.tb, self.run.epoch
        gammas = {name: norm.weight.detach().abs() for name, norm in self.averaged.items()}
        betas = [norm.bias.detach().abs() for norm in self.averaged.values()]
        tb.add_histogram("bn_weights/hist", torch.cat(list(gammas.values())), epoch)
        tb.add_histogram("bn_bias/hist", torch.cat(betas), epoch)
        for name, values in gammas.items():
            tb.add_histogram(f"bn_layers/{name}", values, epoch)

    def end(self) -> None:
        run, history = self.run, torch.stack(self.history).float().numpy()
        write_array(run.folder / "gammas.npy", history)  # (epochs, channels), for pictures of your own
        if run.opt.noplots:
            return
        picture = plot_gamma_history({run.folder.name: list(history)}, run.folder / "gamma_history.png")
        if run.log is not None:
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            run.log.tb.add_image("bn_weights/over_epochs", pixels, run.epoch, dataformats="HWC")
        plot_gammas(history[-1], run.folder / "gammas.png", title="BatchNorm scales after the last epoch")

    def may_be_best(self) -> bool:
        """With --target-sparsity: once the zeros are final. Epochs before have more channels than the run ends with."""
        return self.target is None or self.target.settled

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "target": self.target.state_dict() if self.target else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = list(state["history"])
        if self.target:
            self.target.load_state_dict(state["target"])

    def record(self) -> dict[str, Any]:
        """For prune.py: a cut follows the sparsity training's blocks and shortcuts."""
        return {"sparsity": {"round_to": self.round_to, "shortcuts": self.run.opt.shortcuts}}


def flag_matches(flag: str, names: set[str], patterns: list[str]) -> set[str]:
    """The names that a flag's patterns fit. ValueError, with the flag's name, for a pattern that none fits."""
    try:
        return matching(names, patterns)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def l1_note(run: Run, penalty: GammaL1) -> str:
    """What --sr can do in this run, in a sentence, before the first step."""
    hyp, schedule = run.opt.hyp, run.schedule
    batches = len(run.loader)
    every = schedule.accumulate(schedule.warmup)
    # One entry per step: its rate is that of its first batch, its penalty the share of a nominal batch that it sees.
    epochs = [i // batches for i in range(0, run.opt.epochs * batches, every)]
    batch_fraction = every * run.opt.batch_size / run.opt.nbs
    rates = [hyp["lr0"] * schedule.factor(epoch) for epoch in epochs]
    coefficients = [penalty.coefficient(epoch) * batch_fraction for epoch in epochs]
    adam = run.opt.optimizer != "SGD"
    reach = l1_reach(rates, coefficients, None if adam else hyp["momentum"])
    text = (f"sparsity: in {len(epochs)} steps this sr moves a gamma that nothing holds by "
            f"{'at most ' if adam else ''}{reach:.2g} (at the start they are near 1)")
    if adam:  # it divides each gradient by its usual size: the penalty drowns where that is larger
        text += ", and one whose own gradients are larger than sr hardly at all"
    if adam or reach < 0.5:
        text += (". If they stay away from 0: more epochs, SGD with a larger --sr, "
                 "or --target-sparsity 0.5, which needs no strength")
    return text


def check(opt: Namespace) -> Namespace:
    """Refuse flags that contradict each other; --sparsity says which mode they belong to, or follows from them."""
    if opt.sparsity == "target" and opt.target_sparsity is None:
        opt.target_sparsity = 0.5
    if opt.sparsity == "l1" and opt.target_sparsity is not None:
        raise UserError("--sparsity l1 knows no --target-sparsity; leave one of the two out")
    if opt.round_to and not opt.target_sparsity:
        raise UserError(f"--round-to {opt.round_to}: needs --target-sparsity (without it give --round-to to prune.py)")
    if opt.sr is None:
        opt.sr = 0.0 if opt.target_sparsity else 0.0001
    if opt.percent is None:
        opt.percent = opt.target_sparsity or 0.5
    if not opt.st:
        opt.sr, opt.sr_bias, opt.target_sparsity = 0.0, 0.0, None
    return opt


def add_sparsity_flags(parser: HelpfulParser) -> None:
    """The flags that train.py does not have."""
    add = parser.add_argument
    half = "0.5 takes half of the prunable channels to 0"
    add("--st", action=BooleanOptionalAction, default=True, help="sparsity training; --no-st trains without it")
    add("--sparsity", choices=["l1", "target"],
        help="l1: the penalty of --sr (default); target: --target-sparsity, 0.5 where that is not given")
    add("--sr", type=at_least(0, float),
        help="strength of the L1 penalty on the BN scales (0.0001; 0 with --target-sparsity)")
    add("--sr-bias", type=float, help="strength of the L1 penalty on the BN shifts (10 * sr)")
    add("--target-sparsity", type=fraction(zero=False, one=False, hint=half),
        help="share of the prunable channels that are exactly 0 in the end, 0..1 "
             "(as many as fill up blocks of --round-to)")
    add("--per-flop", action=BooleanOptionalAction, default=True,
        help="with --target-sparsity: rank channels by importance per FLOP, which makes the slim model faster; "
             "--no-per-flop: by importance")
    add("--round-to", type=at_least(1), metavar="N",
        help="with --target-sparsity: channels go in blocks, so that what is left of a layer is a multiple of N, as "
             "fast kernels want it; 1: one by one (16, or less where layers are too narrow for a choice)")
    add("--shortcuts", choices=["skip", "joint"], default="skip",
        help="channels that shortcuts tie together are left alone (skip), or taken as one (joint)")
    add("--keep", nargs="+", default=[], metavar="PATTERN", help="BatchNorms to leave alone, such as 'model.0.*'")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="act on no BatchNorms but these")
    add("--percent", type=fraction(one=False),
        help="the prune.py --percent that every epoch's preview is for (0.5, or --target-sparsity)")
    add("--masked-val", type=int, default=0, metavar="N",
        help="every N epochs also validate the model without those channels (0: never)")


def main(argv: list[str] | None = None) -> Run:
    """Command line -> sparsity training."""
    parser = training_parser(__doc__)
    add_sparsity_flags(parser)
    opt = parser.parse_args(argv)
    opt.script = os.path.basename(__file__)
    return train(opt if opt.resume else resolve(check(opt)), [SparsityHook()])


if __name__ == "__main__":
    run_cli(main)
