"""The pruning engine for a detector."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from models.speed import torch_latency
from models.yolo import Model
from utils.slimming.pruner import Pruner


def model_pruner(model: Model, imgsz: int, device: torch.device | str = "cpu",
                 evaluate: Callable[[Model], Mapping[str, float]] | None = None,
                 losses: Callable[[Model], Iterable[Tensor]] | None = None,
                 milliseconds: Callable[[Sequence[Model]], Sequence[float]] | None = None) -> Pruner[Model]:
    """A Pruner that knows a Model's channels and stride, and times it fused on `device` unless told otherwise."""
    pruner = Pruner(model, imgsz, model.yaml["ch"], evaluate=evaluate, losses=losses, milliseconds=milliseconds or (
        lambda models: torch_latency(models, imgsz, torch.device(device))))
    pruner.stride = int(model.stride.max())
    return pruner
