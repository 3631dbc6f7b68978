"""What int8 leaves in float: the head and everything that no convolution follows, and what the user names."""
from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch

from utils.errors import UserError


def without_convolution_after(readers: Mapping[str, Collection[str]], convolutions: Collection[str]) -> set[str]:
    """The nodes of a graph that no convolution follows: the head's convolutions and the decoding of boxes.

    Decoding is sums and squares of pixels, which 256 steps can't tell apart. The places of the grid are part of it,
    though they do not follow the head: in steps of a 255th of the grid's width a box would be half a pixel off.
    The nodes are found by position, so names do not matter.

    readers: node -> the nodes that read what it computes.
    """
    sources: dict[str, list[str]] = {}
    for node, others in readers.items():
        for other in others:
            sources.setdefault(other, []).append(node)
    before: set[str] = set()
    waiting = list(convolutions)
    while waiting:
        new = set(sources.get(waiting.pop(), ())) - before
        before |= new
        waiting += new
    return set(readers) - before


def module_of(node: str) -> str:
    """The module that a node of an exported graph comes from: '/model/model.0/conv/Conv' -> 'model.0.conv'."""
    parts = node.strip("/").split("/")
    return ".".join(parts[1:-1]) if parts[0] == "model" else ""


def matching_nodes(nodes: Iterable[str], patterns: Collection[str]) -> set[str]:
    """The nodes whose module, or a module around it, fits one of the patterns, such as model.0 or model.2.m.*.

    UserError for a pattern that none fits.
    """
    modules = {node: module_of(node) for node in nodes}
    matches: set[str] = set()
    for pattern in patterns:
        fitting = {node for node, module in modules.items() if fnmatch(module, pattern) or
                   fnmatch(module, f"{pattern}.*")}
        if not fitting:
            raise UserError(f"--int8-keep: no part of the model is called '{pattern}'; give names such as model.0 "
                            "or 'model.2.m.*'")
        matches |= fitting
    return matches
