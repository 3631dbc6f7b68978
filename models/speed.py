"""How fast detectors are, in each runtime that is here."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from models.formats.onnx import onnx_latency
from models.yolo import Model, fused, on_device
from utils.slimming.timing import latency

BATCHES = (1, 16)


def milliseconds(models: Sequence[Model], imgsz: int, device: torch.device) -> dict[str, list[float]]:
    """How measured -> median milliseconds per image of each model, in turns."""
    ready = [on_device(fused(model), device) for model in models]
    found: dict[str, list[float]] = {}
    for batch in BATCHES:
        try:
            found[f"torch, batch {batch}"] = latency(ready, imgsz, batch, runs=max(20 // batch, 5))
        except torch.OutOfMemoryError:
            print(f"note: batch {batch} does not fit into the memory of {device}, its speed is not measured")
    on_cpu = [on_device(model, "cpu") for model in ready]
    for batch in BATCHES:
        if ms := onnx_latency(on_cpu, imgsz, batch, runs=max(20 // batch, 5)):
            found[f"onnxruntime on the CPU, batch {batch}"] = ms
    return found
