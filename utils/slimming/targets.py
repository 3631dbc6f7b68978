"""Targets: what a cut is to reach, in the place of a share of channels."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from utils.slimming.ranking import TracedModel
from utils.slimming.surgery import masked, slim


@dataclass(frozen=True)
class Target:
    """A figure of the model that falls the more is cut.

    value: (model, kept ids (bool, (ids,))) -> the figure after the cut.
    limit: False: the smallest cut whose figure is at most the number given. True: the number is a loss that is allowed,
    and the largest cut is made that does not lose more.
    """

    value: Callable[[TracedModel, np.ndarray], float]
    limit: bool = False


def params_left(traced: TracedModel, keep: np.ndarray) -> float:
    """Share of the parameters, 0..1."""
    return traced.costs.remaining(keep)[0] / traced.costs.remaining()[0]


def flops_left(traced: TracedModel, keep: np.ndarray) -> float:
    """Share of the FLOPs, 0..1."""
    return traced.costs.remaining(keep)[1] / traced.costs.remaining()[1]


def latency_left(traced: TracedModel, keep: np.ndarray) -> float:
    """Milliseconds after the cut, relative to before; both are measured now."""
    after = slim(traced.model, traced.graph.masks(keep), traced.graph)
    before_ms, after_ms = traced.milliseconds([traced.model, after])
    return after_ms / before_ms


def map_gained(traced: TracedModel, keep: np.ndarray) -> float:
    """mAP50-95 without the cut channels, minus that with them: negative where the cut hurts."""
    without = traced.evaluate(masked(traced.model, traced.graph.masks(keep)))
    return without["mAP50-95"] - traced.accuracy["mAP50-95"]


# prune.py --target NAME=NUMBER.
TARGETS: dict[str, Target] = {"params": Target(params_left), "flops": Target(flops_left),
                              "latency": Target(latency_left), "map-drop": Target(map_gained, limit=True)}


def is_target(value: Any) -> bool:
    """Is this a name of TARGETS and a number between 0 and 1?"""
    return (isinstance(value, (tuple, list)) and len(value) == 2 and value[0] in [*TARGETS]
            and isinstance(value[1], Real) and 0 < float(value[1]) < 1)
