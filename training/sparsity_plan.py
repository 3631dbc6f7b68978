"""What a sparsity training acts on: which BatchNorms, by which rule, in which blocks of channels."""
from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from models.formats.speed import stopwatch
from models.pruning import model_pruner
from models.yolo import Model
from training.distributed import World, broadcast
from training.narrow import RemainingChannels
from utils.errors import UserError
from utils.slimming.gamma_l1 import GammaL1
from utils.slimming.graph import batch_norms, matching
from utils.slimming.target_sparsity import TargetSparsity
from utils.slimming.targets import TARGETS

# AVX-512 kernels compute 16 channels at a time, AVX2 and GPUs 8; a multiple of 16 suits them all.
BLOCK_SIZES = (16, 8, 4, 2, 1)
MEASUREMENTS = 4      # at most, whenever a target of latency chooses a share of the channels
CLOSE_ENOUGH = 0.01   # relative, of a latency
NO_NORMS = ("sparsity: no BatchNorm is left to act on; give fewer --keep, --only or --freeze, "
            "or a model with BatchNorms")


class SparsityPlan:
    """Every prunable BatchNorm and no other, the L1 penalty on them, and the target that takes channels to 0.

    The channel graph tells which BatchNorms are prunable: not those whose channels a shortcut's addition couples to
    others, unless --shortcuts joint takes such channels as one.

    opt: of train_sparsity.py. imgsz: of the images, in pixels. start: a model of the shape that the run starts with, on
    its device; it is the plan's own. frozen: names of BatchNorms that do not train. round_to: size of the blocks of a
    run that goes on, or 0. milliseconds: of models, for a target of latency.
    UserError where there is none to act on, or the target can't be reached.

    .flops: a target of latency is this share of the FLOPs, as far as has been measured: see aim().
    """

    def __init__(self, opt: Namespace, imgsz: int, start: Model, frozen: set[str], round_to: int = 0,
                 milliseconds: Callable[[Sequence[Model]], Sequence[float]] | None = None):
        self.opt, self.frozen, self.flops = opt, frozen, opt.target[1] if opt.target else 1.0
        try:
            self.pruner = model_pruner(start, imgsz, milliseconds=milliseconds)
        except ValueError as error:
            raise UserError(f"sparsity: {error}") from None
        self.whole: list[str] = []  # the last BatchNorms of branches that may go as a whole
        # Their scales and shifts are those of the average, over the channels of the start: see update_pruner().
        self.shown = {name: self.pruner.norms[name] for name in self._chosen_norms()}
        self.round_to = 1
        block = opt.round_to or round_to
        sizes = (block,) if block else BLOCK_SIZES
        self.target = self._build_target(sizes) if opt.target_sparsity or opt.target else None
        start.cpu()  # the target has its tables on the device

    def attach(self, model: Model, average: Model, remaining: RemainingChannels) -> None:
        """Act on these models from now on, of which so many channels are left."""
        names = [name for name in self.shown if remaining.holds(name)]
        self.norms, averaged = batch_norms(model, names), batch_norms(average, names)
        norms = list(self.norms.values())
        self.penalty = GammaL1(norms, self.opt.sr, self.opt.epochs, self.opt.sr_bias)
        if self.target:
            masks = [remaining.masks[name].numpy() for name in self.shown] if remaining.masks else None
            self.target.attach([self.norms.get(name) for name in self.shown],
                               [averaged.get(name) for name in self.shown], masks)

    @torch.no_grad()
    def update_pruner(self, average: Model, remaining: RemainingChannels) -> None:
        """Copy the scales and shifts of the average, which is the model that is saved, into the pruner's model."""
        present = batch_norms(average, filter(remaining.holds, self.pruner.norms))
        for name, shown in self.pruner.norms.items():
            for key in ("weight", "bias"):
                tensor = getattr(shown, key)
                if name in present:
                    tensor.copy_(remaining.to_start(name, getattr(present[name], key)))
                else:
                    tensor.zero_()

    def _chosen_norms(self) -> list[str]:
        """Names of the BatchNorms to act on, as --shortcuts, --only, --keep and --freeze leave them."""
        opt, graph = self.opt, self.pruner.graph
        every = set(graph.norms)
        try:
            keep = flag_matches("--keep", every, opt.keep)
            only = flag_matches("--only", every, opt.only) if opt.only else every
        except ValueError as error:
            raise UserError(f"{error}; prune.py's table shows the names") from None
        leave = (self.frozen & every) | keep | (every - only)
        names = graph.prunable_norms(opt.shortcuts == "joint", leave)
        if opt.layers:
            self.whole = [last for last, branch in graph.branches.items() if leave.isdisjoint(branch.norms)]
            names += self.whole
        if not names:
            raise UserError("; ".join([NO_NORMS, *graph.notes[:3]]))
        return names

    def _build_target(self, sizes: Sequence[int]) -> TargetSparsity:
        """The rule of --target-sparsity, in blocks of the first of the falling `sizes` that leaves a choice."""
        opt, graph = self.opt, self.pruner.graph
        costs, groups = None, graph.groups(self.shown, self.whole)
        if opt.per_flop:
            flops = self.pruner.costs.flops_per_channel()
            flops |= {last: np.full(len(flops[last]), self.pruner.costs.flops_of_branch(graph.branches[last]))
                      for last in self.whole}
            costs = [flops[name] for name in self.shown]
        place = {name: i for i, name in enumerate(self.shown)}
        branches = {place[last]: [place[name] for name in graph.branches[last].norms if name in place and name != last]
                    for last in self.whole}
        share = opt.target_sparsity or 1 - opt.target[1]  # share of the channels, or of the figure, that is to go
        for size in sizes:
            target = TargetSparsity(list(self.shown.values()), opt.target_sparsity, (), costs, groups, size,
                                    branches=branches)
            most = target.most if opt.target_sparsity else 1 - self.figure_without(target.most_gone)
            if share <= 0.9 * most:
                break
        self.round_to = size
        if share > most:
            request, of_what, mend = f"--target-sparsity {share:g}", "channels", "less"
            if opt.target:
                request, of_what, mend = "--target {}={:g}".format(*opt.target), opt.target[0], "more"
            end = f" in blocks of {size}; give {mend}, or a smaller --round-to" if size > 1 else (
                f"; every layer keeps some; give {mend}")
            raise UserError(f"{request}: at most {math.floor(1000 * most) / 1000} of the {of_what} can go{end}")
        return target

    def figure_without(self, gone: Sequence[np.ndarray], name: str = "") -> float:
        """Share of a figure (of --target) that is left without these channels: bool (channels,) per BatchNorm."""
        return TARGETS[name or self.opt.target[0]].value(self.pruner, self.kept_without(gone))

    def kept_without(self, gone: Sequence[np.ndarray]) -> np.ndarray:
        """Channels that go -> what is kept, bool (ids,); a convolution that would be left without any keeps all."""
        graph = self.pruner.graph
        keep = np.ones(len(graph.group), bool)
        for name, flags in zip(self.shown, gone):
            if name not in self.whole:
                keep[graph.group[graph.norms[name][flags]]] = False
            elif flags.all():
                keep[graph.branches[name].number] = False
        for ids in graph.outputs.values():
            if not keep[graph.group[ids]].any():
                keep[graph.group[ids]] = True
        return keep[graph.group]

    def aim(self, target: TargetSparsity, measurements: int = MEASUREMENTS) -> None:
        """Choose how many channels of `target` go, so that --target is reached.

        FLOPs and parameters are counted. Milliseconds are measured, so many times at most: channels go by a share of
        the FLOPs, and each measurement corrects that share, on the line through this cut and the whole model.
        """
        name, goal = self.opt.target
        if name != "latency":
            target.aim(lambda gone: self.figure_without(gone) <= goal)
            return
        for _ in range(measurements):
            gone = target.aim(lambda gone: self.figure_without(gone, "flops") <= self.flops)
            flops, figure = self.figure_without(gone, "flops"), self.figure_without(gone)
            if abs(figure / goal - 1) < CLOSE_ENOUGH:
                return
            self.flops = min(1 - (1 - flops) * (1 - goal) / max(1 - figure, 0.01), 0.999)
        target.aim(lambda gone: self.figure_without(gone, "flops") <= self.flops)


def shared_stopwatch(opt: Namespace, imgsz: int, world: World) -> Callable[[Sequence[Model]], Sequence[float]]:
    """Milliseconds of models as --runtime and --int8 ask; the main process measures for all, which choose alike."""
    def milliseconds(models: Sequence[Model]) -> Sequence[float]:
        clock = stopwatch(opt.runtime, imgsz, world.device, precision="int8" if opt.int8 else "fp32")
        return broadcast(clock(models) if world.main else [], world.size)

    return milliseconds


def frozen_norms(model: Model) -> set[str]:
    """The BatchNorms that --freeze froze."""
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, _BatchNorm) and norm.affine}
    return {name for name, norm in norms.items() if not norm.weight.requires_grad}


def flag_matches(flag: str, names: set[str], patterns: list[str]) -> set[str]:
    """The names that a flag's patterns fit. ValueError, with the flag's name, for a pattern that none fits."""
    try:
        return matching(names, patterns)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
