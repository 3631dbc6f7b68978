"""Pictures of the experiments. They take the rows of the results and plain arrays."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from columns import Row
from matplotlib.axes import Axes

from utils.plots.slimming import STAGE_COLOURS, gamma_chart
from utils.plots.style import (
    BLUE,
    INK,
    ORANGE,
    SKY,
    legend_below,
    new_chart,
    new_figure,
    readable,
    save_figure,
    short_number,
    style_axes,
)


def plot_stages(rows: Sequence[Row], path: Path) -> None:
    """The stages of a slimming: accuracy on the left, cost as a share of the first stage's cost on the right.

    Each row has stage (its name), map50 and map (mAP50 and mAP50-95, 0..1), parameters, flops and ms (per image).
    """
    figure = new_figure(12, 4.3)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3.4))
    stages = [readable(row["stage"]) for row in rows]
    accuracy = np.array([[row["map"], row["map50"]] for row in rows], float)
    cost = np.array([[row["parameters"], row["flops"], row["ms"]] for row in rows], float)
    shares = cost / cost[0]
    style_axes(left, "Accuracy", grid="y")
    draw_stages(left, stages, accuracy, ["mAP50-95", "mAP50"], [[f"{v:.3f}" for v in row] for row in accuracy])
    style_axes(right, f"Cost, share of {stages[0]}", grid="y")
    texts = [[f"{share:.0%}\n{short_number(value)}" for share, value in zip(*pair)] for pair in zip(shares, cost)]
    draw_stages(right, stages, shares, ["parameters", "FLOPs", "ms per image"], texts)
    right.yaxis.set_major_formatter("{x:.0%}")
    legend_below(figure, handles=left.containers)
    save_figure(figure, path)


def draw_stages(ax: Axes, stages: Sequence[str], values: np.ndarray, groups: Sequence[str],
                texts: Sequence[Sequence[str]]) -> None:
    """Bars of values (stages, groups) with their texts on top. The bars of a group stand side by side."""
    width = min(0.86 / len(stages), 0.3)
    fontsize = max(4.0, min(8.5, 34 / len(stages)))
    for i, stage in enumerate(stages):
        x = np.arange(len(groups)) + (i - (len(stages) - 1) / 2) * width
        bars = ax.bar(x, values[i], 0.92 * width, color=STAGE_COLOURS[i % len(STAGE_COLOURS)], label=stage)
        ax.bar_label(bars, texts[i], padding=2, fontsize=fontsize, color=INK)
    ax.set_xticks(range(len(groups)), groups, fontsize=10)
    ax.set_ylim(0, 1.18 * values.max() or 1)  # an mAP may be 0 in every stage


def plot_two_gammas(gammas: dict[str, np.ndarray], title: str, path: Path) -> None:
    """Histograms of the |gamma| (channels,) of two models, with their names; the second one is an outline."""
    styles: tuple[dict[str, Any], ...] = {"color": SKY}, {"histtype": "step", "color": INK, "linewidth": 1.5}
    save_figure(gamma_chart([(values, {**style, "label": f"{readable(name)}: {len(values):,} channels"})
                             for (name, values), style in zip(gammas.items(), styles)], title), path)


def plot_shares(rows: Sequence[Row], path: Path) -> None:
    """mAP50-95 against FLOPs left: a dot per run, a line through the means of each share of zeros."""
    figure, ax = new_chart(7, 4, "BCCD, yolov5n, 40 epochs: what zeros cost", "FLOPs left, % of dense",
                           "mAP50-95 on val, before fine-tuning")
    draw_shares(ax, [r for r in rows if r["round_to"] == 1], BLUE, "channel by channel (--round-to 1)", -26)
    draw_shares(ax, [r for r in rows if r["round_to"] == 16 or not r["share"]], ORANGE, "in blocks of 16 (default)", 14)
    ax.set_ylim(bottom=min(r["map"] for r in rows) - 0.06)
    ax.legend(frameon=False, loc="lower right", title="share of zeros (--target-sparsity)")
    save_figure(figure, path)


def draw_shares(ax: Axes, rows: Sequence[Row], colour: str, label: str, offset: float) -> None:
    """The dots and the line of one size of blocks; each share stands `offset` points above its mean."""
    dots = [(100 * r["flops"], r["map"], r["share"]) for r in rows]
    means = [np.mean([dot for dot in dots if dot[2] == share], 0) for share in sorted({share for *_, share in dots})]
    ax.plot([x for x, _, _ in means], [y for _, y, _ in means], color=colour, label=label)
    ax.scatter([x for x, _, _ in dots], [y for _, y, _ in dots], color=colour, zorder=3, s=14, alpha=0.6)
    for x, y, share in means:
        ax.annotate(f"{share:g}" if share else "dense", (x, y), (0, offset), textcoords="offset points", ha="center",
                    fontsize=8, color=colour)
