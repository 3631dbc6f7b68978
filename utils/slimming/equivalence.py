"""The equivalence check: do two models compute the same?"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

EQUIVALENCE_BOUND = 1e-9  # float64 rounding stays below it


def largest_difference(a: nn.Module, b: nn.Module, channels: int = 3,
                       sizes: Sequence[tuple[int, int, int]] = ((2, 64, 64), (1, 96, 128)), seed: int = 0) -> float:
    """Largest |a(x) - b(x)| in float64 over random images, relative to the largest |a(x)| of that output.

    For a = masked and b = slim this shows that surgery was exact: it is rounding, below EQUIVALENCE_BOUND. Infinity
    where the outputs differ in shape or are not finite. `sizes` are (images, height, width).
    """
    worst = 0.0
    for p, q in zip(_outputs(a, channels, sizes, seed), _outputs(b, channels, sizes, seed), strict=True):
        if p.shape != q.shape or not bool(torch.isfinite(p).all() & torch.isfinite(q).all()):
            return float("inf")
        worst = max(worst, float((p - q).abs().max() / p.abs().max().clamp_min(1e-30)))
    return worst


@torch.no_grad()
def _outputs(model: nn.Module, channels: int, sizes: Sequence[tuple[int, int, int]], seed: int) -> list[Tensor]:
    """All outputs for all sizes, on the CPU. The model is not changed."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(n, channels, h, w, dtype=torch.float64, generator=generator) for n, h, w in sizes]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with _Doubles():
            return [y for x in images for y in _tensors(model(x))]
    finally:
        for module, flag in training:
            module.training = flag


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


def _tensors(value: Any) -> Iterable[Tensor]:
    """Every tensor in a model's output, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    for item in value.values() if isinstance(value, dict) else value:
        yield from _tensors(item)
