"""The equivalence check: do two models compute the same?"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

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
    """All outputs for all sizes. There is one float64 copy at a time: large models are checked in little memory."""
    model, generator = deepcopy(model).cpu().double().eval(), torch.Generator().manual_seed(seed)
    images = (torch.rand(n, channels, h, w, dtype=torch.float64, generator=generator) for n, h, w in sizes)
    return [y for x in images for y in _tensors(model(x))]


def _tensors(value: Any) -> Iterable[Tensor]:
    """Every tensor in a model's output, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    for item in value.values() if isinstance(value, dict) else value:
        yield from _tensors(item)
