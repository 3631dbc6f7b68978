"""The record of a pruning: tables on the screen, plain data for report.json."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from utils.slimming.cost import Cost
from utils.slimming.graph import Masks
from utils.slimming.ranking import SafeThreshold
from utils.tables import text_table


def layer_rows(masks: Masks, prunable: Masks) -> list[dict[str, Any]]:
    """One row per BatchNorm: its name, original and remaining channels, and whether it could be cut at all."""
    return [{"layer": name, "original": len(mask), "remaining": int(mask.sum()), "prunable": bool(prunable[name].any())}
            for name, mask in masks.items()]


def layer_table(rows: list[dict[str, Any]]) -> str:
    """layer | original | remaining; layers that shortcuts or outputs hold whole are marked."""
    cells = [(r["layer"], r["original"], r["remaining"], "" if r["prunable"] else "kept whole") for r in rows]
    return text_table(cells, ("layer", "original", "remaining", ""))


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


def lineage_note(before: Masks, after: Masks) -> str:
    """After several rounds: what is left of the channels of the first model; empty in the first round."""
    if not before:
        return ""
    earlier, kept = (sum(int(mask.sum()) for mask in masks.values()) for masks in (before, after))
    total = sum(len(mask) for mask in after.values())
    return (f"of the first model {kept:,} of {total:,} channels are left ({kept / total:.1%}); "
            f"before this cut there were {earlier:,}")


def describe(safe: SafeThreshold, asked: float, achieved: float, threshold: float, gammas: Tensor,
             requested: str, floors: str) -> str:
    """What the threshold rule allows, what was requested, and what came of it.

    asked, achieved: shares of the prunable channels, 0..1. threshold: the largest |gamma| that was cut. gammas: of all
    prunable channels. floors: what every layer keeps, in words.
    """
    lines = [f"largest safe gamma: {safe.gamma:.4g}; cutting below it is --percent {safe.percent:.3f} "
             "(the smallest of the layers' largest gammas: beyond it some layer would lose every channel)"]
    if asked > safe.percent:
        lines.append(f"warning: {asked:.3f} is above that limit; every layer keeps {floors}. "
                     "Train with a larger --sr, or longer, to move the limit")
    lines.append(f"requested {requested}, achieved {achieved:.1%}, threshold |gamma| {threshold:.4g}")
    if zero := float((gammas == 0).float().mean()):
        lines.append(f"{zero:.1%} of the prunable gammas are exactly 0: "
                     f"a --percent up to {zero:.3f} cuts nothing that the model uses")
    return "\n".join(lines)


def target_note(name: str, wanted: float, value: float, reached: bool, again: float | None = None) -> str:
    """What a target took. value: its figure for the cut; again: the same, measured once more."""
    text = f"target {name}={wanted:g}: "
    if name == "map-drop":
        return f"{text}mAP50-95 falls by {-value:.4f} without the cut channels, before any fine-tuning"
    text += f"{value:.3f} of the {name} are left"
    if again is not None:
        text += f" as predicted, {again:.3f} as measured again"
    if not reached:
        text += ("; there is no smaller cut, every layer keeps its --min-channels and --min-share, "
                 "and what shortcuts tie")
    return text
