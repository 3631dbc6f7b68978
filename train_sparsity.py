"""Train so that channels can be told apart and cut: with an L1 penalty on the BatchNorm scales, or to a share of zeros.

    python train_sparsity.py --st --sr 0.0001                    # the penalty: you choose its strength
    python train_sparsity.py --target-sparsity 0.5               # half of the prunable channels end at exactly 0, in blocks of 16
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

from train import Hook, Run, train
from utils.errors import UserError, run_cli
from utils.files import write_array
from utils.options import resolve, training_parser
from utils.slimming.cost import CostModel
from utils.slimming.graph import trace
from utils.slimming.pictures import plot_gamma_history, plot_gammas
from utils.slimming.selection import MIN_SHARE, Rules, Selection, limit, matching
from utils.slimming.sparsity import GammaL1, TargetSparsity, gauge, travel
from utils.slimming.surgery import keep_ids, masked
from val import evaluate

BLOCKS = (16, 8, 4, 2, 1)  # AVX-512 kernels compute 16 channels at a time, AVX2 and GPUs 8; a multiple of 16 suits them all


class SparsityHook(Hook):
    """Sparsity on every prunable BatchNorm and on no other, and what TensorBoard and results.csv show of it.

    The channel graph tells which are prunable: not those whose channels a shortcut's addition ties to others, unless
    --shortcuts joint takes such channels as one.
    """

    def start(self, run: Run) -> None:
        self.run, opt = run, run.opt
        if opt.resume and opt.round_to is None:
            opt.round_to = 1  # the run is older than blocks
        self.graph = graph = trace(run.model)
        self.costs = CostModel(run.model, graph, opt.imgsz)
        modules, averaged = dict(run.model.named_modules()), dict(run.ema.ema.named_modules())
        names = self.chosen(modules)
        norms = [modules[n] for n in names]
        self.norms: dict[str, Any] = {n: averaged[n] for n in names}  # what is shown is what is saved: the averaged weights
        self.penalty = GammaL1(norms, opt.sr, opt.epochs, opt.sr_bias)
        self.target = self.aim(norms, names) if opt.target_sparsity else None
        self.history: list[torch.Tensor] = []  # |gamma| of all channels, an entry an epoch
        if run.world.main:
            every = sum(isinstance(m, _BatchNorm) for m in modules.values())
            channels = sum(len(m.weight) for m in self.norms.values())
            aim = f"target {opt.target_sparsity:.0%}" + f" in blocks of {opt.round_to}" * (opt.round_to > 1) if self.target else f"sr {opt.sr:g}"
            others = " or ".join(["tied by shortcuts"] * (opt.shortcuts == "skip") + ["left out by --keep or --only"] * bool(opt.keep or opt.only)
                                 + ["frozen"] * any(not modules[n].weight.requires_grad for n in graph.norms))
            print(f"sparsity: {aim}, on {len(names)} of {every} BatchNorms, {channels} channels" + (f"; the others are {others}" if others else ""))
            if opt.sr:
                print(budget(run, self.penalty))

    def aim(self, norms: list[Any], names: list[str]) -> TargetSparsity:
        """The rule of --target-sparsity; opt.round_to, where it is not given, becomes the largest of BLOCKS that leaves a choice of blocks."""
        opt = self.run.opt
        flops = self.costs.freed() if opt.per_flop else None
        for size in [opt.round_to] if opt.round_to else BLOCKS:
            # The average of a gamma that is 0 comes near 0 but never there, so it is set to 0 as well.
            target = TargetSparsity(norms, opt.target_sparsity, list(self.norms.values()), [flops[n] for n in names] if flops else None,
                                    [self.graph.group[self.graph.norms[n]] for n in names], size)
            if opt.target_sparsity <= 0.9 * target.most:
                break
        opt.round_to = size
        if opt.target_sparsity > target.most:
            raise UserError(f"--target-sparsity {opt.target_sparsity:g}: at most {math.floor(1000 * target.most) / 1000} of the channels can go"
                            + f" in blocks of {size}; give less, or a smaller --round-to" * (size > 1) + "; every layer keeps some; give less" * (size == 1))
        return target

    def chosen(self, modules: dict[str, Any]) -> list[str]:
        """Names of the BatchNorms to act on, as --shortcuts, --only, --keep and --freeze leave them."""
        opt, norms = self.run.opt, self.graph.norms
        leave = {n for n in norms if not modules[n].weight.requires_grad}
        for flag, patterns in (("--keep", opt.keep), ("--only", opt.only)):
            try:
                found = matching(norms, patterns)
            except ValueError as error:
                raise UserError(f"{flag}: {error}; prune.py's table shows the names") from None
            leave |= found if flag == "--keep" else set(norms) - found if patterns else set()
        names = self.graph.prunable_norms(opt.shortcuts == "joint", leave)
        if not names:
            raise UserError("sparsity: no BatchNorm is left to act on; give fewer --keep, --only or --freeze, or a model with BatchNorms")
        return names

    def before_step(self) -> None:
        self.penalty.add_to_gradients(self.run.epoch, self.run.step_share)
        if self.target:
            self.target.observe()

    def after_step(self, skipped: bool) -> None:
        if self.target and not skipped:
            self.target.shrink(self.run.progress)

    def epoch_end(self, log: dict[str, float]) -> None:
        gammas = [m.weight for m in self.norms.values()]
        self.history.append(torch.cat(gammas).detach().abs().half().cpu())
        shares = gauge(gammas)
        log["sparsity/sr"] = self.penalty.coefficient(self.run.epoch)
        log.update({f"sparsity/{k}": v for k, v in shares.items()})
        rules = Rules(min_share=MIN_SHARE, round_to=self.run.opt.round_to, joint=self.run.opt.shortcuts == "joint", keep=tuple(self.run.opt.keep))
        ranked = Selection(self.graph, self.run.ema.ema, rules)
        bound = log["sparsity/limit"] = limit(self.graph, self.run.ema.ema, ranked.prunable).percent
        if self.run.world.main:
            print(f"{'':>11}gammas " + ", ".join(f"{k.replace('_', ' ')}: {v:.1%}" for k, v in shares.items()) + f"; limit: {bound:.1%}", flush=True)
        log.update(self.outlook(ranked))
        if self.run.log is None:
            return
        tb, epoch = self.run.log.tb, self.run.epoch
        tb.add_histogram("bn_weights/hist", torch.cat([g.detach().abs() for g in gammas]), epoch)
        tb.add_histogram("bn_bias/hist", torch.cat([m.bias.detach().abs() for m in self.norms.values()]), epoch)
        for name, module in self.norms.items():
            tb.add_histogram(f"bn_layers/{name}", module.weight.detach().abs(), epoch)

    def outlook(self, ranked: Selection) -> dict[str, float]:
        """What prune.py --percent would make of the model as it is now: size and, now and then, mAP."""
        run, opt, model = self.run, self.run.opt, self.run.ema.ema
        masks = ranked.percent(opt.percent)
        parameters, flops = self.costs.remaining(keep_ids(self.graph, masks))
        log = {"sparsity/parameters_left": float(parameters), "sparsity/gflops_left": flops / 1e9}
        text = f"{'':>11}--percent {opt.percent:g} would leave {parameters:,} parameters, {flops / 1e9:.3f} GFLOPs"
        if opt.masked_val and (run.epoch + 1) % opt.masked_val == 0:
            found = evaluate(masked(model, masks), run.val_loader, run.world.device, processes=run.world.size).ap  # type: ignore[arg-type]
            log.update({"sparsity/masked_mAP_0.5": found.map50, "sparsity/masked_mAP_0.5:0.95": found.map})
            text += f", mAP50 {found.map50:.3f}, mAP50-95 {found.map:.3f}"
        if run.world.main:
            print(text, flush=True)
        return log

    def end(self) -> None:
        history = torch.stack(self.history).float().numpy()
        write_array(self.run.folder / "gammas.npy", history)  # (epochs, channels), for pictures of your own
        if not self.run.opt.noplots:
            picture = plot_gamma_history({self.run.folder.name: list(history)}, self.run.folder / "gamma_history.png")
            if self.run.log is not None:
                self.run.log.tb.add_image("bn_weights/over_epochs", np.asarray(Image.open(picture).convert("RGB")), self.run.epoch, dataformats="HWC")
            plot_gammas(history[-1], self.run.folder / "gammas.png", title="BatchNorm scales after the last epoch")

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "target": self.target.state_dict() if self.target else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = list(state["history"])
        if self.target:
            self.target.load_state_dict(state["target"])


def budget(run: Run, penalty: GammaL1) -> str:
    """What --sr can do in this run, in a sentence, before the first step."""
    hyp, schedule = run.opt.hyp, run.schedule
    batches = len(run.loader)
    # One entry an iteration; a step that gathers n of them has the rate of one, and its penalty is the share of all.
    every = schedule.accumulate(schedule.warmup)
    epochs = [i // batches for i in range(0, run.opt.epochs * batches, every)]
    share = min(every * run.opt.batch_size / run.opt.nbs, 1.0)
    adam = run.opt.optimizer != "SGD"
    distance = travel([hyp["lr0"] * schedule.factor(e) for e in epochs], [penalty.coefficient(e) * share for e in epochs],
                      None if adam else hyp["momentum"])
    text = f"sparsity: in {len(epochs)} steps this sr moves a gamma that nothing holds by {'at most ' * adam}{distance:.2g} (at the start they are near 1)"
    if adam:  # it divides each gradient by its usual size: the penalty drowns where that is larger
        text += ", and one whose own gradients are larger than sr hardly at all"
    if adam or distance < 0.5:
        text += ". If they stay away from 0: more epochs, SGD with a larger --sr, or --target-sparsity 0.5, which needs no strength"
    return text


def check(opt: Namespace) -> Namespace:
    """Refuse strengths that can't be; --sparsity says which mode they belong to, or follows from them."""
    if opt.sparsity == "target" and opt.target_sparsity is None:
        opt.target_sparsity = 0.5
    if opt.sparsity == "l1" and opt.target_sparsity is not None:
        raise UserError("--sparsity l1 knows no --target-sparsity; leave one of the two out")
    if opt.target_sparsity is not None and not 0 < opt.target_sparsity < 1:
        raise UserError(f"--target-sparsity {opt.target_sparsity:g}: must be between 0 and 1 (0.5 takes half of the prunable channels to 0)")
    if opt.round_to is not None and opt.round_to < 1:
        raise UserError(f"--round-to {opt.round_to}: must be at least 1")
    if opt.round_to and not opt.target_sparsity:
        raise UserError(f"--round-to {opt.round_to}: needs --target-sparsity (without it give --round-to to prune.py)")
    if not 0 <= opt.percent < 1:
        raise UserError(f"--percent {opt.percent:g}: must be at least 0 and below 1")
    if opt.sr is not None and opt.sr < 0:
        raise UserError(f"--sr {opt.sr:g}: must not be negative")
    if opt.sr is None:
        opt.sr = 0.0 if opt.target_sparsity else 0.0001
    if not opt.st:
        opt.sr, opt.sr_bias, opt.target_sparsity = 0.0, 0.0, None
    if not opt.target_sparsity:
        opt.round_to = 1
    return opt


