"""The rules of the channel graph: what each operation of a traced model does to the ids of the channels.

Networks are taken to be image networks: dimension 1 of every 4-D tensor is the channel.
"""
from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import utils.slimming.operations as ops
from utils.slimming.graph import ChannelGraph, Convolution
from utils.slimming.values import (
    Channels,
    Ids,
    Shape,
    Stack,
    argument,
    is_channels,
    is_crop,
    is_one_of,
    is_scalar,
    is_spatial,
)


class Walker:
    """Carries the ids along the traced nodes.

    The value of a node is one of: Channels, a Stack, a Shape, a list of values, a Tensor (a parameter, or computed
    from parameters only), or None (not a tensor, or one whose channels are not known, such as the image).
    """

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, dict(model.named_modules())
        self.graph = ChannelGraph()
        self.parent: list[int] = []  # union-find over the ids
        self.frozen: set[int] = set()
        self.coupled: set[int] = set()
        self.held: set[int] = set()
        self.notes: list[tuple[str, set[int]]] = []
        self.place = ""  # where the node is that is looked at, for notes
        rules = ((ops.CONCATS, self.concat), (ops.STACKS, self.stack), (ops.FLATTENS, self.flatten),
                 (ops.ADDITIONS | ops.PRODUCTS | ops.DIVISIONS, self.elementwise), ({operator.getitem}, self.item),
                 (ops.CHUNKS | ops.SPLITS, self.split), (ops.SPATIAL_MEANS, self.spatial_mean),
                 (ops.PERMUTES | ops.TRANSPOSES, self.turn), (ops.GATES, self.gate),
                 (ops.UNSHUFFLES | ops.SHUFFLES | ops.CHANNEL_SHUFFLES, self.shuffle),
                 (ops.SHAPE_QUERIES, self.shape_query), ({F.batch_norm}, self.functional_norm))
        self.rules = {target: rule for targets, rule in rules for target in targets}

    # --- ids ---

    def new(self, count: int) -> Channels:
        """Channels of a convolution: loose, until a BatchNorm follows."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return Channels(np.arange(start, start + count), np.ones(count, bool))

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        for i, j in zip(a.tolist(), b.tolist()):
            self.parent[self.root(j)] = self.root(i)

    def align(self, ids: np.ndarray, parts: int) -> None:
        """Unite the channels at the same position of equal parts."""
        first, *others = np.split(ids, parts)
        for other in others:
            self.unite(first, other)

    def join(self, values: Sequence[Channels], product: bool = False) -> Channels:
        """Channels that are kept or cut together from here on. A product is 0 where one of them is, else all must be.

        Channels that this ties, other than by a product, are coupled.
        """
        first, *others = values
        for other in others:
            if not product and any(self.root(i) != self.root(j) for i, j in zip(first.ids, other.ids)):
                self.coupled.update(first.ids.tolist())
            self.unite(first.ids, other.ids)
        together = np.logical_and if product else np.logical_or
        return Channels(first.ids, together.reduce([value.loose for value in values]))

    def freeze(self, value: Any) -> None:
        """Freeze every channel in a value, however nested."""
        if isinstance(value, (list, tuple, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                self.freeze(part)
        elif isinstance(value, Ids):
            self.frozen.update(value.ids.tolist())

    # --- nodes ---

    def walk(self, nodes: fx.Graph) -> ChannelGraph:
        values: dict[fx.Node, Any] = {}
        for node in nodes.nodes:
            args = fx.map_arg(node.args, lambda n: values[n])
            kwargs = dict(fx.map_arg(node.kwargs, lambda n: values[n]))
            self.place = next((f" in {path} ({cls.__name__})" for path, cls in
                               reversed(node.meta.get("nn_module_stack", {}).values())), "")
            if node.op == "call_module":
                values[node] = self.module(str(node.target), args, kwargs)
            elif node.op in ("call_function", "call_method"):
                values[node] = self.function(node, list(args), kwargs)
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.model)
                # A copy, for what follows may work in place.
                values[node] = value.detach().clone() if isinstance(value, Tensor) else value
            else:
                values[node] = None
                if node.op == "output":
                    self.freeze(args)
        return self.finish()

    def finish(self) -> ChannelGraph:
        graph, count = self.graph, len(self.parent)
        with_norm = {self.root(i) for norms in (graph.norms, graph.unscaled) for ids in norms.values() for i in ids}
        with_norm |= {self.root(i) for i in self.held}
        # Other notes hold back nothing that is prunable; where nothing is, they say why.
        graph.notes = [text for text, ids in self.notes
                       if not with_norm or not with_norm.isdisjoint(map(self.root, ids))]
        graph.group = np.array([self.root(i) for i in range(count)], int)
        graph.frozen, graph.coupled = self.whole_groups(self.frozen), self.whole_groups(self.coupled)
        return graph

    def whole_groups(self, members: set[int]) -> np.ndarray:
        """bool (ids,): belongs to a group that has one of the members."""
        group = self.graph.group
        marked = np.zeros(len(group), bool)
        marked[group[list(members)]] = True
        return marked[group]

    def note(self, text: str, *values: Any) -> None:
        """Freeze what the values carry and remember why, unless all of it is frozen already."""
        before, self.frozen = self.frozen, set()
        self.freeze(values)
        if not self.frozen <= before:
            self.notes.append((text, self.frozen))
        self.frozen = before | self.frozen

    def unknown(self, args: Any, kwargs: dict, what: str) -> None:
        self.note(f"{what}: not known to the channel graph, what it reads stays whole", *args, *kwargs.values())

    # --- modules ---

    def module(self, name: str, args: tuple, kwargs: dict) -> Any:
        module = self.modules[name]
        x = args[0] if args else kwargs.get("input")
        if isinstance(module, Convolution) and ops.is_plain(module):
            return self.convolution(name, module, x)
        if is_one_of(module, ops.PASSTHROUGH):
            return x
        if is_channels(x):
            if isinstance(module, _BatchNorm) and ops.is_plain(module):
                return self.batch_norm(name, module, x)
            if is_one_of(module, ops.GATES):
                return Channels(x.ids, np.ones(len(x.ids), bool))
            if factor := ops.SHUFFLE_FACTORS.get(type(module)):
                return self.shuffled(type(module), x, getattr(module, factor))
        if isinstance(module, _BatchNorm):
            self.hold_back(x)
        return self.unknown(args, kwargs, f"{name} ({type(module).__name__})")

    def hold_back(self, x: Any) -> None:
        """A BatchNorm that the graph does not know reads x: a note on it tells of channels that could be pruned."""
        if isinstance(x, Ids):
            self.held.update(x.ids.tolist())

    def batch_norm(self, name: str, norm: _BatchNorm, x: Channels) -> Channels:
        if norm.weight is None:
            self.graph.unscaled[name] = x.ids
            self.note(f"{name}: a BatchNorm without scale and shift makes no channel 0, what it reads stays whole", x)
        else:
            self.unite(x.ids, self.graph.norms.setdefault(name, x.ids))  # called twice: its channels are those of both
        return Channels(x.ids, np.zeros(len(x.ids), bool))

    def convolution(self, name: str, conv: Convolution, x: Any) -> Channels:
        graph = self.graph
        if not is_channels(x):
            x = self.new(conv.in_channels)  # the image, or what an unknown operation made
            self.freeze(x)
        if conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels and name not in graph.inputs:
            graph.inputs[name] = graph.outputs[name] = x.ids
            return Channels(x.ids, x.loose | (conv.bias is not None))  # depthwise: 0 stays 0
        if x.loose.any():
            loose = Ids(x.ids[x.loose])
            self.note(f"{name}: reads channels that no BatchNorm can make 0, or a gate; they stay", loose)
        if name in graph.inputs:  # called twice: one weight for both
            self.unite(graph.inputs[name], x.ids)
            return Channels(graph.outputs[name], np.ones(conv.out_channels, bool))
        out = self.new(conv.out_channels)
        if conv.groups > 1:  # every group keeps equally many channels, those at the same positions
            self.align(x.ids, conv.groups)
            self.align(out.ids, conv.groups)
        graph.inputs[name], graph.outputs[name] = x.ids, out.ids
        return out

    # --- functions and methods: a rule gets the node and its arguments, and gives the value ---

    def function(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        target: Any = node.target
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and all(isinstance(a, (Tensor, int, float)) for a in (*args, *kwargs.values())):
            function = getattr(Tensor, target) if isinstance(target, str) else target
            return function(*args, **kwargs)
        if target in ops.PASSTHROUGH:
            return x
        if is_dataclass(target) or hasattr(target, "_fields"):  # a container for outputs, named tuple or dataclass
            return [*args, *kwargs.values()]
        rule = self.rules.get(target, self.strange)
        return rule(node, args, kwargs)

    def strange(self, node: fx.Node, args: list, kwargs: dict) -> None:
        """An operation without a rule, or on what its rule does not cover."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return self.unknown(args, kwargs, f"operation '{name}'{self.place}")

    def functional_norm(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """F.batch_norm() in the forward of a BatchNorm that does more than PyTorch's, with that layer's own tensors."""
        x, keys = argument(args, kwargs, 0, "input"), ("running_mean", "running_var", "weight", "bias")
        tensors = {key: argument(node.args, node.kwargs, i, key) for i, key in enumerate(keys, 1)}
        names = {key: str(t.target) for key, t in tensors.items() if isinstance(t, fx.Node)}
        path = next(iter(names.values()), "").rpartition(".")[0]
        norm = self.modules.get(path)
        own = {key: f"{path}.{key}" for key in keys if getattr(norm, key, None) is not None}
        if isinstance(norm, _BatchNorm) and is_channels(x) and names == own:
            return self.batch_norm(path, norm, x)
        self.hold_back(x)
        return self.strange(node, args, kwargs)

    def gate(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        x = argument(args, kwargs, 0, "input")
        return Channels(x.ids, np.ones(len(x.ids), bool)) if is_channels(x) else self.strange(node, args, kwargs)

    def concat(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        parts, dim = argument(args, kwargs, 0, "tensors"), argument(args, kwargs, 1, "dim", 0)
        if isinstance(parts, (list, tuple)) and all(map(is_channels, parts)):
            if dim in (1, -3):
                return Channels(*(np.concatenate([getattr(p, key) for p in parts]) for key in ("ids", "loose")))
            if is_spatial(dim) and len({len(part.ids) for part in parts}) == 1:
                return self.join(parts)
        return self.unknown([parts], {}, f"a concat of unlike parts{self.place}")

    def split(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.chunk(n, dim) and x.split([...], dim), in parts along the channels (chunk only) or in space."""
        x, dim = args[0] if args else None, argument(args, kwargs, 2, "dim", 0)
        chunks = node.target in ops.CHUNKS
        parts = argument(args, kwargs, 1, "chunks" if chunks else "split_size_or_sections")
        count = parts if chunks else len(parts) if isinstance(parts, (list, tuple)) else None
        if is_channels(x) and isinstance(count, int):
            if is_spatial(dim):
                return [x] * count
            if chunks and dim == 1 and len(x.ids) % count == 0:
                self.align(x.ids, count)  # the parts must stay equal, or chunk() would cut elsewhere
                return [Channels(*part) for part in zip(np.split(x.ids, count), np.split(x.loose, count))]
        return self.strange(node, args, kwargs)

    def stack(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """torch.stack(tensors, dim) with the new dimension behind the channels, for flatten to lay into another."""
        parts, dim = argument(args, kwargs, 0, "tensors"), argument(args, kwargs, 1, "dim", 0)
        if dim in (2, 3, 4, -1) and isinstance(parts, (list, tuple)) and all(map(is_channels, parts)):
            joined = self.join(parts)
            return Stack(joined.ids, joined.loose)
        return self.strange(node, args, kwargs)

    def flatten(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """A 5-D stack becomes a 4-D tensor by laying two neighbouring dimensions behind the channels into one."""
        x = args[0] if args else kwargs.get("input")
        dims = argument(args, kwargs, 1, "start_dim", 0), argument(args, kwargs, 2, "end_dim", -1)
        if isinstance(x, Stack) and dims in ((2, 3), (3, 4), (3, -1)):
            return Channels(x.ids, x.loose)
        return self.strange(node, args, kwargs)

    def spatial_mean(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.mean((2, 3), keepdim=True), or amax."""
        x, dims, keepdim = args[0] if args else None, *(
            argument(args, kwargs, i, key) for i, key in ((1, "dim"), (2, "keepdim")))
        dims = dims if isinstance(dims, (list, tuple)) else (dims,)
        return x if keepdim is True and is_channels(x) and is_spatial(*dims) else self.strange(node, args, kwargs)

    def turn(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.transpose(2, 3) and x.permute(0, 1, 3, 2): height and width change places."""
        x, *dims = args
        if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
            dims = list(dims[0])
        if node.target in ops.PERMUTES and dims[:2] == [0, 1] and len(dims) == 4:
            dims = dims[2:]
        in_space = len(dims) == 2 and not kwargs and is_spatial(*dims)
        return x if in_space and is_channels(x) else self.strange(node, args, kwargs)

    def shuffle(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        x, factor = argument(args, kwargs, 0, "input"), [*args[1:], *(v for k, v in kwargs.items() if k != "input")]
        if not is_channels(x) or len(factor) != 1 or not isinstance(factor[0], int):
            return self.strange(node, args, kwargs)
        return self.shuffled(node.target, x, factor[0])

    def shuffled(self, operation: Any, x: Channels, factor: int) -> Channels:
        """Pixel unshuffle, pixel shuffle (factor: of the sides), or channel shuffle (factor: the groups)."""
        if operation in ops.UNSHUFFLES:
            return Channels(np.repeat(x.ids, factor ** 2), np.repeat(x.loose, factor ** 2))
        if operation in ops.SHUFFLES:  # factor ** 2 channels in a row make one
            ids, loose = x.ids.reshape(-1, factor ** 2), x.loose.reshape(-1, factor ** 2)
            self.align(ids.T.ravel(), factor ** 2)
            return Channels(ids[:, 0], np.logical_or.reduce(loose, 1))
        self.align(x.ids, factor)
        return Channels(x.ids.reshape(factor, -1).T.ravel(), x.loose.reshape(factor, -1).T.ravel())

    def shape_query(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x.shape, x.size(), x.size(2), x.dim(), and attributes such as x.device, which depend on no channel."""
        x, *rest = args
        is_attribute = node.target is getattr
        if not isinstance(x, Channels) or node.target == "dim" or (is_attribute and rest[0] in ops.CHANNEL_FREE):
            return None
        if is_attribute and rest[0] != "shape":
            return self.unknown([x], {}, f"attribute '{rest[0]}'{self.place}")
        shape, dim = Shape(x.ids), argument(rest, kwargs, 0, "dim")
        return self.item(node, [shape, dim], {}) if dim is not None and node.target == "size" else shape

    def item(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """x[index]: an element of a list, or a crop in space, which leaves the channels alone."""
        x, index = args
        if isinstance(x, (list, tuple)):
            return x[index]
        if isinstance(x, Shape):
            # Code may compute with heights and widths. Code that reads the number of channels relies on it.
            reads_channels = not isinstance(index, (int, slice)) or 1 in np.atleast_1d(np.arange(4)[index])
            if reads_channels and node.users:
                return self.unknown([x], {}, f"the number of channels{self.place}")
            return None
        if x is None or (is_channels(x) and is_crop(index)):
            return x
        return self.unknown([x], {}, f"index {index}{self.place}")

    def elementwise(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        """Sum or product of two tensors: their channels are kept or cut together. A factor leaves them alone."""
        a, b = args[0], argument(args, kwargs, 1, "other")
        product = node.target in ops.PRODUCTS
        if not isinstance(a, Ids) and not isinstance(b, Ids):
            return None
        if is_channels(a) and is_channels(b) and node.target not in ops.DIVISIONS:
            if len(a.ids) == len(b.ids):
                if not product and not (a.loose & b.loose).all():
                    self.coupled.update(a.ids.tolist())  # a shortcut, be it around a depthwise convolution
                return self.join([a, b], product)
            if product and 1 in (len(a.ids), len(b.ids)):  # one factor for all channels of a pixel: it stays
                wide, narrow = (a, b) if len(b.ids) == 1 else (b, a)
                self.freeze(narrow)
                return wide
        if node.target not in ops.ADDITIONS:
            if is_channels(a) and is_scalar(b):
                return a
            if product and is_channels(b) and is_scalar(a):
                return b
        return self.unknown([a, b], {}, f"operation '{node.name}' on unlike shapes{self.place}")
