"""Repairs after a cut that took more than zeros. They look at images."""
from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from utils.slimming.graph import ChannelGraph, Masks, batch_norms, weighted_layers
from utils.slimming.surgery import M

Images = Tensor | tuple[Tensor, ...]


@torch.no_grad()
def absorb(model: M, graph: ChannelGraph, masks: Masks, images: Iterable[Images]) -> M:
    """A copy whose other layers carry the mean of the channels that are about to be cut; nothing is cut yet.

    A cut channel was about act(beta), and exactly that where gamma is 0. A convolution that reads it adds sum(W) times
    that to its output. This goes into the mean of the BatchNorm behind the convolution, or into its own bias. The means
    are measured on `images`, as recalibrate() takes them, so any activation, pool, concat or sum between is covered.
    Exact for constant channels and 1x1 convolutions; zero padding makes the border of larger ones differ. Grouped and
    transposed convolutions are left alone, and so is one that a BatchNorm without a scale may follow first.
    """
    keep = graph.kept(masks)
    new = deepcopy(model).eval()
    unscaled = {int(i) for ids in graph.unscaled.values() for i in ids}
    convs = {name: conv for name, conv in weighted_layers(new, graph.inputs).items()
             if isinstance(conv, nn.Conv2d) and conv.groups == 1 and int(graph.outputs[name][0]) not in unscaled}
    gone = {name: torch.from_numpy(~keep[graph.inputs[name]]) for name in convs}
    gone = {name: channels for name, channels in gone.items() if channels.any()}
    means = _input_means({name: convs[name] for name in gone}, new, images)
    following = norms_behind(new, graph)
    for name, channels in gone.items():
        conv = convs[name]
        constant = conv.weight.sum((2, 3))[:, channels] @ means[name][channels].to(conv.weight)
        norm = following.get(name)
        if conv.bias is not None:
            conv.bias += constant
        elif norm is not None and norm.running_mean is not None:
            norm.running_mean -= constant
    return new


def norms_behind(model: nn.Module, graph: ChannelGraph) -> dict[str, _BatchNorm]:
    """Name of a convolution -> the BatchNorm that follows it, and normalises its channels and no others."""
    norms, first, behind = batch_norms(model, graph.norms), dict[int, str](), {}
    for name, ids in graph.norms.items():
        first.setdefault(int(ids[0]), name)  # the first BatchNorm over a convolution's channels follows it
    unscaled = {int(i) for ids in graph.unscaled.values() for i in ids}
    for name, ids in graph.outputs.items():
        norm = first.get(int(ids[0]))
        if norm is not None and int(ids[0]) not in unscaled and len(graph.norms[norm]) == len(ids):
            behind[name] = norms[norm]
    return behind


def _input_means(layers: dict[str, nn.Conv2d], model: nn.Module, images: Iterable[Images]) -> dict[str, Tensor]:
    """Mean of each input channel (channels,) of the layers over all images and pixels."""
    total: dict[str, Tensor] = {}
    count = dict.fromkeys(layers, 0)

    def add(name: str, x: Tensor) -> None:
        total[name] = total.get(name, 0) + x.double().sum((0, 2, 3))
        count[name] += x.numel() // x.shape[1]

    handles = [layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
               for name, layer in layers.items()]
    for batch in images:
        model(batch if isinstance(batch, Tensor) else batch[0])
    for handle in handles:
        handle.remove()
    return {name: value / count[name] for name, value in total.items()}


def recalibrate(model: M, images: Iterable[Images]) -> M:
    """A copy whose BatchNorms have the means and variances of `images`.

    images: batches (B, C, H, W) of what it will see, or tuples that begin with one.
    """
    new = deepcopy(model).eval()
    update_bn(images, new)
    return new
