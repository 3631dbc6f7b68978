"""Pictures of a slimming run, drawn from plain arrays, and the look that all of the project's charts share.

Charts are built on `matplotlib.figure.Figure`: no pyplot, no backend switch, no global state. Each plot_* function
writes one PNG and returns its path.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours (Color Universal Design, 2008): told apart with every common kind of colour blindness.
BLUE, VERMILION, GREEN, ORANGE, SKY, PINK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
INK, GREY, PALE = "#333333", "#9A9A9A", "#D9DEE3"
STAGES = (GREY, SKY, ORANGE, BLUE, GREEN, PINK)  # the colour of a stage, in order; more of them start over
DPI = 140


# The shared look ------------------------------------------------------------------------------------------------------

def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of width x height inches whose parts never overlap."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")


def dress(ax: Axes, title: str = "", xlabel: str = "", ylabel: str = "", grid: str | None = "both") -> None:
    """Title, axis labels, a light grid behind the data ("x", "y", "both" or None) and no top or right frame."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.set_axisbelow(True)
    ax.grid(False)
    if grid:
        ax.grid(True, axis=grid, color="#E6E6E6", linewidth=0.8)  # type: ignore[arg-type]
    ax.tick_params(which="both", colors=INK, labelsize=9, length=0)
    ax.set_title(title, fontsize=11, color=INK, fontweight="bold", loc="left")
    ax.set_xlabel(xlabel, fontsize=10, color=INK)
    ax.set_ylabel(ylabel, fontsize=10, color=INK)


def note_empty(ax: Axes, text: str) -> None:
    """Say in the middle of a panel why it shows nothing."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=10, color=GREY)


def readable(text: object, stand_in: str = "?", limit: int = 28) -> str:
    """A user's text (a class, file or layer name) in a form that a chart shows as it is.

    Letters that the font lacks become `stand_in`, dollar signs don't start a formula, long texts end in an ellipsis.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    line = " ".join(str(text).split())
    out: list[str] = []
    for letter in line:
        if ord(letter) in known:
            out.append(letter)
        elif not out or out[-1] != stand_in:  # a run of unknown letters needs one stand-in only
            out.append(stand_in)
    line = "".join(out)
    return (line if len(line) <= limit else line[:limit - 1] + "…").replace("$", r"\$")


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG; the folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def short_number(value: float) -> str:
    """1872157 -> '1.87 M', 4.2e9 -> '4.20 G', 31.4 -> '31.4'."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) / size < 999.5 else f"{value / size:.0f}{unit}"
    return f"{value:.3g}"


# Gammas ---------------------------------------------------------------------------------------------------------------

def plot_gammas(gammas: np.ndarray, path: str | Path, threshold: float | None = None, percent: float | None = None,
                title: str = "", compare: np.ndarray | None = None,
                labels: tuple[str, str] = ("before", "after")) -> Path:
    """Histogram of |gamma| of all prunable channels; the counts are logarithmic, so that a spike at 0 and a bell show.

    `threshold` draws a line and writes the share of channels below it; `percent` (0..1) is the share asked for.
    `labels` name `gammas` and, where given, `compare`, whose histogram is laid over the first as an outline.
    """
    first, second = _finite(gammas), _finite(compare)
    marked = threshold is not None and math.isfinite(threshold) and first.size > 0
    high = max(_upper_end([first, second]), 1.04 * threshold if marked and threshold else 0.0)
    bins = np.linspace(0, high, 101).tolist()
    figure = new_figure(9, 4.2)
    ax = figure.add_subplot()
    dress(ax, title or "BatchNorm scales of the prunable channels", "|gamma|", "channels (log scale)")
    if first.size:
        ax.hist(np.minimum(first, high), bins=bins, color=BLUE if compare is None else SKY,
                label=f"{readable(labels[0])} ({first.size:,} channels)")
    else:
        note_empty(ax, "no prunable channels")
    if second.size:
        ax.hist(np.minimum(second, high), bins=bins, histtype="step", color=INK, linewidth=1.5,
                label=f"{readable(labels[1])} ({second.size:,} channels)")
    # The line at one half lets a bin with a single channel still have a visible height.
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5, top=max(10.0, 4.0 * ax.dataLim.y1 if first.size or second.size else 10.0))
    ax.set_xlim(-0.01 * high, high)
    if marked and threshold is not None:
        _mark_threshold(ax, first, threshold, percent, high)
    if compare is not None and (first.size or second.size):
        ax.legend(loc="upper right", frameon=False, fontsize=9)
    return save(figure, path)


def _mark_threshold(ax: Axes, gammas: np.ndarray, threshold: float, percent: float | None, high: float) -> None:
    """The threshold's line, the cut side shaded, and beside it the share of channels there."""
    ax.axvspan(-0.01 * high, threshold, color=VERMILION, alpha=0.10, linewidth=0, zorder=0)
    ax.axvline(threshold, color=VERMILION, linewidth=1.6, linestyle="--")
    lines = [f"threshold {threshold:.3g}", f"{np.mean(gammas < threshold):.1%} of the channels lie left of it"]
    if percent is not None:
        lines.append(f"asked for: {percent:.1%}")
    left_half = threshold < 0.5 * high
    ax.annotate("\n".join(lines), (threshold, 0.97), xycoords=("data", "axes fraction"), fontsize=9, va="top",
                xytext=(6 if left_half else -6, 0), textcoords="offset points", color=VERMILION,
                ha="left" if left_half else "right")


