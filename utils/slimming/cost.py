"""What a model costs: parameters, FLOPs, bytes of weights; and what is left of that after any cut."""
from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.slimming.equivalence import UnfitImagesError
from utils.slimming.graph import ChannelGraph, convolutions


@dataclass(frozen=True)
class Cost:
    """parameters: count; flops: 2 x multiply-adds for one image; bytes: inference weights (with buffers) in fp32."""

    parameters: int
    flops: int
    bytes: int

    @property
    def gflops(self) -> float:
        return self.flops / 1e9

    @property
    def megabytes(self) -> float:
        return self.bytes / 1e6


def profile(model: nn.Module, imgsz: int = 640, channels: int = 3) -> Cost:
    """Cost of one square image of `imgsz` pixels. Nothing is computed: the pass runs on the meta device."""
    _, flops = _meta_pass(model, (), imgsz, channels)
    floats = [t for t in model.state_dict().values() if t.is_floating_point()]
    return Cost(parameters=sum(p.numel() for p in model.parameters()), flops=flops,
                bytes=sum(4 * t.numel() for t in floats))


def _meta_pass(model: nn.Module, names: Iterable[str], imgsz: int, channels: int) -> tuple[dict[str, int], int]:
    """(name of a convolution -> positions of its kernel over all calls, FLOPs of the whole model)."""
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports triton

    # deepcopy takes what the memo has in the place of a tensor: no weight is copied.
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    meta_model = deepcopy(model, memo).eval()
    pixels = dict.fromkeys(names, 0)

    def count(name: str, conv: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        if isinstance(conv, nn.ConvTranspose2d):
            y = args[0] if args else kwargs["input"]  # the kernel is laid on each pixel that is read
        pixels[name] += y.shape[2] * y.shape[3]  # of every call: a layer may be shared

    for name in pixels:
        meta_model.get_submodule(name).register_forward_hook(partial(count, name), with_kwargs=True)
    image = torch.empty(1, channels, imgsz, imgsz, device="meta", dtype=next(meta_model.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            meta_model(image)
        except Exception as error:  # whatever its code raises
            raise UnfitImagesError(model, image.shape, error) from error
    return pixels, counter.get_total_flops()


@dataclass(frozen=True)
class _ConvolutionCost:
    """What one pair of an output and an input channel of a convolution costs, and one output channel's bias."""

    name: str
    weights: float
    flops: float
    bias: int
    depthwise: bool


class CostModel:
    """What is left of a model after any cut, counted from its channel graph without making the cut.

    A convolution with r output channels, c input channels and k x k taps on a map of p pixels has r * c * k^2 weights
    (a group's share of them where it is grouped) and takes 2 * r * c * k^2 * p FLOPs. The map is that which it makes,
    of a transposed one that which it reads.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, imgsz: int = 640, channels: int = 3):
        self.graph = graph
        pixels, total = _meta_pass(model, graph.outputs, imgsz, channels)
        self.parts: list[_ConvolutionCost] = []
        counted = sum(2 * len(ids) for ids in graph.norms.values())
        for name, conv in convolutions(model, graph.outputs).items():
            weights = conv.kernel_size[0] * conv.kernel_size[1] / conv.groups
            depthwise = graph.outputs[name] is graph.inputs[name]
            self.parts.append(_ConvolutionCost(name, weights, 2 * weights * pixels[name], int(conv.bias is not None),
                                               depthwise))
            counted += sum(p.numel() for p in conv.parameters(recurse=False))
        # What no cut changes: attention, say.
        self.rest = sum(p.numel() for p in model.parameters()) - counted
        self.rest_flops = total - round(sum(
            part.flops * len(graph.inputs[part.name]) * len(graph.outputs[part.name]) for part in self.parts))

    def remaining(self, keep: np.ndarray | None = None) -> tuple[int, int]:
        """(parameters, FLOPs) when only the ids with keep (bool, (ids,)) are left; of the whole model without it."""
        graph = self.graph
        if keep is None:
            keep = np.ones(len(graph.group), bool)
        parameters, flops = float(self.rest), float(self.rest_flops)
        for part in self.parts:
            inputs = graph.inputs[part.name]
            rows = int(keep[graph.outputs[part.name]].sum())
            columns = len(inputs) if part.depthwise else int(keep[inputs].sum())
            parameters += rows * columns * part.weights + rows * part.bias
            flops += rows * columns * part.flops
        parameters += sum(2 * int(keep[ids].sum()) for ids in graph.norms.values())
        return round(parameters), round(flops)

    def flops_per_channel(self) -> dict[str, np.ndarray]:
        """BatchNorm name -> float (channels,): the FLOPs that go when only this channel (and its group) goes."""
        graph = self.graph
        total = np.zeros(len(graph.group))
        for part in self.parts:
            outputs, inputs = graph.group[graph.outputs[part.name]], graph.group[graph.inputs[part.name]]
            np.add.at(total, outputs, part.flops * len(inputs))
            if not part.depthwise:
                np.add.at(total, inputs, part.flops * len(outputs))
        return {name: total[graph.group[ids]] for name, ids in graph.norms.items()}
