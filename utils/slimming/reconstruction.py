"""Least-squares repair of a cut: the weights that are left make up for what the cut channels sent.

He et al. 2017 (arXiv 1707.06168, section 3.1) choose the weights of a layer that lost input channels so that its
outputs stay as they were. Here every convolution is refitted, in the order of execution, to what the model computed
before the cut; its inputs are those that the refitted layers before it send.
"""
from __future__ import annotations

from collections import Counter
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from utils.slimming.compensation import norms_behind
from utils.slimming.graph import ChannelGraph, Masks, weighted_layers
from utils.slimming.surgery import M, masked

FEWEST_SAMPLES, MOST_SAMPLES = 4096, 16384  # samples of a layer: positions of its output that the fit looks at
PER_INPUT = 4                               # samples for each weight of a filter, between these bounds
RIDGE = 0.01                                # of the mean square of an input: what holds the weights near their values
SEED = 0

Positions = tuple[Tensor, Tensor, Tensor]  # (samples,) each: image, row, column


@torch.no_grad()
def reconstruct(model: M, graph: ChannelGraph, masks: Masks, images: Tensor) -> M:
    """A masked copy of `model`, refitted: its convolutions give what the model's do, as near as they can.

    images: (N, 3, H, W), training images as training sees them; all are computed at once. For inputs x' of the copy and
    outputs y of the model at the same positions, the new weights W' minimise |y - W'x'|^2 + ridge |W' - W|^2. The
    difference of the means goes into the BatchNorm behind the convolution, or into its bias. Grouped and transposed
    convolutions, and those that run more than once, keep their weights.
    """
    model = deepcopy(model).eval()
    new = masked(model, masks).eval()
    keep = graph.kept(masks)
    targets = _sampled_outputs(model, list(refitted_layers(model, graph)), keep, graph, images)
    following = norms_behind(new, graph)

    def refit(name: str, conv: nn.Conv2d, x: Tensor) -> None:
        positions, y = targets.pop(name)
        rows, columns = (torch.from_numpy(np.flatnonzero(keep[ids[name]])).to(x.device)
                         for ids in (graph.outputs, graph.inputs))
        patches = sampled_patches(conv, x, positions)[:, columns].flatten(1)
        weight = conv.weight[rows][:, columns]
        missing = y[:, rows] - patches @ weight.flatten(1).T
        if conv.bias is not None:
            missing -= conv.bias[rows]
        change = ridge_regression(patches - patches.mean(0), missing - missing.mean(0))
        conv.weight[rows[:, None], columns] = weight + change.T.view_as(weight)
        shift = missing.mean(0) - patches.mean(0) @ change
        norm = following.get(name)
        if conv.bias is not None:
            conv.bias[rows] += shift
        elif norm is not None and norm.running_mean is not None:
            norm.running_mean[rows] -= shift

    handles = [conv.register_forward_pre_hook(lambda layer, inputs, name=name: refit(name, layer, inputs[0]))
               for name, conv in refitted_layers(new, graph).items() if name in targets]
    new(images)
    for handle in handles:
        handle.remove()
    return new


def refitted_layers(model: nn.Module, graph: ChannelGraph) -> dict[str, nn.Conv2d]:
    """Name -> convolution of those that can be refitted."""
    return {name: conv for name, conv in weighted_layers(model, graph.outputs).items()
            if isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)}


def _sampled_outputs(model: nn.Module, names: list[str], keep: np.ndarray, graph: ChannelGraph,
                     images: Tensor) -> dict[str, tuple[Positions, Tensor]]:
    """Name -> positions, and (samples, out) the outputs of the convolution there. Only of those that run once."""
    random, calls = torch.Generator().manual_seed(SEED), Counter[str]()
    samples: dict[str, tuple[Positions, Tensor]] = {}

    def sample(name: str, conv: nn.Conv2d, y: Tensor) -> None:
        calls[name] += 1
        inputs = int(keep[graph.inputs[name]].sum()) * conv.kernel_size[0] * conv.kernel_size[1]
        images, _, height, width = y.shape
        places = images * height * width
        count = min(places, MOST_SAMPLES, max(FEWEST_SAMPLES, PER_INPUT * inputs))
        chosen = torch.randint(places, (count,), generator=random)
        chosen = chosen.to(y.device)
        positions = chosen // (height * width), chosen // width % height, chosen % width
        samples[name] = positions, y[positions[0], :, positions[1], positions[2]]

    layers = weighted_layers(model, names)
    handles = [conv.register_forward_hook(lambda layer, _, y, name=name: sample(name, layer, y))
               for name, conv in layers.items()]
    model(images)
    for handle in handles:
        handle.remove()
    return {name: pair for name, pair in samples.items() if calls[name] == 1}


def sampled_patches(conv: nn.Conv2d, x: Tensor, positions: Positions) -> Tensor:
    """(samples, in, kernel h, kernel w): what the convolution's filters see of x (N, in, H, W) at output positions."""
    assert not isinstance(conv.padding, str)
    (pad_h, pad_w), image = conv.padding, positions[0][:, None, None]
    x = nn.functional.pad(x, (pad_w, pad_w, pad_h, pad_h)).permute(0, 2, 3, 1)
    rows, columns = (place[:, None] * stride + dilation * torch.arange(size, device=x.device)
                     for place, stride, dilation, size in zip(positions[1:], conv.stride, conv.dilation,
                                                              conv.kernel_size))
    return x[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def ridge_regression(x: Tensor, y: Tensor) -> Tensor:
    """B (in, out) that minimises |y - xB|^2 + RIDGE * (mean square of x) * samples * |B|^2.

    x: (samples, in), y: (samples, out). Zero where x is. (Hoerl and Kennard 1970.)
    """
    square = (x.T @ x).double()
    square.diagonal().add_(RIDGE * square.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(square, (x.T @ y).double()).to(y.dtype)
