"""Pictures of data, batches and results. Each function writes one PNG and returns its path; none touches pyplot.

The common look (fonts, grid, the treatment of users' texts) is that of utils.slimming.pictures.
"""
from __future__ import annotations

import colorsys
import csv
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.slimming import pictures as look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_CONFIDENCE = 0.25  # detections below it would bury a batch picture
MANY_CLASSES = 20      # from here on single curves are not told apart and stay grey
# Okabe and Ito's colours (Color Universal Design, 2008), blue first; Tol's wine for their yellow, too pale on white.
PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (230, 159, 0), (204, 121, 167), (86, 180, 233), (136, 34, 85))

Names = Mapping[int, str] | Sequence[str]


def colour(i: int) -> tuple[int, int, int]:
    """RGB 0..255 of class i: seven colour-blind-safe ones, then hues a golden angle apart at changing lightness."""
    if 0 <= i < len(PALETTE):
        return PALETTE[i]
    red, green, blue = colorsys.hls_to_rgb((i * 0.61803399) % 1.0, (0.36, 0.5, 0.66)[i % 3], (0.8, 0.6)[i // 3 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def class_name(names: Names, i: int) -> str:
    """The name of class i, or its number where it has none."""
    if isinstance(names, Mapping):
        return str(names.get(i, i))
    return str(names[i]) if 0 <= i < len(names) else str(i)


# Boxes on images ------------------------------------------------------------------------------------------------------

def draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: Sequence[str], classes: Sequence[int]) -> np.ndarray:
    """A copy of `image` (H, W, 3) uint8 RGB with boxes (n, 4) xyxy in pixels and their captions drawn on it.

    An empty label draws no caption; boxes with a coordinate that is not finite are left out.
    """
    canvas = np.ascontiguousarray(image).copy()
    height, width = canvas.shape[:2]
    line = max(1, round(min(height, width) / 250))
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    captions = []
    for box, label, cls in zip(corners, labels, classes, strict=True):
        if not np.isfinite(box).all():
            continue
        x1, y1, x2, y2 = np.clip(box, 0, (width - 1, height - 1) * 2).round().astype(int).tolist()
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour(int(cls)), line)
        captions.append((_drawable(label, int(cls)), x1, y1, colour(int(cls))))
    for text, x, y, rgb in captions:  # after all boxes, so that no line crosses a caption
        if text:
            _draw_caption(canvas, text, x, y, line, rgb)
    return canvas


