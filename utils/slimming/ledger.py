"""The book that the walker keeps: which channels are one, which must stay, and why."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx, nn

from utils.slimming.graph import ChannelGraph
from utils.slimming.values import Channels, Count, Ids


class Ledger:
    """Ids of channels, in groups that can only be kept or cut together (a union-find), and notes for the user."""

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, dict(model.named_modules())
        self.graph = ChannelGraph()
        self.parent: list[int] = []  # union-find over the ids
        self.frozen: set[int] = set()
        self.coupled: set[int] = set()
        self.held_back: set[int] = set()
        self.notes: list[tuple[str, set[int]]] = []
        self.place = ""  # where the node is that is looked at, for notes
        self.parameters = {name for name, _ in model.named_parameters()}
        self.sources: dict[int, str] = {}  # id of a tensor -> the parameter that it is, perhaps seen in another shape

    def new(self, count: int, space: int = 2) -> Channels:
        """Channels of a layer: loose, until a BatchNorm follows."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return Channels(np.arange(start, start + count), np.ones(count, bool), space)

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        if a is b:
            return
        for i, j in zip(a.tolist(), b.tolist()):
            self.parent[self.root(j)] = self.root(i)

    def align(self, ids: np.ndarray, parts: int) -> None:
        """Unite the channels at the same position of equal parts."""
        first, *others = np.split(ids, parts)
        for other in others:
            self.unite(first, other)

    def same_number(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Make both keep equally many channels. False where their numbers differ now."""
        if len(a) != len(b):
            return False
        if not np.array_equal(np.sort(a), np.sort(b)):
            self.unite(a, b)
        return True

    def join(self, values: Sequence[Channels], product: bool = False) -> Channels:
        """Unite channels, which are kept or cut together from here on; ones united by a sum or the like are coupled.

        A product is 0 where one of its factors is. Other results are 0 only where all operands are.
        """
        first, *others = values
        for other in others:
            if not product and any(self.root(i) != self.root(j) for i, j in zip(first.ids, other.ids)):
                self.coupled.update(first.ids.tolist())
            self.unite(first.ids, other.ids)
        together = np.logical_and if product else np.logical_or
        return replace(first, loose=together.reduce([value.loose for value in values]))

    def follows(self, tensor: Any, x: Channels) -> bool:
        """Is this a parameter with one value for each channel of x? Then it is cut with them."""
        name = self.sources.get(id(tensor))
        if name is None or tensor.dim() <= x.space or x.spread:
            return False
        if not tensor.numel() == len(x.ids) == tensor.shape[-1 - x.space]:
            return False
        self.unite(x.ids, self.graph.vectors.setdefault(name, x.ids))
        return True

    def freeze(self, value: Any) -> None:
        """Freeze every channel in a value, however nested."""
        if isinstance(value, slice):
            value = (value.start, value.stop)
        if isinstance(value, (list, tuple, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                self.freeze(part)
        elif isinstance(value, Ids):
            self.frozen.update(value.ids.ravel().tolist())

    def note(self, text: str, *values: Any) -> None:
        """Freeze what the values carry and remember why, unless all of it is frozen already."""
        before, self.frozen = self.frozen, set()
        self.freeze(values)
        if not self.frozen <= before:
            self.notes.append((text, self.frozen))
        self.frozen = before | self.frozen

    def unknown(self, args: Any, kwargs: dict, what: str) -> None:
        self.note(f"{what}: not known to the channel graph, what it reads stays whole", *args, *kwargs.values())

    def strange(self, node: fx.Node, args: list, kwargs: dict) -> None:
        """An operation that has no rule, or whose rule does not cover these arguments."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if any(isinstance(value, Count) for value in (*args, *kwargs.values())):
            return self.unknown(args, kwargs, f"the number of channels{self.place}")
        return self.unknown(args, kwargs, f"operation '{name}'{self.place}")

    def hold_back(self, x: Any) -> None:
        """A BatchNorm that the graph does not know reads x: a note on it tells of channels that could be pruned."""
        if isinstance(x, Ids):
            self.held_back.update(x.ids.ravel().tolist())

    def finish(self) -> ChannelGraph:
        graph, count = self.graph, len(self.parent)
        with_norm = {self.root(i) for norms in (graph.norms, graph.unscaled) for ids in norms.values() for i in ids}
        with_norm |= {self.root(i) for i in self.held_back}
        # Other notes concern no prunable channel. Where no channel is prunable, they say why.
        graph.notes = list(dict.fromkeys(text for text, ids in self.notes
                                         if not with_norm or not with_norm.isdisjoint(map(self.root, ids))))
        graph.group = np.array([self.root(i) for i in range(count)], int)
        graph.frozen, graph.coupled = self.whole_groups(self.frozen), self.whole_groups(self.coupled)
        return graph

    def whole_groups(self, members: set[int]) -> np.ndarray:
        """bool (ids,): belongs to a group that has one of the members."""
        group = self.graph.group
        marked = np.zeros(len(group), bool)
        marked[group[list(members)]] = True
        return marked[group]
