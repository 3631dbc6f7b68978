"""From masks to a slim model, to a masked one, and from a slim model's weights back to its shape."""
from __future__ import annotations

from collections.abc import Set
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from utils.slimming.branches import take_out
from utils.slimming.graph import ChannelGraph, Convolution, Masks, batch_norms, require_mask, weighted_layers
from utils.slimming.tracing import M, copy_sharing, trace

REPLACED = ("weight", "bias", "running_mean", "running_var")  # tensors of a layer that is cut


def slim(model: M, masks: Masks, graph: ChannelGraph | None = None) -> M:
    """A copy of `model` without the channels whose mask is False; the input is not changed.

    Cutting a BatchNorm's channel cuts the filter of the layer before it and that input channel of every layer after it
    (Liu et al. 2017, section 3.3). A branch goes as a whole where the masks of all its BatchNorms are all False.
    BatchNorms without a mask keep all channels. `graph`: the model's, if it is known. A model that has `.masks`, over
    the channels of its first shape, gets the composed ones.
    Raises ValueError when masks disagree on channels that are one, or cut what must stay.
    """
    graph = graph or trace(model)
    keep = graph.kept(masks)
    new = copy_sharing(model, (tensor for layer in (*weighted_layers(model, graph.outputs).values(),
                                                   *batch_norms(model, graph.norms).values())
                               for tensor in (getattr(layer, key, None) for key in REPLACED)))
    take_out(new, gone := graph.gone(keep))
    remaining = partial(filter, lambda name: not any(branch.holds(name) for branch in gone))
    for name, layer in weighted_layers(new, remaining(graph.outputs)).items():
        outputs, inputs = (torch.from_numpy(keep[ids[name]]) for ids in (graph.outputs, graph.inputs))
        rows, columns = (inputs, outputs) if isinstance(layer, nn.ConvTranspose2d) else (outputs, inputs)
        weight = layer.weight.detach()[rows]
        width = weight.shape[1]  # channels of one group; every group keeps those at the same positions
        _replace(layer, "weight", weight if width == 1 else weight[:, columns[:width]])
        if layer.bias is not None:
            _replace(layer, "bias", layer.bias.detach()[outputs])
    for name, norm in batch_norms(new, remaining(graph.norms)).items():
        for key in REPLACED:
            if (old := getattr(norm, key)) is not None:
                _replace(norm, key, old.detach()[torch.from_numpy(keep[graph.norms[name]])])
    for name in remaining(graph.vectors):
        ids, (owner, _, key) = graph.vectors[name], name.rpartition(".")
        vector = new.get_parameter(name).detach()
        _replace(new.get_submodule(owner), key, vector[tuple(
            torch.from_numpy(keep[ids]) if size > 1 else slice(None) for size in vector.shape)])
    for module in new.modules():
        _set_counts(module)
    if isinstance(getattr(new, "masks", None), dict):
        new.masks = compose_masks(new.masks, masks)  # type: ignore[assignment, arg-type]  # nn.Module's __setattr__
    return new


def masked(model: M, masks: Masks) -> M:
    """A copy of `model` of the same shape whose cut channels have gamma = beta = 0."""
    return deepcopy(masked_view(model, masks))


def masked_view(model: M, masks: Masks) -> M:
    """masked() that shares all tensors but these gammas and betas with `model`: to look at, not to train."""
    norms = batch_norms(model, masks)
    for name, norm in norms.items():
        require_mask(name, masks[name], norm.num_features)
    own = {id(tensor) for norm in norms.values() for tensor in (norm.weight, norm.bias)}
    new = copy_sharing(model, (t for t in (*model.parameters(), *model.buffers()) if id(t) not in own))
    with torch.no_grad():
        for name, norm in batch_norms(new, masks).items():
            norm.weight[~masks[name]] = 0.0
            norm.bias[~masks[name]] = 0.0
    return new


def compose_masks(old: Masks, new: Masks) -> Masks:
    """Masks over the first model's channels, from those of earlier rounds and of this one (over what was left)."""
    result = {name: mask.clone() for name, mask in old.items()}
    for name, mask in new.items():
        if name in result:
            result[name][old[name]] = mask
        else:
            result[name] = mask.clone()
    return result


def last_masks(old: Masks, composed: Masks) -> Masks:
    """The inverse of compose_masks(): the masks of the last round, from those after it and those before it.

    BatchNorms of branches that an earlier round cut have none.
    """
    return {name: mask[old[name]] if name in old else mask for name, mask in composed.items()
            if name not in old or old[name].any()}


def take_out_missing(model: nn.Module, state: Set[str]) -> None:
    """Take branches out of `model`, in place, of which `state`, names of tensors, has nothing: a cut took them."""
    if not state >= model.state_dict().keys():
        take_out(model, [branch for branch in trace(model).branches.values() if not any(map(branch.holds, state))])


def resize_like(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the leaf layers of `model` the shapes that `state` has, in place; values are left to load_state_dict.

    This is how a slim checkpoint becomes a model again: build the yaml, take_out_missing(), take the shapes, load.
    Raises KeyError or ValueError when `state` belongs to another architecture.
    """
    for name, module in model.named_modules():
        for key, old in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{name}.{key}" if name else key
            if full not in state:
                if key in module._non_persistent_buffers_set:
                    continue
                raise KeyError(full)
            new = state[full]
            if new.shape == old.shape:
                continue
            if new.dim() != old.dim() or any(n > o for n, o in zip(new.shape, old.shape)):
                raise ValueError(f"{full}: {tuple(new.shape)} does not fit into {tuple(old.shape)}")
            _replace(module, key, torch.empty_like(new, dtype=old.dtype, device=old.device))
        _set_counts(module)


def _replace(module: nn.Module, key: str, value: Tensor) -> None:
    """Exchange a parameter or buffer for a tensor of another shape; a parameter stays a parameter."""
    old = getattr(module, key)
    value = value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value.clone()
    setattr(module, key, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def _set_counts(module: nn.Module) -> None:
    """Make a layer's own channel counts agree with the shapes of its tensors."""
    if isinstance(module, Convolution):
        rows, columns = module.weight.shape[:2]  # of a transposed one: inputs, outputs of a group
        was_depthwise = module.groups == module.in_channels == module.out_channels
        became_depthwise = columns == 1 and rows < module.groups  # by an earlier cut
        if module.groups > 1 and (was_depthwise or became_depthwise):
            module.groups = rows
        counts = (columns * module.groups, rows)
        module.in_channels, module.out_channels = counts if isinstance(module, nn.Conv2d) else counts[::-1]
    elif isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
        module.num_features = len(module.weight)
