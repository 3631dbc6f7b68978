"""The pruning engine for a detector."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from models.yolo import Model, fused, on_device
from utils.slimming.pruner import Pruner


def model_pruner(model: Model, imgsz: int, device: torch.device | str = "cpu",
                 evaluate: Callable[[Model], Mapping[str, float]] | None = None,
                 losses: Callable[[Model], Iterable[Tensor]] | None = None) -> Pruner[Model]:
    """A Pruner that knows a Model's channels and stride, and times it fused on `device`."""
    pruner = Pruner(model, imgsz, model.yaml["ch"], evaluate=evaluate, losses=losses,
                    prepare=lambda m: on_device(fused(m), device))
    pruner.stride = int(model.stride.max())
    return pruner
