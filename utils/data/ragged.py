"""Rows of many images in one array: no Python object per image, which forked workers would copy as they count them."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


class Ragged:
    """A sequence of arrays that differ in length only: item i is values[starts[i]:starts[i] + counts[i]], a view.

    starts: where each begins; one after the other unless it is given.
    """

    def __init__(self, values: np.ndarray, counts: np.ndarray, starts: np.ndarray | None = None):
        self.values, self.counts = values, counts
        self.starts = counts.cumsum(dtype=np.int64) - counts if starts is None else starts

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Ragged:
        """A copy of some arrays, at least one."""
        return cls(np.concatenate(arrays), np.fromiter(map(len, arrays), np.int64, len(arrays)))

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """All items of some, at least one, one after the other."""
        return cls(np.concatenate([part.flat() for part in parts]), np.concatenate([part.counts for part in parts]))

    def take(self, index: np.ndarray) -> Ragged:
        """The items at (n,) `index` in that order. The values stay where they are."""
        return Ragged(self.values, self.counts[index], self.starts[index])

    def flat(self) -> np.ndarray:
        """The rows of all items in order, as one array."""
        before = self.counts.cumsum(dtype=np.int64) - self.counts
        if np.array_equal(self.starts, before) and self.counts.sum() == len(self.values):
            return self.values
        rows = np.arange(self.counts.sum()) + np.repeat(self.starts - before, self.counts)
        return self.values[rows]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.starts[index]
        return self.values[start:start + self.counts[index]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))


class Paths:
    """A sequence of paths, kept as one text: a Path exists only while somebody holds it."""

    def __init__(self, paths: Sequence[str]):
        text = np.frombuffer(os.fsencode("".join(f"{path}\0" for path in paths)), np.uint8)
        ends = np.flatnonzero(text == 0)  # a path holds no NUL
        starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
        self.text = Ragged(text, ends - starts, starts)

    def take(self, index: np.ndarray) -> Paths:
        """The paths at (n,) `index` in that order."""
        taken = Paths(())
        taken.text = self.text.take(index)
        return taken

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> Path:
        return Path(os.fsdecode(self.text[index].tobytes()))

    def __iter__(self) -> Iterator[Path]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Paths, Sequence)) and list(self) == list(other)
