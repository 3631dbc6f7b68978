"""What cuts would do, before any is made: over a range of percents, and layer by layer."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from utils.slimming.cost import CostModel
from utils.slimming.selection import Masks, Selection
from utils.slimming.surgery import keep_ids, slim

Measure = Callable[[nn.Module], Mapping[str, float]]  # a model -> its accuracy, such as {"mAP50": 0.9, "mAP50-95": 0.6}


def sweep(model: nn.Module, ranked: Selection, costs: CostModel, shares: Sequence[float], measure: Measure) -> tuple[list[dict[str, Any]], list[nn.Module]]:
    """A row a share (0..1) of the prunable channels, percent, accuracy and cost of the slim model, and those models."""
    rows, models = [], []
    for share in tqdm(shares, desc="sweep", leave=False, disable=None):
        masks = ranked.percent(share)
        models.append(slim(model, masks))
        rows.append({"percent": share, **measure(models[-1]), **_cost(ranked, costs, masks)})
    return rows, models


def sensitivity(model: nn.Module, ranked: Selection, costs: CostModel, share: float, measure: Measure) -> list[dict[str, Any]]:
    """A row a layer: accuracy and cost when `share` of this layer's channels goes and all others stay; the first row is the whole model.

    Layers whose channels are the same ones have one row, under the name of the first.
    """
    rows: list[dict[str, Any]] = [{"layer": "(none)", "cut": 0, **measure(model), **_cost(ranked, costs, ranked.cut(0))}]
    seen: set[bytes] = set()
    for name, ids in tqdm(ranked.graph.norms.items(), desc="layers", leave=False, disable=None):
        masks = ranked.layer(name, share)
        channels = ranked.graph.group[ids].tobytes()
        if masks[name].all() or channels in seen:
            continue
        seen.add(channels)
        rows.append({"layer": name, "cut": int((~masks[name]).sum()), **measure(slim(model, masks)), **_cost(ranked, costs, masks)})
    return rows


def _cost(ranked: Selection, costs: CostModel, masks: Masks) -> dict[str, float]:
    parameters, flops = costs.remaining(keep_ids(ranked.graph, masks))
    return {"parameters": parameters, "GFLOPs": flops / 1e9}
