"""Milliseconds of models, measured in turns so that a busy moment of the machine hits all of them."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn


def latency(models: Sequence[nn.Module], imgsz: int = 640, batch: int = 1, runs: int = 20,
            channels: int = 3) -> list[float]:
    """Median milliseconds per image of each model. Pass models that are ready to run: eval mode, on their device."""
    def prepared(model: nn.Module) -> Callable[[], object]:
        parameter = next(model.parameters())
        x = torch.rand(batch, channels, imgsz, imgsz, device=parameter.device, dtype=parameter.dtype)
        x = x.to(memory_format=torch.channels_last)

        def call() -> None:
            model(x)
            synchronize(parameter.device)

        return call

    with torch.inference_mode():
        return [ms / batch for ms in medians([prepared(model) for model in models], runs)]


def medians(calls: Sequence[Callable[[], object]], runs: int = 20, seconds: float = 20.0) -> list[float]:
    """Median milliseconds of each call, over `runs` turns in which each is called once, after up to three for warm-up.

    Where that would take much more than `seconds` there are fewer turns, three at least.
    """
    samples: list[list[float]] = [[] for _ in calls]
    begun, turns, warm_up = time.perf_counter(), runs, 3
    for turn in range(runs + warm_up):
        if turn == 1:
            first = time.perf_counter() - begun
            turns = max(min(runs, int(seconds / first)), 3)
            warm_up = 3 if first < seconds / 20 else 1
        if turn >= turns + warm_up:
            break
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                samples[i].append((time.perf_counter() - start) * 1000)
    return [float(np.median(s)) for s in samples]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
