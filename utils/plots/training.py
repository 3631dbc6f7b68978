"""Plots of a training run: the labels that it starts from and the results of its epochs."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.plots.style import BLUE, INK, PALETTE, class_colour, new_figure, readable, save_figure, style_axes
from utils.tables import read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 100   # classes in the bar chart
MAX_BOXES = 800  # outlines in the chart of box shapes


def plot_labels(labels: np.ndarray, names: Mapping[int, str], path: str | Path) -> Path:
    """The labels of a data set: boxes per class, box shapes, box centres and box sizes.

    labels: (n, 5) class, x, y, w, h normalised.
    """
    from matplotlib.colors import LogNorm

    figure = new_figure(12, 7.6)
    grid = figure.add_gridspec(2, 3, height_ratios=(4, 5))
    _draw_class_counts(figure.add_subplot(grid[0, :]), labels[:, 0].astype(int), names)
    shapes, centres, sizes = (figure.add_subplot(grid[1, i]) for i in range(3))
    style_axes(shapes, "Box shapes", "width", "height", grid=None)
    style_axes(centres, "Box centres", "x", "y", grid=None)
    style_axes(sizes, "Box sizes", "width", "height")
    if len(labels):
        _draw_outlines(shapes, labels)
        for ax, x, y in ((centres, labels[:, 1], labels[:, 2]), (sizes, labels[:, 3], labels[:, 4])):
            # The scale starts at one half, so that a cell with a single box is not white.
            ax.hist2d(x, y, bins=50, range=((0, 1), (0, 1)), norm=LogNorm(vmin=0.5), cmap="YlGnBu")
    for ax in (shapes, centres, sizes):
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    centres.invert_yaxis()  # the y axis of an image points down
    return save_figure(figure, path)


def _draw_class_counts(ax: Axes, classes: np.ndarray, names: Mapping[int, str]) -> None:
    """One bar per class that has a name or a box. If there are more than MAX_BARS, only the most frequent."""
    counts = Counter(dict.fromkeys(names, 0))
    counts.update(classes.tolist())
    order = sorted(counts)
    title = f"Boxes per class, {len(classes):,} in total"
    if len(counts) > MAX_BARS:
        order = [cls for cls, _ in counts.most_common(MAX_BARS)]
        title += f"; the {MAX_BARS} most frequent of {len(counts)} classes"
    style_axes(ax, title, ylabel="boxes", grid="y")
    heights = [counts[cls] for cls in order]
    bars = ax.bar(range(len(order)), heights, color=BLUE)
    if len(order) <= 30:
        ax.bar_label(bars, [f"{height:,}" for height in heights], padding=2, fontsize=8, color=INK)
    spare = max(0, 6 - len(order)) / 2  # so that the bar of a single class does not fill the axes
    ax.set_xlim(-0.6 - spare, len(order) - 0.4 + spare)
    ax.set_ylim(0, 1.12 * max([1, *heights]))
    ticks = [readable(names.get(cls, str(cls)), f"#{cls}", 20) for cls in order]
    ax.set_xticks(range(len(order)), ticks, rotation=90 if len(order) > 8 else 0,
                  fontsize=9 if len(order) <= 40 else 6.5)


def _draw_outlines(ax: Axes, labels: np.ndarray) -> None:
    """Outlines of up to MAX_BOXES boxes around a common centre, in the colours of their classes."""
    from matplotlib.collections import PolyCollection

    chosen = labels[np.linspace(0, len(labels) - 1, min(len(labels), MAX_BOXES)).astype(int)]
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    outlines = 0.5 + chosen[:, None, 3:5] * corners  # (boxes, 4 corners, 2)
    colours = np.array([class_colour(int(cls)) for cls in chosen[:, 0]]) / 255
    ax.add_collection(PolyCollection(list(outlines), facecolors="none", edgecolors=colours, linewidths=0.6, alpha=0.5))


def plot_results(csv_path: str | Path, path: str | Path) -> Path:
    """The columns of a results.csv over the epochs, in small charts. A cell may be empty.

    The epochs count from 1, as on the screen. A loss that is nothing but zeros (that of the classes, where there is
    one class) has no chart.
    """
    rows = read_results(Path(csv_path))
    columns = {name: np.array([float("nan" if row[name] == "" else row[name]) for row in rows]) for name in rows[0]}
    epochs = columns.pop("epoch") + 1
    charts: dict[str, list[tuple[str, np.ndarray]]] = {}
    for column, values in columns.items():
        title, label = _chart_of(column)
        charts.setdefault(title, []).append((label, values))
    charts = {title: curves for title, curves in charts.items()
              if not title.endswith(" loss") or any(np.nan_to_num(values).any() for _, values in curves)}
    figure_rows = math.ceil(len(charts) / 3)
    figure = new_figure(12, 2.7 * figure_rows)
    axes = figure.subplots(figure_rows, 3, squeeze=False).flat
    for ax, (title, curves) in zip(axes, charts.items(), strict=False):
        style_axes(ax, readable(title, limit=36), "epoch")
        _draw_curves(ax, epochs, curves)
    for ax in axes[len(charts):]:
        ax.set_axis_off()
    return save_figure(figure, path)


def _chart_of(column: str) -> tuple[str, str]:
    """The chart that a column of results.csv belongs to, and its label there.

    Training and validation losses share a chart, and so do the mAPs.
    """
    group, _, name = column.partition("/")
    if group in ("train", "val"):
        return name.replace("_", " "), group
    if name in ("precision", "recall"):
        return "precision and recall", name
    if group == "metrics":
        return "mAP", {"mAP_0.5": "mAP50", "mAP_0.5:0.95": "mAP50-95"}.get(name, name)
    if group == "x":
        return "learning rate", name
    if name.startswith("below_"):
        return "share of channels by |gamma|", name.replace("_", " ")
    return column, ""


def _draw_curves(ax: Axes, epochs: np.ndarray, curves: Sequence[tuple[str, np.ndarray]]) -> None:
    """The curves of one chart, each a label and its values (epochs,). A line joins the epochs that have a value.

    Curves that coincide are one line with all their labels.
    """
    from matplotlib.ticker import MaxNLocator

    lines: dict[bytes, tuple[list[str], np.ndarray]] = {}
    for label, values in curves:
        lines.setdefault(values.tobytes(), ([], values))[0].append(label)
    for i, (labels, values) in enumerate(lines.values()):
        finite, label = np.isfinite(values), ", ".join(labels)
        ax.plot(epochs[finite], values[finite], color=PALETTE[i % len(PALETTE)], label=label, linewidth=1.8,
                linestyle=("-", "--", ":", "-.")[i % 4], marker="o" if finite.sum() <= 15 else None, markersize=4)
    if curves[0][0]:
        ax.legend(frameon=False, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    ax.yaxis.get_offset_text().set_fontsize(8)
