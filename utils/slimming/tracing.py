"""From a model to its channel graph, by torch.fx.

The real model is traced and each tensor carries the ids of its channels: a convolution makes new ones, BatchNorm,
activations and pools pass them on, concat appends, an addition unites them one by one (the rules are in walker.py). An
operation that is not known freezes the channels that it reads and leaves a note: a strange block stays whole, it is
never corrupted.
"""
from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from utils.slimming.graph import ChannelGraph
from utils.slimming.operations import CHUNKS, PASSTHROUGH, SPLITS
from utils.slimming.walker import Walker


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
    return Walker(model).walk(nodes)


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
