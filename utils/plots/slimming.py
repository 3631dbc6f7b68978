"""Plots of slimming: BatchNorm scales, the channels of each layer, accuracy against cost. They take plain arrays."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PINK,
    SKY,
    VERMILION,
    legend_below,
    narrow_form,
    new_chart,
    new_figure,
    readable,
    save_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGE_COLOURS = (GREY, SKY, ORANGE, BLUE, GREEN, PINK)  # in the order of a run; a seventh stage is grey again


def plot_gammas(gammas: np.ndarray, path: str | Path, cut: np.ndarray | None = None,
                title: str = "BatchNorm scales of the prunable channels") -> Path:
    """Histogram of the |gamma| of all prunable channels.

    gammas: (channels,) |gamma|. cut: (channels,) bool, the channels that are cut, in their own colour; a line marks the
    threshold where one separates them from those that are kept.
    """
    if cut is None:
        return save_figure(gamma_chart([(gammas, {"color": BLUE})], title), path)
    parts = [(part, {"color": colour, "alpha": 0.6, "label": f"{name}: {_channels(len(part), len(gammas))}"})
             for part, name, colour in ((gammas[~cut], "kept", BLUE), (gammas[cut], "cut", VERMILION))]
    separates = cut.any() and not cut.all() and gammas[cut].max() < gammas[~cut].min()
    return save_figure(gamma_chart(parts, title, gammas[cut].max() if separates else None), path)


def gamma_chart(parts: Sequence[tuple[np.ndarray, dict[str, Any]]], title: str,
                threshold: float | None = None) -> Figure:
    """Histograms of |gamma| in one chart; a legend where they have labels.

    The counts have a logarithmic axis, so that both a peak at 0 and a flat bell are visible.

    parts: (channels,) |gamma|, and matplotlib's options for its histogram.
    """
    figure, ax = new_chart(9, 4.2, title, "|gamma|", "channels (log scale)")
    high = _upper_end([gammas for gammas, _ in parts])
    if threshold is not None:
        high = max(high, 1.04 * threshold)
        ax.axvline(threshold, color=VERMILION, linewidth=1.6, linestyle="--", label=f"threshold {threshold:.3g}")
    bins = np.linspace(0, high, 101).tolist()
    for gammas, options in parts:
        ax.hist(np.minimum(gammas, high, dtype=float), bins, **options)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="upper right", frameon=False, fontsize=9)
    ax.set_yscale("log")
    # The axis starts at one half, so that the bar of a single channel has a height.
    ax.set_ylim(0.5, max(10.0, 4.0 * ax.dataLim.y1))
    ax.set_xlim(-0.01 * high, high)
    return figure


def _channels(count: int, of: int) -> str:
    return f"{count:,} channels" + (f" ({count / of:.1%})" if count != of else "")


def plot_gamma_history(histories: Mapping[str, Sequence[np.ndarray]], path: str | Path) -> Path:
    """Heat maps of |gamma| (x) over the epochs (y, from 1), one per run, side by side. A line shows the median.

    Bins without a channel stay white.

    histories: for each run's name one array (channels,) of |gamma| per epoch. The axes and colours are shared, so that
    the runs can be compared.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(max(3.1 * len(histories) + 1, 6), 3.6)
    axes = figure.subplots(1, len(histories), sharex=True, sharey=True, squeeze=False)[0]
    high = _upper_end([gammas for epochs in histories.values() for gammas in epochs])
    bins = np.linspace(0, high, 61)
    norm = LogNorm(1e-3, 1)
    for ax, (name, epochs) in zip(axes, histories.items(), strict=True):
        style_axes(ax, readable(name, limit=36), "|gamma|", grid=None)
        shares = [np.histogram(np.minimum(gammas, high, dtype=float), bins)[0] / len(gammas) for gammas in epochs]
        ax.pcolormesh(bins, np.arange(len(epochs) + 1) + 0.5, np.stack(shares), norm=norm, cmap="YlGnBu")
        ax.plot([np.median(gammas) for gammas in epochs], range(1, len(epochs) + 1), color=VERMILION, linewidth=1.5,
                marker="o" if len(epochs) == 1 else None, label="median")
    axes[0].set_ylabel("epoch", fontsize=10, color=INK)
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_below(figure, handles=axes[0].lines)
    bar = figure.colorbar(ScalarMappable(norm, "YlGnBu"), ax=axes, label="share of the channels", shrink=0.9, aspect=30,
                          pad=0.02)
    bar.set_ticks([1e-3, 1e-2, 1e-1, 1], labels=["0.1%", "1%", "10%", "100%"])
    bar.ax.tick_params(labelsize=9, colors=INK)
    return save_figure(figure, path)


