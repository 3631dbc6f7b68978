"""From a model to its channel graph, by torch.fx.

The real model is traced and each tensor carries the ids of its channels: a convolution makes new ones, BatchNorm,
activations and pools pass them on, concat appends, an addition unites them one by one (the rules are in walker.py). An
operation that is not known freezes the channels that it reads and leaves a note: a strange block stays whole, it is
never corrupted.
"""
from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from utils.slimming.graph import ChannelGraph, Convolution
from utils.slimming.operations import CHUNKS, PASSTHROUGH, SPLITS, is_plain
from utils.slimming.walker import Walker

M = TypeVar("M", bound=nn.Module)
# What makes weights anew in every call -> how a weight becomes a plain parameter again.
MENDS = {"torch.nn.utils.spectral_norm": "call torch.nn.utils.remove_spectral_norm(layer)",
         "torch.nn.utils.weight_norm": "call torch.nn.utils.remove_weight_norm(layer)",
         "torch.nn.utils.prune": "call torch.nn.utils.prune.remove(layer, 'weight')",
         "torch.nn.utils.parametrize": "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
         "its own code": "make it a parameter"}


def trace(model: nn.Module) -> ChannelGraph:
    """Follow `model` from its input to its outputs and return its channel graph.

    It is traced in training mode, where detection heads return their raw maps. What is traced is a copy: whatever the
    model's code does to buffers, modes and attributes does not happen to the model.
    Raises ValueError if torch.fx can't trace it (control flow that depends on data), and for weights that are no
    parameters of their layer.
    """
    refuse_made_weights(model)
    new = copy_sharing(model, model.parameters()).train()
    tracer = _Tracer()
    for layer in (m for m in new.modules() if isinstance(m, (Convolution, _BatchNorm)) and not is_plain(m)):
        vars(layer)["_check_input_dim"] = lambda x: None  # of BatchNorm: a branch on the input
        if not _can_be_traced(layer):
            tracer.opaque.add(layer)
    try:
        nodes = tracer.trace(new, _defaults(new))
    except Exception as error:  # fx raises many kinds
        raise ValueError(f"torch.fx can't trace {type(model).__name__}: {reason(error)}") from error
    return Walker(new).walk(nodes)


def reason(error: Exception) -> str:
    """The first line of an error's message; its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def copy_sharing(model: M, tensors: Iterable[Tensor | None]) -> M:
    """A deep copy of `model`, except for these parameters and buffers, which both hold."""
    return deepcopy(model, {id(tensor): tensor for tensor in tensors if tensor is not None})


def refuse_made_weights(model: nn.Module) -> None:
    """ValueError for weights that something else makes before every call: spectral_norm, weight_norm, prune's masks.

    There would be no weight to cut, but several tensors of other shapes.
    """
    for name, module in model.named_modules():
        makers = [type(hook).__module__ for hook in module._forward_pre_hooks.values()]
        if isinstance(module, (Convolution, _BatchNorm)):
            makers += ["torch.nn.utils.parametrize"] * is_parametrized(module)
            makers += ["its own code"] * (not {"weight", "bias"} <= module._parameters.keys())
        for maker in makers:
            if maker in MENDS:
                raise ValueError(f"{name or type(model).__name__}: {maker} makes its weight anew in every call, so "
                                 f"there is none to cut; {MENDS[maker]} first")


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The inputs of a model that need not be given, as they are when they are not: tracing follows that case."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, (bool, int, float))}


def _can_be_traced(module: nn.Module) -> bool:
    try:
        _Tracer().trace(module)
    except Exception:  # fx raises many kinds
        return False
    return True


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

    It does not look into modules that are registered as passthrough, nor into plain convolutions and BatchNorms under
    another name. It looks into those that do more than PyTorch's, unless they are `opaque`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.opaque: set[nn.Module] = set()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (Convolution, _BatchNorm)):
            return is_plain(m) or m in self.opaque
        return type(m) in PASSTHROUGH or super().is_leaf_module(m, module_qualified_name)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            count = len(obj)  # type: ignore[arg-type]  # fx.Proxy declares neither __len__ nor __getitem__
        except TypeError:
            return super().iter(obj)
        return iter([operator.getitem(obj, i) for i in range(count)])  # type: ignore[call-overload]
