"""The style that all charts share: colours, figures, axes, and how texts are shown.

The charts use `matplotlib.figure.Figure` directly: no pyplot, no choice of backend, no global state.
"""
from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito (Color Universal Design, 2008) are easy to tell apart with any kind of colour blindness.
BLUE, VERMILION, GREEN, ORANGE, SKY, PINK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
# Tol's wine takes the place of Okabe and Ito's yellow, which is too pale on white.
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, "#882255")
INK, GREY, PALE = "#333333", "#9A9A9A", "#D9DEE3"
DPI = 140


def class_colour(i: int) -> tuple[int, int, int]:
    """RGB 0..255 of class i: first the palette, then hues a golden angle apart with changing lightness."""
    if i < len(PALETTE):
        red, green, blue = bytes.fromhex(PALETTE[i][1:])
        return red, green, blue
    lightness, saturation = (0.36, 0.5, 0.66)[i % 3], (0.8, 0.6)[i // 3 % 2]
    rgb = colorsys.hls_to_rgb(i * 0.61803399 % 1.0, lightness, saturation)
    return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of width x height inches. Its layout keeps the parts from overlapping."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")


def style_axes(ax: Axes, title: str = "", xlabel: str = "", ylabel: str = "",
               grid: Literal["x", "y", "both"] | None = "both") -> None:
    """Set the title, the axis labels and a light grid behind the data; hide the top and right spines."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(True, axis=grid, color="#E6E6E6", linewidth=0.8)
    ax.tick_params(which="both", colors=INK, labelsize=9, length=0)
    ax.set_title(title, fontsize=11, color=INK, fontweight="bold", loc="left")
    ax.set_xlabel(xlabel, fontsize=10, color=INK)
    ax.set_ylabel(ylabel, fontsize=10, color=INK)


def new_chart(width: float, height: float, title: str, xlabel: str, ylabel: str = "",
              grid: Literal["x", "y", "both"] | None = "both") -> tuple[Figure, Axes]:
    """A figure of width x height inches with a single pair of axes in the common style."""
    figure = new_figure(width, height)
    ax = figure.add_subplot()
    style_axes(ax, title, xlabel, ylabel, grid)
    return figure, ax


def legend_below(figure: Figure, handles: Sequence[Any] | None = None) -> None:
    """Add one legend for the whole figure below its axes. Without `handles` it lists all labelled artists."""
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)


def note_empty(ax: Axes, text: str) -> None:
    """Say in the middle of the axes why they are empty."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=10, color=GREY)


def readable(text: str, stand_in: str = "?", limit: int = 28) -> str:
    """A name that the user chose (of a class, a layer or a run) in a form that matplotlib can show.

    A run of letters that the font lacks becomes one `stand_in`. A dollar sign does not start a formula. A text of more
    than `limit` letters ends in an ellipsis.
    """
    letters = _letters()
    runs = groupby(" ".join(text.split()), key=lambda letter: ord(letter) in letters)
    line = "".join("".join(run) if is_known else stand_in for is_known, run in runs)
    if len(line) > limit:
        line = line[:limit - 1] + "…"
    return line.replace("$", r"\$")


@cache
def _letters() -> frozenset[int]:
    """Those that the font has, by their numbers in Unicode."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def short_number(value: float) -> str:
    """Three significant digits and a unit: 1872157 -> '1.87 M', 4.2e9 -> '4.2 G', 31.42 -> '31.4'."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{float(f'{value / size:.3g}'):g}{unit}"  # the inner format alone gives 1e+03 for 999.9
    return f"{value:.3g}"


def narrow_form(path: str | Path) -> Path:
    """Where the narrow form of a picture lies, which a page shows on phones."""
    path = Path(path)
    return path.with_name(f"{path.stem}_narrow{path.suffix}")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure as a PNG and return its path. A missing folder is created."""
    path = Path(path)
    if engine := figure.get_layout_engine():  # once: savefig would lay it out, and draw it, twice
        engine.execute(figure)
        figure.set_layout_engine("none")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
