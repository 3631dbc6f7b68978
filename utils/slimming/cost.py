"""What a model costs: parameters, FLOPs, bytes of weights; and what is left of that after any cut."""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from utils.modules import deep_copy
from utils.slimming.branches import Branch
from utils.slimming.equivalence import Inputs, UnfitImagesError, as_call
from utils.slimming.graph import ChannelGraph, weighted_layers

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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


def profile(model: nn.Module, imgsz: int = 640, channels: int = 3, inputs: Inputs | None = None) -> Cost:
    """Cost of one square image of `imgsz` pixels, or of example inputs, on the meta device: nothing is computed."""
    _, flops = _meta_pass(model, (), imgsz, channels, inputs)
    floats = [t for t in model.state_dict().values() if t.is_floating_point()]
    return Cost(parameters=sum(p.numel() for p in model.parameters()), flops=flops,
                bytes=sum(4 * t.numel() for t in floats))


def _meta_pass(model: nn.Module, names: Iterable[str], imgsz: int, channels: int, inputs: Inputs | None,
               ) -> tuple[dict[str, int], int]:
    """(name of a layer -> positions of its kernel over all calls, FLOPs of the whole model)."""
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports triton

    # deepcopy takes what the memo has in the place of a tensor: no weight is copied.
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    meta_model = deep_copy(model, memo).eval()
    for module in meta_model.modules():
        if type(module) in BATCH_NORMS:  # it counts no FLOPs, and meta tensors take it through Python
            module.forward = nn.Identity().forward
    pixels = dict.fromkeys(names, 0)

    def count(name: str, layer: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        if isinstance(layer, nn.ConvTranspose2d):
            y = args[0] if args else kwargs["input"]  # the kernel is laid on each pixel that is read
        pixels[name] += y.numel() // y.shape[1]  # of every call: a layer may be shared

    for name in pixels:
        meta_model.get_submodule(name).register_forward_hook(partial(count, name), with_kwargs=True)
    dtype = next(meta_model.parameters()).dtype
    args, kwargs = as_call(torch.empty(1, channels, imgsz, imgsz, device="meta") if inputs is None else inputs)
    args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta", dtype if x.is_floating_point() else x.dtype),
                                 (args, kwargs))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            meta_model(*args, **kwargs)
        except Exception as error:  # whatever its code raises
            raise UnfitImagesError(model, (args, kwargs), error) from error
    return pixels, counter.get_total_flops()


@dataclass(frozen=True)
class _LayerCost:
    """What one pair of an output and an input channel of a layer costs, and one output channel's bias.

    around: ids of the branches that the layer is in.
    """

    name: str
    around: np.ndarray
    weights: float
    flops: float
    bias: int
    depthwise: bool


class CostModel:
    """What is left of a model after any cut, counted from its channel graph without making the cut.

    A convolution with r output channels, c input channels and k x k taps on a map of p pixels has r * c * k^2 weights
    (a group's share of them where it is grouped) and takes 2 * r * c * k^2 * p FLOPs. The map is that which it makes,
    of a transposed one that which it reads. A Linear is a convolution of one tap on one pixel.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, imgsz: int = 640, channels: int = 3,
                 inputs: Inputs | None = None):
        self.graph = graph
        pixels, total = _meta_pass(model, graph.outputs, imgsz, channels, inputs)
        self.parts: list[_LayerCost] = []
        self.alone = [(times, ids, graph.around(name)) for times, of_kind in ((2, graph.norms), (1, graph.vectors))
                      for name, ids in of_kind.items()]
        counted = sum(times * len(ids) for times, ids, _ in self.alone)
        for name, layer in weighted_layers(model, graph.outputs).items():
            weights = 1.0 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size) / layer.groups
            depthwise = graph.outputs[name] is graph.inputs[name]
            self.parts.append(_LayerCost(name, graph.around(name), weights, 2 * weights * pixels[name],
                                         int(layer.bias is not None), depthwise))
            counted += sum(p.numel() for p in layer.parameters(recurse=False))
        # What no cut of channels changes: attention, say.
        self.rest = sum(p.numel() for p in model.parameters()) - counted
        of_channels = {f"{name}.{key}" for name in (*graph.outputs, *graph.norms) for key in ("weight", "bias")}
        self.rest_of_branches = [(p.numel(), graph.around(name)) for name, p in model.named_parameters()
                                 if name not in of_channels | graph.vectors.keys()]
        self.rest_flops = total - round(sum(
            part.flops * len(graph.inputs[part.name]) * len(graph.outputs[part.name]) for part in self.parts))

    def remaining(self, keep: np.ndarray | None = None) -> tuple[int, int]:
        """(parameters, FLOPs) when only the ids with keep (bool, (ids,)) are left; of the whole model without it."""
        graph = self.graph
        if keep is None:
            keep = np.ones(len(graph.group), bool)
        gone = sum(count for count, around in self.rest_of_branches if not keep[around].all())
        parameters, flops = float(self.rest - gone), float(self.rest_flops)
        for part in self.parts:
            if not keep[part.around].all():
                continue
            inputs = graph.inputs[part.name]
            rows = int(keep[graph.outputs[part.name]].sum())
            columns = len(inputs) if part.depthwise else int(keep[inputs].sum())
            parameters += rows * columns * part.weights + rows * part.bias
            flops += rows * columns * part.flops
        parameters += sum(times * int(keep[ids].sum()) for times, ids, around in self.alone if keep[around].all())
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

    def flops_of_branch(self, branch: Branch) -> float:
        """The FLOPs that go when a branch goes and nothing else."""
        keep = np.ones(len(self.graph.group), bool)
        keep[branch.number] = False
        return self.remaining()[1] - self.remaining(keep)[1]
