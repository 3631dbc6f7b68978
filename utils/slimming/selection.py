"""From scores to masks: which channels go.

The score of a channel is |gamma| of its BatchNorm. All prunable channels of the network are ranked together, by order
and never by comparing with a value: many gammas are exactly equal (0, say), and a comparison would cut all or none of them.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from utils.slimming.graph import ChannelGraph


@dataclass(frozen=True)
class Limit:
    """The source's safety rule: above the smallest of the layers' largest gammas, some layer would lose every channel."""

    gamma: float    # the largest threshold that leaves every layer a channel
    percent: float  # the share of prunable channels below it, 0..1


def gammas(graph: ChannelGraph, model: nn.Module) -> dict[str, Tensor]:
    """|gamma| (channels,) on the CPU of every BatchNorm with a prunable channel; not to be cut ones are left out."""
    modules = dict(model.named_modules())
    return {name: modules[name].weight.detach().float().cpu().abs()[mask]  # type: ignore[operator, union-attr]
            for name, mask in graph.prunable().items() if bool(mask.any())}


def limit(graph: ChannelGraph, model: nn.Module) -> Limit:
    """The largest safe gamma and the percent that it corresponds to."""
    layers = gammas(graph, model)
    if not layers:
        return Limit(0.0, 0.0)
    safe = min(float(g.max()) for g in layers.values())
    everything = torch.cat(list(layers.values()))
    return Limit(safe, float((everything < safe).float().mean()))


def select(graph: ChannelGraph, model: nn.Module, percent: float = 0.5, min_channels: int = 1) -> dict[str, Tensor]:
    """Masks that cut the lowest-scored `percent` (0..1) of all prunable channels, for every BatchNorm of the graph.

    Every layer keeps at least `min_channels` channels, its best ones; the cut goes on with the next in rank, so
    that the share is reached unless floors forbid it. Equal scores are cut in layer order (deterministic).
    Raises ValueError for a percent outside 0..1 or min_channels below 1.
    """
    if not 0 <= percent < 1:
        raise ValueError(f"percent must be at least 0 and below 1, not {percent}")
    if min_channels < 1:
        raise ValueError(f"min_channels must be at least 1, not {min_channels}")
    scores = _group_scores(graph, model)
    can_go = ~(graph.frozen | graph.tied)
    protected = np.zeros(len(graph.group), bool)
    for ids in graph.norms.values():
        best = ids[np.argsort(-scores[graph.group[ids]], kind="stable")][:min_channels]
        protected[graph.group[best]] = True
    roots, channels = np.unique(graph.group[np.concatenate(list(graph.norms.values()))], return_counts=True)
    total = int(channels[can_go[roots]].sum())
    candidates = can_go[roots] & ~protected[roots]
    roots, channels = roots[candidates], channels[candidates]
    order = np.argsort(scores[roots], kind="stable")
    cut = order[np.cumsum(channels[order]) <= round(percent * total)]
    keep = np.ones(len(graph.group), bool)
    keep[roots[cut]] = False
    return {name: torch.from_numpy(keep[graph.group[ids]]) for name, ids in graph.norms.items()}


def _group_scores(graph: ChannelGraph, model: nn.Module) -> np.ndarray:
    """Score of every group of ids, at the index of its root: the mean |gamma| of the BatchNorm channels in it."""
    modules = dict(model.named_modules())
    total, count = np.zeros(len(graph.group)), np.zeros(len(graph.group))
    for name, ids in graph.norms.items():
        np.add.at(total, graph.group[ids], modules[name].weight.detach().double().abs().cpu().numpy())  # type: ignore[operator, union-attr]
        np.add.at(count, graph.group[ids], 1)
    return total / np.maximum(count, 1)
