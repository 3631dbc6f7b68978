"""The channel graph: which channels of a network are the same channel.

Every output channel of a convolution or a Linear has a number, its id. tracing.py follows the model and notes the ids
that each layer reads and writes. Branches that may go as a whole have ids behind those. One boolean per id then decides
everything: masks, kept inputs and outputs, cost. No layer number and no class of a particular architecture appears.
"""
from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.slimming.branches import Branch

Convolution = nn.Conv2d | nn.ConvTranspose2d
Layer = Convolution | nn.Linear
Masks = dict[str, Tensor]  # BatchNorm name -> bool (channels,) over the channels that it has now; True is kept


@dataclass
class ChannelGraph:
    """Ids are integers 0..n-1. `group[id]` is equal for ids that can only be kept or cut together.

    A branch has an id of its own and is cut where that is cut. The ids of its channels do not matter then: other layers
    may have them, too. In masks a branch is cut where the masks of all of its BatchNorms are all False.
    """

    inputs: dict[str, np.ndarray] = field(default_factory=dict)   # layer name -> ids of its input channels
    outputs: dict[str, np.ndarray] = field(default_factory=dict)  # layer name -> ids of its output channels
    norms: dict[str, np.ndarray] = field(default_factory=dict)    # BatchNorm name -> ids of its channels
    unscaled: dict[str, np.ndarray] = field(default_factory=dict)  # the same of those without scale and shift: frozen
    vectors: dict[str, np.ndarray] = field(default_factory=dict)  # parameter with a value a channel -> ids of these
    group: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    frozen: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))   # (ids,) must be kept
    coupled: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # (ids,) united with others by an addition
    branches: dict[str, Branch] = field(default_factory=dict)     # last BatchNorm of a branch -> the branch
    notes: list[str] = field(default_factory=list)                # what the graph does not know, for the user

    def add_branches(self, branches: dict[str, Branch]) -> None:
        """Note branches, numbered from the number of ids on. They are frozen, unless rules let branches go."""
        ids = np.array([branch.number for branch in branches.values()], int)
        self.branches, self.group = branches, np.append(self.group, ids)
        self.frozen = np.append(self.frozen, np.ones(len(ids), bool))
        self.coupled = np.append(self.coupled, np.zeros(len(ids), bool))

    def around(self, name: str) -> np.ndarray:
        """Ids of the branches that a layer, BatchNorm or parameter is in."""
        return np.array([branch.number for branch in self.branches.values() if branch.holds(name)], int)

    def gone(self, keep: np.ndarray) -> list[Branch]:
        """The branches that are cut where keep, bool (ids,), is False."""
        return [branch for branch in self.branches.values() if not keep[branch.number]]

    def removable(self, coupled: bool = False) -> np.ndarray:
        """bool (ids,): may be cut. `coupled`: channels that an addition couples may go as well, a group at once."""
        return ~self.frozen if coupled else ~(self.frozen | self.coupled)

    def prunable(self, coupled: bool = False) -> Masks:
        """BatchNorm name -> bool (channels,): may be cut."""
        removable = self.removable(coupled)
        return {name: torch.from_numpy(removable[ids]) for name, ids in self.norms.items()}

    def prunable_norms(self, coupled: bool = False, leave: Iterable[str] = ()) -> list[str]:
        """Names of the BatchNorms whose channels may all be cut: those that sparsity training acts on.

        `leave`: these are left out, and so is every BatchNorm that shares a channel with one of them.
        """
        fixed = ~self.removable(coupled)
        for name in leave:
            fixed[self.group[self.norms[name]]] = True
        names = dict(self.norms)
        while blocked := [name for name, ids in names.items() if fixed[self.group[ids]].any()]:
            for name in blocked:
                fixed[self.group[names.pop(name)]] = True
        return list(names)

    def groups(self, names: Iterable[str], whole: Collection[str] = ()) -> list[np.ndarray]:
        """Numbers of the channels of these BatchNorms, int (channels,) each, equal for those that go at once.

        whole: those of them that end branches which go as a whole, and are no more coupled to others.
        """
        return [np.full(len(self.norms[name]), self.branches[name].number) if name in whole
                else self.group[self.norms[name]] for name in names]

    def masks(self, keep: np.ndarray) -> Masks:
        """One bool per id -> masks for every BatchNorm."""
        return {name: torch.from_numpy(keep[self.group[ids]] & keep[self.around(name)].all())
                for name, ids in self.norms.items()}

    def kept(self, masks: Masks) -> np.ndarray:
        """Masks -> one bool per id. Raises ValueError on masks that contradict each other or the graph."""
        keep = np.ones(len(self.group), bool)
        for name, mask in masks.items():
            if name not in self.norms:
                raise ValueError(f"mask for '{name}': the model has no such BatchNorm in its channel graph")
            require_mask(name, mask, len(self.norms[name]))
        cut = [branch for branch in self.branches.values()
               if all(name in masks and not masks[name].any() for name in branch.norms)]
        masks = {name: mask for name, mask in masks.items() if not any(branch.holds(name) for branch in cut)}
        for name, mask in masks.items():
            keep[self.group[self.norms[name][~mask.numpy()]]] = False
        keep = keep[self.group]
        if (~keep & self.frozen).any():
            raise ValueError("the masks cut channels that must stay (an output, or what an unknown operation reads)")
        keep[[branch.number for branch in cut]] = False
        if emptied := [name for name, ids in self.outputs.items() if not keep[ids].any()]:
            raise ValueError(f"nothing is left of {', '.join(emptied)}: a layer needs an output channel")
        for name, mask in masks.items():
            if not np.array_equal(keep[self.norms[name]], mask.numpy()):
                raise ValueError(f"mask for '{name}' disagrees with that of a layer that shares its channels")
        return keep


def require_mask(name: str, mask: Tensor, channels: int) -> None:
    """ValueError for what is no mask of a layer of so many channels. Numbers in its place would be taken for indices.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 1:
        raise ValueError(f"mask for '{name}': a tensor of bool is needed, one for each channel")
    if len(mask) != channels:
        raise ValueError(f"mask for '{name}' has {len(mask)} channels, the layer has {channels}")


def batch_norms(model: nn.Module, names: Iterable[str]) -> dict[str, _BatchNorm]:
    """Name -> BatchNorm of the model, for the names of a graph or of masks. ValueError for one that it lacks."""
    norms = {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = model
        if not isinstance(module, _BatchNorm):
            raise ValueError(f"'{name}': the model has no BatchNorm of that name")
        norms[name] = module
    return norms


def weighted_layers(model: nn.Module, names: Iterable[str]) -> dict[str, Layer]:
    """Name -> convolution or Linear of the model, for the names of a graph."""
    layers = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, Layer)
        layers[name] = module
    return layers


def filters(layer: Layer) -> Tensor:
    """The weight by output channels, (out, in / groups, h, w) also of a transposed convolution, (out, in) of Linear."""
    weight = layer.weight.detach()
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)  # it is stored by input channels


class UnknownNormError(ValueError):
    """A pattern that fits the name of no BatchNorm."""


def matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names that fit one of the patterns (model.0.*). UnknownNormError for a pattern that none fits."""
    by_pattern = {pattern: {name for name in names if fnmatch(name, pattern)} for pattern in patterns}
    if unused := [pattern for pattern in patterns if not by_pattern[pattern]]:
        raise UnknownNormError(f"no BatchNorm is called {', '.join(unused)}")
    return set().union(*by_pattern.values())
