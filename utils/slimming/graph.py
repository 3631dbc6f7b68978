"""The channel graph: which channels of a network are the same channel.

Every output channel of a convolution gets a number (an id). The real model is traced with torch.fx and each tensor on
the way carries the ids of its channels: a convolution makes new ones, BatchNorm, activations and pools pass them on,
concat appends, an addition unites them one by one. An operation that is not known here freezes the channels it touches
and leaves a note, so that a strange block is never corrupted, only left whole. After that, one boolean per id decides
everything: masks, kept inputs and outputs, cost. No layer number and no class of a particular architecture appears.

Networks are taken to be image networks: dimension 1 of every 4-D tensor is the channel.
"""
from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Leave the channels in place and map 0 to 0, so that a channel whose gamma and beta are 0 stays 0 behind them.
PASSING_MODULES: tuple[type[nn.Module], ...] = (
    nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardswish, nn.Mish, nn.GELU, nn.ELU, nn.Tanh, nn.Identity,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d)
PASSING_FUNCTIONS = {F.silu, F.relu, F.leaky_relu, F.relu6, F.hardswish, F.mish, F.gelu, F.interpolate, F.max_pool2d,
                     F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, torch.relu, torch.tanh, torch.neg, operator.neg}
PASSING_METHODS = {"contiguous", "clone", "detach", "float", "half", "to", "relu", "tanh"}
# Leave the channels in place but make something of 0: good for nothing but a factor of channels that are 0 themselves.
GATES: tuple[type[nn.Module], ...] = (nn.Sigmoid, nn.Hardsigmoid)
GATE_FUNCTIONS = {torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid", "sigmoid_"}
ADDITIONS = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
DIVISIONS = {operator.truediv, torch.div, "div"}
CHUNKS = {torch.chunk, "chunk"}
SPLITS = {torch.split, "split"}
SHAPE_QUERIES = {"size", "dim", getattr}
HARMLESS = {"device", "dtype", "ndim", "is_cuda", "requires_grad", "layout"}  # attributes


@dataclass
class ChannelGraph:
    """What trace() found. Ids are integers 0..n-1; `group[id]` is equal for ids that live or die together."""

    inputs: dict[str, np.ndarray] = field(default_factory=dict)   # convolution name -> ids of its input channels
    outputs: dict[str, np.ndarray] = field(default_factory=dict)  # convolution name -> ids of its output channels
    norms: dict[str, np.ndarray] = field(default_factory=dict)    # BatchNorm name -> ids of its channels
    group: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    frozen: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # per id: must be kept
    tied: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))    # per id: united with others by an addition
    notes: list[str] = field(default_factory=list)

    def prunable(self) -> dict[str, Tensor]:
        """BatchNorm name -> bool (channels,): may be cut alone, that is neither frozen nor tied by a shortcut."""
        return {name: torch.from_numpy(~(self.frozen | self.tied)[ids]) for name, ids in self.norms.items()}

    def prunable_norms(self, joint: bool = False, leave: Iterable[str] = ()) -> list[str]:
        """Names of the BatchNorms whose channels may all be cut: those that sparsity training acts on.

        `joint`: shortcuts' channels, too, each group at once. `leave`: these are left out, and so is every BatchNorm that shares a
        channel with one of them, since it could not be cut.
        """
        fixed = np.zeros(len(self.group), bool)
        for name in leave:
            fixed[self.group[self.norms[name]]] = True
        fixed |= self.frozen if joint else self.frozen | self.tied
        names = dict(self.norms)
        while blocked := [name for name, ids in names.items() if fixed[self.group[ids]].any()]:
            for name in blocked:
                fixed[self.group[names.pop(name)]] = True
        return list(names)


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
    """torch.fx's tracer with such stand-ins."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            return iter([obj[i] for i in range(len(obj))])  # type: ignore[arg-type, index]
        except TypeError:
            return super().iter(obj)


@dataclass(frozen=True)
class _Gate:
    """Ids of channels that may differ from 0 where they are cut: a sigmoid's, or a convolution's that no BatchNorm follows."""

    ids: np.ndarray


def _ids(x: Any) -> np.ndarray:
    return x.ids if isinstance(x, _Gate) else x


@dataclass(frozen=True)
class _Shape:
    """x.shape, of a tensor with these ids."""

    ids: np.ndarray


class _Walker:
    """Carries the ids along the traced nodes.

    The value of a node is an int array (the ids of a tensor's channels, which are 0 where they are cut), a _Gate, a _Shape, a list
    of values, a Tensor (a parameter, or what is computed from parameters only), or None: not a tensor, or one whose channels are not known, such as the image.
    """

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, dict(model.named_modules())
        self.graph = ChannelGraph()
        self.parent: list[int] = []
        self.frozen: set[int] = set()
        self.tied: set[int] = set()
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

    def freeze(self, value: Any) -> None:
        """Freeze every channel in a value, however nested."""
        if isinstance(value, np.ndarray):
            self.frozen.update(value.tolist())
        elif isinstance(value, (_Gate, _Shape)):
            self.frozen.update(value.ids.tolist())
        elif isinstance(value, (list, tuple)):
            for v in value:
                self.freeze(v)

    # --- nodes ---
    def walk(self, nodes: fx.Graph) -> ChannelGraph:
        values: dict[fx.Node, Any] = {}
        for node in nodes.nodes:
            args = fx.map_arg(node.args, lambda n: values[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
            if node.op == "call_module":
                values[node] = self.module(str(node.target), args, dict(kwargs))
            elif node.op in ("call_function", "call_method"):
                values[node] = self.function(node, list(args), dict(kwargs))
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(self.model)
            else:
                values[node] = None
                if node.op == "output":
                    self.freeze(args)
        return self.finish()

    def finish(self) -> ChannelGraph:
        graph, n = self.graph, len(self.parent)
        normed = {int(i) for ids in graph.norms.values() for i in ids}
        graph.notes = [text for text, ids in self.notes if ids & normed]  # an output's view() holds back nothing prunable
        graph.group = np.array([self.root(i) for i in range(n)], int)
        for flags, ids in (("frozen", self.frozen), ("tied", self.tied)):
            marked = np.zeros(n, bool)
            marked[graph.group[list(ids)]] = True  # one marked member marks its whole group
            setattr(graph, flags, marked[graph.group])
        return graph

    def module(self, name: str, args: tuple, kwargs: dict) -> Any:
        module = self.modules[name]
        x = args[0] if args else kwargs.get("input")
        if isinstance(module, nn.Conv2d):
            return self.convolution(name, module, x)
        if isinstance(module, _BatchNorm) and isinstance(x, (np.ndarray, _Gate)):
            ids = _ids(x)
            self.unite(ids, self.graph.norms.setdefault(name, ids))  # called twice: its channels are those of both
            return ids
        if isinstance(module, PASSING_MODULES):
            return x
        if isinstance(module, GATES) and isinstance(x, (np.ndarray, _Gate)):
            return _Gate(_ids(x))
        return self.unknown(args, kwargs, f"{name} ({type(module).__name__})")

    def convolution(self, name: str, conv: nn.Conv2d, x: Any) -> Any:
        if isinstance(x, _Gate):
            self.note(f"{name}: reads channels that no BatchNorm can make 0, or a gate; they stay", x)
            x = x.ids
        elif not isinstance(x, np.ndarray):
            x = self.new(conv.in_channels)  # the image, or what an unknown operation made
            self.freeze(x)
        if name in self.graph.inputs:  # called twice: one weight for both
            self.unite(self.graph.inputs[name], x)
            return _Gate(self.graph.outputs[name])
        if conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels:
            self.graph.inputs[name] = self.graph.outputs[name] = x
            return x if conv.bias is None else _Gate(x)  # depthwise: 0 stays 0
        out = self.new(conv.out_channels)
        if conv.groups > 1:  # every group keeps as many channels, those at the same places
            self.align(x, conv.groups)
            self.align(out, conv.groups)
        self.graph.inputs[name], self.graph.outputs[name] = x, out
        return _Gate(out)  # until a BatchNorm follows

    def align(self, ids: np.ndarray, parts: int) -> None:
        """Unite the channels at the same place of equal parts."""
        first, *others = np.split(ids, parts)
        for other in others:
            self.unite(first, other)

    def function(self, node: fx.Node, args: list, kwargs: dict) -> Any:
        target = node.target
        x = args[0] if args else None
        if target in SHAPE_QUERIES:
            return self.shape(node, x, args[1:])
        if isinstance(x, Tensor) and all(isinstance(a, (Tensor, int, float)) for a in (*args, *kwargs.values())):
            return getattr(x, target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)  # type: ignore[operator]
        if target in (torch.cat, torch.concat):
            parts, dim = kwargs.get("tensors", x), kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim in (1, -3) and isinstance(parts, (list, tuple)) and all(isinstance(p, (np.ndarray, _Gate)) for p in parts):
                ids = np.concatenate([_ids(p) for p in parts])
                return _Gate(ids) if any(isinstance(p, _Gate) for p in parts) else ids
            return self.unknown([parts], {}, f"a concat of unlike parts ({node.name})")
        if target is operator.getitem:
            return self.item(node, x, args[1])
        if target in ADDITIONS or target in PRODUCTS or target in DIVISIONS:
            return self.elementwise(node, x, args[1] if len(args) > 1 else kwargs.get("other"))
        if target in PASSING_FUNCTIONS or target in PASSING_METHODS or self.pools(target, args, kwargs):
            return x
        if target in GATE_FUNCTIONS and isinstance(x, (np.ndarray, _Gate)):
            return _Gate(_ids(x))
        if target in CHUNKS and isinstance(x, np.ndarray):
            count, dim = (kwargs.get(k, args[i] if len(args) > i else d) for i, k, d in ((1, "chunks", 1), (2, "dim", 0)))
            if dim == 1 and len(x) % count == 0:  # the parts must stay equal, or chunk() would cut elsewhere
                self.align(x, count)
                return np.split(x, count)
        return self.unknown(args, kwargs, f"operation '{getattr(target, '__name__', target)}' ({node.name})")

    def shape(self, node: fx.Node, x: Any, args: list) -> Any:
        """x.shape, x.size(), x.size(2); of x.dim() and other attributes, such as x.device, no channel depends."""
        if not isinstance(x, (np.ndarray, _Gate)) or node.target == "dim" or (node.target is getattr and args[0] in HARMLESS):
            return None
        if node.target is getattr and args[0] != "shape":
            return self.unknown([x], {}, f"attribute '{args[0]}' ({node.name})")
        shape = _Shape(_ids(x))
        return self.item(node, shape, args[0]) if args and node.target == "size" else shape

    def pools(self, target: Any, args: list, kwargs: dict) -> bool:
        """Is this x.mean((2, 3), keepdim=True), or amax?"""
        dims, keepdim = (kwargs.get(k, args[i] if len(args) > i else None) for i, k in ((1, "dim"), (2, "keepdim")))
        named = target in ("mean", "amax", torch.mean, torch.amax)
        return named and keepdim is True and isinstance(dims, (list, tuple)) and set(dims) <= {2, 3, -1, -2}

    def item(self, node: fx.Node, x: Any, index: Any) -> Any:
        """x[index]: an element of a list, or a crop in space that leaves the channels alone."""
        if isinstance(x, (list, tuple)):
            return x[index]
        if isinstance(x, _Shape):  # heights and widths may be computed with; who asks for the number of channels relies on it
            asks = 1 in np.atleast_1d(np.arange(4)[index]) if isinstance(index, (int, slice)) else True
            return self.unknown([x], {}, f"the number of channels, '{node.name}',") if asks and node.users else None
        rest = None
        if isinstance(index, tuple):
            rest = index[1:] if index[0] is Ellipsis and len(index) <= 3 else index[2:] if index[:2] == (slice(None), slice(None)) else None
        if x is None or (isinstance(x, (np.ndarray, _Gate)) and rest is not None and all(isinstance(i, slice) for i in rest)):
            return x
        return self.unknown([x], {}, f"index {index} ({node.name})")

    def elementwise(self, node: fx.Node, a: Any, b: Any) -> Any:
        """Sum or product of two tensors: their channels live or die together. A factor leaves them alone."""
        known, target = [_ids(v) for v in (a, b) if isinstance(v, (np.ndarray, _Gate))], node.target
        gates = sum(isinstance(v, _Gate) for v in (a, b))
        if len(known) == 2 and len(known[0]) == len(known[1]) and target not in DIVISIONS and gates <= int(target in PRODUCTS):
            self.unite(*known)
            if target in ADDITIONS:
                self.tied.update(known[0].tolist())
            return known[0]
        factor = b if isinstance(a, (np.ndarray, _Gate)) else a if target in PRODUCTS else None
        if len(known) == 1 and target not in ADDITIONS and (isinstance(factor, (int, float)) or isinstance(factor, Tensor) and factor.numel() == 1):
            return b if factor is a else a
        return self.unknown([a, b], {}, f"operation '{node.name}' on unlike shapes, or on what no BatchNorm can make 0") if known else None

    def unknown(self, args: Any, kwargs: dict, what: str) -> None:
        touched = [v for v in (*args, *kwargs.values()) if v is not None]
        if any(isinstance(v, (np.ndarray, _Gate, _Shape, list, tuple)) for v in touched):
            self.note(f"{what}: not known to the channel graph, what it reads stays whole", *touched)

    def note(self, text: str, *values: Any) -> None:
        """Freeze what the values carry and remember why."""
        before, self.frozen = self.frozen, set()
        self.freeze(values)
        self.notes.append((text, self.frozen))
        self.frozen = before | self.frozen
