"""From scores to masks: which channels go.

The score of a channel is |gamma| of its BatchNorm unless another is asked for. All prunable channels of the network
are ranked together, by order and never by comparing with a value: many gammas are exactly equal (0, say), and a comparison
would cut all or none of them.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
import torch
from torch import Tensor, nn

from utils.slimming.graph import ChannelGraph
from utils.slimming.surgery import Masks

MIN_SHARE = 0.25  # default of prune.py; after an L1 run on BCCD, a floor of 0.1 ended .018 mAP50-95 lower


@dataclass(frozen=True)
class Limit:
    """The threshold rule: above the smallest of the layers' largest gammas, some layer would lose every channel."""

    gamma: float    # the largest threshold that leaves every layer a channel
    percent: float  # the share of prunable channels below it, 0..1


@dataclass(frozen=True)
class Rules:
    """What every selection keeps to."""

    min_channels: int = 1        # that every layer keeps, its best ones
    min_share: float = 0.0       # of its channels that every layer keeps unless their score is 0: a thread of a layer starves what follows
    round_to: int = 1            # a layer that is cut keeps a multiple of this, as far as it has so many
    joint: bool = False          # channels that shortcuts tie together may go, all of them at once; otherwise they stay
    keep: tuple[str, ...] = ()   # patterns of BatchNorm names, such as model.0.*: these layers stay whole


# Scores of convolution filters and BatchNorm scales, each over the ids that they belong to ----------------------------

def _gamma(graph: ChannelGraph, modules: Mapping[str, nn.Module]) -> np.ndarray:
    """|gamma| (Liu et al. 2017), the mean over the BatchNorm channels of a group."""
    return _mean(graph, {name: modules[name].weight.detach().abs() for name in graph.norms}, graph.norms)  # type: ignore[operator, union-attr]


def _l1(graph: ChannelGraph, modules: Mapping[str, nn.Module]) -> np.ndarray:
    """Mean |weight| of the filters that make the channel (Li et al. 2017, arXiv 1608.08710)."""
    filters = {name: modules[name].weight.detach().abs().flatten(1).mean(1) for name in graph.outputs}  # type: ignore[operator, union-attr]
    return _mean(graph, filters, graph.outputs)


SCORES: dict[str, Callable[[ChannelGraph, Mapping[str, nn.Module]], np.ndarray]] = {
    "gamma": _gamma, "l1": _l1, "gamma-l1": lambda graph, modules: _gamma(graph, modules) * _l1(graph, modules)}


def _mean(graph: ChannelGraph, values: Mapping[str, Tensor], ids: Mapping[str, np.ndarray]) -> np.ndarray:
    """(ids,) mean of the values that fall into a group, at the index of its root."""
    total, count = np.zeros(len(graph.group)), np.zeros(len(graph.group))
    for name, value in values.items():
        np.add.at(total, graph.group[ids[name]], value.double().cpu().numpy())
        np.add.at(count, graph.group[ids[name]], 1)
    return total / np.maximum(count, 1)


# Selection ------------------------------------------------------------------------------------------------------------

