"""The record of a pruning: tables on the screen, plain data for report.json."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from utils.slimming.cost import Cost
from utils.slimming.equivalence import EQUIVALENCE_BOUND
from utils.slimming.graph import Masks
from utils.slimming.result import PruneResult, TargetOutcome
from utils.tables import text_table


def cost_rows(before: Cost, after: Cost, ms: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """One row per figure: before, after, and what is left of it.

    ms: how it was measured -> milliseconds per image (before, after).
    """
    figures = [("parameters", before.parameters, after.parameters), ("GFLOPs", before.gflops, after.gflops),
               ("MB (fp32 weights)", before.megabytes, after.megabytes)]
    figures += [(f"ms an image ({how})", a, b) for how, (a, b) in ms.items()]
    return [{"figure": name, "before": a, "after": b, "left": b / a if a else 0.0} for name, a, b in figures]


def cost_table(rows: list[dict[str, Any]]) -> str:
    """figure | before | after | left."""
    def show(value: float) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"

    cells = [(r["figure"], show(r["before"]), show(r["after"]), f"{r['left']:.0%}") for r in rows]
    return text_table(cells, ("", "before", "after", "left"))


def stage_table(rows: list[dict[str, Any]]) -> str:
    """stage | mAP50 | mAP50-95 ... for rows of equal keys; the first key is the row's name."""
    def show(value: Any) -> str:
        if isinstance(value, str):
            return value
        return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"

    keys = list(rows[0])
    return text_table([[show(row.get(key, "")) for key in keys] for row in rows], keys)


def lineage_note(before: Masks, after: Masks) -> str:
    """After several rounds: what is left of the channels of the first model; empty in the first round."""
    if not before:
        return ""
    earlier, kept = (sum(int(mask.sum()) for mask in masks.values()) for masks in (before, after))
    total = sum(len(mask) for mask in after.values())
    return (f"of the first model {kept:,} of {total:,} channels are left ({kept / total:.1%}); "
            f"before this cut there were {earlier:,}")


def target_note(target: TargetOutcome, again: float | None = None) -> str:
    """What a target took. again: its figure for the cut, measured once more."""
    text = f"target {target.name}={target.goal:g}: "
    if target.name == "map-drop":
        return f"{text}mAP50-95 falls by {-target.value:.4f} without the cut channels, before any fine-tuning"
    text += f"{target.value:.3f} of the {target.name} are left"
    if again is not None:
        text += f" as predicted, {again:.3f} as measured again"
    if not target.reached:
        text += ("; there is no smaller cut, every layer keeps its --min-channels and --min-share, "
                 "and what shortcuts couple")
    return text


def score_note(score: str, images: int) -> str:
    """What --score auto has chosen; images: what a score on data looks at."""
    if score == "gamma":
        return "ranked by gamma: the gammas that go are far below those that stay"
    return (f"ranked by {score}, what the loss on {images} training images would lose, for the gammas do not tell "
            "channels apart (--score gamma: by gamma all the same)")


def _floor(share: float) -> str:
    """`share`, rounded down to three digits: what the report says of it holds for a cut of the rounded share."""
    return f"{math.floor(1000 * share + 1e-9) / 1000:.3f}"


def describe(result: PruneResult, percent: float, requested: str, floors: str) -> str:
    """What the threshold rule allows, what was requested, and what came of it.

    percent: share of the prunable channels, 0..1. floors: what every layer keeps, in words.
    """
    safe = result.safe
    otherwise = "by gamma alone, " if result.per_flop or result.score != "gamma" else ""
    lines = [f"largest safe gamma: {safe.gamma:.4g}; {otherwise}cutting below it is --percent {_floor(safe.percent)} "
             "(the smallest of the layers' largest gammas: beyond it some layer would lose every channel)"]
    if percent > safe.percent:
        lines.append(f"warning: {percent:.3f} is above that limit; every layer keeps {floors}. "
                     "Train with a larger --sr, or longer, to move the limit")
    largest = "threshold |gamma|" if result.score == "gamma" else "largest |gamma| cut"
    lines.append(f"requested {requested}, achieved {result.achieved:.1%}, {largest} {result.threshold:.4g}")
    if result.branches:
        lines.append(f"whole branches taken out: {', '.join(result.branches)}")
    if zero := float((result.gammas == 0).float().mean()):
        lines.append(f"{zero:.1%} of the prunable gammas are exactly 0: "
                     f"a --percent up to {_floor(result.unused)} cuts nothing that the model uses")
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join([*lines, f"equivalence check: largest relative |slim - masked| in float64 is "
                      f"{result.difference:.1e} (must be below {EQUIVALENCE_BOUND:.0e})\n"])


def layer_table(result: PruneResult) -> str:
    """layer | original | remaining channels of every BatchNorm."""
    layers = [(row["layer"], row["original"], row["remaining"],
               "taken out" if not row["remaining"] else "" if row["prunable"] else "kept whole")
              for row in result.layers]
    return text_table(layers, ("layer", "original", "remaining", ""))
