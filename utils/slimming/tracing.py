"""From a model to its channel graph, by torch.fx.

The real model is traced and each tensor carries the ids of its channels: a convolution makes new ones, BatchNorm,
activations and pools pass them on, concat appends, an addition unites them one by one. An operation that is not known
freezes the channels that it reads and leaves a note: a strange block stays whole, it is never corrupted.

Networks are taken to be image networks: dimension 1 of every 4-D tensor is the channel.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.slimming.graph import ChannelGraph

# They leave the channels in place and map 0 to 0: a channel whose gamma and beta are 0 is still 0 behind them.
PASSTHROUGH: set[Any] = {
    nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardswish, nn.Mish, nn.GELU, nn.ELU, nn.Tanh, nn.Identity,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.Dropout, nn.Dropout2d,
    nn.ZeroPad2d,
    F.silu, F.relu, F.leaky_relu, F.relu6, F.hardswish, F.mish, F.gelu, F.interpolate, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.dropout, torch.relu, torch.tanh, torch.neg, operator.neg,
    "contiguous", "clone", "detach", "float", "half", "to", "relu", "tanh"}  # strings are methods of a tensor
# They leave the channels in place but map 0 to another value. Their output may scale channels, and nothing else.
GATES = {nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid", "sigmoid_"}
CONCATS = {torch.cat, torch.concat}
ADDITIONS = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
DIVISIONS = {operator.truediv, torch.div, "div"}
SPATIAL_MEANS = {"mean", "amax", torch.mean, torch.amax}
CHUNKS = {torch.chunk, "chunk"}
SPLITS = {torch.split, "split"}
SHAPE_QUERIES = {"size", "dim", getattr}
CHANNEL_FREE = {"device", "dtype", "ndim", "is_cuda", "requires_grad", "layout"}  # attributes of a tensor


def register_passthrough(*operations: type[nn.Module] | Callable | str) -> None:
    """Tell the graph of module classes, functions or tensor methods that keep channels in place and map 0 to 0."""
    PASSTHROUGH.update(operations)


def trace(model: nn.Module) -> ChannelGraph:
    """Follow `model` from its input to its outputs and return its channel graph. The model is not changed.

    It is traced in training mode, where detection heads return their raw maps.
    Raises ValueError if torch.fx can't trace it (control flow that depends on data).
    """
    was_training = {module: module.training for module in model.modules()}
    try:
        nodes = _Tracer().trace(model.train())
    except Exception as error:  # fx raises many kinds
        raise ValueError(f"torch.fx can't trace {type(model).__name__}: {error}") from error
    finally:
        for module, flag in was_training.items():
            module.training = flag
    return _Walker(model).walk(nodes)


class _Proxy(fx.Proxy):
    """torch.fx's stand-in for a tensor, which also knows how many parts a chunk or a split has: list(x.chunk(2, 1))."""

    def __len__(self) -> int:
        parts = self.node.args[1] if len(self.node.args) > 1 else None
        if self.node.target in CHUNKS and isinstance(parts, int):
            return parts
        if self.node.target in SPLITS and isinstance(parts, (list, tuple)):
            return len(parts)
        raise TypeError(f"the length of '{self.node}' is not known while tracing")