def _upper_end(arrays: Sequence[np.ndarray]) -> float:
    """The upper end of a |gamma| axis: the largest value, or less if a few outliers are far above all others."""
    values = np.concatenate(arrays)
    common, largest = float(np.quantile(values, 0.999)), float(values.max())
    if common > 0:
        largest = min(largest, 1.5 * common)
    return 1.04 * largest if largest > 0 else 1.0


def plot_kept(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """One bar per layer: the number of its channels before and after the cut. Layers that may not be pruned are grey.

    A narrow form of the picture, for phones, lies beside it.
    Each row has layer (its name), original, remaining (channels) and prunable.
    """
    before, after = (sum(row[key] for row in rows) for key in ("original", "remaining"))
    kept = f"{after:,} of {before:,} kept ({after / before:.0%})"
    _draw_kept(rows, narrow_form(path), kept, 4.2)
    return _draw_kept(rows, path, f"Channels by layer: {kept}", 9)


def _draw_kept(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str, width: float) -> Path:
    """The picture of plot_kept, `width` inches wide."""
    layers, original, kept, prunable = ([row[key] for row in rows] for key in ("layer", "original", "remaining",
                                                                               "prunable"))
    figure, ax = _layer_chart(layers, title, "channels", width)
    y, lengths, free = np.arange(len(layers)), np.array(kept), np.array(prunable, bool)
    whole = ax.barh(y, original, height=0.74, color=PALE, label="cut")
    ax.barh(y[free], lengths[free], height=0.74, color=BLUE, label="kept")
    if not free.all():
        ax.barh(y[~free], lengths[~free], height=0.74, color=GREY, label="may not be pruned")
    counts = [f"{b / a:.0%}  ({b}/{a})" for a, b in zip(original, kept, strict=True)]
    ax.bar_label(whole, counts, padding=4, fontsize=7.5, color=INK)
    ax.set_xlim(0, (1 + 1.3 / width) * max(original))  # room for the counts
    legend_below(figure)
    return save_figure(figure, path)


def plot_sensitivity(rows: Sequence[Mapping[str, Any]], path: str | Path, share: float) -> Path:
    """The effect of cutting `share` (0..1) of the channels of one layer at a time.

    A bar per layer shows the loss of mAP50-95. A dot shows the share of the model's FLOPs that the cut saves.
    rows: the first is the whole model, the others are a layer each; all have layer, mAP50-95 and GFLOPs.
    """
    whole, cuts = rows[0], rows[1:]
    title = f"{share:.0%} of one layer's channels cut, nothing else"
    figure, ax = _layer_chart([row["layer"] for row in cuts], title, "mAP50-95 lost")
    y = range(len(cuts))
    lost = [whole["mAP50-95"] - row["mAP50-95"] for row in cuts]
    saved = [1 - row["GFLOPs"] / whole["GFLOPs"] for row in cuts]
    ax.barh(y, lost, height=0.74, color=BLUE, label="mAP50-95 lost")
    other = ax.twiny()
    style_axes(other, xlabel="FLOPs saved, share of the model's", grid=None)
    other.plot(saved, y, color=ORANGE, marker="o", markersize=4, linestyle="", label="FLOPs saved")
    other.set_xlim(left=0)
    other.xaxis.set_major_formatter("{x:.0%}")
    legend_below(figure)
    return save_figure(figure, path)


def _layer_chart(layers: Sequence[str], title: str, xlabel: str, width: float = 9) -> tuple[Figure, Axes]:
    """A figure for one horizontal bar per layer, the first layer on top. It grows with the number of layers."""
    figure, ax = new_chart(width, 0.185 * len(layers) + 1.6, title, xlabel, grid="x")
    ax.set_yticks(range(len(layers)), [readable(name, limit=40) for name in layers], fontsize=7.5)
    ax.set_ylim(len(layers) - 0.4, -0.6)
    return figure, ax


def plot_sweep(rows: Sequence[Mapping[str, float]], path: str | Path, knee: int) -> Path:
    """mAP (left axis) and cost as a share of the first row's cost (right axis) over the percentage of channels cut.

    Each row has percent (0..1), mAP50, mAP50-95, parameters, GFLOPs and ms. `knee` is the row that is marked.
    """
    title = "Right after the cut, before any fine-tuning"
    figure, ax = new_chart(8, 4.4, title, "% of the prunable channels cut", "mAP")
    x = [100 * row["percent"] for row in rows]
    for key, colour in (("mAP50", SKY), ("mAP50-95", BLUE)):
        ax.plot(x, [row[key] for row in rows], color=colour, marker="o", markersize=4, label=key)
    ax.axvline(x[knee], color=VERMILION, linestyle="--", linewidth=1.4, label=f"knee: {x[knee]:.0f}%")
    ax.set_ylim(bottom=0)
    other = ax.twinx()
    style_axes(other, ylabel="cost, share of the first", grid=None)
    for key, colour in (("parameters", GREY), ("GFLOPs", ORANGE), ("ms", GREEN)):
        shares = [row[key] / rows[0][key] for row in rows]
        other.plot(x, shares, color=colour, linestyle=":", marker="s", markersize=3, label=key)
    other.set_ylim(0, 1.1)
    other.yaxis.set_major_formatter("{x:.0%}")
    legend_below(figure)
    return save_figure(figure, path)


def plot_tradeoff(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """mAP50-95 (y) against milliseconds an image (x), a point per model. Each row has model (its name), ms and map."""
    figure, ax = new_chart(6.6, 3.8, "Accuracy and time", "ms an image", "mAP50-95")
    for row, colour, marker in zip(rows, cycle(STAGE_COLOURS), cycle("osD^vPX")):
        ax.plot(row["ms"], row["map"], color=colour, marker=marker, markersize=9, linestyle="",
                label=readable(row["model"]))
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)  # beside the axes, however close the points are
    ax.set_xlim(0, 1.25 * max(row["ms"] for row in rows))
    ax.set_ylim(0, 1.25 * max(row["map"] for row in rows) or 1)
    return save_figure(figure, path)


def plot_latencies(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """A bar of milliseconds for every model in every format, with its mAP50-95 where that is known.

    Each row has model, format, precision, ms and mAP50-95; a row without ms is left out.
    """
    timed = [row for row in rows if row["ms"] != ""]
    figure, ax = new_chart(9, 0.3 * len(timed) + 1.6, "One image, and what is detected", "ms per image", grid="x")
    for i, model in enumerate(dict.fromkeys(row["model"] for row in timed)):
        places = [(y, row) for y, row in enumerate(timed) if row["model"] == model]
        bars = ax.barh([y for y, _ in places], [row["ms"] for _, row in places], height=0.74,
                       color=STAGE_COLOURS[i % len(STAGE_COLOURS)], label=readable(model))
        texts = [f"{row['ms']:.1f} ms" + (f", mAP50-95 {row['mAP50-95']:.3f}" if row["mAP50-95"] != "" else "")
                 for _, row in places]
        ax.bar_label(bars, texts, padding=3, fontsize=8, color=INK)
    ax.set_yticks(range(len(timed)), [f"{row['format']} {row['precision']}" for row in timed], fontsize=8)
    ax.set_ylim(len(timed) - 0.4, -0.6)
    ax.margins(x=0.3)
    legend_below(figure)
    return save_figure(figure, path)
