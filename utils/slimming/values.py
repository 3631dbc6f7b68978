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
    """A 4-D tensor. loose, bool (channels,): the channel may differ from 0 where it is cut.

    A gate's may, sigmoid(0) is 0.5, and so may a convolution's that no BatchNorm follows.
    """

    loose: np.ndarray


@dataclass(frozen=True)
class Stack(Channels):
    """Such tensors along a new dimension behind the channels: 5-D."""


@dataclass(frozen=True)
class Shape(Ids):
    """x.shape of a tensor with these channels."""


def argument(args: Sequence, kwargs: dict, position: int, name: str, default: Any = None) -> Any:
    """An argument of a traced call, given by name or by position."""
    if name in kwargs:
        return kwargs[name]
    return args[position] if len(args) > position else default


def is_channels(x: Any) -> TypeGuard[Channels]:
    return type(x) is Channels


def is_one_of(module: nn.Module, operations: set[Any]) -> bool:
    """Is the module of a class, or of a subclass of one, that the set names?"""
    return not operations.isdisjoint(type(module).__mro__)


def is_spatial(*dimensions: Any) -> bool:
    """Are these height and width of a 4-D tensor, or one of them?"""
    return bool(dimensions) and all(isinstance(d, int) and d in (2, 3, -1, -2) for d in dimensions)


def is_scalar(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.numel() == 1)


def is_crop(index: Any) -> bool:
    """Is this x[..., a:b, c:d] or x[:, :, a:b, c:d]?"""
    if not isinstance(index, tuple):
        return False
    if index[0] is Ellipsis and len(index) <= 3:
        spatial = index[1:]
    elif index[:2] == (slice(None), slice(None)):
        spatial = index[2:]
    else:
        return False
    return all(isinstance(i, slice) for i in spatial)