class _Tracer(fx.Tracer):
    """torch.fx's tracer with such stand-ins. It does not look into modules that are registered as passthrough."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in PASSTHROUGH or super().is_leaf_module(m, module_qualified_name)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            count = len(obj)  # type: ignore[arg-type]  # fx.Proxy declares neither __len__ nor __getitem__
        except TypeError:
            return super().iter(obj)
        return iter([operator.getitem(obj, i) for i in range(count)])  # type: ignore[call-overload]


@dataclass(frozen=True)
class _NotZeroed:
    """Ids of channels that may differ from 0 where they are cut: a gate's, or a convolution's without a BatchNorm."""

    ids: np.ndarray


@dataclass(frozen=True)
class _Shape:
    """x.shape of a tensor with these ids."""

    ids: np.ndarray


def _is_one_of(module: nn.Module, operations: set[Any]) -> bool:
    """Is the module of a class, or of a subclass of one, that the set names?"""
    return not operations.isdisjoint(type(module).__mro__)


def _carries_channels(x: Any) -> bool:
    return isinstance(x, (np.ndarray, _NotZeroed))


def _ids(x: Any) -> np.ndarray:
    return x.ids if isinstance(x, (_NotZeroed, _Shape)) else x


def _argument(args: list, kwargs: dict, position: int, name: str, default: Any = None) -> Any:
    """An argument of a traced call, given by name or by position."""
    if name in kwargs:
        return kwargs[name]
    return args[position] if len(args) > position else default


class _Walker:
    """Carries the ids along the traced nodes.

    The value of a node is one of: an int array (ids of channels that are 0 where they are cut), a _NotZeroed, a
    _Shape, a list of values, a Tensor (a parameter, or computed from parameters only), or None (not a tensor, or one
    whose channels are not known, such as the image).
    """

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, dict(model.named_modules())
        self.graph = ChannelGraph()
        self.parent: list[int] = []  # union-find over the ids
        self.frozen: set[int] = set()
        self.coupled: set[int] = set()
        self.notes: list[tuple[str, set[int]]] = []

    # --- ids ---

    def new(self, count: int) -> np.ndarray:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

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

    def freeze(self, value: Any) -> None:
        """Freeze every channel in a value, however nested."""
        if isinstance(value, (list, tuple)):
            for part in value:
                self.freeze(part)
        elif isinstance(value, (np.ndarray, _NotZeroed, _Shape)):
            self.frozen.update(_ids(value).tolist())

    # --- nodes ---

    def walk(self, nodes: fx.Graph) -> ChannelGraph:
        values: dict[fx.Node, Any] = {}
        for node in nodes.nodes:
            args = fx.map_arg(node.args, lambda n: values[n])
            kwargs = dict(fx.map_arg(node.kwargs, lambda n: values[n]))
            if node.op == "call_module":
                values[node] = self.module(str(node.target), args, kwargs)
            elif node.op in ("call_function", "call_method"):
                values[node] = self.function(node, list(args), kwargs)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(self.model)
            else:
                values[node] = None
                if node.op == "output":
                    self.freeze(args)
        return self.finish()

    def finish(self) -> ChannelGraph:
        graph, count = self.graph, len(self.parent)
        with_norm = {int(i) for ids in graph.norms.values() for i in ids}
        graph.notes = [text for text, ids in self.notes if ids & with_norm]  # others hold back nothing prunable
        graph.group = np.array([self.root(i) for i in range(count)], int)
        graph.frozen, graph.coupled = self.whole_groups(self.frozen), self.whole_groups(self.coupled)
        return graph

    def whole_groups(self, members: set[int]) -> np.ndarray:
        """bool (ids,): belongs to a group that has one of the members."""
        group = self.graph.group
        marked = np.zeros(len(group), bool)
        marked[group[list(members)]] = True
        return marked[group]

    def module(self, name: str, args: tuple, kwargs: dict) -> Any:
        module = self.modules[name]
        x = args[0] if args else kwargs.get("input")
        if isinstance(module, nn.Conv2d):
            return self.convolution(name, module, x)
        if isinstance(module, _BatchNorm) and _carries_channels(x):
            ids = _ids(x)
            self.unite(ids, self.graph.norms.setdefault(name, ids))  # called twice: its channels are those of both
            return ids
        if _is_one_of(module, PASSTHROUGH):
            return x
        if _is_one_of(module, GATES) and _carries_channels(x):
            return _NotZeroed(_ids(x))
        return self.unknown(args, kwargs, f"{name} ({type(module).__name__})")

    def convolution(self, name: str, conv: nn.Conv2d, x: Any) -> Any:
        if isinstance(x, _NotZeroed):
            self.note(f"{name}: reads channels that no BatchNorm can make 0, or a gate; they stay", x)
            x = x.ids
        elif not isinstance(x, np.ndarray):
            x = self.new(conv.in_channels)  # the image, or what an unknown operation made
            self.freeze(x)
        graph = self.graph
        if name in graph.inputs:  # called twice: one weight for both
            self.unite(graph.inputs[name], x)
            return _NotZeroed(graph.outputs[name])
        if conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels:
            graph.inputs[name] = graph.outputs[name] = x
            return x if conv.bias is None else _NotZeroed(x)  # depthwise: 0 stays 0
        out = self.new(conv.out_channels)
        if conv.groups > 1:  # every group keeps equally many channels, those at the same positions
            self.align(x, conv.groups)
            self.align(out, conv.groups)
        graph.inputs[name], graph.outputs[name] = x, out
        return _NotZeroed(out)  # until a BatchNorm follows

    def function(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        target: Any = node.target
        x = args[0] if args else None
        if target in SHAPE_QUERIES:
            return self.shape_query(node, x, args[1:])
        if isinstance(x, Tensor) and all(isinstance(a, (Tensor, int, float)) for a in (*args, *kwargs.values())):
            function = getattr(Tensor, target) if isinstance(target, str) else target
            return function(*args, **kwargs)
        if target in CONCATS:
            return self.concat(node, args, kwargs)
        if target is operator.getitem:
            return self.item(node, x, args[1])
        if target in ADDITIONS | PRODUCTS | DIVISIONS:
            return self.elementwise(node, x, _argument(args, kwargs, 1, "other"))
        if target in PASSTHROUGH or self.is_spatial_mean(target, args, kwargs):
            return x
        if target in GATES and _carries_channels(x):
            return _NotZeroed(_ids(x))
        if target in CHUNKS and isinstance(x, np.ndarray):
            count, dim = _argument(args, kwargs, 1, "chunks", 1), _argument(args, kwargs, 2, "dim", 0)
            if dim == 1 and len(x) % count == 0:
                self.align(x, count)  # the parts must stay equal, or chunk() would cut elsewhere
                return np.split(x, count)
        return self.unknown(args, kwargs, f"operation '{getattr(target, '__name__', target)}' ({node.name})")

    def concat(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        parts, dim = _argument(args, kwargs, 0, "tensors"), _argument(args, kwargs, 1, "dim", 0)
        if dim in (1, -3) and isinstance(parts, (list, tuple)) and all(map(_carries_channels, parts)):
            ids = np.concatenate([_ids(part) for part in parts])
            return _NotZeroed(ids) if any(isinstance(part, _NotZeroed) for part in parts) else ids
        return self.unknown([parts], {}, f"a concat of unlike parts ({node.name})")

    def shape_query(self, node: fx.Node, x: Any, rest: list) -> Any:
        """x.shape, x.size(), x.size(2), x.dim(), and attributes such as x.device, which depend on no channel."""
        is_attribute = node.target is getattr
        if not _carries_channels(x) or node.target == "dim" or (is_attribute and rest[0] in CHANNEL_FREE):
            return None
        if is_attribute and rest[0] != "shape":
            return self.unknown([x], {}, f"attribute '{rest[0]}' ({node.name})")
        shape = _Shape(_ids(x))
        return self.item(node, shape, rest[0]) if rest and node.target == "size" else shape

    def is_spatial_mean(self, target: Any, args: list, kwargs: dict) -> bool:
        """Is this x.mean((2, 3), keepdim=True), or amax?"""
        dims, keepdim = _argument(args, kwargs, 1, "dim"), _argument(args, kwargs, 2, "keepdim")
        if target not in SPATIAL_MEANS or keepdim is not True:
            return False
        return isinstance(dims, (list, tuple)) and set(dims) <= {2, 3, -1, -2}

    def item(self, node: fx.Node, x: Any, index: Any) -> Any:
        """x[index]: an element of a list, or a crop in space, which leaves the channels alone."""
        if isinstance(x, (list, tuple)):
            return x[index]
        if isinstance(x, _Shape):
            # Code may compute with heights and widths. Code that reads the number of channels relies on it.
            reads_channels = not isinstance(index, (int, slice)) or 1 in np.atleast_1d(np.arange(4)[index])
            if reads_channels and node.users:
                return self.unknown([x], {}, f"the number of channels, '{node.name}',")
            return None
        if x is None or (_carries_channels(x) and self.is_crop(index)):
            return x
        return self.unknown([x], {}, f"index {index} ({node.name})")

    def is_crop(self, index: Any) -> bool:
        """Is this x[..., a:b, c:d] or x[:, :, a:b, c:d]?"""
        if not isinstance(index, tuple):
            return False
        if index[0] is Ellipsis and len(index) <= 3:
            spatial = index[1:]
        elif index[:2] == (slice(None), slice(None)):
            spatial = index[2:]
        else:
            return False
        return all(isinstance(i, slice) for i in spatial)

    def elementwise(self, node: fx.Node, a: Any, b: Any) -> Any:
        """Sum or product of two tensors: their channels are kept or cut together. A factor leaves them alone."""
        target = node.target
        known = [_ids(v) for v in (a, b) if _carries_channels(v)]
        if not known:
            return None
        if len(known) == 2 and len(known[0]) == len(known[1]) and target not in DIVISIONS:
            not_zeroed = sum(isinstance(v, _NotZeroed) for v in (a, b))
            if not_zeroed == 0 or (not_zeroed == 1 and target in PRODUCTS):
                self.unite(*known)
                if target in ADDITIONS:
                    self.coupled.update(known[0].tolist())
                return known[0]
        if len(known) == 1 and target not in ADDITIONS:
            if _carries_channels(a) and self.is_scalar(b):
                return a
            if target in PRODUCTS and self.is_scalar(a):
                return b
        return self.unknown([a, b], {}, f"operation '{node.name}' on unlike shapes, or on what no BatchNorm can make 0")

    def is_scalar(self, x: Any) -> bool:
        return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.numel() == 1)

    def unknown(self, args: Any, kwargs: dict, what: str) -> None:
        read = [v for v in (*args, *kwargs.values()) if v is not None]
        if any(isinstance(v, (np.ndarray, _NotZeroed, _Shape, list, tuple)) for v in read):
            self.note(f"{what}: not known to the channel graph, what it reads stays whole", *read)

    def note(self, text: str, *values: Any) -> None:
        """Freeze what the values carry and remember why."""
        before, self.frozen = self.frozen, set()
        self.freeze(values)
        self.notes.append((text, self.frozen))
        self.frozen = before | self.frozen
