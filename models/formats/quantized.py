"""What int8 leaves in float: everything behind the head's convolutions, and what the user names."""
from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch

from utils.errors import UserError


def behind_last(readers: Mapping[str, Collection[str]], convolutions: Collection[str]) -> set[str]:
    """The nodes of a graph that follow a convolution which no other convolution follows.

    In a detector these convolutions are the head's, and what follows is the decoding of boxes: sums and squares of
    pixels, which 256 steps can't tell apart. They are found by position, so names do not matter.

    readers: node -> the nodes that read what it computes. The graph has no circle.
    """
    following: dict[str, set[str]] = {}

    def after(node: str) -> set[str]:
        waiting = [node]
        while waiting:  # without recursion: a network may be deeper than Python's stack
            current = waiting[-1]
            missing = [other for other in readers.get(current, ()) if other not in following]
            if current not in following and missing:
                waiting += missing
                continue
            waiting.pop()
            direct = readers.get(current, ())
            following[current] = set(direct).union(*(following[other] for other in direct))
        return following[node]

    last = [conv for conv in convolutions if not after(conv) & set(convolutions)]
    return set().union(*(after(conv) for conv in last))


def module_of(node: str) -> str:
    """The module that a node of an exported graph comes from: '/model/model.0/conv/Conv' -> 'model.0.conv'."""
    parts = node.strip("/").split("/")
    return ".".join(parts[1:-1]) if parts[0] == "model" else ""


def matching_nodes(nodes: Iterable[str], patterns: Collection[str]) -> set[str]:
    """The nodes whose module, or a module around it, fits one of the patterns, such as model.0 or model.2.m.*.

    UserError for a pattern that none fits.
    """
    modules = {node: module_of(node) for node in nodes}
    found: set[str] = set()
    for pattern in patterns:
        fitting = {node for node, module in modules.items() if fnmatch(module, pattern) or
                   fnmatch(module, f"{pattern}.*")}
        if not fitting:
            raise UserError(f"--int8-keep: no part of the model is called '{pattern}'; give names such as model.0 "
                            "or 'model.2.m.*'")
        found |= fitting
    return found