def plot_gamma_history(histories: Mapping[str, Sequence[np.ndarray]], path: str | Path) -> Path:
    """One panel a run: how the channels spread over |gamma| (x) as the epochs pass (y); the line is the median.

    `histories` maps a run's name to one array of |gamma| an epoch. Axes and colours are shared, so panels compare.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D

    runs = {name: [_finite(g) for g in epochs] for name, epochs in histories.items()}
    columns = min(max(len(runs), 1), 4)
    rows = max(math.ceil(len(runs) / columns), 1)
    figure = new_figure(max(3.1 * columns + 1, 6), 3.6 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    high = _upper_end([g for epochs in runs.values() for g in epochs])
    last = max((len(epochs) for epochs in runs.values()), default=0)
    norm = LogNorm(1e-3, 1)
    for index, ax in enumerate(axes.flat):
        ax.set_visible(index < max(len(runs), 1))
        dress(ax, xlabel="|gamma|" if index + columns >= len(runs) else "", grid=None,
              ylabel="epoch" if index % columns == 0 else "")
        ax.xaxis.set_tick_params(labelbottom=index + columns >= len(runs))
    for ax, (name, epochs) in zip(axes.flat, runs.items(), strict=False):
        ax.set_title(readable(name, limit=36), fontsize=11, color=INK, fontweight="bold", loc="left")
        _draw_history(ax, epochs, high, norm)
        ax.set_xlim(0, high)
        ax.set_ylim(-0.5, max(last, 1) - 0.5)
        ax.yaxis.get_major_locator().set_params(integer=True)
    if runs:
        figure.legend(handles=[Line2D([], [], color=VERMILION, label="median")], loc="outside lower center",
                      frameon=False, fontsize=9)
    else:
        note_empty(axes[0, 0], "no runs")
    bar = figure.colorbar(ScalarMappable(norm, "YlGnBu"), ax=axes, shrink=0.9, aspect=30, pad=0.02)
    bar.set_label("share of the channels", fontsize=10, color=INK)
    bar.set_ticks([1e-3, 1e-2, 1e-1, 1], labels=["0.1%", "1%", "10%", "100%"])
    bar.ax.tick_params(labelsize=9, colors=INK)
    return save(figure, path)


def _draw_history(ax: Axes, epochs: list[np.ndarray], high: float, norm: Any) -> None:
    """The heat map of one run: a row of 60 bins an epoch, and the median over it."""
    filled = [(epoch, g) for epoch, g in enumerate(epochs) if g.size]
    if not filled:
        note_empty(ax, "no epochs")
        return
    bins = np.linspace(0, high, 61)
    share = np.full((len(epochs), 60), np.nan)
    for epoch, g in filled:
        share[epoch] = np.histogram(np.minimum(g, high), bins)[0] / g.size
    share[share == 0] = np.nan  # empty cells stay white
    ax.pcolormesh(bins, np.arange(len(epochs) + 1) - 0.5, share, norm=norm, cmap="YlGnBu")
    ax.plot([np.median(g) for _, g in filled], [epoch for epoch, _ in filled], color=VERMILION, linewidth=1.5,
            marker="o" if len(filled) == 1 else None)


# Layers and stages ----------------------------------------------------------------------------------------------------

def plot_kept(layers: Sequence[str], original: Sequence[int], kept: Sequence[int], path: str | Path,
              prunable: Sequence[bool]) -> Path:
    """One bar a layer: its channels before and after the cut. Layers that may not be pruned are grey.

    The figure grows with the number of layers. Raises ValueError where the four sequences differ in length.
    """
    from matplotlib.patches import Patch

    rows = list(zip(layers, original, kept, prunable, strict=True))
    figure = new_figure(9, min(0.185 * len(rows) + 1.3, 400) + (1.0 if not rows else 0.0))
    ax = figure.add_subplot()
    before, after = sum(original), sum(kept)
    share = f": {after:,} of {before:,} kept ({after / before:.0%})" if before else ""
    dress(ax, f"Channels by layer{share}", "channels", grid="x")
    if not rows:
        note_empty(ax, "no layers")
        return save(figure, path)
    y = np.arange(len(rows))
    free = np.array(prunable, bool)
    ax.barh(y, original, height=0.74, color=[PALE if can else "#E9E9E9" for can in free])
    ax.barh(y, kept, height=0.74, color=[BLUE if can else GREY for can in free])
    longest = max(max(original), max(kept), 1)
    for position, (_, total, left, _) in enumerate(rows):
        ratio = f"{left / total:.0%}" if total else "–"
        ax.text(max(total, left) + 0.008 * longest, position, f"{ratio}  ({left}/{total})", va="center", fontsize=7.5,
                color=INK)
    ax.set_yticks(y, [readable(name, limit=40) for name in layers], fontsize=7.5)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1.14 * longest)
    handles = [Patch(color=BLUE, label="kept"), Patch(color=PALE, label="cut")]
    if not free.all():
        handles.append(Patch(color=GREY, label="may not be pruned"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)


def plot_sweep(rows: Sequence[Mapping[str, float]], path: str | Path, knee: int) -> Path:
    """mAP on the left axis and cost as a share of the first row on the right one, over percent; the knee is marked.

    Each row has percent (0..1), mAP50, mAP50-95, parameters, GFLOPs and ms.
    """
    figure = new_figure(8, 4.4)
    ax = figure.add_subplot()
    dress(ax, "Right after the cut, before any fine-tuning", "percent of the prunable channels cut", "mAP", grid="both")
    x = [100 * row["percent"] for row in rows]
    for key, colour in (("mAP50", SKY), ("mAP50-95", BLUE)):
        ax.plot(x, [row[key] for row in rows], color=colour, marker="o", markersize=4, label=key)
    ax.axvline(x[knee], color=VERMILION, linestyle="--", linewidth=1.4, label=f"knee: {x[knee]:.0f}%")
    ax.set_ylim(bottom=0)
    other = ax.twinx()
    dress(other, ylabel="cost, share of the first", grid=None)
    for key, colour in (("parameters", GREY), ("GFLOPs", ORANGE), ("ms", GREEN)):
        other.plot(x, [row[key] / rows[0][key] for row in rows], color=colour, linestyle=":", marker="s", markersize=3, label=key)
    other.set_ylim(0, 1.1)
    other.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return save(figure, path)


def plot_sensitivity(rows: Sequence[Mapping[str, Any]], path: str | Path, share: float) -> Path:
    """One bar a layer: how far mAP50-95 falls when `share` of its channels goes alone, and the FLOPs that this frees, as dots.

    rows[0] is the whole model; each row has layer, mAP50-95 and GFLOPs.
    """
    whole, layers = rows[0], rows[1:]
    figure = new_figure(9, 0.185 * len(layers) + 1.6)
    ax = figure.add_subplot()
    dress(ax, f"{share:.0%} of one layer's channels cut, nothing else", "mAP50-95 lost", grid="x")
    y = np.arange(len(layers))
    ax.barh(y, [whole["mAP50-95"] - row["mAP50-95"] for row in layers], height=0.74, color=BLUE, label="mAP50-95 lost")
    ax.set_yticks(y, [readable(row["layer"], limit=40) for row in layers], fontsize=7.5)
    ax.set_ylim(len(layers) - 0.4, -0.6)
    other = ax.twiny()
    dress(other, xlabel="FLOPs freed, share of the model's", grid=None)
    other.plot([1 - row["GFLOPs"] / whole["GFLOPs"] for row in layers], y, color=ORANGE, marker="o", markersize=4, linestyle="", label="FLOPs freed")
    other.set_xlim(left=0)
    other.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return save(figure, path)


def plot_stages(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """The story of a slimming run: accuracy on the left, cost as a share of the first stage on the right.

    Each row has stage (its name), map50 and map (mAP50 and mAP50-95, 0..1), parameters, flops and ms (time an image); a
    value may be missing, None or NaN. A kind of cost that no stage knows is left out.
    """
    figure = new_figure(12, 4.3)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3.4))
    accuracy = _table(rows, ("map", "map50"))
    cost, kinds = _table(rows, ("parameters", "flops", "ms")), ("parameters", "FLOPs", "ms per image")
    known = np.isfinite(cost).any(0) if np.isfinite(cost).any() else np.ones(3, bool)
    cost = cost[:, known]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = cost / cost[:1]
    shares[~np.isfinite(shares)] = np.nan
    dress(left, "Accuracy", grid="y")
    dress(right, f"Cost, share of {readable(rows[0].get('stage', 'the first'))}" if rows else "Cost", grid="y")
    if rows:
        names = [readable(row.get("stage", "")) for row in rows]
        handles = _grouped_bars(left, accuracy, ["mAP50-95", "mAP50"], [[f"{v:.3f}" for v in row] for row in accuracy])
        texts = [[f"{share:.0%}\n{short_number(value)}" for share, value in zip(*pair, strict=True)]
                 for pair in zip(shares, cost, strict=True)]
        _grouped_bars(right, shares, [kind for kind, seen in zip(kinds, known, strict=True) if seen], texts)
        right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), frameon=False, fontsize=10)
    else:
        note_empty(left, "no stages")
        note_empty(right, "no stages")
    return save(figure, path)


def _grouped_bars(ax: Axes, values: np.ndarray, groups: list[str], texts: list[list[str]]) -> list[Any]:
    """Bars of values (stages, groups), side by side in a group, each with its text on top; one handle a stage."""
    stages = len(values)
    width = min(0.86 / stages, 0.3)
    centres = np.arange(len(groups))
    handles = []
    for stage, (row, labels) in enumerate(zip(values, texts, strict=True)):
        x = centres + (stage - (stages - 1) / 2) * width
        handles.append(ax.bar(x, np.nan_to_num(row), width * 0.92, color=STAGES[stage % len(STAGES)]))
        for at, value, label in zip(x, row, labels, strict=True):
            known = bool(np.isfinite(value))
            ax.annotate(label if known else "–", (float(at), float(value) if known else 0), (0, 2),
                        textcoords="offset points", ha="center", va="bottom", color=INK,
                        fontsize=max(4.0, min(8.5, 34 / stages)))
    ax.set_xticks(centres, groups, fontsize=10)
    top = float(np.nanmax(values, initial=0.0)) if np.isfinite(values).any() else 1.0
    ax.set_ylim(0, 1.18 * top if top > 0 else 1)
    return handles


def _table(rows: Sequence[Mapping[str, Any]], keys: tuple[str, ...]) -> np.ndarray:
    """(rows, keys) float64; what is missing, None or infinite is NaN."""
    values = [[float("nan") if row.get(key) is None else float(row[key]) for key in keys] for row in rows]
    table = np.array(values, float).reshape(len(rows), len(keys))
    table[~np.isfinite(table)] = np.nan
    return table


def _finite(values: np.ndarray | None) -> np.ndarray:
    """The finite |values|, flat, float64."""
    flat = np.abs(np.asarray([] if values is None else values, dtype=np.float64).ravel())
    return flat[np.isfinite(flat)]


def _upper_end(arrays: Sequence[np.ndarray]) -> float:
    """Where a |gamma| axis ends: the largest value, unless a few strays would squeeze all others into a corner."""
    values = np.concatenate([np.empty(0), *arrays])
    if not values.size or values.max() <= 0:
        return 1.0
    common, largest = float(np.quantile(values, 0.999)), float(values.max())
    return 1.04 * (largest if largest <= 1.5 * common or common == 0 else 1.5 * common)
