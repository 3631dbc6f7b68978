"""From scores to cuts: which channels go first.

The score of a channel is |gamma| of its BatchNorm unless another is asked for. All prunable channels of the network
are ranked together, by order and never by comparing with a value: many gammas are exactly equal (0, say), and a
comparison would cut all or none of them.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from numbers import Integral, Real
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from utils.slimming.cost import CostModel
from utils.slimming.equivalence import Inputs, as_call
from utils.slimming.graph import ChannelGraph, Masks, batch_norms, filters, matching, weighted_layers
from utils.slimming.surgery import M
from utils.slimming.timing import latency
from utils.slimming.tracing import trace

MIN_SHARE = 0.25  # default of prune.py; after an L1 run on BCCD, a floor of 0.1 ended .018 mAP50-95 lower
# What holds a model that is to be called through it -> the attribute that is the model.
WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}

class NothingToCutError(ValueError):
    """A model without a channel that may go. The message says why."""

    def __init__(self, why: Sequence[str]):
        more = [f"and {len(why) - 3} more reasons"] if len(why) > 3 else []
        super().__init__("this model has no BatchNorm channel that may be cut: " + "; ".join([*why[:3], *more]))


@dataclass(frozen=True)
class Rules:
    """What every cut keeps to."""

    min_channels: int = 1        # every layer keeps its best ones
    min_share: float = 0.0       # every layer keeps this share of its channels, unless their score is 0
    round_to: int = 1            # a layer that is cut keeps a multiple of this, as far as it has so many
    coupled: bool = False        # channels that shortcuts couple may go, all of a group at once; otherwise they stay
    layers: bool = False         # branches may go as a whole, whatever the rules above keep of their layers
    keep: tuple[str, ...] = ()   # patterns of BatchNorm names, such as model.0.*: these layers stay whole

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):  # its letters would be taken for patterns
            object.__setattr__(self, "keep", (self.keep,))
        numbers = isinstance(self.min_share, Real), *(isinstance(n, Integral) for n in (
            self.min_channels, self.round_to))
        if not all(numbers) or self.min_channels < 1 or self.round_to < 1 or not 0 <= self.min_share <= 1:
            raise ValueError("min_channels and round_to must be whole numbers of at least 1 and min_share between 0 "
                             f"and 1: min_channels={self.min_channels}, round_to={self.round_to}, "
                             f"min_share={self.min_share}")


@dataclass(frozen=True)
class SafeThreshold:
    """The threshold rule: above the smallest of the layers' largest gammas, some layer would lose every channel."""

    gamma: float    # the largest threshold that leaves every layer a channel
    percent: float  # the largest share of the prunable channels, 0..1, whose cut by gamma alone takes only smaller ones


