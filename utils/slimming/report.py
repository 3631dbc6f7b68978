"""The record of a pruning: tables on the screen, plain data for report.json."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from utils.slimming.cost import Cost


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Plain text table; numbers to the right, the first column to the left."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def layer_rows(masks: dict[str, Tensor], prunable: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One row a BatchNorm: its name, original and remaining channels, and whether it could be cut at all."""
    return [{"layer": name, "original": len(mask), "remaining": int(mask.sum()), "prunable": bool(prunable[name].any())}
            for name, mask in masks.items()]


def layer_table(rows: list[dict[str, Any]]) -> str:
    """layer | original | remaining; layers that shortcuts or outputs hold whole are marked."""
    return table([(r["layer"], r["original"], r["remaining"], "" if r["prunable"] else "kept whole") for r in rows],
                 ("layer", "original", "remaining", ""))


def cost_rows(before: Cost, after: Cost, ms: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """One row a figure: before, after, and what is left of it. `ms`: how it was measured -> milliseconds an image (before, after)."""
    figures = [("parameters", before.parameters, after.parameters), ("GFLOPs", before.gflops, after.gflops),
               ("MB (fp32 weights)", before.megabytes, after.megabytes)]
    figures += [(f"ms an image ({how})", a, b) for how, (a, b) in ms.items()]
    return [{"figure": name, "before": a, "after": b, "left": b / a if a else 0.0} for name, a, b in figures]


def cost_table(rows: list[dict[str, Any]]) -> str:
    """figure | before | after | left."""
    def show(value: float) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"

    return table([(r["figure"], show(r["before"]), show(r["after"]), f"{r['left']:.0%}") for r in rows],
                 ("", "before", "after", "left"))


def uneven(model: nn.Module) -> list[str]:
    """A note on convolutions that onnxruntime can't run in blocks of channels on a CPU, which takes input channels that divide by 4; else nothing."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    count = sum(m.in_channels > 16 and m.in_channels % 4 > 0 for m in convolutions)  # 16 and less are read as they are
    return [f"{count} of {len(convolutions)} convolutions read a number of channels that does not divide by 4, which costs speed under onnxruntime; "
            "--round-to 16 mends that"] if count else []


def stage_table(rows: list[dict[str, Any]]) -> str:
    """stage | mAP50 | mAP50-95 ... for rows of equal keys; the first key is the row's name."""
    def show(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"

    keys = list(rows[0])
    return table([[show(row.get(k, "")) for k in keys] for row in rows], keys)