class Selection:
    """The channels of a model, ranked once; then masks that cut any number of them.

    `score` is one of SCORES; `costs` (BatchNorm name -> (channels,), as CostModel.freed gives) divide it, so that
    channels that cost much go first. Ties are broken by layer order. Masks are for every BatchNorm of the graph.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, rules: Rules = Rules(), score: str = "gamma",  # noqa: B008  (it is frozen)
                 costs: Mapping[str, np.ndarray] | None = None):
        if rules.min_channels < 1 or rules.round_to < 1 or not 0 <= rules.min_share <= 1:
            raise ValueError(f"min_channels and round_to must be at least 1 and min_share between 0 and 1: {rules}")
        whole = matching(graph.norms, rules.keep)
        self.graph, self.rules = graph, rules
        self.scores = SCORES[score](graph, dict(model.named_modules()))
        if costs is not None:
            divisor = np.ones(len(graph.group))
            for name, ids in graph.norms.items():
                divisor[graph.group[ids]] = np.maximum(costs[name], 1)
            self.scores = self.scores / divisor
        can_go = ~graph.frozen if rules.joint else ~(graph.frozen | graph.tied)
        protected = np.zeros(len(graph.group), bool)
        for name, ids in graph.norms.items():
            if name in whole:
                protected[graph.group[ids]] = True
                continue
            best = ids[np.argsort(-self.scores[graph.group[ids]], kind="stable")]
            protected[graph.group[best[:rules.min_channels]]] = True
            share = best[:math.ceil(rules.min_share * len(ids))]
            protected[graph.group[share[self.scores[graph.group[share]] > 0]]] = True
        roots, channels = np.unique(graph.group[np.concatenate(list(graph.norms.values()))], return_counts=True)
        self.total = int(channels[can_go[roots]].sum())  # BatchNorm channels that may go at all
        self.prunable = {name: torch.from_numpy(can_go[ids] & (name not in whole)) for name, ids in graph.norms.items()}  # which those are
        candidates = can_go[roots] & ~protected[roots]
        roots, channels = roots[candidates], channels[candidates]
        order = np.argsort(self.scores[roots], kind="stable")
        self.roots, self.channels = roots[order], channels[order]  # from the first to go to the last

    def percent(self, share: float) -> Masks:
        """Cut the lowest `share` (0..1) of the prunable channels. ValueError for a share outside 0..1."""
        if not 0 <= share < 1:
            raise ValueError(f"percent must be at least 0 and below 1, not {share}")
        return self.cut(int((np.cumsum(self.channels) <= round(share * self.total)).sum()))

    def until(self, done: Callable[[int], bool]) -> tuple[int, bool]:
        """The smallest number of groups for which done(number) is true, by bisection, and True; or that of all groups, and False.

        `done` is taken to stay true for all larger cuts.
        """
        low, high = 0, len(self.roots)
        if not done(high):
            return high, False
        while low < high:
            middle = (low + high) // 2
            if done(middle):
                high = middle
            else:
                low = middle + 1
        return high, True

    def cut(self, groups: int) -> Masks:
        """Cut the lowest `groups` groups of channels (a channel without ties is a group of its own), then round."""
        return self._without(self.roots[:groups])

    def layer(self, name: str, share: float) -> Masks:
        """Cut the lowest `share` (0..1) of the groups of one BatchNorm that may go, and nothing else but what is tied to them."""
        own = self.roots[np.isin(self.roots, self.graph.group[self.graph.norms[name]])]
        return self._without(own[:round(share * len(own))])

    def _without(self, roots: np.ndarray) -> Masks:
        """Masks that cut these groups, after rounding."""
        keep = np.ones(len(self.graph.group), bool)
        keep[roots] = False
        while self.rules.round_to > 1 and self._round_up(keep):
            pass  # groups that layers share: rounding one may move another
        return {name: torch.from_numpy(keep[self.graph.group[ids]]) for name, ids in self.graph.norms.items()}

    def _round_up(self, keep: np.ndarray) -> bool:
        """Give layers the best of their cut channels back until what is left is a multiple; in place. Did it change?"""
        changed = False
        for ids in self.graph.norms.values():
            roots = self.graph.group[ids]
            gone = roots[~keep[roots]]
            missing = min(-(len(roots) - len(gone)) % self.rules.round_to, len(gone))
            if missing:
                keep[gone[np.argsort(-self.scores[gone], kind="stable")][:missing]] = changed = True
        return changed


def matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names that one of the patterns (model.0.*) means. ValueError for a pattern that means none."""
    found = {p: {name for name in names if fnmatch(name, p)} for p in patterns}
    if unused := [p for p in patterns if not found[p]]:
        raise ValueError(f"no BatchNorm is called {', '.join(unused)}")
    return set().union(*found.values())


def select(graph: ChannelGraph, model: nn.Module, percent: float = 0.5, min_channels: int = 1) -> Masks:
    """Masks that cut the channels with the smallest |gamma|, `percent` (0..1) of the prunable ones.

    Every layer keeps at least `min_channels` channels, its best ones; the cut goes on with the next in rank, so
    that the share is reached unless floors forbid it. Raises ValueError for a percent outside 0..1 or min_channels below 1.
    """
    return Selection(graph, model, Rules(min_channels)).percent(percent)


def gammas(graph: ChannelGraph, model: nn.Module, prunable: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """|gamma| (channels,) on the CPU of every BatchNorm with a prunable channel; those that may not be cut are left out.

    `prunable` is a Selection's; by default that of the graph, without channels that shortcuts tie.
    """
    modules = dict(model.named_modules())
    return {name: modules[name].weight.detach().float().cpu().abs()[mask]  # type: ignore[operator, union-attr]
            for name, mask in (graph.prunable() if prunable is None else prunable).items() if bool(mask.any())}


def limit(graph: ChannelGraph, model: nn.Module, prunable: Mapping[str, Tensor] | None = None) -> Limit:
    """The largest safe gamma and the percent that it corresponds to, over the channels that may be cut (see gammas)."""
    layers = gammas(graph, model, prunable)
    if not layers:
        return Limit(0.0, 0.0)
    safe = min(float(g.max()) for g in layers.values())
    everything = torch.cat(list(layers.values()))
    return Limit(safe, float((everything < safe).float().mean()))


def knee(x: np.ndarray, y: np.ndarray) -> int:
    """Index of the point that lies farthest above the line from the first to the last point, both axes scaled to 0..1.

    The "kneedle" of Satopaa et al. 2011 for a falling curve: where it starts to fall steeply.
    """
    spans = [np.ptp(v) or 1.0 for v in (x, y)]
    across, down = (x - x[0]) / spans[0], (y - y[0]) / spans[1]
    return int(np.argmax(down - across * down[-1]))
