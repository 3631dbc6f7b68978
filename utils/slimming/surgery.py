"""From masks to a slim model, and the proof that nothing but zeros was cut.

A mask is a bool tensor over the channels that a BatchNorm has now; True is kept.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from utils.slimming.graph import ChannelGraph, trace

Masks = dict[str, Tensor]


def slim(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of `model` without the channels whose mask is False; the input is not changed.

    Cutting a BN channel cuts the filter of the convolution before it and that input channel of every convolution after
    it (Liu et al. 2017, section 3.3). BatchNorms without a mask keep all channels.
    Raises ValueError when masks disagree on channels that are one, or cut what must stay.
    """
    graph = trace(model)
    keep = keep_ids(graph, masks)
    new = deepcopy(model)
    modules = dict(new.named_modules())
    for name in graph.outputs:
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        rows, columns = torch.from_numpy(keep[graph.outputs[name]]), torch.from_numpy(keep[graph.inputs[name]])
        width = conv.weight.shape[1]  # channels that a group reads: all, some or, if depthwise, one. Every group keeps the same places
        weight = conv.weight.detach()[rows]
        _replace(conv, "weight", weight if width == 1 else weight[:, columns[:width]])
        if conv.bias is not None:
            _replace(conv, "bias", conv.bias.detach()[rows])
    for name, ids in graph.norms.items():
        for key in ("weight", "bias", "running_mean", "running_var"):
            if getattr(modules[name], key, None) is not None:
                _replace(modules[name], key, getattr(modules[name], key).detach()[torch.from_numpy(keep[ids])])
    for module in modules.values():
        _counts_from_shapes(module)
    return new


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of `model` of the same shape whose cut channels have gamma = beta = 0."""
    new = deepcopy(model)
    modules = dict(new.named_modules())
    with torch.no_grad():
        for name, mask in masks.items():
            modules[name].weight[~mask] = 0.0  # type: ignore[operator]
            modules[name].bias[~mask] = 0.0  # type: ignore[operator]
    return new


@torch.no_grad()
def absorb(model: nn.Module, masks: Masks, images: Iterable[Tensor]) -> nn.Module:
    """A copy whose other layers carry the mean of the channels that are about to be cut; same shape, nothing is cut yet.

    A cut channel was not nothing: it was about act(beta), and exactly that where gamma is 0. A convolution that reads it
    adds sum(W) times that to its output, which is moved into the mean of the BatchNorm behind, or into its own bias. The means
    are measured on `images` (batches (B, C, H, W)), so that any activation, pool, concat or sum between is covered. Exact for constant
    channels and 1x1 convolutions; zero padding makes the border of larger ones differ.
    """
    graph = trace(model)
    keep = keep_ids(graph, masks)
    new = deepcopy(model).eval()
    modules = dict(new.named_modules())
    readers = {name: ~keep[graph.inputs[name]] for name in graph.inputs}
    readers = {name: gone for name, gone in readers.items() if gone.any() and modules[name].groups == 1}
    means = _input_means(new, readers, images)
    behind: dict[int, str] = {}
    for name, ids in graph.norms.items():
        behind.setdefault(int(ids[0]), name)  # the first BatchNorm over a convolution's channels stands right behind it
    for name, gone in readers.items():
        conv, columns = modules[name], torch.from_numpy(gone)
        assert isinstance(conv, nn.Conv2d)
        constant = conv.weight.sum((2, 3))[:, columns] @ means[name][columns].to(conv.weight)
        norm = behind.get(int(graph.outputs[name][0]))
        if conv.bias is not None:
            conv.bias += constant
        elif norm is not None and len(graph.norms[norm]) == len(constant):
            modules[norm].running_mean -= constant  # type: ignore[operator]
    return new


def _input_means(model: nn.Module, names: Iterable[str], images: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean of each input channel (channels,) of the named modules over all images and pixels."""
    modules = dict(model.named_modules())
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        total[name] = total.get(name, 0) + x.double().sum((0, 2, 3))
        count[name] = count.get(name, 0) + x.numel() // x.shape[1]

    handles = [modules[n].register_forward_pre_hook(lambda _, inputs, n=n: note(n, inputs[0])) for n in names]
    for batch in images:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: value / count[name] for name, value in total.items()}


