"""The rules of the channel graph: what each operation of a traced model does to the ids of the channels.

Networks are taken to be image networks: dimension 1 of every tensor is the channel.
"""
from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import utils.slimming.operations as ops
from utils.slimming.graph import ChannelGraph, Convolution
from utils.slimming.layouts import Layouts
from utils.slimming.values import (
    Channels,
    Count,
    Ids,
    Shape,
    argument,
    is_channel_dimension,
    is_map,
    is_one_of,
    is_scalar,
    is_spatial,
)


class Walker(Layouts):
    """Carries the ids along the traced nodes.

    The value of a node is one of: Channels, Grouped, a Shape, a Count, a list of values, a Tensor (a parameter, or
    computed from parameters only), or None (not a tensor, or one whose channels are not known, such as the image).
    vectors: names of the model's inputs that are 2-D, such as a row of numbers for each image.
    """

    def __init__(self, model: nn.Module, vectors: Collection[str] = ()):
        super().__init__(model)
        self.vectors = vectors
        rules = ((ops.CONCATS, self.concat), (ops.STACKS, self.stack), (ops.FLATTENS, self.flatten),
                 (ops.ADDITIONS | ops.PRODUCTS | ops.DIVISIONS, self.elementwise), ({operator.getitem}, self.item),
                 (ops.CHUNKS, self.chunk), (ops.SPLITS, self.split), (ops.SPATIAL_MEANS, self.spatial_mean),
                 (ops.PERMUTES | ops.TRANSPOSES, self.turn), (ops.GATES, self.gate), (ops.VIEWS, self.view),
                 (ops.SQUEEZES, self.squeeze), (ops.UNSQUEEZES, self.unsqueeze), (ops.EXPANSIONS, self.expand),
                 (ops.UNSHUFFLES | ops.SHUFFLES | ops.CHANNEL_SHUFFLES, self.shuffle), (ops.PADS, self.pad),
                 (ops.PRELUS, self.prelu), (ops.SHAPE_QUERIES, self.shape_query),
                 ({F.batch_norm, F.linear}, self.functional), ({operator.floordiv}, self.quotient))
        self.rules = {target: rule for targets, rule in rules for target in targets}

    # --- nodes ---

    def walk(self, nodes: fx.Graph) -> ChannelGraph:
        values: dict[fx.Node, Any] = {}
        for node in nodes.nodes:
            args = fx.map_arg(node.args, lambda n: values[n])
            kwargs = dict(fx.map_arg(node.kwargs, lambda n: values[n]))
            self.place = next((f" in {path} ({cls.__name__})" for path, cls in
                               reversed(node.meta.get("nn_module_stack", {}).values())), "")
            inputs = [values[n] for n in node.all_input_nodes]
            if node.op == "call_module":
                values[node] = self.module(node, str(node.target), args, kwargs)
            elif node.op in ("call_function", "call_method"):
                if inputs and all(isinstance(value, Tensor) for value in inputs):
                    values[node] = self.computed(node, args, kwargs)
                else:
                    values[node] = self.function(node, list(args), kwargs)
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.model)
                # A copy, for what follows may work in place.
                values[node] = value.detach().clone() if isinstance(value, Tensor) else value
                if node.target in self.parameters:
                    self.sources[id(values[node])] = str(node.target)
            else:
                values[node] = self.flattened(node, None, 1, -1) if node.target in self.vectors else None
                if node.op == "output":
                    numbers = [value for value in tree_leaves(args) if isinstance(value, (Count, Shape))]
                    self.unknown(numbers, {}, "the number of channels")
                    self.freeze(args)
        return self.finish()

    def computed(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """What parameters give. One that is only seen in another shape, without a fixed size, stays that parameter."""
        target: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        value = target(*args, **kwargs)
        name = self.sources.get(id(args[0])) if args else None
        if name and isinstance(value, Tensor) and value.numel() == args[0].numel():
            sizes = {1, -1} if node.target not in ops.VIEWS else set(np.ravel(args[1:]).tolist())
            if sizes <= {1, -1} and node.target in ops.VIEWS | ops.UNSQUEEZES | {operator.getitem}:
                self.sources[id(value)] = name
        return value

    # --- modules ---

    def module(self, node: fx.Node, name: str, args: tuple, kwargs: dict) -> Any:
        module = self.modules[name]
        x = args[0] if args else kwargs.get("input")
        if isinstance(module, Convolution) and ops.is_plain(module):
            return self.convolution(name, module, x)
        if is_one_of(module, ops.PASSTHROUGH) or type(module).__name__ in ops.DROPS:
            return x
        if isinstance(module, nn.Flatten):
            return self.flattened(node, x, module.start_dim, module.end_dim)
        if isinstance(x, Channels):
            if isinstance(module, _BatchNorm) and ops.is_plain(module):
                return self.batch_norm(name, module, x)
            if isinstance(module, nn.Linear) and ops.is_plain(module) and (row := self.linear(name, module, x)):
                return row
            if isinstance(module, nn.PReLU) and self.slopes(f"{name}.weight", module.weight, x):
                return x
            if is_one_of(module, ops.GATES):
                return replace(x, loose=np.ones(len(x.ids), bool))
            if (factor := ops.SHUFFLE_FACTORS.get(type(module))) and x.space == 2:
                return self.shuffled(type(module), x, getattr(module, factor))
        if isinstance(module, _BatchNorm):
            self.hold_back(x)
        return self.unknown(args, kwargs, f"{name} ({type(module).__name__})")

    def linear(self, name: str, linear: nn.Linear, x: Channels) -> Channels | None:
        row = self.as_read(x, linear.in_features)
        return row and self.layer(name, row, linear.out_features)

    def batch_norm(self, name: str, norm: _BatchNorm, x: Channels) -> Any:
        if x.space == 0:
            row = self.as_read(x, norm.num_features)
            if row is None:
                return self.unknown([x], {}, f"{name} (BatchNorm1d)")
            x = row
        if norm.weight is None:
            self.graph.unscaled[name] = x.ids
            self.note(f"{name}: a BatchNorm without scale and shift makes no channel 0, what it reads stays whole", x)
        else:
            self.unite(x.ids, self.graph.norms.setdefault(name, x.ids))  # called twice: its channels are those of both
        return replace(x, loose=np.zeros(len(x.ids), bool))

    def as_read(self, x: Channels, features: int) -> Channels | None:
        """Vectors as a layer reads them that takes so many values; None where that can't be told."""
        if not len(x.ids) and x.spread and x.space == 0:
            values = self.new(features, 0)
            self.freeze(values)  # of an input, or of what an unknown operation made
            return replace(values, loose=np.zeros(features, bool))
        times, rest = divmod(features, max(len(x.ids), 1))
        if x.space or rest or (times > 1 and not x.spread):
            return None
        return Channels(np.repeat(x.ids, times), np.repeat(x.loose, times), 0)

    def slopes(self, name: str, weight: Any, x: Channels) -> bool:
        """A PReLU with one slope, or one for each channel, which goes with it."""
        if weight.numel() == 1:
            return True
        if x.spread or weight.numel() != len(x.ids):
            return False
        self.unite(x.ids, self.graph.vectors.setdefault(name, x.ids))
        return True

    def convolution(self, name: str, conv: Convolution, x: Any) -> Channels:
        graph = self.graph
        if not is_map(x):
            self.unknown([x], {}, f"{name} ({type(conv).__name__}) on what is no map")
            x = self.new(conv.in_channels)  # the image, or what an unknown operation made
            self.freeze(x)
        if conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels and name not in graph.inputs:
            graph.inputs[name] = graph.outputs[name] = x.ids
            return replace(x, loose=x.loose | (conv.bias is not None))  # depthwise: 0 stays 0
        return self.layer(name, x, conv.out_channels, conv.groups)

    def layer(self, name: str, x: Channels, count: int, groups: int = 1) -> Channels:
        """A layer with weights reads x and makes new channels."""
        graph = self.graph
        if x.loose.any():
            loose = Ids(x.ids[x.loose])
            self.note(f"{name}: reads channels that no BatchNorm can make 0, or a gate; they stay", loose)
        if name in graph.inputs:  # called twice: one weight for both
            self.unite(graph.inputs[name], x.ids)
            return Channels(graph.outputs[name], np.ones(count, bool), x.space)
        out = self.new(count, x.space)
        if groups > 1:  # every group keeps equally many channels, those at the same positions
            self.align(x.ids, groups)
            self.align(out.ids, groups)
        graph.inputs[name], graph.outputs[name] = x.ids, out.ids
        return out

    # --- functions and methods: a rule gets the node and its arguments, and gives the value ---

    def function(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        target: Any = node.target
        if target in ops.PASSTHROUGH:
            return args[0] if args else kwargs.get("input")
        if is_dataclass(target) or hasattr(target, "_fields"):  # a container for outputs, named tuple or dataclass
            return [*args, *kwargs.values()]
        rule = self.rules.get(target, self.strange)
        return rule(node, args, kwargs)

    def functional(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """F.batch_norm() or F.linear() in a layer that does more than PyTorch's, with that layer's own tensors."""
        x, kind = argument(args, kwargs, 0, "input"), nn.Linear if node.target is F.linear else _BatchNorm
        keys = ("weight", "bias") if kind is nn.Linear else ("running_mean", "running_var", "weight", "bias")
        tensors = {key: argument(node.args, node.kwargs, i, key) for i, key in enumerate(keys, 1)}
        names = {key: str(t.target) for key, t in tensors.items() if isinstance(t, fx.Node)}
        path = next(iter(names.values()), "").rpartition(".")[0]
        layer = self.modules.get(path)
        own = {key: f"{path}.{key}" for key in keys if getattr(layer, key, None) is not None}
        if isinstance(layer, kind) and isinstance(x, Channels) and names == own:
            value = self.linear(path, layer, x) if isinstance(layer, nn.Linear) else self.batch_norm(path, layer, x)
            if value is not None:
                return value
        if kind is _BatchNorm:
            self.hold_back(x)
        return self.strange(node, args, kwargs)

    def gate(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        x = argument(args, kwargs, 0, "input")
        if isinstance(x, Channels):
            return replace(x, loose=np.ones(len(x.ids), bool))
        return self.strange(node, args, kwargs)

    def prelu(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
        name = self.sources.get(id(weight), "")
        if name and isinstance(x, Channels) and self.slopes(name, weight, x):
            return x
        return self.strange(node, args, kwargs)

    def pad(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """F.pad() in space. A value other than 0 stands at the border of a cut channel, too."""
        x, sizes, mode, value = (
            argument(args, kwargs, i, key) for i, key in enumerate(("input", "pad", "mode", "value")))
        if not isinstance(x, Channels) or not isinstance(sizes, (list, tuple)) or len(sizes) > 2 * x.space:
            return self.strange(node, args, kwargs)
        return x if mode not in (None, "constant") or not value else replace(x, loose=np.ones(len(x.ids), bool))

    def concat(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        parts, dim = argument(args, kwargs, 0, "tensors"), argument(args, kwargs, 1, "dim", 0)
        if isinstance(parts, (list, tuple)) and parts and all(isinstance(p, Channels) and len(p.ids) for p in parts):
            first = parts[0]
            if all(part.space == first.space for part in parts):
                if is_channel_dimension(first, dim):  # a vector of spread ones can be read where none is
                    return Channels(np.concatenate([p.ids for p in parts]), np.concatenate([p.loose for p in parts]),
                                    first.space)
                if is_spatial(first, dim) and len({len(part.ids) for part in parts}) == 1:
                    return self.join(parts)
        return self.unknown([parts], {}, f"a concat of unlike parts{self.place}")

    def stack(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """torch.stack(tensors, dim) with the new dimension behind the channels, for flatten to lay into another."""
        parts, dim = argument(args, kwargs, 0, "tensors"), argument(args, kwargs, 1, "dim", 0)
        alike = isinstance(parts, (list, tuple)) and all(map(is_map, parts)) and len({len(p.ids) for p in parts}) == 1
        if alike and is_spatial(stacked := replace(parts[0], space=3), dim):
            return replace(stacked, loose=self.join(parts).loose)
        return self.strange(node, args, kwargs)

    def elementwise(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """Sum or product of two tensors: their channels are kept or cut together. A factor leaves them alone."""
        a, b = args[0], argument(args, kwargs, 1, "other")
        product = node.target in ops.PRODUCTS
        if not isinstance(a, Ids) and not isinstance(b, Ids):
            return None
        if isinstance(a, Channels) and isinstance(b, Channels):
            value = None if node.target in ops.DIVISIONS or a.space != b.space else self.joined(a, b, product)
        elif isinstance(a, Channels):
            value = self.with_constant(a, b, node.target in ops.ADDITIONS)
        elif isinstance(b, Channels) and node.target not in ops.DIVISIONS:
            value = self.with_constant(b, a, node.target in ops.ADDITIONS)
        else:
            value = None
        if value is None:
            self.unknown([a, b], {}, f"operation '{node.name}' on unlike shapes{self.place}")
        return value

    def joined(self, a: Channels, b: Channels, product: bool) -> Channels | None:
        if len(a.ids) == len(b.ids):
            if not product and not (a.loose & b.loose).all():
                self.coupled.update(a.ids.tolist())  # a shortcut, be it around a depthwise convolution
            return self.join([a, b], product)
        if product and 1 in (len(a.ids), len(b.ids)) and not (a.spread or b.spread):
            wide, narrow = (a, b) if len(b.ids) == 1 else (b, a)  # one factor for all channels of a pixel: it stays
            self.freeze(narrow)
            return wide
        return None

    def with_constant(self, x: Channels, constant: Any, sum_of: bool) -> Channels | None:
        """x and a number, or a parameter with a value for each channel. What is added stands in a cut channel, too."""
        if sum_of and isinstance(constant, (int, float)) and constant == 0:  # sum([a, b]) begins with it
            return x
        if not is_scalar(constant) and not self.follows(constant, x):
            return None
        return replace(x, loose=np.ones(len(x.ids), bool)) if sum_of else x
