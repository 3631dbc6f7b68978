"""Blocks of channels: channels that go together so that a multiple is left of a layer."""
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


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
