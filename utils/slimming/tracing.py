"""From a model to its channel graph, by torch.fx.

The real model is traced and each tensor carries the ids of its channels: a convolution makes new ones, BatchNorm,
activations and pools pass them on, concat appends, an addition unites them one by one (the rules are in walker.py). An
operation that is not known freezes the channels that it reads and leaves a note: a strange block stays whole, it is
never corrupted.
"""
from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from utils.modules import deep_copy
from utils.slimming.branches import find_branches
from utils.slimming.graph import ChannelGraph, Convolution, Layer
from utils.slimming.operations import CHUNKS, DROPS, PASSTHROUGH, SPLITS, is_plain
from utils.slimming.walker import Walker

M = TypeVar("M", bound=nn.Module)
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]  # what a model is called with: model(x), model(*x), model(**x)
# What makes weights anew in every call -> how a weight becomes a plain parameter again.
MENDS = {"torch.nn.utils.spectral_norm": "call torch.nn.utils.remove_spectral_norm(layer)",
         "torch.nn.utils.weight_norm": "call torch.nn.utils.remove_weight_norm(layer)",
         "torch.nn.utils.prune": "call torch.nn.utils.prune.remove(layer, 'weight')",
         "torch.nn.utils.parametrize": "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
         "its own code": "make it a parameter"}


def trace(model: nn.Module, inputs: Inputs | None = None) -> ChannelGraph:
    """Follow `model` from its input to its outputs and return its channel graph.

    It is traced in training mode, where detection heads return their raw maps. What is traced is a copy: whatever the
    model's code does to buffers, modes and attributes does not happen to the model. A block that torch.fx can't trace
    (control flow that depends on data) is an unknown operation. inputs: example inputs; one image otherwise.
    Raises ValueError if torch.fx can't trace what is around such blocks, and for weights that are no parameters of
    their layer.
    """
    refuse_made_weights(model)
    new = copy_sharing(model, model.parameters()).train()
    for layer in (m for m in new.modules() if isinstance(m, _BatchNorm) and not is_plain(m)):
        vars(layer)["_check_input_dim"] = lambda x: None  # a branch on the input
    arguments, defaults = _inputs(new, inputs)
    opaque: set[type[nn.Module]] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            nodes = tracer.trace(new, defaults)
            break
        except Exception as error:  # fx raises many kinds
            if tracer.failed is None:
                raise ValueError(f"torch.fx can't trace {type(model).__name__}: {reason(error)}") from error
            opaque.add(type(tracer.failed))
    graph = Walker(new, {name for name, x in arguments.items() if isinstance(x, Tensor) and x.dim() == 2}).walk(nodes)
    graph.add_branches(find_branches(nodes, new, graph.norms, len(graph.group)))
    return graph


def as_call(inputs: Inputs | None) -> tuple[tuple, dict[str, Any]]:
    """The arguments that a model is called with, by position and by name; of one image where nothing is given."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if inputs is None or isinstance(inputs, Tensor) else tuple(inputs), {}


def reason(error: Exception) -> str:
    """The first line of an error's message; its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def copy_sharing(model: M, tensors: Iterable[Tensor | None]) -> M:
    """A deep copy of `model`, except for these parameters and buffers, which both hold."""
    return deep_copy(model, {id(tensor): tensor for tensor in tensors if tensor is not None})


def refuse_made_weights(model: nn.Module) -> None:
    """ValueError for weights that something else makes before every call: spectral_norm, weight_norm, prune's masks.

    There would be no weight to cut, but several tensors of other shapes.
    """
    for name, module in model.named_modules():
        makers = [type(hook).__module__ for hook in module._forward_pre_hooks.values()]
        if isinstance(module, (Convolution, _BatchNorm)):  # a Linear may have such a weight: it is not cut
            makers += ["torch.nn.utils.parametrize"] * is_parametrized(module)
            makers += ["its own code"] * (not {"weight", "bias"} <= module._parameters.keys())
        for maker in makers:
            if maker in MENDS:
                raise ValueError(f"{name or type(model).__name__}: {maker} makes its weight anew in every call, so "
                                 f"there is none to cut; {MENDS[maker]} first")


def _inputs(model: nn.Module, inputs: Inputs | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a model by name: those that are given, and the plain defaults of the others."""
    args, kwargs = as_call(inputs)
    parameters = inspect.signature(model.forward).parameters
    arguments = {**dict(zip(parameters, args)), **kwargs}
    return arguments, {name: p.default for name, p in parameters.items() if name not in arguments
                       and (p.default is None or isinstance(p.default, (bool, int, float)))}


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
    """torch.fx's tracer with such stand-ins.

    It does not look into modules that are registered as passthrough, nor into plain layers and BatchNorms under another
    name, nor into those of `opaque` classes. It looks into layers that do more than PyTorch's.
    """

    def __init__(self, opaque: set[type[nn.Module]]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: nn.Module | None = None  # the innermost module that can't be traced

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        """Without stand-ins for *args and **kwargs, which a model is not called with."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        flags = inspect.unwrap(root_fn).__code__.co_flags
        kinds: tuple[tuple[int, Any], ...] = (inspect.CO_VARARGS, ()), (inspect.CO_VARKEYWORDS, {})
        empty = [nothing for flag, nothing in kinds if flags & flag]
        return function, [*args[:len(args) - len(empty)], *empty]

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in PASSTHROUGH | self.opaque or type(m).__name__ in DROPS:
            return True
        if isinstance(m, (Layer, _BatchNorm)):
            return is_plain(m)
        return super().is_leaf_module(m, module_qualified_name)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            count = len(obj)  # type: ignore[arg-type]  # fx.Proxy declares neither __len__ nor __getitem__
        except TypeError:
            return super().iter(obj)
        return iter([operator.getitem(obj, i) for i in range(count)])  # type: ignore[call-overload]
