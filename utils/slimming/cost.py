"""What a model costs: parameters, FLOPs, bytes of weights, milliseconds an image."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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


class CostModel:
    """What is left of a model after any cut, counted from its channel graph without making the cut.

    A convolution with r output channels, c input channels and k x k taps on a map of p pixels has r * c * k^2 weights (a
    group's share of them where it is grouped) and takes 2 * r * c * k^2 * p FLOPs.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, imgsz: int = 640, channels: int = 3):
        self.graph = graph
        modules = dict(model.named_modules())
        pixels, total = _map_sizes(model, graph, imgsz, channels)
        self.parts: list[tuple[str, float, float, int]] = []  # name, weights and FLOPs of one output x input channel, biases
        counted = 0
        for name in graph.outputs:
            conv = modules[name]
            assert isinstance(conv, nn.Conv2d)
            weights = conv.kernel_size[0] * conv.kernel_size[1] / conv.groups
            self.parts.append((name, weights, 2 * weights * pixels[name], int(conv.bias is not None)))
            counted += conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel())
        counted += sum(2 * len(ids) for ids in graph.norms.values())
        self.rest = sum(p.numel() for p in model.parameters()) - counted  # what no cut changes
        self.rest_flops = total - round(sum(
            work * len(graph.inputs[name]) * len(graph.outputs[name]) for name, _, work, _ in self.parts))  # attention, say
        self._depthwise = {name for name in graph.outputs if graph.outputs[name] is graph.inputs[name]}

    def remaining(self, keep: np.ndarray) -> tuple[int, int]:
        """(parameters, FLOPs) when only the ids with keep (bool, (ids,)) are left."""
        parameters, flops = float(self.rest), float(self.rest_flops)
        for name, weights, work, bias in self.parts:
            rows, columns = int(keep[self.graph.outputs[name]].sum()), int(keep[self.graph.inputs[name]].sum())
            pairs = rows * (len(self.graph.inputs[name]) if name in self._depthwise else columns)
            parameters += pairs * weights + rows * bias
            flops += pairs * work
        parameters += sum(2 * int(keep[ids].sum()) for ids in self.graph.norms.values())
        return round(parameters), round(flops)

    def freed(self) -> dict[str, np.ndarray]:
        """BatchNorm name -> float (channels,): the FLOPs that go when only this channel (and its group) goes."""
        total = np.zeros(len(self.graph.group))
        for name, _, work, _ in self.parts:
            outputs, inputs = (self.graph.group[ids[name]] for ids in (self.graph.outputs, self.graph.inputs))
            np.add.at(total, outputs, work * len(inputs))
            if name not in self._depthwise:
                np.add.at(total, inputs, work * len(outputs))
        return {name: total[self.graph.group[ids]] for name, ids in self.graph.norms.items()}


def _map_sizes(model: nn.Module, graph: ChannelGraph, imgsz: int, channels: int) -> tuple[dict[str, int], int]:
    """(convolution name -> pixels of its output maps, FLOPs of the whole model), from one pass on the meta device."""
    ghost = deepcopy(model).to("meta").eval()
    pixels: dict[str, int] = {}

    def note(name: str, y: Tensor) -> None:
        pixels[name] = pixels.get(name, 0) + y.shape[2] * y.shape[3]  # of every call: a layer may be shared

    for name, module in ghost.named_modules():
        if name in graph.outputs:
            module.register_forward_hook(lambda _, __, y, name=name: note(name, y))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ghost(torch.empty(1, channels, imgsz, imgsz, device="meta", dtype=next(ghost.parameters()).dtype))
    return pixels, counter.get_total_flops()


def latency(models: list[nn.Module], imgsz: int = 640, batch: int = 1, runs: int = 20, channels: int = 3) -> list[float]:
    """Median milliseconds an image of each model in eval mode, measured in turn so that drift hits all alike.

    Pass models that are ready to run (fused, on their device).
    """
    def prepared(model: nn.Module) -> Callable[[], object]:
        parameter = next(model.parameters())
        x = torch.rand(batch, channels, imgsz, imgsz, device=parameter.device, dtype=parameter.dtype).to(memory_format=torch.channels_last)

        def call() -> None:
            model(x)
            _wait(parameter.device)

        return call

    with torch.inference_mode():
        return [ms / batch for ms in medians([prepared(model) for model in models], runs)]


def medians(calls: Sequence[Callable[[], object]], runs: int = 20, seconds: float = 20.0) -> list[float]:
    """Median milliseconds of each call, over `runs` turns in which each is called once, after up to three turns of warm-up.

    Where that would take much more than `seconds` there are fewer turns, three at least.
    """
    samples: list[list[float]] = [[] for _ in calls]
    begun, turns, warm = time.perf_counter(), runs, 3
    for turn in range(runs + warm):
        if turn == 1:
            one = time.perf_counter() - begun
            turns, warm = max(min(runs, int(seconds / one)), 3), 3 if one < seconds / 20 else 1
        if turn >= turns + warm:
            break
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn >= warm:
                samples[i].append((time.perf_counter() - start) * 1000)
    return [float(np.median(s)) for s in samples]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
