"""Copies of modules."""
from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)
# A class that has one of these of its own is copied as it says.
OWN = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def copy_module(module: M, memo: dict[int, Any]) -> M:
    """What deepcopy(module, memo) gives, in a fraction of the time.

    A module has a dozen dictionaries of hooks. Nearly all are empty; these are made anew, not copied.
    """
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = type(module).__new__(type(module))
    for name, value in vars(module).items():
        if type(value) in (dict, OrderedDict) and not value:
            vars(new)[name] = type(value)()
        elif name == "_modules":
            children = ((key, None if child is None else deep_copy(child, memo)) for key, child in value.items())
            vars(new)[name] = type(value)(children)
        else:
            vars(new)[name] = deepcopy(value, memo)
    return new


def deep_copy(module: M, memo: dict[int, Any]) -> M:
    """deepcopy(module, memo), by copy_module() unless its class has a way of its own."""
    if any(getattr(type(module), name, None) is not getattr(nn.Module, name, None) for name in OWN):
        return deepcopy(module, memo)
    return copy_module(module, memo)