def main(argv: list[str] | None = None) -> Run:
    """Command line -> sparsity training."""
    parser = training_parser(__doc__)
    parser.add_argument("--st", action=BooleanOptionalAction, default=True, help="sparsity training; --no-st trains without it")
    parser.add_argument("--sparsity", choices=["l1", "target"],
                        help="l1: the penalty of --sr (default); target: --target-sparsity, 0.5 where that is not given")
    parser.add_argument("--sr", type=float, help="strength of the L1 penalty on the BN scales (0.0001; 0 with --target-sparsity)")
    parser.add_argument("--sr-bias", type=float, help="strength of the L1 penalty on the BN shifts (10 * sr)")
    parser.add_argument("--target-sparsity", type=float,
                        help="share of the prunable channels that are exactly 0 in the end, 0..1 (as many as fill up blocks of --round-to)")
    parser.add_argument("--per-flop", action=BooleanOptionalAction, default=True,
                        help="with --target-sparsity: rank channels by importance per FLOP, which makes the slim model faster; --no-per-flop: by importance")
    parser.add_argument("--round-to", type=int, metavar="N",
                        help="with --target-sparsity: channels go in blocks, so that what is left of a layer is a multiple of N, as fast kernels want it; "
                             "1: one by one (16, or less where layers are too narrow for a choice)")
    parser.add_argument("--shortcuts", choices=["skip", "joint"], default="skip",
                        help="channels that shortcuts tie together are left alone (skip), or taken as one (joint)")
    parser.add_argument("--keep", nargs="+", default=[], metavar="PATTERN", help="BatchNorms to leave alone, such as 'model.0.*'")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="act on no BatchNorms but these")
    parser.add_argument("--percent", type=float, default=0.5, help="the prune.py --percent that the outlook of every epoch is for")
    parser.add_argument("--masked-val", type=int, default=0, metavar="N", help="every N epochs also validate the model without those channels (0: never)")
    opt = parser.parse_args(argv)
    opt.script = os.path.basename(__file__)
    return train(opt if opt.resume else resolve(check(opt)), [SparsityHook()])


if __name__ == "__main__":
    run_cli(main)
