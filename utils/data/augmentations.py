"""Augmentation as pure functions: random numbers come from the generator argument, and no argument is modified.

Images are uint8 (h, w, 3) in BGR; labels are float32 (m, 5): class, x1, y1, x2, y2 in pixels of the image.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

FILL = 114            # grey of pixels that no image covers
LEAST_BOX_SIDE = 2.0  # pixels; a box must be wider and higher after a random map
MOST_ASPECT = 100.0   # long side / short side of a box after a random map
LEAST_AREA = 0.1      # share of a box's area that must be left after a random map
Labelled = tuple[np.ndarray, np.ndarray]  # image and its labels


def augment_hsv(image: np.ndarray, rng: np.random.Generator, h: float, s: float, v: float) -> np.ndarray:
    """Scale hue, saturation and value, each by a random factor in 1 - gain .. 1 + gain."""
    if not (h or s or v):
        return image
    factors = rng.uniform(-1, 1, 3) * (h, s, v) + 1
    ramp = np.arange(256) * factors[:, None]
    # Hue is an angle in steps of two degrees: it wraps around, the others saturate.
    tables = np.concatenate((ramp[:1] % 180, np.clip(ramp[1:], 0, 255))).astype(np.uint8)
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
    return cv2.cvtColor(cv2.merge([cv2.LUT(p, t) for p, t in zip(planes, tables)]), cv2.COLOR_HSV2BGR)


def flip_lr(image: np.ndarray, labels: np.ndarray) -> Labelled:
    """Mirror left and right."""
    flipped = labels.copy()
    flipped[:, [1, 3]] = image.shape[1] - labels[:, [3, 1]]
    return cv2.flip(image, 1), flipped


def flip_ud(image: np.ndarray, labels: np.ndarray) -> Labelled:
    """Mirror top and bottom."""
    flipped = labels.copy()
    flipped[:, [2, 4]] = image.shape[0] - labels[:, [4, 2]]
    return cv2.flip(image, 0), flipped


def mixup(image: np.ndarray, labels: np.ndarray, other: np.ndarray, other_labels: np.ndarray,
          rng: np.random.Generator) -> Labelled:
    """Blend two images of one size, r ~ Beta(32, 32), and keep the labels of both (mixup, arXiv:1710.09412)."""
    r = float(rng.beta(32.0, 32.0))
    return cv2.addWeighted(image, r, other, 1 - r, 0), np.concatenate((labels, other_labels))


def mosaic(tiles: Sequence[Labelled], rng: np.random.Generator, size: int) -> Labelled:
    """Four images, no side above `size`, around a random point of a 2 size x 2 size canvas (YOLOv4, arXiv:2004.10934).

    They meet at the point in the order top left, top right, bottom left, bottom right, and are cut at the canvas's
    edge, as are their boxes. A box that lies outside keeps its row with no area, and random_perspective drops it.
    """
    canvas = np.full((2 * size, 2 * size, 3), FILL, np.uint8)
    centre_x, centre_y = (int(c) for c in rng.uniform(0.5 * size, 1.5 * size, 2))
    moved = []
    for i, (image, labels) in enumerate(tiles):
        h, w = image.shape[:2]
        left = centre_x if i % 2 else centre_x - w
        top = centre_y if i >= 2 else centre_y - h
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + w, 2 * size), min(top + h, 2 * size)
        canvas[y1:y2, x1:x2] = image[y1 - top:y2 - top, x1 - left:x2 - left]
        moved.append(labels + np.array([0, left, top, left, top], np.float32))
    joined = np.concatenate(moved)
    joined[:, 1:] = joined[:, 1:].clip(0, 2 * size)
    return canvas, joined


def random_perspective(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, degrees: float = 0.0,
                       translate: float = 0.1, scale: float = 0.5, shear: float = 0.0, perspective: float = 0.0,
                       border: tuple[int, int] = (0, 0)) -> Labelled:
    """One random affine (or projective) map of image and boxes.

    degrees and shear: largest angles. translate: largest shift, as a share of the output's sides. scale: the zoom lies
    in 1 - scale .. 1 + scale. perspective: largest projective coefficient. border (y, x) is added on all sides of the
    output: (-s/2, -s/2) makes s x s of a mosaic. A box becomes the axis-aligned box around its moved corners, cut at
    the image's edge; `worth_keeping` decides whether it stays.
    """
    height, width = image.shape[0] + 2 * border[0], image.shape[1] + 2 * border[1]
    matrix, zoom = _draw_matrix(image.shape[:2], (height, width), rng, degrees, translate, scale, shear, perspective)
    if border == (0, 0) and np.array_equal(matrix, np.eye(3)):
        moved = image
    elif perspective:
        moved = cv2.warpPerspective(image, matrix, (width, height), borderValue=(FILL, FILL, FILL))
    else:
        moved = cv2.warpAffine(image, matrix[:2], (width, height), borderValue=(FILL, FILL, FILL))
    if not len(labels):
        return moved, labels
    boxes = _move_boxes(labels[:, 1:], matrix)
    boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
    keep = worth_keeping(labels[:, 1:] * zoom, boxes)
    return moved, np.concatenate((labels[keep, :1], boxes[keep]), 1)


def worth_keeping(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(m,) bool: which boxes are large enough after a map to train on, by the criteria of YOLOv5's box_candidates.

    `before` and `after` are (m, 4) xyxy; `before` is in the scale of `after`.
    """
    old = before[:, 2:] - before[:, :2]
    new = after[:, 2:] - after[:, :2]
    aspect = new.max(1) / np.maximum(new.min(1), 1e-9)
    return (new > LEAST_BOX_SIDE).all(1) & (aspect < MOST_ASPECT) & (new.prod(1) > LEAST_AREA * old.prod(1))


