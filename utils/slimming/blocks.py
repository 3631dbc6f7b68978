"""Groups of channels, which are coupled, and blocks of groups, which go together so that a multiple is left."""
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


class ChannelGroups:
    """The channels of several layers, numbered one after another, and the groups that couple them: constant tables.

    sizes: channels of each layer. numbers: int (channels,), equal for channels of one group. cost: float (channels,).
    floors: int (layers,), so many channels of a layer are protected. may_go: bool (channels,), False for those that
    are protected in any case.
    """

    def __init__(self, sizes: np.ndarray, numbers: np.ndarray, cost: np.ndarray, floors: np.ndarray, may_go: np.ndarray,
                 device: torch.device | None):
        layer = np.repeat(np.arange(len(sizes)), sizes)
        _, first, group, counts = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
        self.in_layer = np.zeros((len(counts), len(sizes)), int)  # (groups, layers) channels
        np.add.at(self.in_layer, (group, layer), 1)

        def on_device(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array, device=device)

        self.layer = on_device(layer)                                # (channels,)
        self.place = on_device((sizes.cumsum() - sizes)[layer])      # (channels,) number of the layer's first channel
        self.floor = on_device(floors[layer])                        # (channels,) of the channel's layer
        self.group = on_device(group)                                # (channels,)
        self.counts = on_device(counts)                              # (groups,) channels
        self.members = on_device(membership_table(group))            # (groups, most) numbers of their channels
        self.fixed = on_device(~may_go[first])                       # (groups,) they never go
        self.cost = on_device(cost[first].astype(np.float32))        # (groups,) of a channel

    def __len__(self) -> int:
        return len(self.counts)

    def protected(self, ranking: Tensor) -> Tensor:
        """bool (groups,): fixed, or among the best of a layer by this ranking (groups,), from the worst to the best."""
        rank = torch.empty_like(ranking)
        rank[ranking] = torch.arange(len(ranking), device=ranking.device)
        order = rank[self.group].argsort(descending=True, stable=True)
        order = order[self.layer[order].argsort(stable=True)]  # channels by layer, within a layer from best to worst
        position = torch.arange(len(order), device=order.device) - self.place
        protected = self.fixed.clone()
        protected[self.group[order[position < self.floor]]] = True
        return protected


class ChannelBlocks:
    """Groups of channels, dealt into blocks in the order of any ranking.

    `in_layer`, (groups, layers), counts a group's channels in each layer. Groups of equal counts are of one kind. A
    block holds groups of one kind, as many as make a multiple of `round_to` channels in every layer; the lowest block
    of a kind takes the remainder.
    """

    def __init__(self, in_layer: np.ndarray, round_to: int, device: torch.device | None):
        self.in_layer, kind = np.unique(in_layer, axis=0, return_inverse=True)  # (kinds, layers)
        kind = kind.reshape(-1)
        self.counts = np.bincount(kind)  # groups of each kind
        self.sizes = [max(round_to // math.gcd(round_to, int(c)) for c in row[row > 0]) for row in self.in_layer]
        numbers, blocks = [np.zeros(0, int)], 0
        for size, count in zip(self.sizes, self.counts):
            numbers.append(blocks + (np.arange(count) + -count % size) // size)
            blocks += -(-count // size)
        self.kind = torch.as_tensor(kind, device=device) if max(self.sizes, default=1) > 1 else None
        # (blocks, most groups): positions in a ranking by kind
        self.table = torch.as_tensor(membership_table(np.concatenate(numbers)), device=device)

    def arrange(self, ranking: Tensor) -> Tensor:
        """A ranking (groups,) -> (blocks, most groups) numbers of groups, from the lowest block of a kind to its best.

        Rows are filled up with the number of groups.
        """
        if self.kind is None:
            return self.table
        by_kind = ranking[self.kind[ranking].argsort(stable=True)]
        return append(by_kind, len(ranking))[self.table]

    def min_remaining(self, floors: np.ndarray) -> int:
        """At least so many channels remain in any case, since every layer keeps `floors`, (layers,), of its own."""
        of_one_kind = (self.in_layer > 0).sum(0) == 1  # where there are several kinds, any of them may remain
        channels = 0
        for row, size, count in zip(self.in_layer, self.sizes, self.counts):
            needed = [-(-int(floors[i]) // int(row[i])) for i in np.flatnonzero((row > 0) & of_one_kind)]
            whole_blocks = -(-max(needed, default=0) // size) * size
            channels += min(int(count), whole_blocks) * int(row.sum())
        return channels


def membership_table(labels: np.ndarray) -> np.ndarray:
    """Labels 0..n-1 of things -> (n, most): the things of each label in order, filled up with the number of things."""
    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    table = np.full((len(counts), counts.max(initial=1)), len(labels))
    position = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    table[labels[order], position] = order
    return table


def append(values: Tensor, value: float) -> Tensor:
    """One more value at the end, for tables that are filled up with the index behind the last."""
    return nn.functional.pad(values, (0, 1), value=value)