class TracedModel(Generic[M]):
    """A model, its channel graph, BatchNorms and costs: what scores and targets look at. It is traced once.

    imgsz: pixels of the square image that FLOPs and milliseconds are for. channels: of that image.
    inputs: example tensors in its place, for a model that is not called with images alone: model(*inputs), or
    model(**inputs) of a dict.
    evaluate: model -> its accuracy, such as {"mAP50": 0.9, "mAP50-95": 0.6}, for target map-drop, sweep, sensitivity.
    milliseconds: models -> milliseconds per image of each, measured in turns, for target latency and sweep.
    losses: model -> the loss of one batch after another, for scores that want gradients on data.
    Raises ValueError for weights that are not finite, for inputs that are missing and for a model that can't be traced;
    NothingToCutError, a ValueError, where it has no BatchNorm whose channels can be cut.
    """

    def __init__(self, model: M, imgsz: int = 640, channels: int = 3, *, inputs: Inputs | None = None,
                 evaluate: Callable[[M], Mapping[str, float]] | None = None,
                 milliseconds: Callable[[Sequence[M]], Sequence[float]] | None = None,
                 losses: Callable[[M], Iterable[Tensor]] | None = None):
        for key, value in (("imgsz", imgsz), ("channels", channels)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{key} must be a whole number from 1 on, not {value!r}")
        self.model, self.imgsz, self.channels, self.inputs = model, imgsz, channels, inputs
        self.evaluate: Callable[[M], Mapping[str, float]] = evaluate or _missing("evaluate")
        self.losses: Callable[[M], Iterable[Tensor]] = losses or _missing("losses")
        self.milliseconds: Callable[[Sequence[M]], Sequence[float]] = milliseconds or (
            lambda models: latency(models, imgsz, channels=channels, inputs=inputs))
        _refuse_unfit(model, inputs)
        self.graph = trace(model, inputs)
        if not self.graph.norms:
            has_norm = any(isinstance(m, _BatchNorm) for m in model.modules())
            raise NothingToCutError([*self.graph.notes, "no BatchNorm with a scale follows a convolution"] if has_norm
                                    else ["it has no BatchNorm (fused or exported? give the model from before fusing)"])
        self.norms: dict[str, _BatchNorm] = batch_norms(model, self.graph.norms)

    @cached_property
    def costs(self) -> CostModel:
        """What is left of the model after any cut. A cut by percent does not ask for it."""
        return CostModel(self.model, self.graph, self.imgsz, self.channels, self.inputs)

    @cached_property
    def accuracy(self) -> Mapping[str, float]:
        """What `evaluate` says of the model itself."""
        return self.evaluate(self.model)

    def gammas(self, prunable: Masks) -> dict[str, Tensor]:
        """|gamma| (channels,) on the CPU of the prunable channels, of every BatchNorm that has some."""
        return {name: self.norms[name].weight.detach().float().cpu().abs()[mask]
                for name, mask in prunable.items() if bool(mask.any())}

    def largest(self, *keys: str) -> np.ndarray:
        """(ids,) largest |weight|, |bias| (keys) of a group's BatchNorm channels, at the id that numbers it.

        Of a branch, of its last BatchNorm's.
        """
        magnitudes = np.zeros(len(self.graph.group))
        for name, norm in self.norms.items():
            for key in keys:
                values = getattr(norm, key).detach().float().cpu().abs().numpy()
                np.maximum.at(magnitudes, self.graph.group[self.graph.norms[name]], values)
                if branch := self.graph.branches.get(name):
                    magnitudes[branch.number] = max(magnitudes[branch.number], values.max())
        return magnitudes


def _refuse_unfit(model: nn.Module, inputs: Inputs | None) -> None:
    """ValueError for what is no model, for values that are not finite, and for inputs that are missing."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"an nn.Module is needed, not {type(model).__name__}; a checkpoint is loaded first")
    inside = WRAPPERS.get(type(model).__name__)
    if inside:
        raise ValueError(f"{type(model).__name__} wraps a model; give the one inside: model.{inside}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or is_lazy(tensor):
            raise ValueError(f"{name} has no values yet (a lazy layer, or the meta device); load the weights first")
        if not tensor.is_floating_point() or tensor.detach().sum(dtype=torch.float32).isfinite():
            continue
        if tensor.isnan().any() or (isinstance(tensor, nn.Parameter) and tensor.isinf().any()):  # a buffer may mean it
            raise ValueError(f"{name} holds values that are not finite, so nothing can be ranked or checked; "
                             "take weights from before the training diverged")
    needed = [p.name for p in signature(model.forward).parameters.values()
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    args, kwargs = as_call(inputs)
    if missing := [name for name in needed[len(args):] if name not in kwargs]:
        called = "model(images)" if inputs is None else "the inputs that were given"
        raise ValueError(f"{type(model).__name__} takes {len(needed)} inputs ({', '.join(needed)}), but is called as "
                         f"{called}, without {', '.join(missing)}; give inputs=, a tuple or a dict of example tensors")


def _missing(name: str) -> Callable[[Any], Any]:
    """Stands for a function that was not given."""
    def refuse(model: Any) -> Any:
        raise ValueError(f"give Pruner(..., {name}=): this score, target or table needs it")

    return refuse


# Scores ---------------------------------------------------------------------------------------------------------------

def gamma_score(traced: TracedModel) -> np.ndarray:
    """|gamma| (Liu et al. 2017), the mean over the BatchNorm channels of a group."""
    values = {name: norm.weight.detach().abs() for name, norm in traced.norms.items()}
    return group_mean(traced.graph, values, traced.graph.norms)


def l1_score(traced: TracedModel) -> np.ndarray:
    """Mean |weight| of the filters that make the channel (Li et al. 2017, arXiv 1608.08710)."""
    layers = weighted_layers(traced.model, traced.graph.outputs)
    means = {name: filters(layer).abs().flatten(1).mean(1) for name, layer in layers.items()}
    return group_mean(traced.graph, means, traced.graph.outputs)


def gamma_l1_score(traced: TracedModel) -> np.ndarray:
    """The product of both."""
    return gamma_score(traced) * l1_score(traced)


def taylor_score(traced: TracedModel) -> np.ndarray:
    """What the loss would lose with a group of channels, to first order, on the batches of traced.losses.

    The sum over batches and channels of (gamma * dL/dgamma + beta * dL/dbeta)^2 (Molchanov et al. 2019, arXiv
    1906.10771, eq. 8).
    """
    model, graph = deepcopy(traced.model), traced.graph
    norms = batch_norms(model, graph.norms)
    parameters = [p for norm in norms.values() for p in (norm.weight.requires_grad_(), norm.bias.requires_grad_())]
    total = np.zeros(len(graph.group))
    for loss in traced.losses(model):
        gradients = torch.autograd.grad(loss.sum(), parameters, materialize_grads=True)
        first_order = [(p.detach() * g).double().cpu().numpy() for p, g in zip(parameters, gradients)]
        for ids, of_gamma, of_beta in zip(graph.norms.values(), first_order[::2], first_order[1::2]):
            np.add.at(total, graph.group[ids], (of_gamma + of_beta) ** 2)
    return total


# prune.py --score: name -> a function that gives every id of the graph a score, (ids,); the lowest go first.
SCORES: dict[str, Callable[[TracedModel], np.ndarray]] = {
    "gamma": gamma_score, "l1": l1_score, "gamma-l1": gamma_l1_score, "taylor": taylor_score}


def group_mean(graph: ChannelGraph, values: Mapping[str, Tensor], ids: Mapping[str, np.ndarray]) -> np.ndarray:
    """(ids,) mean of the values that fall into a group, at the id that numbers it.

    values: (channels,) per layer; ids: the ids of these channels, such as graph.norms or graph.outputs.
    """
    total, count = np.zeros(len(graph.group)), np.zeros(len(graph.group))
    for name, value in values.items():
        np.add.at(total, graph.group[ids[name]], value.cpu().double().numpy())
        np.add.at(count, graph.group[ids[name]], 1)
    return total / np.maximum(count, 1)


def branch_scores(traced: TracedModel, score: str) -> dict[int, float]:
    """Id of a branch -> its score: the sum over its last BatchNorm's channels, as if they were coupled to no others."""
    if not traced.graph.branches:
        return {}
    alone = copy(traced)
    alone.graph = replace(traced.graph, group=np.arange(len(traced.graph.group)))
    scores = SCORES[score](alone)
    return {branch.number: float(scores[traced.graph.norms[last]].sum())
            for last, branch in traced.graph.branches.items()}


# Ranking --------------------------------------------------------------------------------------------------------------

class Ranking:
    """The groups of channels of a model, ranked once. Its methods give what any cut keeps, bool (ids,).

    `score` is one of SCORES, divided by the FLOPs of the channel where `per_flop` asks for it. Ties are broken by layer
    order. Prunable are the channels that the graph, the shortcuts and rules.keep let go: every share is one of these.
    With rules.layers a branch is one of the groups, and all of its channels are prunable.
    Raises ValueError for a pattern in rules.keep that no BatchNorm fits.
    """

    def __init__(self, traced: TracedModel, rules: Rules, score: str = "gamma", per_flop: bool = False):
        graph = traced.graph
        self.graph, self.rules, self.score = graph, rules, score
        self.scores = np.array(SCORES[score](traced))
        branches = np.array([branch.number for branch in graph.branches.values()], int)
        for number, value in (branch_scores(traced, score) if rules.layers else {}).items():
            self.scores[number] = value
        if per_flop:
            divisor = np.ones(len(graph.group))
            for name, flops in traced.costs.flops_per_channel().items():
                divisor[graph.group[graph.norms[name]]] = np.maximum(flops, 1)
            for branch in graph.branches.values():
                divisor[branch.number] = max(traced.costs.flops_of_branch(branch), 1)
            self.scores = self.scores / divisor
        self.may_go = graph.removable(rules.coupled)  # (ids,)
        self.may_go[branches] = rules.layers
        for name in matching(graph.norms, rules.keep):  # and whoever shares channels with it
            self.may_go &= ~np.isin(graph.group, graph.group[graph.norms[name]])
            self.may_go[graph.around(name)] = False
        self.prunable = {name: torch.from_numpy(self.may_go[ids] | self.may_go[graph.around(name)].any())
                         for name, ids in graph.norms.items()}
        self.total = sum(int(mask.sum()) for mask in self.prunable.values())  # channels
        groups = np.unique(np.concatenate([graph.group[ids] for ids in graph.norms.values()] + [branches]))
        groups = groups[self.may_go[groups] & ~self._protected()[groups]]
        self.groups = groups[np.argsort(self.scores[groups], kind="stable")]  # from the first to go to the last
        self.channels = self._channels()

    def _channels(self) -> np.ndarray:
        """(groups,) BatchNorm channels that go with each of self.groups, but not with one before it."""
        graph, place = self.graph, np.full(len(self.graph.group), len(self.groups))
        place[self.groups] = np.arange(len(self.groups))
        first = [np.minimum(place[graph.group[ids]], place[graph.around(name)].min(initial=len(self.groups)))
                 for name, ids in graph.norms.items()]
        return np.bincount(np.concatenate(first), minlength=len(self.groups) + 1)[:-1]

    def _protected(self) -> np.ndarray:
        """bool (ids,): groups among the best channels of a layer, which the rules keep."""
        graph, rules = self.graph, self.rules
        protected = np.zeros(len(graph.group), bool)
        for ids in graph.norms.values():
            groups = graph.group[ids]
            best = groups[np.argsort(-self.scores[groups], kind="stable")]
            protected[best[:rules.min_channels]] = True
            share = best[:math.ceil(rules.min_share * len(ids))]
            protected[share[self.scores[share] > 0]] = True
        for ids in graph.outputs.values():  # several convolutions may share a BatchNorm: none is left without channels
            groups = graph.group[ids]
            protected[groups[np.argmax(self.scores[groups])]] = True
        return protected

    def why_empty(self) -> list[str]:
        """Why no channel may go."""
        graph, why = self.graph, list(self.graph.notes)
        removable = [graph.removable(coupled)[ids].any() for coupled in (self.rules.coupled, True)
                     for ids in graph.norms.values()]
        if any(removable[:len(graph.norms)]):
            why.append(f"all that could go is to be kept whole ({', '.join(self.rules.keep)})")
        elif any(removable):
            why.append("shortcuts couple all that could go (Rules(coupled=True), --shortcuts joint let them go)")
        return why or ["all of them are outputs of the model"]

    def leading_share(self, chosen: np.ndarray) -> float:
        """Largest share (0..1) of the prunable channels of which a cut takes only groups that are `chosen`, (ids,)."""
        return int(self.channels[np.logical_and.accumulate(chosen[self.groups])].sum()) / self.total

    def keep_percent(self, percent: float) -> np.ndarray:
        """Cut the lowest share (0..1) of the prunable channels. ValueError for 1 and whatever lies outside."""
        if not isinstance(percent, Real) or not 0 <= percent < 1:
            raise ValueError(f"percent must be at least 0 and below 1, not {percent}")
        return self.keep_groups(int((np.cumsum(self.channels) <= round(percent * self.total)).sum()))

    def keep_groups(self, count: int) -> np.ndarray:
        """Cut the lowest `count` groups of channels (an uncoupled channel is a group of its own), then round."""
        return self._without(self.groups[:count])

    def keep_layer(self, name: str, share: float) -> np.ndarray:
        """Cut the lowest share (0..1) of the prunable channels of one BatchNorm, and nothing else."""
        ids = self.graph.norms[name]
        groups = self.graph.group[ids[self.may_go[ids]]]
        return self._without(self.groups[np.isin(self.groups, groups)][:round(share * len(np.unique(groups)))])

    def smallest_cut(self, done: Callable[[int], bool]) -> tuple[int, bool]:
        """The smallest number of groups for which done(number) is true, by bisection, and True.

        The number of all groups and False where it is true for none. `done` is taken to stay true for larger cuts.
        """
        low, high = 0, len(self.groups)
        if not done(high):
            return high, False
        while low < high:
            middle = (low + high) // 2
            if done(middle):
                high = middle
            else:
                low = middle + 1
        return high, True

    def _without(self, groups: np.ndarray) -> np.ndarray:
        """What is kept without these groups, after rounding."""
        keep = np.ones(len(self.graph.group), bool)
        keep[groups] = False
        while self.rules.round_to > 1 and self._round_up(keep):
            pass  # layers share groups: rounding one may move another
        return keep[self.graph.group]

    def _round_up(self, keep: np.ndarray) -> bool:
        """Give layers the best of their cut channels back until a multiple is left; in place. Did it change?"""
        changed = False
        for ids in self.graph.norms.values():
            groups = self.graph.group[ids]
            gone = groups[~keep[groups]]
            missing = min(-(len(groups) - len(gone)) % self.rules.round_to, len(gone))
            if missing:
                best = gone[np.argsort(-self.scores[gone], kind="stable")]
                keep[best[:missing]] = True
                changed = True
        return changed


def knee(xs: Sequence[float], ys: Sequence[float]) -> int:
    """Index of the point that lies farthest above the line from the first to the last point, both axes scaled to 0..1.

    The "kneedle" of Satopaa et al. 2011 for a falling curve: where it starts to fall steeply.
    """
    x, y = np.array(xs), np.array(ys)
    spans = [np.ptp(v) or 1.0 for v in (x, y)]
    across, down = (x - x[0]) / spans[0], (y - y[0]) / spans[1]
    return int(np.argmax(down - across * down[-1]))
