"""The pruning engine for a detector."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from models.yolo import Model, fused, on_device
from utils.slimming.pruner import Pruner
from utils.slimming.timing import latency


def model_pruner(model: Model, imgsz: int, device: torch.device | str = "cpu",
                 evaluate: Callable[[Model], Mapping[str, float]] | None = None,
                 losses: Callable[[Model], Iterable[Tensor]] | None = None,
                 milliseconds: Callable[[Sequence[Model]], Sequence[float]] | None = None) -> Pruner[Model]:
    """A Pruner that knows a Model's channels and stride, and times it fused on `device` unless told otherwise."""
    pruner = Pruner(model, imgsz, model.yaml["ch"], evaluate=evaluate, losses=losses, milliseconds=milliseconds or (
        lambda models: torch_latency(models, imgsz, torch.device(device))))
    pruner.stride = model.divisor
    return pruner


def torch_latency(models: Sequence[Model], imgsz: int, device: torch.device, batch: int = 1,
                  runs: int = 20) -> list[float]:
    """Median milliseconds per image of the models, fused, in PyTorch."""
    return latency([on_device(fused(model), device) for model in models], imgsz, batch, runs)
