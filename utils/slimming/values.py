"""What the walker carries along a traced model in the place of tensors, and what it asks of arguments."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True)
class Ids:
    """Something whose channels have these ids, int (channels,)."""

    ids: np.ndarray


@dataclass(frozen=True)
class Channels(Ids):
    """A tensor whose dimension 1 is the channels.

    loose, bool (channels,): the channel may differ from 0 where it is cut. A gate's may, sigmoid(0) is 0.5, and so may
    that of a layer that no BatchNorm follows.
    space: dimensions behind the channels. 2 of a map, 0 of a vector, 3 of a stack of maps.
    spread: each channel of a vector may be several values in a row, flattened from a map. Of a vector without ids
    nothing is known.
    """

    loose: np.ndarray
    space: int = 2
    spread: bool = False


@dataclass(frozen=True)
class Grouped(Ids):
    """A map whose channels are laid out in two dimensions, 5-D. ids and loose have the shape of these two."""

    loose: np.ndarray


@dataclass(frozen=True)
class Shape(Ids):
    """x.shape of a tensor with these channels."""

    space: int


@dataclass(frozen=True)
class Count(Ids):
    """The number of these channels, divided by `divisor`, as code computes it."""

    divisor: int = 1


def argument(args: Sequence, kwargs: dict, position: int, name: str, default: Any = None) -> Any:
    """An argument of a traced call, given by name or by position."""
    if name in kwargs:
        return kwargs[name]
    return args[position] if len(args) > position else default


def is_map(x: Any) -> TypeGuard[Channels]:
    return isinstance(x, Channels) and x.space == 2


def is_one_of(module: nn.Module, operations: set[Any]) -> bool:
    """Is the module of a class, or of a subclass of one, that the set names?"""
    return not operations.isdisjoint(type(module).__mro__)


def is_spatial(x: Channels, *dimensions: Any) -> bool:
    """Are these dimensions of x behind its channels?"""
    return bool(dimensions) and all(
        isinstance(d, int) and (2 <= d < 2 + x.space or -x.space <= d < 0) for d in dimensions)


def is_channel_dimension(x: Channels, dimension: Any) -> bool:
    return isinstance(dimension, int) and dimension in (1, -1 - x.space)


def is_count_of(number: Any, x: Channels) -> TypeGuard[Count]:
    """Is the number computed from how many channels x has?"""
    return isinstance(number, Count) and np.array_equal(np.sort(number.ids), np.sort(x.ids))


def is_scalar(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.numel() == 1)