@torch.no_grad()
def recalibrate(model: nn.Module, images: Iterable[Tensor]) -> nn.Module:
    """A copy whose BatchNorms have the means and variances of `images`, batches (B, C, H, W) of what the model will see."""
    new = deepcopy(model).eval()
    norms = [m for m in new.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain average over the batches
        m.train()
    for batch in images:
        new(batch)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum
    return new.eval()


def compose(old: Masks, new: Masks) -> Masks:
    """Masks over the first model's channels, from those of earlier rounds and of this one (over what was left)."""
    result = {name: mask.clone() for name, mask in old.items()}
    for name, mask in new.items():
        if name in result:
            result[name][old[name]] = mask
        else:
            result[name] = mask.clone()
    return result


def largest_difference(a: nn.Module, b: nn.Module, channels: int = 3, sizes: Sequence[tuple[int, int, int]] = ((2, 64, 64), (1, 96, 128)),
                       seed: int = 0) -> float:
    """Largest |a(x) - b(x)| in float64 over random images, relative to the largest |a(x)| of that output.

    This is the proof that surgery was exact: for a = masked and b = slim it is rounding, below 1e-9. `sizes` are
    (images, height, width).
    """
    worst = 0.0
    for p, q in zip(_outputs_in_double(a, channels, sizes, seed), _outputs_in_double(b, channels, sizes, seed), strict=True):
        if p.shape != q.shape or not bool(torch.isfinite(p).all() & torch.isfinite(q).all()):
            return float("inf")
        worst = max(worst, float((p - q).abs().max() / p.abs().max().clamp_min(1e-30)))
    return worst


@torch.no_grad()
def _outputs_in_double(model: nn.Module, channels: int, sizes: Sequence[tuple[int, int, int]], seed: int) -> list[Tensor]:
    """All outputs for all sizes. One float64 copy at a time: large models are proven in little memory."""
    model, generator = deepcopy(model).double().eval(), torch.Generator().manual_seed(seed)
    return [y for n, h, w in sizes for y in _tensors(model(torch.rand(n, channels, h, w, dtype=torch.float64, generator=generator)))]


def keep_ids(graph: ChannelGraph, masks: Masks) -> np.ndarray:
    """Masks -> one bool per channel id. Raises ValueError on masks that contradict each other or the graph."""
    keep = np.ones(len(graph.group), bool)
    for name, mask in masks.items():
        if name not in graph.norms:
            raise ValueError(f"mask for '{name}': the model has no such BatchNorm in its channel graph")
        if len(mask) != len(graph.norms[name]):
            raise ValueError(f"mask for '{name}' has {len(mask)} channels, the layer has {len(graph.norms[name])}")
        keep[graph.group[graph.norms[name][~mask.numpy()]]] = False
    keep = keep[graph.group]
    if (~keep & graph.frozen).any():
        raise ValueError("the masks cut channels that must stay (an output, or what an unknown operation reads)")
    for name, mask in masks.items():
        if not np.array_equal(keep[graph.norms[name]], mask.numpy()):
            raise ValueError(f"mask for '{name}' disagrees with that of a layer whose channels are the same ones")
    return keep


def resize_like(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the leaf layers of `model` the shapes that `state` has, in place; values are left to load_state_dict.

    This is how a slim checkpoint becomes a model again: build the yaml, take the shapes, load. Raises KeyError or
    ValueError when `state` belongs to another architecture.
    """
    for name, module in model.named_modules():
        for key, old in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{name}.{key}" if name else key
            if full not in state:
                if key in module._non_persistent_buffers_set:
                    continue
                raise KeyError(full)
            if state[full].shape == old.shape:
                continue
            if state[full].dim() != old.dim() or any(n > o for n, o in zip(state[full].shape, old.shape)):
                raise ValueError(f"{full}: {tuple(state[full].shape)} does not fit into {tuple(old.shape)}")
            _replace(module, key, torch.empty_like(state[full], dtype=old.dtype, device=old.device))
        _counts_from_shapes(module)


def _replace(module: nn.Module, key: str, value: Tensor) -> None:
    """Put a tensor of another shape in the place of a parameter or buffer, keeping which of the two it is."""
    old = getattr(module, key)
    value = value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value.clone()
    setattr(module, key, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def _counts_from_shapes(module: nn.Module) -> None:
    """Make a layer's own channel counts tell what its tensors say."""
    if isinstance(module, nn.Conv2d):
        rows, columns = module.weight.shape[:2]
        if module.groups > 1 and (module.groups == module.in_channels == module.out_channels or (columns == 1 and rows < module.groups)):
            module.groups = rows  # depthwise, as it was or as an earlier cut has made it: one group a channel
        module.in_channels, module.out_channels = columns * module.groups, rows
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
        module.num_features = len(module.weight)


def _tensors(value: object) -> list[Tensor]:
    """Every tensor in a model's output, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for item in items for t in _tensors(item)]  # type: ignore[attr-defined]
