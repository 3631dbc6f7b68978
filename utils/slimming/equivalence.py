"""The equivalence check: do two models compute the same?"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from utils.slimming.tracing import Inputs, as_call, copy_sharing, reason

EQUIVALENCE_BOUND = 1e-9  # float64 rounding stays below it
Sizes = Sequence[tuple[int, int, int]]  # images, height, width


class UnfitImagesError(ValueError):
    """A model that does not compute the images, or other inputs, that it was given."""

    def __init__(self, model: nn.Module, inputs: Any, error: Exception):
        shapes = ", ".join(str(tuple(x.shape)) for x in tree_leaves(inputs) if isinstance(x, Tensor))
        super().__init__(
            f"{type(model).__name__} does not compute images of the shape {shapes} ({reason(error)}); it is "
            "called as model(images), with one tensor: give the imgsz= and channels= that it takes, or inputs=, a "
            "tuple or a dict of example tensors")


def largest_difference(a: nn.Module, b: nn.Module, channels: int = 3, sizes: Sizes = ((2, 64, 64), (1, 96, 128)),
                       seed: int = 0, inputs: Inputs | None = None) -> float:
    """Largest |a(x) - b(x)| in float64 over random images, relative to the largest |a(x)| of that output.

    For a = masked and b = slim this shows that surgery was exact: it is rounding, below EQUIVALENCE_BOUND. Infinity
    where the outputs differ in shape or are not finite, or b does not compute what a does.
    UnfitImagesError where a does not compute such images. inputs: example inputs in their place.
    """
    expected = outputs(a, channels, sizes, seed, inputs)
    try:
        return difference(expected, outputs(b, channels, sizes, seed, inputs))
    except UnfitImagesError:
        return float("inf")


def difference(expected: Sequence[Any], actual: Sequence[Any]) -> float:
    """Largest relative difference of two lists of outputs(). What is no tensor must be equal."""
    worst = 0.0
    if len(expected) != len(actual):
        return float("inf")
    for p, q in zip(expected, actual):
        if not isinstance(p, Tensor) or not isinstance(q, Tensor):
            if type(p) is not type(q) or p != q:
                return float("inf")
        elif p.shape != q.shape or not bool(torch.isfinite(p).all() & torch.isfinite(q).all()):
            return float("inf")
        elif p.numel():
            p, q = p.double(), q.double()
            worst = max(worst, float((p - q).abs().max() / p.abs().max().clamp_min(1e-30)))
    return worst


@torch.no_grad()
def outputs(model: nn.Module, channels: int, sizes: Sizes, seed: int = 0, inputs: Inputs | None = None) -> list[Any]:
    """All outputs in eval mode, in float64 on the CPU, for random images of all sizes: tensors, numbers, None.

    inputs: example inputs in the images' place, of which floating-point tensors are replaced by random ones, too.
    What the model's code changes is changed in a copy. UnfitImagesError where it does not compute such images.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    calls = [as_call(random(n, channels, h, w)) for n, h, w in sizes]
    if inputs is not None:
        calls = [tree_map_only(Tensor, lambda x: random(*x.shape) if x.is_floating_point() else x, as_call(inputs))]
    copy = copy_sharing(model, model.parameters()).eval()
    values: list[Any] = []
    with _Doubles():
        for args, kwargs in calls:
            try:
                values += _leaves(copy(*args, **kwargs))
            except Exception as error:  # whatever its code raises
                raise UnfitImagesError(model, (args, kwargs), error) from error
    return values


class _Doubles(TorchFunctionMode):
    """Within it every operation takes its floating-point tensors as float64 ones on the CPU.

    A weight has a float64 copy while it is used and no longer: large models are checked in little memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # an attribute
            if func == Tensor.dtype.__get__ and args[0].is_floating_point():  # type: ignore[attr-defined]
                return torch.float64
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, _double, (args, kwargs or {}))
        return func(*args, **kwargs)


def _double(x: Tensor) -> Tensor:
    return x.to("cpu", torch.float64 if x.is_floating_point() else x.dtype)


def _leaves(value: Any) -> Iterable[Any]:
    """Every tensor, number, text and None in a model's output, in order."""
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        yield value
        return
    parts = value.values() if isinstance(value, Mapping) else vars(value).values() if is_dataclass(value) else value
    for part in parts:
        yield from _leaves(part)
