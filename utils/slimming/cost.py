"""What a model costs: parameters, FLOPs, bytes of weights, milliseconds an image."""
from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from utils.slimming.graph import ChannelGraph


@dataclass(frozen=True)
class Cost:
    """parameters: count; flops: 2 x multiply-adds for one image; bytes: inference weights (buffers included) in fp32."""

    parameters: int
    flops: int
    bytes: int

    @property
    def gflops(self) -> float:
        return self.flops / 1e9

    @property
    def megabytes(self) -> float:
        return self.bytes / 1e6


def profile(model: nn.Module, imgsz: int | tuple[int, int] = 640, channels: int = 3) -> Cost:
    """Cost of one image of `imgsz` pixels (square, or (h, w)). Nothing is computed: the pass runs on the meta device."""
    height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    ghost = deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ghost(torch.empty(1, channels, height, width, device="meta", dtype=next(ghost.parameters()).dtype))
    state = model.state_dict()
    return Cost(parameters=sum(p.numel() for p in model.parameters()),
                flops=counter.get_total_flops(),
                bytes=sum(4 * t.numel() for t in state.values() if t.is_floating_point()))


def channel_flops(model: nn.Module, graph: ChannelGraph, imgsz: int = 640, channels: int = 3) -> dict[str, np.ndarray]:
    """BatchNorm name -> float (channels,): the FLOPs of one image that go when only this channel (and its group) goes.

    That is its filter in the convolution that makes it, and its input in every convolution that reads it. Depthwise
    convolutions are counted once, with the channel.
    """
    ghost = deepcopy(model).to("meta").eval()
    convolutions = {name: module for name, module in ghost.named_modules() if name in graph.outputs}
    pixels: dict[str, int] = {}

    def note(name: str, y: Tensor) -> None:
        pixels[name] = y.shape[2] * y.shape[3]

    for name, conv in convolutions.items():
        conv.register_forward_hook(lambda _, __, y, name=name: note(name, y))
    with torch.no_grad():
        ghost(torch.empty(1, channels, imgsz, imgsz, device="meta", dtype=next(ghost.parameters()).dtype))
    freed = np.zeros(len(graph.group))
    for name, conv in convolutions.items():
        assert isinstance(conv, nn.Conv2d)
        one = 2.0 * conv.kernel_size[0] * conv.kernel_size[1] * pixels[name]  # an input channel seen by an output channel
        np.add.at(freed, graph.group[graph.outputs[name]], one * conv.in_channels / conv.groups)
        if conv.groups == 1:
            np.add.at(freed, graph.group[graph.inputs[name]], one * conv.out_channels)
    return {name: freed[graph.group[ids]] for name, ids in graph.norms.items()}


def latency(models: list[nn.Module], imgsz: int = 640, batch: int = 1, runs: int = 20, channels: int = 3) -> list[float]:
    """Median milliseconds an image of each model in eval mode, measured in turn so that drift hits all alike.

    Pass models that are ready to run (fused, on their device). Three passes warm up.
    """
    samples: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(runs + 3):
            for i, model in enumerate(models):
                parameter = next(model.parameters())
                x = torch.rand(batch, channels, imgsz, imgsz, device=parameter.device, dtype=parameter.dtype)
                x = x.to(memory_format=torch.channels_last)
                _wait(parameter.device)
                start = time.perf_counter()
                model(x)
                _wait(parameter.device)
                if turn >= 3:
                    samples[i].append((time.perf_counter() - start) * 1000 / batch)
    return [float(np.median(s)) for s in samples]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
