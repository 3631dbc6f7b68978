"""What came of a cut."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic

from torch import Tensor, nn

from utils.slimming.graph import Masks
from utils.slimming.ranking import SafeThreshold
from utils.slimming.surgery import M, masked

FAR_BELOW = 0.1  # largest |gamma| of a channel that goes, relative to the median of those that stay


def separates(gammas: Tensor, kept: Tensor) -> bool:
    """Do |gamma| (channels,) tell which channels to cut: are those not `kept` (channels,) far below those that are?"""
    if kept.all() or not kept.any():
        return True
    return float(gammas[~kept].max()) <= FAR_BELOW * float(gammas[kept].median())


@dataclass(frozen=True)
class TargetOutcome:
    """What became of a target."""

    name: str
    goal: float
    value: float    # the target's figure for the cut that was made
    reached: bool   # False: there is no cut that reaches it


@dataclass
class PruneResult(Generic[M]):
    """A cut that was made and checked."""

    model: M                     # before
    slim: M
    masks: Masks
    branches: list[str]          # modules of which a whole branch was cut
    prunable: Masks              # which channels may be cut at all
    gammas: Tensor               # |gamma| of all prunable channels; of a branch that goes, of its last BatchNorm's
    kept: Tensor                 # which channels of .gammas are kept, (channels,) bool
    safe: SafeThreshold
    unused: float                # largest share of the prunable channels of which a cut takes only those that are 0
    threshold: float             # the largest |gamma| that was cut
    achieved: float              # share of the prunable channels that was cut, 0..1
    difference: float            # of the equivalence check: largest relative |slim - masked|
    target: TargetOutcome | None
    graph_notes: list[str]
    score: str                   # one of SCORES, by which the channels were ranked
    per_flop: bool               # ... per FLOP

    @cached_property
    def masked(self) -> M:
        """Of the old shape, gamma = beta = 0 on the cut channels: made of .model when it is first asked for."""
        return masked(self.model, self.masks)

    @property
    def gammas_separate(self) -> bool:
        """Do the gammas tell which channels to cut?"""
        return separates(self.gammas, self.kept)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One row per BatchNorm: its name, original and remaining channels, and whether it could be cut at all."""
        return [{"layer": name, "original": len(mask), "remaining": int(mask.sum()),
                 "prunable": bool(self.prunable[name].any())} for name, mask in self.masks.items()]

    @property
    def notes(self) -> list[str]:
        """What the user should know of the graph and of the slim model."""
        return self.graph_notes + misaligned_channels(self.slim)

    @property
    def report(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {"achieved": self.achieved, "score": self.score, "threshold": self.threshold,
                "limit": {"gamma": self.safe.gamma, "percent": self.safe.percent}, "difference": self.difference,
                "branches": self.branches, "layers": self.layers, "notes": self.notes}


def misaligned_channels(model: nn.Module) -> list[str]:
    """A note on convolutions that onnxruntime can't run in blocks of channels on a CPU; empty where there are none.

    Its blocked kernels take input channels that divide by 4. It reads 16 channels and less as they are.
    """
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    count = sum(m.in_channels > 16 and m.in_channels % 4 > 0 for m in convs)
    if not count:
        return []
    return [f"{count} of {len(convs)} convolutions read a number of channels that does not divide by 4, "
            "which costs speed under onnxruntime; --round-to 16 mends that"]
