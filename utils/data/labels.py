"""The text of a label file -> boxes: what its rows mean, what is repaired in them, what can't be used."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils.boxes import xywh2xyxy, xyxy2xywh
from utils.errors import UserError

MARGIN = 1e-5          # of an image's side: many times what float32 rounds away
SLACK = 0.1            # of an image's side that a number may be outside of it; one in pixels is further out
MOST_CORNERS = 1000    # of polygons whose edges are compared, each with each
# How far points may lie outside of their box, as a share of its sides; and how far where the set's long rows are boxes.
NEAR, FAR = 0.1, 0.5
# The votes of a long row for what all long rows of its set are: above 0 polygons, below 0 boxes with points. A vote is
# about the logarithm of how much more frequent such a row is among polygons than among boxes.
ONLY_POLYGON, LIKE_POLYGON, LIKE_POINTS = 3.0, 0.3, -4.0

POLYGONS, POINTS = "polygons (their boxes are used)", "boxes with points (the boxes are used)"
MALFORMED, OUTSIDE = "malformed rows skipped", "rows outside the image skipped (pixels? divide by its width and height)"
NO_AREA = "boxes dropped (no area in the image)"
NO_TEXT = "label files skipped (no text; save them as UTF-8)"
LABEL_LOSSES = (MALFORMED, OUTSIDE, NO_AREA, NO_TEXT)  # problems that leave out labels


def parse_labels(text: str, path: Path, nc: int | None = None, single_cls: bool = False,
                 reading: str = "") -> tuple[np.ndarray, Counter[str]]:
    """Text of the label file `path` -> float32 (m, 5) class, xywh normalised, and the number of each problem in it.

    A row is `class x y w h`; or a polygon, `class x1 y1 x2 y2 x3 y3 ...`, whose bounding box is taken; or a box with
    points, `class x y w h px py ...` or `class x y w h px py visibility ...`, whose box is taken. reading: POLYGONS or
    POINTS for rows that could be both, as reading_of() says of the set.
    UserError for a class that is not below `nc`: there is no way to tell which class was meant.
    """
    problems: Counter[str] = Counter()
    rows, tidy = [], True
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = _numbers(line)
        if row is None or len(row) != 5:
            row = _box_of_other_row(row or [], reading, problems)
        if row is None:
            continue
        if not _well_inside(*row[1:]):
            tidy = False
            if max(row[1:]) > 1 + SLACK or min(row[1:]) < -SLACK:
                problems[OUTSIDE] += 1
                continue
        if single_cls:
            rows.append([0.0, *row[1:]])
        elif nc is not None and row[0] >= nc:
            raise UserError(f"{path}: line {number}: class {row[0]:.0f}, but the data yaml names {nc} (0 to {nc - 1}); "
                            "correct the label or add the name")
        else:
            rows.append(row)
    labels = np.array(rows, np.float32).reshape(-1, 5)
    if not tidy or len(set(map(tuple, labels.tolist()))) < len(rows):
        labels = _repair(labels, problems)
    return labels, +problems  # without zeros


def reading_of(texts: Iterable[str]) -> str:
    """POLYGONS or POINTS: what the long rows of some label files are; "" where there are none.

    All long rows of a set are of one kind. Each votes with what its numbers tell: a polygon's are mostly no box with
    points in it, and a box with points makes a polygon whose edges cross.
    """
    votes = 0.0
    for text in texts:
        for row in filter(None, map(_numbers, text.splitlines())):
            if len(row) < 7:
                continue
            polygon, points = _is_polygon(row), _has_points(row, NEAR)
            if points:
                votes += LIKE_POLYGON if polygon and _like_polygon(row) else LIKE_POINTS
            elif polygon:
                votes += ONLY_POLYGON
    return POLYGONS if votes > 0 else POINTS if votes < 0 else ""


def _numbers(line: str) -> list[float] | None:
    """The numbers of a row; None where they are not numbers, fewer than five, or the first is no class."""
    try:
        values = [float(token) for token in line.split()]
    except ValueError:
        return None
    good = len(values) >= 5 and all(map(math.isfinite, values)) and values[0] >= 0 and not values[0] % 1
    return values if good else None


def _box_of_other_row(row: list[float], reading: str, problems: Counter[str]) -> list[float] | None:
    """[class, x, y, w, h] of a row that is not of five numbers, or None. Counts what it is."""
    polygon = _is_polygon(row)
    points = _has_points(row, FAR if reading == POINTS else NEAR)
    if polygon and points:
        points = reading == POINTS or not reading and not _like_polygon(row)
    if points:
        problems[POINTS] += 1
        return row[:5]
    if polygon:
        problems[POLYGONS] += 1
        xs, ys = row[1::2], row[2::2]
        x1, x2, y1, y2 = min(xs), max(xs), min(ys), max(ys)
        return [row[0], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    problems[OUTSIDE if len(row) >= 7 and len(row) % 2 and max(row[1:]) > 1 + SLACK else MALFORMED] += 1
    return None


def _is_polygon(row: list[float]) -> bool:
    """Can a row be a class and the corners of a polygon?"""
    return len(row) >= 7 and len(row) % 2 == 1 and min(row[1:]) >= -SLACK and max(row[1:]) <= 1 + SLACK


def _has_points(row: list[float], outside: float) -> bool:
    """Can a row be a box and points in it, or up to `outside` of its sides beside it?

    A point that is not visible (both numbers 0 or -1, or a visibility of 0 or -1) may be anywhere.
    """
    if len(row) < 7:
        return False
    x, y, w, h = row[1:5]
    if min(w, h) <= 0 or min(x - w / 2, y - h / 2) < -SLACK or max(x + w / 2, y + h / 2) > 1 + SLACK:
        return False
    far_x, far_y, numbers = (0.5 + outside) * w, (0.5 + outside) * h, len(row) - 5
    pairs, triples = list(zip(row[5::2], row[6::2])), list(zip(row[5::3], row[6::3], row[7::3]))
    candidates = [pairs] if numbers % 2 == 0 else []
    # Where the numbers could be pairs as well, a visibility is a whole number.
    if numbers % 3 == 0 and all(-1 <= v <= 2 and (numbers % 2 or v % 1 == 0) for _, _, v in triples):
        candidates.append([(px, py) for px, py, v in triples if v > 0])
    return any(all((px <= 0 and py <= 0) or (abs(px - x) <= far_x and abs(py - y) <= far_y) for px, py in points)
               for points in candidates)


def _like_polygon(row: list[float]) -> bool:
    """Does a row that could be both look like a polygon, and not like a box with points?

    As a polygon a box with points begins with the box's centre and its width and height. That corner lies anywhere:
    further from the others than they are from one another, or so that edges cross. Of a triangle's corners one often is
    that far away. Points that are not visible lie on one another.
    """
    corners = np.array(row[1:]).reshape(-1, 2)
    if (corners == 0).all(1).sum() > 1:
        return False
    others = np.delete(corners, 1, 0)
    apart, size = np.hypot(*(others - corners[1]).T).min(), np.hypot(*np.ptp(others, 0))
    if apart > size * (2 if len(corners) == 3 else 1):
        return False
    return len(corners) > MOST_CORNERS or not _crosses_itself(corners)


def _crosses_itself(corners: np.ndarray) -> bool:
    """Do two edges of a polygon (n, 2) cross?"""
    edges = np.roll(corners, -1, 0) - corners
    between = corners[None] - corners[:, None]
    # [i, j]: on which side of edge i corner j lies; 0 on it, whatever rounding says.
    side = np.round(edges[:, None, 0] * between[..., 1] - edges[:, None, 1] * between[..., 0], 12)
    parted = side * np.roll(side, -1, 1) < 0  # edge i, or the line through it, parts the ends of edge j
    return bool((parted & parted.T).any())


def _well_inside(x: float, y: float, w: float, h: float) -> bool:
    """Is a box so far from the edge, and so large, that rounding to float32 can't leave anything to repair?"""
    return w > MARGIN and h > MARGIN and (w + MARGIN) / 2 < x < 1 - (w + MARGIN) / 2 \
        and (h + MARGIN) / 2 < y < 1 - (h + MARGIN) / 2


def _repair(labels: np.ndarray, problems: Counter[str]) -> np.ndarray:
    """Cut boxes at the image's edge; drop duplicates and boxes without area inside the image. Count each."""
    corners = xywh2xyxy(labels[:, 1:])
    inside = corners.clip(0, 1)
    excess = np.abs(corners - inside).max(1, initial=0)
    keep = (labels[:, 3:] > 0).all(1) & (inside[:, 2:] > inside[:, :2]).all(1)
    repaired = labels.copy()
    repaired[excess > 0, 1:] = xyxy2xywh(inside[excess > 0])
    repaired = repaired[keep]
    first: dict[tuple[float, ...], int] = {}
    for i, row in enumerate(repaired.tolist()):
        first.setdefault(tuple(row), i)
    # Coordinates rounded to a few digits often exceed the edge slightly: such boxes are cut, but not counted.
    problems["boxes cut at the edge"] = int((keep & (excess > 1e-4)).sum())
    problems[NO_AREA] = int((~keep).sum())
    problems["duplicate rows removed"] = len(repaired) - len(first)
    return repaired[list(first.values())] if first else repaired
