"""Train so that channels can be told apart and cut: with an L1 penalty on the BatchNorm scales, or to a share of zeros.

    python train_sparsity.py --st --sr 0.0001                    # the penalty: you choose its strength
    python train_sparsity.py --target-sparsity 0.5               # half of the prunable channels end at exactly 0
    python train_sparsity.py --target flops=0.5 --shrink         # as many as half of the FLOPs take, cut in the run
    tensorboard --logdir runs/train                              # bn_weights/hist: watch the gammas go to zero

This is train.py with one hook. The next step is: python prune.py --percent 0.5
"""
from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from models.yolo import Model
from train import train
from utils.errors import UserError, run_cli
from utils.files import write_array
from utils.options import add_sparsity_flags, training_parser
from utils.plots.slimming import plot_gamma_history, plot_gammas
from utils.slimming.cost import profile
from utils.slimming.graph import Masks, batch_norms
from utils.slimming.ranking import MIN_SHARE, Rules
from utils.slimming.sparsity import GammaL1, gamma_stats, l1_reach
from utils.slimming.surgery import last_masks, masked, slim
from utils.training.narrow import narrow
from utils.training.run import Hook, Run
from utils.training.sparsity import SparsityPlan, frozen_norms
from utils.training.start import start_options
from val import evaluate

ENOUGH = 0.1  # of the channels: --shrink cuts when so many more are 0 for good; each cut takes a second or two


