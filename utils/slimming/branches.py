"""Branches: layers that a shortcut leads around. They may go as a whole, what is left computes x, not x + branch(x)."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass

from torch import fx, nn

import utils.slimming.operations as ops
from utils.slimming.values import is_one_of


@dataclass(frozen=True)
class Branch:
    """A module that computes after(x + branch(x)) and reads nothing but x: where the branch's end is 0, after(x)."""

    number: int              # its id, behind those of the channels
    module: str              # name of the module
    norms: tuple[str, ...]   # the branch's BatchNorms
    after: tuple[str, ...]   # modules behind the addition: activations

    def holds(self, name: str) -> bool:
        """Is this layer, BatchNorm or parameter one of the branch's?"""
        return name.startswith(f"{self.module}.")


def find_branches(nodes: fx.Graph, model: nn.Module, norms: Collection[str], first: int) -> dict[str, Branch]:
    """Name of a branch's last BatchNorm -> the branch, for all of a traced model, numbered from `first` on.

    norms: names of the BatchNorms that can be 0.
    """
    modules = dict(model.named_modules())
    inside: dict[str, set[fx.Node]] = {}  # name of a module -> what was traced in it
    for node in nodes.nodes:
        for name in _modules_around(node):
            inside.setdefault(name, set()).add(node)
    layers = {node for node in nodes.nodes if node.op in ("call_module", "get_attr")}
    branches: dict[str, Branch] = {}
    for add in nodes.nodes:
        if add.op not in ("call_function", "call_method") or add.target not in ops.SUMS:
            continue
        if len(add.args) != 2 or add.kwargs or not all(isinstance(arg, fx.Node) for arg in add.args):
            continue
        for x, end in (add.args, add.args[::-1]):
            last = _last_layer(modules, end)
            for name in reversed(_modules_around(add)) if last in norms else ():
                own = {layer for layer in layers if str(layer.target).startswith(f"{name}.")}
                after = _behind(modules, add, x, end, inside[name])
                if after is not None and own == inside[name] & layers:
                    of_branch = tuple(norm for norm in norms if norm.startswith(f"{name}."))
                    branches[last] = Branch(first + len(branches), name, of_branch, after)
                    break
    return branches


def _modules_around(node: fx.Node) -> list[str]:
    """Names of the modules that a node was traced in, from the outermost in."""
    return [name for name, _ in node.meta.get("nn_module_stack", {}).values() if name]


def _behind(modules: dict[str, nn.Module], add: fx.Node, x: fx.Node, end: fx.Node,
            inside: set[fx.Node]) -> tuple[str, ...] | None:
    """The modules behind x + end, if what was traced `inside` a module is only that, them, and what leads there."""
    whole, waiting = {add}, [end]
    while x in inside and x.op == "call_module" and type(modules[str(x.target)]) is nn.Identity:
        whole.add(x)
        x = x.all_input_nodes[0]
    while waiting:
        node = waiting.pop()
        if node in inside and node is not x and node not in whole:
            whole.add(node)
            waiting += node.all_input_nodes
    after, out = [], add
    while len(out.users) == 1 and (user := next(iter(out.users))) in inside and user.op == "call_module" and (
            _is_passthrough(modules, user) and not any(True for _ in modules[str(user.target)].parameters())):
        out = user
        whole.add(out)
        after.append(str(out.target))
    read = {node for one in inside for node in one.all_input_nodes} - inside
    seen_outside = {node for node in inside if not inside.issuperset(node.users)}
    return tuple(after) if inside == whole and read == {x} and seen_outside == {out} else None


def _last_layer(modules: dict[str, nn.Module], end: fx.Node) -> str:
    """Name of the layer that makes `end` 0 where it gives 0."""
    while _is_passthrough(modules, end):
        end = end.all_input_nodes[0]
    return str(end.target) if end.op == "call_module" else ""


def _is_passthrough(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    """Does it map its only input, where that is 0, to 0?"""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        layer = modules[str(node.target)]
        return is_one_of(layer, ops.PASSTHROUGH) or type(layer).__name__ in ops.DROPS
    return node.op in ("call_function", "call_method") and node.target in ops.PASSTHROUGH


def take_out(model: nn.Module, branches: Iterable[Branch]) -> None:
    """Replace the modules of these branches, in place, by what follows their additions: mostly nothing."""
    for branch in branches:
        old = model.get_submodule(branch.module)
        behind = [deepcopy(model.get_submodule(name)) for name in branch.after]
        for module in behind:
            if "inplace" in vars(module):  # it gets no sum any more, but x, which others may read, too
                vars(module)["inplace"] = False
        new = behind[0] if len(behind) == 1 else nn.Sequential(*behind) if behind else nn.Identity()
        for parent in list(model.modules()):  # it may be registered under several names
            for name in [name for name, child in parent._modules.items() if child is old]:
                parent.register_module(name, new)
