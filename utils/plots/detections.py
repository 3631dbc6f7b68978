"""Plots of detections: boxes on images, mosaics of batches, curves over recall and confidence, the confusion matrix."""
from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.boxes import xywh2xyxy, xyxy2xywh
from utils.files import atomic, printable
from utils.plots.style import BLUE, GREY, INK, PALETTE, class_colour, new_chart, note_empty, readable, save_figure

MIN_CONFIDENCE = 0.25  # weaker detections would cover the image
MAX_TILES = 16         # images in a mosaic
MAX_SIDE = 1920        # pixels, the longest side of a mosaic without the gaps between its tiles
DASHES = ("-", "--", ":")
Rectangle = tuple[int, int, int, int]


def draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: Sequence[str], classes: Sequence[int],
               line: int | None = None) -> np.ndarray:
    """A copy of `image` with boxes and their captions drawn on it.

    image: (H, W, 3) uint8 RGB. boxes: (n, 4) xyxy in pixels; one with a coordinate that is not finite is left out.
    labels: the captions; an empty one is not drawn, and none covers another: what has no room is left out. classes:
    choose the colours. line: width in pixels of a box's outline; None: by the image's size.
    """
    canvas = np.array(image, order="C")
    height, width = canvas.shape[:2]
    line = line or max(1, round(min(height, width) / 250))
    captions = []
    for box, label, cls in zip(boxes, labels, classes, strict=True):
        if not np.isfinite(box).all():
            continue
        x1, y1, x2, y2 = np.clip(box, 0, (width - 1, height - 1) * 2).round().astype(int).tolist()
        cv2.rectangle(canvas, (x1, y1), (x2, y2), class_colour(cls), line)
        captions.append((_drawable(label, cls), (x1, y1, x2, y2), class_colour(cls)))
    taken: list[Rectangle] = []
    for text, corners, colour in captions:  # after all boxes, so that no line crosses a caption
        if text:
            _draw_caption(canvas, text, corners, line, colour, taken)
    return canvas


def _draw_caption(canvas: np.ndarray, text: str, box: Sequence[int], line: int, colour: tuple[int, int, int],
                  taken: list[Rectangle]) -> None:
    """Draw text on a plate of the given colour, at a box (xyxy) and always inside the canvas.

    line: width in pixels of the box's outline. taken: where other captions are; the plate is added. A caption that
    would cover one of them wherever it is put is left out.
    """
    font, (height, width) = cv2.FONT_HERSHEY_SIMPLEX, canvas.shape[:2]
    thickness = max(1, line // 2)
    scale = max(9.0, min(height, width) / 36) / 22  # a capital letter is 22 pixels high at scale 1
    (w, h), below = cv2.getTextSize(text, font, scale, thickness)
    if w + 4 > width:  # a long name in a narrow image
        scale *= (width - 4) / w
        (w, h), below = cv2.getTextSize(text, font, scale, thickness)
    plate_w, plate_h = w + 4, h + below + 2
    for left, top in _places(box, plate_w, plate_h):
        left, top = max(0, min(left, width - plate_w)), max(0, min(top, height - plate_h))
        right, bottom = min(left + plate_w, width) - 1, min(top + plate_h, height) - 1
        if all(left > x2 or right < x1 or top > y2 or bottom < y1 for x1, y1, x2, y2 in taken):
            break
    else:
        return
    taken.append((left, top, right, bottom))
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, cv2.FILLED)
    is_bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
    text_colour = (0, 0, 0) if is_bright else (255, 255, 255)
    cv2.putText(canvas, text, (left + 2, top + h + 1), font, scale, text_colour, thickness, cv2.LINE_AA)


def _places(box: Sequence[int], width: int, height: int) -> Iterator[tuple[int, int]]:
    """(left, top) where the caption (of width x height) of a box may lie: above it, inside row by row, below it."""
    x1, y1, x2, y2 = box
    above = [y1 - height] if y1 >= height else []
    for top in (*above, *range(y1, y2 - height, height), y2):
        yield from ((x1, top), (x2 - width, top))


def _drawable(text: str, cls: int) -> str:
    """`text` in letters that OpenCV can draw.

    OpenCV 5 can draw all letters. For older versions accents are removed and other scripts become #class.
    """
    line = "".join(c for c in " ".join(printable(text).split()) if c.isprintable())
    if int(cv2.__version__.split(".")[0]) >= 5:
        return line
    folded = "".join(c for c in unicodedata.normalize("NFKD", line) if not unicodedata.combining(c))
    return re.sub(r"[^\x20-\x7e]+", f"#{cls}", folded)