def _draw_caption(canvas: np.ndarray, text: str, x: int, y: int, line: int, rgb: tuple[int, int, int]) -> None:
    """Text on a plate in the box's colour, above its corner (x, y) where there is room, always inside the image."""
    font, (height, width) = cv2.FONT_HERSHEY_SIMPLEX, canvas.shape[:2]
    weight = max(1, line // 2)
    scale = max(9.0, min(height, width) / 36) / 22  # the font's capitals are 22 pixels high at scale 1
    (w, h), below = cv2.getTextSize(text, font, scale, weight)
    if w + 4 > width:  # a long name in a narrow image
        scale *= (width - 4) / w
        (w, h), below = cv2.getTextSize(text, font, scale, weight)
    plate_w, plate_h = w + 4, h + below + 2
    left = max(0, min(x, width - plate_w))
    top = y - plate_h if y >= plate_h else max(0, min(y, height - plate_h))
    cv2.rectangle(canvas, (left, top), (min(left + plate_w, width) - 1, min(top + plate_h, height) - 1), rgb, -1)
    bright = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140
    cv2.putText(canvas, text, (left + 2, top + h + 1), font, scale, (0, 0, 0) if bright else (255, 255, 255), weight,
                cv2.LINE_AA)


def _drawable(text: str, cls: int) -> str:
    """`text` as cv2 can draw it: OpenCV 5 knows all letters; before, accents go and other scripts become #class."""
    line = " ".join(text.split())
    if int(cv2.__version__.split(".")[0]) >= 5:
        return line
    folded = "".join(c for c in unicodedata.normalize("NFKD", line) if not unicodedata.combining(c))
    return re.sub(r"[^\x20-\x7e]+", f"#{cls}", folded)


def plot_batch(images: Tensor, targets: Tensor, paths: Sequence[str | Path], names: Names, path: str | Path,
               max_images: int = 16, max_side: int = 1920) -> Path:
    """A mosaic of a batch with its boxes.

    images: (B, 3, H, W) uint8 RGB. targets: (n, 6) image, class, x, y, w, h normalised, or (n, 7) with the confidence
    last; confidences below 0.25 are left out. paths: a file name for each tile, or none at all. Small images are
    enlarged so that captions can be read; no side of the picture exceeds max_side.
    """
    count = min(len(images), max_images)
    if not count or not images.shape[2] * images.shape[3]:
        return _write_png(_message("no images"), path)
    height, width = images.shape[2:]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = min(max(1.0, 320 / max(height, width)), max_side / (columns * width), max_side / (rows * height))
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    rest = targets.detach().float().cpu().numpy()
    if rest.ndim == 2 and rest.shape[1] > 6:
        rest = rest[rest[:, 6] >= MIN_CONFIDENCE]
    mosaic = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i in range(count):
        tile = cv2.resize(images[i].cpu().permute(1, 2, 0).numpy(), (w, h),
                          interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        file = Path(paths[i]).name if i < len(paths) else ""
        top, left = i // columns * h, i % columns * w
        mosaic[top:top + h, left:left + w] = _tile(tile, rest[rest[:, 0] == i] if len(rest) else rest, names, file)
    return _write_png(mosaic, path)


def _tile(image: np.ndarray, targets: np.ndarray, names: Names, file: str) -> np.ndarray:
    """One image of the mosaic with its targets (n, 6 or 7), its file's name and a white frame."""
    height, width = image.shape[:2]
    if len(targets):
        centre, half = targets[:, 2:4], targets[:, 4:6] / 2
        boxes = np.concatenate((centre - half, centre + half), 1) * (width, height, width, height)
        classes = targets[:, 1].astype(int).tolist()
        labels = [class_name(names, cls) for cls in classes]
        if targets.shape[1] > 6:
            labels = [f"{label} {confidence:.2f}" for label, confidence in zip(labels, targets[:, 6], strict=True)]
        image = draw_boxes(image, boxes, labels, classes)
    else:
        image = image.copy()
    if file:
        # At the foot, where it hides the fewest captions.
        _draw_caption(image, _drawable(file if len(file) <= 40 else f"{file[:39]}…", 0), 0, height - 1, 1, (40, 40, 40))
    cv2.rectangle(image, (0, 0), (width - 1, height - 1), (255, 255, 255), max(1, width // 200))
    return image


def _message(text: str) -> np.ndarray:
    """A small picture (H, W, 3) that only says something."""
    canvas = np.full((120, 320, 3), 255, np.uint8)
    cv2.putText(canvas, text, (20, 66), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (150, 150, 150), 1, cv2.LINE_AA)
    return canvas


def _write_png(image: np.ndarray, path: str | Path) -> Path:
    """Write an RGB picture. By way of bytes, for cv2.imwrite fails at some non-ASCII paths."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())
    return path


def detections_to_targets(detections: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Detections, one (n, 6) xyxy conf class in pixels an image of size (H, W), as (n, 7) targets for plot_batch."""
    height, width = size
    if not detections:
        return torch.zeros(0, 7)
    d = torch.cat([x.detach().float().cpu().reshape(-1, 6) for x in detections])
    image = torch.repeat_interleave(torch.arange(len(detections)), torch.tensor([len(x) for x in detections]))[:, None]
    rows = torch.cat((image, d[:, 5:6], (d[:, :2] + d[:, 2:4]) / 2, d[:, 2:4] - d[:, :2], d[:, 4:5]), 1)
    return rows / torch.tensor([1, 1, width, height, width, height, 1.0])


# Labels ---------------------------------------------------------------------------------------------------------------

def plot_labels(labels: np.ndarray, names: Names, path: str | Path) -> Path:
    """What a data set's labels (n, 5) class x y w h (normalised) are like: classes, shapes, places and sizes."""
    from matplotlib.collections import PolyCollection

    rows = np.asarray(labels, dtype=np.float64).reshape(-1, 5)
    rows = rows[np.isfinite(rows).all(1)]
    figure = look.new_figure(12, 7.6)
    grid = figure.add_gridspec(2, 3, height_ratios=(4, 5))
    _class_counts(figure.add_subplot(grid[0, :]), rows[:, 0].astype(int), names)
    shapes, places, sizes = (figure.add_subplot(grid[1, i]) for i in range(3))
    look.dress(shapes, "Boxes, laid over one another", "width", "height", grid=None)
    look.dress(places, "Where their centres lie", "x", "y", grid=None)
    look.dress(sizes, "How large they are", "width", "height")
    if len(rows):
        few = rows[np.linspace(0, len(rows) - 1, min(len(rows), 800)).astype(int)]
        corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
        colours = np.array([colour(int(c)) for c in few[:, 0]]) / 255
        shapes.add_collection(PolyCollection(list(0.5 + few[:, None, 3:5] * corners), facecolors="none", linewidths=0.6,
                                             edgecolors=np.c_[colours, np.full(len(few), 0.5)]))
        _density(places, rows[:, 1], rows[:, 2])
        _density(sizes, rows[:, 3], rows[:, 4])
    for ax in (shapes, places, sizes):
        ax.set_xlim(0, 1)
        ax.set_ylim(*((1, 0) if ax is places else (0, 1)))  # y of an image points down
        ax.set_aspect("equal")
        if not len(rows):
            look.note_empty(ax, "no labels")
    return look.save(figure, path)


def _class_counts(ax: Axes, classes: np.ndarray, names: Names, most: int = 100) -> None:
    """A bar for every named or present class; of more than `most` the most frequent."""
    present, counts = np.unique(classes, return_counts=True)
    found = dict(zip(present.tolist(), counts.tolist(), strict=True))
    known = names.keys() if isinstance(names, Mapping) else range(len(names))
    order = sorted(set(known) | set(found))
    title = f"{len(classes):,} boxes of {len(order)} {'class' if len(order) == 1 else 'classes'}"
    if len(order) > most:
        order = sorted(order, key=lambda c: -found.get(c, 0))[:most]
        title += f"; the {most} most frequent"
    look.dress(ax, title, ylabel="boxes", grid="y")
    if not order:
        look.note_empty(ax, "no classes")
        return
    heights = [found.get(c, 0) for c in order]
    ax.bar(range(len(order)), heights, width=0.8, color=look.BLUE)
    middle, half = (len(order) - 1) / 2, max(len(order), 6) / 2
    ax.set_xlim(middle - half - 0.1, middle + half + 0.1)  # a single class doesn't become one huge bar
    ax.set_ylim(0, 1.12 * max(max(heights), 1))
    ax.set_xticks(range(len(order)), [look.readable(class_name(names, c), f"#{c}", 20) for c in order],
                  rotation=90 if len(order) > 8 else 0, fontsize=9 if len(order) <= 40 else 6.5)
    if len(order) <= 30:
        for i, count in enumerate(heights):
            ax.annotate(f"{count:,}", (i, count), (0, 2), textcoords="offset points", ha="center", fontsize=8,
                        color=look.INK)


def _density(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Counts in 50 x 50 cells of the unit square on a logarithmic colour scale; empty cells stay white."""
    from matplotlib.colors import LogNorm

    edges = np.linspace(0, 1, 51)
    counts = np.histogram2d(np.clip(x, 0, 1), np.clip(y, 0, 1), bins=(edges, edges))[0].T
    ax.pcolormesh(edges, edges, np.where(counts > 0, counts, np.nan), norm=LogNorm(0.5, max(counts.max(), 2)),
                  cmap="YlGnBu")


# Curves ---------------------------------------------------------------------------------------------------------------

def plot_pr_curve(recall_axis: np.ndarray, precision: np.ndarray, ap50: np.ndarray, names: Sequence[str],
                  path: str | Path) -> Path:
    """Precision over recall (both at IoU 0.5): precision (classes, points), recall_axis (points,), ap50 (classes,).

    names: those of the classes in the order of the rows. The bold line is the mean over classes.
    """
    ap = np.asarray(ap50, float).ravel()
    labels = [f"{look.readable(name, f'#{i}')} {ap[i]:.3f}" for i, name in enumerate(names)]
    mean = f"all classes {ap.mean():.3f} mAP50" if len(ap) else ""
    return _curves(recall_axis, precision, labels, mean, path, "Precision and recall", "recall", "precision")


def plot_metric_curve(px: np.ndarray, curves: np.ndarray, names: Sequence[str], path: str | Path, ylabel: str) -> Path:
    """A metric (`ylabel`: F1, say) of each class, curves (classes, points), over the confidence px (points,).

    names: those of the classes in the order of the rows. The bold line is the mean; its maximum is in the legend.
    """
    x, y = np.asarray(px, float).ravel(), np.asarray(curves, float).reshape(-1, len(px))
    labels = [look.readable(name, f"#{i}") for i, name in enumerate(names)]
    mean = ""
    if y.size:
        best = int(y.mean(0).argmax())
        mean = f"all classes {y.mean(0)[best]:.2f} at {x[best]:.3f}"
    return _curves(x, y, labels, mean, path, f"{ylabel} and confidence", "confidence", ylabel)


def _curves(x: np.ndarray, y: np.ndarray, labels: Sequence[str], mean: str, path: str | Path, title: str, xlabel: str,
            ylabel: str) -> Path:
    """A line for each row of y, the mean in bold, a legend beside them. Of many classes only the mean has colour."""
    figure = look.new_figure(9, 5.4)
    ax = figure.add_subplot()
    look.dress(ax, title, xlabel, ylabel)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.03)
    if not np.size(y):
        look.note_empty(ax, "no classes with labels")
        return look.save(figure, path)
    many = len(labels) > MANY_CLASSES
    for i, (row, _) in enumerate(zip(y, labels, strict=True)):
        # The palette returns after seven classes, with another dash.
        style = ("-", "--", ":")[i // len(PALETTE) % 3]
        rgb = tuple(v / 255 for v in PALETTE[i % len(PALETTE)])
        ax.plot(x, row, linewidth=0.8 if many else 1.4, color=look.GREY if many else rgb, alpha=0.5 if many else 0.9,
                linestyle="-" if many else style)
    lines = list(ax.lines)
    bold = ax.plot(x, np.mean(y, 0), linewidth=3.2, color=look.BLUE if many else look.INK)[0]
    handles, texts = [bold, *lines], [mean, *labels]
    if many:
        handles, texts = handles[:2], [mean, f"each of {len(labels)} classes"]
    elif len(lines) == 1:  # the mean is the class
        handles, texts = [bold], [mean.replace("all classes", labels[0].removesuffix(f" {mean.split()[2]}"))]
    figure.legend(handles, texts, loc="outside right upper", frameon=False, fontsize=9)
    return look.save(figure, path)


def plot_confusion(matrix: np.ndarray, names: Names, path: str | Path) -> Path:
    """The confusion matrix (nc + 1, nc + 1), rows predicted and columns true, as a share of each column.

    The last row and column are the background: objects that were missed, and detections where nothing is.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    n = len(counts)
    totals = counts.sum(0, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    ticks = [look.readable(class_name(names, i), f"#{i}", 18) for i in range(n - 1)] + ["background"]
    side = min(max(5.0, 2.6 + 0.42 * n if n <= 31 else 3.6 + 0.13 * n), 60)
    figure = look.new_figure(side + 0.8, side)
    ax = figure.add_subplot()
    look.dress(ax, "Confusion, share of the true class", "true", "predicted", grid=None)
    mesh = ax.imshow(np.where(share > 0, share, np.nan), cmap="Blues", vmin=0, vmax=1)
    size = 9 if n <= 31 else 6
    ax.set_xticks(range(n), ticks, rotation=90 if n > 4 else 0, fontsize=size)
    ax.set_yticks(range(n), ticks, fontsize=size)
    if n <= 31:
        for row, column in np.argwhere(share >= 0.005):
            ax.text(column, row, f"{share[row, column]:.2f}", ha="center", va="center", fontsize=9 if n <= 12 else 7,
                    color="white" if share[row, column] > 0.55 else look.INK)
    if not totals.any():
        look.note_empty(ax, "no labels and no detections")
    bar = figure.colorbar(mesh, ax=ax, shrink=0.8, aspect=30, pad=0.02)
    bar.ax.tick_params(labelsize=9, colors=look.INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return look.save(figure, path)


# results.csv ----------------------------------------------------------------------------------------------------------

def plot_results(csv_path: str | Path, path: str | Path) -> Path:
    """All columns of a results.csv as small charts over the epochs; cells may be empty.

    Raises UserError where the file can't be read.
    """
    columns = _read_columns(Path(csv_path))
    epochs = columns.pop("epoch", None)
    panels: dict[str, list[tuple[str, np.ndarray]]] = {}
    for column, values in columns.items():
        panel, label = _panel(column)
        panels.setdefault(panel, []).append((label, values))
    across = min(max(len(panels), 1), 3)
    down = max(math.ceil(len(panels) / across), 1)
    figure = look.new_figure(4 * across if len(panels) > 1 else 6, 2.7 * down)
    axes = figure.subplots(down, across, squeeze=False)
    for ax, (panel, curves) in zip(axes.flat, panels.items(), strict=False):
        look.dress(ax, look.readable(panel, limit=36), "epoch")
        _draw_curves(ax, epochs, curves)
    for ax in list(axes.flat)[len(panels):]:
        ax.set_axis_off()
    if not panels:
        look.note_empty(axes[0, 0], "no results yet")
    return look.save(figure, path)


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    """A csv's columns as float64 arrays; what is no finite number is NaN."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no readable results.csv ({getattr(error, 'strerror', None) or error}); "
                        "give the one in a run's folder") from None
    header, body = (rows[0], rows[1:]) if rows else ([], [])
    return {name: np.array([_number(row[i]) if i < len(row) else math.nan for row in body], float)
            for i, name in enumerate(header) if name}


def _number(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _panel(column: str) -> tuple[str, str]:
    """The chart that a column goes to, and its name there: train and val losses share one, and so do the mAPs."""
    group, _, name = column.partition("/")
    if group in ("train", "val"):
        return name.replace("_", " "), group
    if group == "metrics" and name in ("precision", "recall"):
        return "precision and recall", name
    if group == "metrics" and name.startswith("mAP"):
        return "mAP", {"mAP_0.5": "mAP50", "mAP_0.5:0.95": "mAP50-95"}.get(name, name)
    if group == "x":
        return "learning rate", name
    if group == "sparsity" and name.startswith("below_"):
        return "share of channels by |gamma|", name.replace("_", " ")
    return column, ""


def _draw_curves(ax: Axes, epochs: np.ndarray | None, curves: Sequence[tuple[str, np.ndarray]]) -> None:
    """The lines of one chart; gaps (epochs without validation) are bridged, and single values are dots."""
    from matplotlib.ticker import MaxNLocator

    colours = (look.BLUE, look.VERMILION, look.GREEN, look.PINK, look.ORANGE, look.SKY)
    drawn = False
    for i, (label, values) in enumerate(curves):
        x = epochs if epochs is not None else np.arange(len(values), dtype=float)
        known = np.isfinite(values) & np.isfinite(x)
        if not known.any():
            continue
        drawn = True
        ax.plot(x[known], values[known], color=colours[i % len(colours)], linewidth=1.8, label=label,
                linestyle=("-", "--", ":", "-.")[i % 4], marker="o" if known.sum() <= 15 else None, markersize=4)
    if not drawn:
        look.note_empty(ax, "no values")
        return
    if any(label for label, _ in curves):
        ax.legend(frameon=False, fontsize=9, loc="best")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(curves[0][1]) == 1:
        ax.set_xlim(ax.dataLim.x0 - 1, ax.dataLim.x0 + 1)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    ax.yaxis.get_offset_text().set_fontsize(8)
