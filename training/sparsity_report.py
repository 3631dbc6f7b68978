"""What a sparsity training shows: on the screen, in results.csv, in TensorBoard, as pictures."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from models.yolo import Model
from training.loggers import Cell, cell
from training.narrow import RemainingChannels
from training.run import Run
from training.sparsity_plan import SparsityPlan
from utils.files import write_array
from utils.metrics import APResult
from utils.plots.slimming import plot_gamma_history, plot_gammas
from utils.slimming.gamma_l1 import GammaL1, gamma_stats, l1_reach
from utils.slimming.ranking import MIN_SHARE, Rules
from utils.slimming.surgery import masked


class SparsityReport:
    """What the line of an epoch and the pictures show, over the channels of the model that the run started with.

    The scales are those that plan.update_pruner() has copied last.
    evaluate: accuracy on the val images, for --masked-val.
    .history: |gamma| (channels,) of all channels that the plan acts on, an entry an epoch.
    """

    def __init__(self, run: Run, plan: SparsityPlan, remaining: RemainingChannels,
                 evaluate: Callable[[Model], APResult]):
        self.run, self.plan, self.remaining, self.evaluate = run, plan, remaining, evaluate
        self.history: list[torch.Tensor] = []

    def describe(self) -> None:
        """Before the first step: what is sparsified and how."""
        if self.run.world.main:
            print(self.summary())
            print(self.explanation())
            if self.run.opt.sr:
                print(l1_note(self.run, self.plan.penalty))

    def columns(self) -> dict[str, Cell]:
        """What the line of an epoch shows: see explanation()."""
        cells = {"zero": cell("sparsity/zero", "{:.1%}"), "<0.1": cell("sparsity/below_1e-1", "{:.1%}"),
                 "limit": cell("sparsity/limit", "{:.1%}"), "cut GFLOPs": cell("sparsity/gflops_left", "{:.3f}")}
        return cells | ({"cut mAP": cell("sparsity/masked_mAP_0.5:0.95", "{:.3f}")} if self.run.opt.masked_val else {})

    def explanation(self) -> str:
        """The columns, in two lines."""
        cut = f"prune.py --percent {self.run.opt.percent:g}" if self.run.opt.percent else "a cut to the target"
        return ("columns: zero, <0.1: share of gammas that are 0, or below 0.1; limit: --percent up to which a cut by "
                f"gamma\nempties no layer; cut GFLOPs: what {cut} would leave of the model as it is. TensorBoard and "
                "results.csv have more.")

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
        channels = sum(len(norm.weight) for norm in plan.shown.values())
        text = f"sparsity: {how}, on {len(plan.shown)} of {total} BatchNorms, {channels} channels"
        text += f", {len(plan.whole)} branches" if opt.layers else ""
        text += f"; the others are {' or '.join(others)}" if others else ""
        if plan.target:
            text += (f"\nsparsity: the zeros are final after {plan.target.LAST:.0%} of the run; best.pt is one of the "
                     "epochs from there on, and --patience counts from there")
        return text

    def epoch_end(self, log: dict[str, float]) -> None:
        """Add the figures of an epoch to `log`, and give TensorBoard its histograms."""
        opt, plan = self.run.opt, self.plan
        gammas: list[torch.Tensor] = [norm.weight for norm in plan.shown.values()]
        self.history.append(torch.cat(gammas).detach().abs().half())
        stats = gamma_stats(gammas)
        rules = Rules(min_share=MIN_SHARE, round_to=plan.round_to, coupled=opt.shortcuts == "joint",
                      layers=opt.layers, keep=tuple(opt.keep))
        limit = plan.pruner.rank(rules=rules).safe_threshold().percent
        log["sparsity/sr"] = plan.penalty.coefficient(self.run.epoch)
        log.update({f"sparsity/{key}": value for key, value in stats.items()})
        log["sparsity/limit"] = limit
        log.update(self.preview_cut())
        self.add_histograms()

    def preview_cut(self) -> dict[str, float]:
        """What prune.py --percent would make of the model as it is now: size and, now and then, mAP."""
        run, opt, pruner, target = self.run, self.run.opt, self.plan.pruner, self.plan.target
        percent = opt.percent
        if percent is None:  # what --target takes as the channels rank now
            gone = sum(int(flags.sum()) for flags in target.gone) if target else 0
            percent = max(target.share * target.total, gone) / pruner.ranking.total if target else 0.0
        masks, parameters, flops = pruner.preview(percent)
        log = {"sparsity/parameters_left": float(parameters), "sparsity/gflops_left": flops / 1e9}
        if opt.masked_val and (run.epoch + 1) % opt.masked_val == 0:
            ap = self.evaluate(masked(run.ema.ema, self.remaining.to_present(masks)))
            log.update({"sparsity/masked_mAP_0.5": ap.map50, "sparsity/masked_mAP_0.5:0.95": ap.map})
        return log

    def add_histograms(self) -> None:
        """|gamma| and |beta| of all channels, and |gamma| of every layer, for TensorBoard."""
        if self.run.logger is None:
            return
        tb, epoch = self.run.logger.tb, self.run.epoch
        gammas = {name: norm.weight.detach().abs() for name, norm in self.plan.shown.items()}
        betas = [norm.bias.detach().abs() for norm in self.plan.shown.values()]
        tb.add_histogram("bn_weights/hist", torch.cat(list(gammas.values())), epoch)
        tb.add_histogram("bn_bias/hist", torch.cat(betas), epoch)
        for name, values in gammas.items():
            tb.add_histogram(f"bn_layers/{name}", values, epoch)

    def end(self) -> None:
        """After the last epoch: gammas.npy, (epochs, channels), and pictures."""
        run, history = self.run, torch.stack(self.history).float().numpy()
        write_array(run.folder / "gammas.npy", history)
        if run.opt.noplots:
            return
        picture = plot_gamma_history({run.folder.name: list(history)}, run.folder / "gamma_history.png")
        if run.logger is not None:
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            run.logger.tb.add_image("bn_weights/over_epochs", pixels, run.epoch, dataformats="HWC")
        plot_gammas(history[-1], run.folder / "gammas.png", title="BatchNorm scales after the last epoch")


def l1_note(run: Run, penalty: GammaL1) -> str:
    """What --sr can do in this run, in a sentence, before the first step."""
    hyp, schedule = run.opt.hyp, run.schedule
    batches = len(run.loader)
    every = schedule.accumulate(schedule.warmup)
    # One entry per step: its rate is that of its first batch, its penalty the share of a nominal batch that it sees.
    epochs = [i // batches for i in range(0, run.opt.epochs * batches, every)]
    batch_fraction = every * run.opt.batch_size / run.nbs
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