def plot_batch(images: Tensor, targets: Tensor, paths: Sequence[str | Path], names: Mapping[int, str],
               path: str | Path) -> Path:
    """A mosaic, as JPEG, of the first MAX_TILES images of a batch with their boxes and file names.

    images: (B, 3, H, W) uint8 RGB. targets: (n, 6) image, class, x, y, w, h normalised, or (n, 7) with the confidence
    last; boxes with a confidence below MIN_CONFIDENCE are left out. paths: one per image. All on the CPU.
    """
    path, rows = Path(path), targets.numpy()
    if rows.shape[1] > 6:
        rows = rows[rows[:, 6] >= MIN_CONFIDENCE]
    columns = math.ceil(math.sqrt(min(len(images), MAX_TILES)))
    height, width = images.shape[2:]
    longest = max(height, width)
    # Small images are enlarged, so that their captions are readable.
    scale = min(max(1.0, 320 / longest), MAX_SIDE / (columns * longest))
    size = max(1, int(width * scale)), max(1, int(height * scale))
    tiles = []
    for i, (image, file) in enumerate(zip(images[:MAX_TILES], paths, strict=False)):
        tile = cv2.resize(image.permute(1, 2, 0).numpy(), size,
                          interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        tiles.append(_draw_tile(tile, rows[rows[:, 0] == i], names, Path(file).name))
    with atomic(path) as temporary:
        Image.fromarray(_side_by_side(tiles, columns)).save(temporary, format="jpeg", quality=95)
    return path


def _side_by_side(tiles: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Tiles (h, w, 3) of one size in rows of `columns`, white in between: (H, W, 3)."""
    high, wide = tiles[0].shape[0] + gap, tiles[0].shape[1] + gap
    mosaic = np.full((-(-len(tiles) // columns) * high + gap, min(columns, len(tiles)) * wide + gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * high + gap, i % columns * wide + gap
        mosaic[top:top + tile.shape[0], left:left + tile.shape[1]] = tile
    return mosaic


def _draw_tile(image: np.ndarray, targets: np.ndarray, names: Mapping[int, str], file: str) -> np.ndarray:
    """A copy of an image (H, W, 3) with its targets (n, 6 or 7) and its file name."""
    height, width = image.shape[:2]
    boxes = xywh2xyxy(targets[:, 2:6]) * (width, height, width, height)
    classes = targets[:, 1].astype(int).tolist()
    labels = [names.get(cls, str(cls)) for cls in classes]
    if targets.shape[1] > 6:
        labels = [f"{label} {confidence:.2f}" for label, confidence in zip(labels, targets[:, 6], strict=True)]
    canvas = draw_boxes(image, boxes, labels, classes)
    caption = _drawable(file if len(file) <= 40 else f"{file[:39]}…", 0)
    # At the bottom, where it covers few other captions.
    _draw_caption(canvas, caption, (0, height - 1) * 2, 1, (40, 40, 40), [])
    return canvas


def detections_to_targets(detections: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Detections as the targets of plot_batch.

    detections: for each image (n, 6) xyxy in pixels, confidence, class. size: (H, W) of the images.
    Returns (n, 7) image, class, x, y, w, h normalised, confidence.
    """
    height, width = size
    image = torch.cat([torch.full((len(rows), 1), float(i)) for i, rows in enumerate(detections)])
    boxes, confidence, cls = torch.cat(list(detections)).split((4, 1, 1), 1)
    return torch.cat((image, cls, xyxy2xywh(boxes) / torch.tensor([width, height, width, height]), confidence), 1)


def plot_pr_curve(recall_axis: np.ndarray, precision: np.ndarray, ap50: np.ndarray, names: Sequence[str],
                  path: str | Path) -> Path:
    """Precision over recall at IoU 0.5, a line per class and a bold one for their mean.

    recall_axis: (points,). precision: (classes, points). ap50: (classes,). names: (classes,).
    """
    scores = [f" {ap:.3f}" for ap in ap50]
    mean = f"{ap50.mean():.3f} mAP50" if scores else ""
    return _plot_curves(recall_axis, precision, names, scores, mean, path, "recall", "precision")


def plot_metric_curve(px: np.ndarray, curves: np.ndarray, names: Sequence[str], path: str | Path, ylabel: str) -> Path:
    """A metric over the confidence, a line per class and a bold one for their mean. The legend gives its maximum.

    px: (points,) confidence. curves: (classes, points). names: (classes,). ylabel: the metric, such as F1.
    """
    mean = ""
    if len(curves):
        average = curves.mean(0)
        best = average.argmax()
        mean = f"{average[best]:.2f} at {px[best]:.3f}"
    return _plot_curves(px, curves, names, [""] * len(names), mean, path, "confidence", ylabel)


def _plot_curves(x: np.ndarray, y: np.ndarray, names: Sequence[str], scores: Sequence[str], mean: str,
                 path: str | Path, xlabel: str, ylabel: str) -> Path:
    """A line for each row of y (classes, points) and a bold one for their mean, with a legend beside the axes.

    The legend shows each class with its score, and the mean with the text `mean`. All lines are grey if the classes
    are too many to tell apart.
    """
    from cycler import cycler

    figure, ax = new_chart(9, 5.4, f"{ylabel} and {xlabel}", xlabel, ylabel)
    ax.set(xlim=(0, 1), ylim=(0, 1.03))
    if not len(y):
        note_empty(ax, "no classes with labels")
        return save_figure(figure, path)
    shown = [readable(name, f"#{i}") for i, name in enumerate(names)]
    labels = [name + score for name, score in zip(shown, scores, strict=True)]
    is_grey = len(y) > len(PALETTE) * len(DASHES)
    if is_grey:
        lines = ax.plot(x, y.T, color=GREY, alpha=0.5, linewidth=0.8)
        labels = [f"each of {len(y)} classes"]
    else:
        ax.set_prop_cycle(cycler(linestyle=DASHES) * cycler(color=PALETTE))  # all colours solid, then dashed
        lines = ax.plot(x, y.T, alpha=0.9, linewidth=1.4)
    whole = "all classes"
    if len(y) == 1:  # the mean is the class
        whole, labels = shown[0], []
    bold = ax.plot(x, y.mean(0), color=BLUE if is_grey else INK, linestyle="-", linewidth=3.2)[0]
    figure.legend([bold, *lines[:len(labels)]], [f"{whole} {mean}", *labels], loc="outside right upper", frameon=False,
                  fontsize=9)
    return save_figure(figure, path)


def plot_confusion(matrix: np.ndarray, names: Mapping[int, str], path: str | Path) -> Path:
    """The confusion matrix: counts, and shares as colours and, where the cells have room, numbers.

    A share is that of the true class, but in the column of the detections without an object, which has no true class:
    there it is that of all detections of the row, in a colour of its own.

    matrix: (classes + 1, classes + 1) counts, rows predicted and columns true. The last row and column are the
    background: objects that were missed, and detections without an object.
    """
    n = len(matrix)
    share = matrix / matrix.sum(0).clip(min=1)
    share[:, -1] = matrix[:, -1] / matrix.sum(1).clip(min=1)
    large = n > 31  # too many classes for numbers in the cells
    side = min(3.6 + 0.13 * n, 60) if large else max(5.0, 3.0 + 0.46 * n)
    figure, ax = new_chart(side + 1.7, side, "Confusion: counts and shares", "true", "predicted", grid=None)
    is_false = np.broadcast_to(np.arange(n) == n - 1, share.shape)
    images = [ax.imshow(np.ma.masked_array(share, hidden | (share == 0)), cmap=colours, vmin=0, vmax=1)
              for hidden, colours in ((is_false, "Blues"), (~is_false, "Oranges"))]
    ticks = [readable(names.get(i, str(i)), f"#{i}", 18) for i in range(n - 1)]
    fontsize = 6 if large else 9
    ax.set_xticks(range(n), [*ticks, "nothing"], rotation=90 if n > 4 else 0, fontsize=fontsize)
    ax.set_yticks(range(n), [*ticks, "missed"], fontsize=fontsize)
    if not large:
        for row, column in np.argwhere(matrix):
            text = f"{matrix[row, column]:,.0f}\n{share[row, column]:.2f}"
            ax.text(column, row, text, ha="center", va="center", fontsize=8.5 if n <= 12 else 6.5,
                    color="white" if share[row, column] > 0.55 else INK)
    if not matrix.any():
        note_empty(ax, "no labels and no detections")
    for image, label in zip(images[::-1], ("false detections, share of all of the class", "share of the true class")):
        bar = figure.colorbar(image, ax=ax, shrink=0.8, aspect=40, pad=0.02)
        bar.set_label(label, fontsize=9, color=INK)
        bar.ax.tick_params(labelsize=9, colors=INK)
        bar.ax.spines["outline"].set_visible(False)
    return save_figure(figure, path)