class SparsityHook(Hook):
    """A SparsityPlan in the training loop, and what TensorBoard and results.csv show of it."""

    done = False  # --shrink has cut the last channel: none is left for the target to look at

    def start(self, run: Run) -> None:
        self.run = run
        shrunk = run.resumed.get("shrunk")
        self.before: Masks = shrunk["before"] if shrunk else dict(run.model.masks)  # as the run starts
        self.kept: Masks = {}  # over the channels that it starts with: what --shrink has left; empty before it cuts
        self.difference = (shrunk or {}).get("difference") or 0.0  # largest relative one that a cut has made
        if shrunk:
            # What is shown is over the channels of the start: the model as it was, with zeros where channels were.
            wide = slim(Model(run.model.yaml), self.before).to(run.world.device)
            self.plan = SparsityPlan(run.opt, wide, wide, run.resumed, frozen_norms(run.model))
            self.narrowed()
        else:
            # What is shown is what is saved, the averaged weights: the pruner looks at them.
            self.plan = SparsityPlan(run.opt, run.model, run.ema.ema, run.resumed, frozen_norms(run.model))
        self.history: list[torch.Tensor] = []  # |gamma| of all channels, an entry an epoch
        if run.world.main:
            print(self.summary())
            if run.opt.sr:
                print(l1_note(run, self.plan.penalty))

    def summary(self) -> str:
        """What is sparsified and how, in a line."""
        opt, plan = self.run.opt, self.plan
        how = f"sr {opt.sr:g}"
        if plan.target:
            how = "target " + (f"{opt.target_sparsity:.0%}" if opt.target_sparsity else "{}={:g}".format(*opt.target))
            how += f" in blocks of {plan.round_to}" if plan.round_to > 1 else ""
        others = []
        if opt.shortcuts == "skip":
            others.append("coupled by shortcuts")
        if opt.keep or opt.only:
            others.append("left out by --keep or --only")
        if plan.frozen:
            others.append("frozen")
        total = sum(isinstance(module, _BatchNorm) for module in self.run.model.modules())
        channels = sum(len(plan.pruner.norms[name].weight) for name in plan.norms)
        text = f"sparsity: {how}, on {len(plan.norms)} of {total} BatchNorms, {channels} channels"
        text += f"; the others are {' or '.join(others)}" if others else ""
        if plan.target:
            text += (f"\nsparsity: the zeros are final after {plan.target.LAST:.0%} of the run; best.pt is one of the "
                     "epochs from there on, and --patience counts from there")
        return text

    def before_step(self) -> None:
        if self.plan.target and not self.done:
            self.plan.target.observe()  # the loss's gradients, without the penalty's
        self.plan.penalty.add_to_gradients(self.run.epoch, self.run.batch_fraction)

    def after_step(self, skipped: bool) -> None:
        target, progress = self.plan.target, self.run.progress
        if target is None or skipped or self.done:
            return
        if self.run.opt.target and target.due(progress):
            target.aim(self.plan.reached)
        target.shrink(progress)

    def shrink(self) -> None:
        """--shrink: cut the channels that are 0 for good, once the zeros are final or there are enough new ones."""
        plan, target = self.plan, self.plan.target
        if not self.run.opt.shrink or target is None or self.done:
            return
        new = last_masks(self.kept, plan.pruner.graph.masks(plan.kept_without(target.gone)))
        channels = sum(int((~new[name]).sum()) for name in plan.norms)
        if not target.settled and channels < ENOUGH * target.total:
            return
        self.done = target.settled
        if not channels:
            return
        zeroed = self.run.ema.ema
        narrow(self.run, new)
        try:
            self.difference = max(self.difference, plan.pruner.check(zeroed, self.run.ema.ema))
        except ValueError as error:
            raise UserError(f"--shrink: {error}; last.pt is whole, as of the epoch before") from None
        if self.run.world.main:
            cost = profile(self.run.model, self.run.opt.imgsz)
            print(f"{'':>11}slim from here on: {cost.parameters:,} parameters, {cost.gflops:.2f} GFLOPs; "
                  f"equivalence check: largest relative difference {self.difference:.1e}", flush=True)

    def narrowed(self) -> None:
        self.plan.pruner.model.cpu()  # nobody else holds it any more
        self.kept = last_masks(self.before, self.run.model.masks)
        self.plan.follow(self.run.model, self.run.ema.ema, self.kept)

    @torch.no_grad()
    def look(self) -> None:
        """Where channels were cut: bring the averaged scales and shifts into the model that the pruner looks at."""
        for name, norm in batch_norms(self.run.ema.ema, self.kept).items():
            wide = self.plan.pruner.norms[name]
            for mine, theirs in ((wide.weight, norm.weight), (wide.bias, norm.bias)):
                mine.zero_()
                mine[self.kept[name]] = theirs.cpu()

    def epoch_end(self, log: dict[str, float]) -> None:
        opt, plan = self.run.opt, self.plan
        self.look()
        gammas: list[torch.Tensor] = [norm.weight for norm in plan.averaged.values()]
        self.history.append(torch.cat(gammas).detach().abs().half().cpu())
        stats = gamma_stats(gammas)
        rules = Rules(min_share=MIN_SHARE, round_to=plan.round_to, coupled=opt.shortcuts == "joint",
                      keep=tuple(opt.keep))
        ranking = plan.pruner.rank(rules=rules).ranking
        limit = plan.pruner.safe_threshold(ranking.prunable).percent
        log["sparsity/sr"] = plan.penalty.coefficient(self.run.epoch)
        log.update({f"sparsity/{key}": value for key, value in stats.items()})
        log["sparsity/limit"] = limit
        if self.run.world.main:
            shares = ", ".join(f"{key.replace('_', ' ')}: {value:.1%}" for key, value in stats.items())
            print(f"{'':>11}gammas {shares}; threshold rule: {limit:.1%}", flush=True)
        log.update(self.preview_cut())
        self.add_histograms()
        if opt.target and plan.target and not plan.target.settled:
            plan.target.aim(plan.reached)
        self.shrink()

    def preview_cut(self) -> dict[str, float]:
        """What prune.py --percent would make of the model as it is now: size and, now and then, mAP."""
        run, opt, pruner, target = self.run, self.run.opt, self.plan.pruner, self.plan.target
        percent = opt.percent
        if percent is None:  # what --target takes as the channels rank now
            percent = target.share * target.total / pruner.ranking.total if target else 0.0
        masks, parameters, flops = pruner.preview(percent)
        log = {"sparsity/parameters_left": float(parameters), "sparsity/gflops_left": flops / 1e9}
        text = f"--percent {percent:.3g} would leave {parameters:,} parameters, {flops / 1e9:.3f} GFLOPs"
        if opt.masked_val and (run.epoch + 1) % opt.masked_val == 0:
            candidate = masked(run.ema.ema, last_masks(self.kept, masks))
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
        gammas = {name: norm.weight.detach().abs() for name, norm in self.plan.averaged.items()}
        betas = [norm.bias.detach().abs() for norm in self.plan.averaged.values()]
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
        return self.plan.target is None or self.plan.target.settled

    def state_dict(self) -> dict[str, Any]:
        target = self.plan.target.state_dict() if self.plan.target else None
        return {"history": self.history, "target": target, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.done = list(state["history"]), state.get("done", False)
        channels = sum(len(norm.weight) for norm in self.plan.averaged.values())
        if any(len(gammas) != channels for gammas in self.history):
            raise ValueError(f"the sparsity training's history is not of {channels} channels")
        if self.plan.target:
            self.plan.target.load_state_dict(state["target"])

    def record(self) -> dict[str, Any]:
        """For prune.py: a cut follows the sparsity training's blocks and shortcuts. For a resumed run: what is cut."""
        known: dict[str, Any] = {"sparsity": {"round_to": self.plan.round_to, "shortcuts": self.run.opt.shortcuts}}
        if self.kept:
            known["shrunk"] = {"before": self.before, "done": self.done, "difference": self.difference}
        return known


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
    if opt.sparsity == "l1" and opt.target_sparsity is not None:
        raise UserError("--sparsity l1 knows no --target-sparsity; leave one of the two out")
    if opt.target and (opt.sparsity == "l1" or opt.target_sparsity):
        other = "--sparsity l1" if opt.sparsity == "l1" else "--target-sparsity"
        raise UserError(f"--target {opt.target[0]}: does not go with {other}; leave one of the two out")
    if opt.sparsity == "target" and not (opt.target or opt.target_sparsity):
        opt.target_sparsity = 0.5
    aimed = opt.target or opt.target_sparsity
    if opt.shrink and not aimed:
        raise UserError("--shrink: cuts zeros; needs --target-sparsity or --target, which make them")
    if opt.round_to and not aimed:
        raise UserError(f"--round-to {opt.round_to}: needs --target-sparsity (without it give --round-to to prune.py)")
    if opt.sr is None:
        opt.sr = 0.0 if aimed else 0.0001
    if opt.percent is None and not opt.target:
        opt.percent = opt.target_sparsity or 0.5
    if not opt.st:
        opt.sr, opt.sr_bias, opt.target_sparsity, opt.target, opt.percent = 0.0, 0.0, None, None, opt.percent or 0.5
    return opt


def parse(argv: list[str] | None = None) -> Namespace:
    """Command line -> options; those of a run that does not go on are resolved."""
    parser = training_parser(__doc__)
    add_sparsity_flags(parser)
    opt = parser.parse_args(argv)
    opt.script = os.path.basename(__file__)
    return opt if opt.resume else start_options(check(opt))


def main(argv: list[str] | None = None, hooks: Sequence[Hook] = ()) -> Run:
    """Command line, and further hooks -> sparsity training."""
    return train(parse(argv), [SparsityHook(), *hooks])


if __name__ == "__main__":
    run_cli(main)