def to_tensor_layout(image: np.ndarray) -> np.ndarray:
    """BGR (h, w, 3) -> contiguous RGB (3, h, w)."""
    return np.stack(cv2.split(image)[::-1])


def _draw_matrix(size: tuple[int, ...], output: tuple[int, int], rng: np.random.Generator, degrees: float,
                 translate: float, scale: float, shear: float, perspective: float) -> tuple[np.ndarray, float]:
    """(3, 3) map from pixels of an image of `size` (h, w) to pixels of the `output` (h, w), and its zoom factor.

    The order is YOLOv5's: move the centre to 0, perspective, rotation and zoom, shear, translation.
    """
    px, py = rng.uniform(-perspective, perspective, 2)
    angle = math.radians(rng.uniform(-degrees, degrees))
    zoom = float(rng.uniform(1 - scale, 1 + scale))
    shear_x, shear_y = (math.tan(math.radians(a)) for a in rng.uniform(-shear, shear, 2))
    shift_x, shift_y = rng.uniform(0.5 - translate, 0.5 + translate, 2)
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    centre = np.array([[1, 0, -size[1] / 2], [0, 1, -size[0] / 2], [0, 0, 1]])
    project = np.array([[1, 0, 0], [0, 1, 0], [px, py, 1]])
    rotate = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    skew = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    shift = np.array([[1, 0, shift_x * output[1]], [0, 1, shift_y * output[0]], [0, 0, 1]])
    return shift @ skew @ rotate @ project @ centre, zoom


def _move_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(m, 4) xyxy -> (m, 4) axis-aligned boxes around the corners after the projective map `matrix`."""
    corners = boxes[:, [0, 1, 2, 3, 0, 3, 2, 1]].reshape(-1, 4, 2)
    moved = np.concatenate((corners, np.ones_like(corners[..., :1])), 2) @ matrix.T
    points = moved[..., :2] / moved[..., 2:]
    return np.concatenate((points.min(1), points.max(1)), 1).astype(np.float32)
