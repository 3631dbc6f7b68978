"""Milliseconds of models, measured in turns so that a busy moment of the machine hits all of them."""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from utils.slimming.equivalence import Inputs, as_call


def latency(models: Sequence[nn.Module], imgsz: int = 640, batch: int = 1, runs: int = 20,
            channels: int = 3, inputs: Inputs | None = None) -> list[float]:
    """Median milliseconds per image of each model, or of a call with `inputs`.

    Pass models that are ready to run: eval mode, on their device.
    """
    with torch.inference_mode():
        calls = []
        for model in models:
            parameter = next(model.parameters())
            x = torch.rand(batch, channels, imgsz, imgsz, device=parameter.device, dtype=parameter.dtype)
            calls.append(prepared(model, x if inputs is None else inputs))
        return [ms / batch for ms in medians(calls, runs)]


def prepared(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    """A call of the model with these inputs that ends when the device is done. Images are laid out channels_last."""
    device = next(model.parameters()).device
    if isinstance(inputs, torch.Tensor) and inputs.dim() == 4:
        inputs = inputs.to(memory_format=torch.channels_last)
    args, kwargs = as_call(inputs)

    def call() -> None:
        model(*args, **kwargs)
        synchronize(device)

    return call


def medians(calls: Sequence[Callable[[], object]], runs: int = 20, seconds: float = 20.0) -> list[float]:
    """Median milliseconds of each call, over `runs` turns in which each is called once, after up to three for warm-up.

    Where that would take much more than `seconds` there are fewer turns, three at least.
    """
    begun = time.perf_counter()
    for call in calls:  # the first time a runtime starts its threads
        call()
    first = time.perf_counter() - begun
    turns, warm_up = max(min(runs, int(seconds / first)), 3), 2 if first < seconds / 20 else 0
    samples: list[list[float]] = [[] for _ in calls]
    with on_first_core():
        for turn in range(turns + warm_up):
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                if turn >= warm_up:
                    samples[i].append((time.perf_counter() - start) * 1000)
    return [float(np.median(s)) for s in samples]


@contextmanager
def on_first_core() -> Iterator[None]:
    """Keep the calling thread on its first core, away from the threads that a runtime has started (Linux only).

    Otherwise the system puts it on a core with one of them now and then, and all calls take up to twice the time.
    """
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
