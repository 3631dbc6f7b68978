"""Box arithmetic: formats, overlap, letterboxing and its inverse, non-maximum suppression. Pure functions.

xyxy = corners x1 y1 x2 y2; xywh = centre x, centre y, width, height. Pixels unless a docstring says otherwise.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

EPS = 1e-7
MAX_CANDIDATES = 30000  # most confident candidates of an image that NMS looks at
CLASS_OFFSET = 7680     # pixels between the classes' private planes: more than any image side
FIRST_CHUNK = 512       # candidates in NMS's first try

Boxes = TypeVar("Boxes", Tensor, np.ndarray)
RatioPad = tuple[tuple[float, float], tuple[float, float]]


# Formats --------------------------------------------------------------------------------------------------------------

def _join(parts: list[Boxes]) -> Boxes:
    """Concatenate along the last axis."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, -1)
    return np.concatenate(parts, -1)


def xywh2xyxy(b: Boxes) -> Boxes:
    """(..., 4+) xywh -> new (..., 4+) xyxy; columns after the fourth are copied. Any unit, tensor or array."""
    centre, half = b[..., :2], b[..., 2:4] / 2
    return _join([centre - half, centre + half, b[..., 4:]])


def xyxy2xywh(b: Boxes) -> Boxes:
    """(..., 4+) xyxy -> new (..., 4+) xywh; columns after the fourth are copied. Any unit, tensor or array."""
    low, high = b[..., :2], b[..., 2:4]
    return _join([(low + high) / 2, high - low, b[..., 4:]])


def label_rows(detections: Tensor, shape: Sequence[int], confidence: bool, pixels: bool = False) -> str:
    """Detections (n, 6: xyxy in pixels, confidence, class) in an image of `shape` (h, w) as a label file's text.

    A row is class, x, y, w, h as shares of the image, or, with `pixels`, class, x1, y1, x2, y2 in these; and the
    confidence where it is asked for.
    """
    height, width = shape[:2]
    boxes = detections[:, :4].double()
    if not pixels:
        boxes = xyxy2xywh(boxes) / torch.tensor([width, height, width, height], dtype=torch.float64)
    rows = []
    for box, score, cls in zip(boxes.tolist(), detections[:, 4].tolist(), detections[:, 5].tolist()):
        numbers = [*box, score] if confidence else box
        rows.append(" ".join([f"{int(cls)}", *(f"{v:.6g}" for v in numbers)]) + "\n")
    return "".join(rows)


# Overlap --------------------------------------------------------------------------------------------------------------

def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every pair: (n, 4) and (m, 4) xyxy -> (n, m). Boxes without area give 0, never NaN."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:4], b[None, :, 2:4])
    inter = (high - low).clamp_(min=0).prod(2)
    area_a, area_b = ((c[:, 2:4] - c[:, :2]).prod(1) for c in (a, b))
    return inter / (area_a[:, None] + area_b - inter + EPS)


def iou_xywh(a: Tensor, b: Tensor) -> Tensor:
    """IoU row by row: (n, 4) and (n, 4) xywh -> (n,). Differentiable."""
    half_a, half_b = a[:, 2:4] / 2, b[:, 2:4] / 2
    low = torch.maximum(a[:, :2] - half_a, b[:, :2] - half_b)
    high = torch.minimum(a[:, :2] + half_a, b[:, :2] + half_b)
    inter = (high - low).clamp(min=0).prod(1)
    return inter / (a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - inter + EPS)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU row by row: (n, 4) and (n, 4) xywh -> (n,), above -1.5 and at most the IoU.

    IoU - rho^2 / c^2 - alpha v of Zheng et al., "Distance-IoU Loss", AAAI 2020, with alpha a constant to the gradient
    as in the paper. float32: EPS is too small for half precision.
    """
    iou = iou_xywh(a, b)
    half_a, half_b = a[:, 2:4] / 2, b[:, 2:4] / 2
    high = torch.maximum(a[:, :2] + half_a, b[:, :2] + half_b)
    low = torch.minimum(a[:, :2] - half_a, b[:, :2] - half_b)
    diagonal = (high - low).square().sum(1) + EPS
    distance = (a[:, :2] - b[:, :2]).square().sum(1)
    # EPS in the height keeps the value and the gradient of a box without height finite.
    angle = torch.atan(a[:, 2] / (a[:, 3] + EPS)) - torch.atan(b[:, 2] / (b[:, 3] + EPS))
    v = (4 / math.pi ** 2) * angle.square()
    with torch.no_grad():
        alpha = v / ((1 - iou).clamp(min=0) + v + EPS)  # of equal boxes the IoU may round to above 1
    return iou - distance / diagonal - alpha * v


# Letterbox ------------------------------------------------------------------------------------------------------------

class LetterboxGeometry(NamedTuple):
    """Where an image lies in its letterbox. Pixels."""

    ratio: float                        # new size / old size, the same for both axes
    size: tuple[int, int]               # (h, w) of the resized image without its border
    pad: tuple[float, float]            # (w, h) border at each side, before rounding
    border: tuple[int, int, int, int]   # top, bottom, left, right border, whole pixels

def letterbox_geometry(shape: tuple[int, int], new_shape: int | tuple[int, int], auto: bool = False,
                       scale_up: bool = True, stride: int = 32) -> LetterboxGeometry:
    """How an image of `shape` (h, w) fits into `new_shape` (h, w; or the side of a square) with its aspect kept.

    auto: pad only to the next multiple of `stride`, so that the result may be smaller than new_shape.
    scale_up=False: never enlarge the image; pad it instead.
    """
    target_h, target_w = (new_shape, new_shape) if isinstance(new_shape, int) else new_shape
    ratio = min(target_h / shape[0], target_w / shape[1])
    if not scale_up:
        ratio = min(ratio, 1.0)
    # A very long image keeps at least one row or column.
    height, width = max(round(shape[0] * ratio), 1), max(round(shape[1] * ratio), 1)
    spare_h, spare_w = target_h - height, target_w - width
    if auto:
        spare_h, spare_w = spare_h % stride, spare_w % stride
    pad_h, pad_w = spare_h / 2, spare_w / 2
    # An odd pixel goes to the bottom or right: the .1 breaks the tie of a half.
    border = (round(pad_h - 0.1), round(pad_h + 0.1), round(pad_w - 0.1), round(pad_w + 0.1))
    return LetterboxGeometry(ratio, (height, width), (pad_w, pad_h), border)


def letterbox(image: np.ndarray, new_shape: int | tuple[int, int], auto: bool = False, scale_up: bool = True,
              stride: int = 32, colour: int = 114) -> tuple[np.ndarray, tuple[float, float], tuple[float, float]]:
    """Resize `image` (H, W, 3) with its aspect kept and pad it to `new_shape` with grey.

    Returns (image, (ratio_w, ratio_h), (pad_w, pad_h)); options as in letterbox_geometry. Where nothing is to do the
    image itself comes back.
    """
    height, width = image.shape[:2]
    geometry = letterbox_geometry((height, width), new_shape, auto, scale_up, stride)
    if geometry.size != (height, width):
        image = cv2.resize(image, geometry.size[::-1], interpolation=cv2.INTER_LINEAR)
    if any(geometry.border):
        image = cv2.copyMakeBorder(image, *geometry.border, cv2.BORDER_CONSTANT, value=(colour,) * 3)
    return image, (geometry.ratio, geometry.ratio), geometry.pad


def clip_boxes(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """(n, 4+) xyxy -> new tensor with the corners inside an image of `shape` (h, w); other columns are copied."""
    height, width = shape[:2]
    high = boxes.new_tensor([width, height, width, height])
    return torch.cat((torch.minimum(boxes[:, :4].clamp(min=0), high), boxes[:, 4:]), 1)


def cut_out(image: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """View of `image` (H, W, C) inside a box, xyxy ... in pixels; of at least a pixel, unless it lies outside."""
    x1, y1, x2, y2 = (int(v) for v in box[:4])
    return image[y1:max(y2, y1 + 1), x1:max(x2, x1 + 1)]


def scale_boxes(from_shape: Sequence[int], boxes: Tensor, to_shape: Sequence[int],
                ratio_pad: RatioPad | None = None) -> Tensor:
    """(n, 4+) xyxy in a letterbox of `from_shape` (h, w) -> new tensor, in the image of `to_shape` (h, w), clipped.

    ratio_pad: ((ratio_h, ratio_w), (pad_w, pad_h)) of the letterbox, where it is known; the first ratio serves both
    axes. Without it the letterbox is taken to be centred. Columns after the fourth are copied.
    """
    if ratio_pad is None:
        gain = min(from_shape[0] / to_shape[0], from_shape[1] / to_shape[1])
        pad_w, pad_h = (from_shape[1] - to_shape[1] * gain) / 2, (from_shape[0] - to_shape[0] * gain) / 2
    else:
        gain, (pad_w, pad_h) = ratio_pad[0][0], ratio_pad[1]
    corners = (boxes[:, :4] - boxes.new_tensor([pad_w, pad_h, pad_w, pad_h])) / gain
    return torch.cat((clip_boxes(corners, to_shape), boxes[:, 4:]), 1)


# Non-maximum suppression ----------------------------------------------------------------------------------------------

def nms(pred: Tensor, conf: float = 0.25, iou: float = 0.45, classes: Sequence[int] | None = None,
        agnostic: bool = False, multi_label: bool = False, max_det: int = 300) -> list[Tensor]:
    """Non-maximum suppression of a batch's decoded predictions.

    pred (B, N, nc + 5): xywh, objectness, class scores 0..1; left as it is. conf: objectness, and objectness x class
    score, must exceed it. iou: of two boxes that overlap by more the less confident goes. classes: keep these only.
    agnostic: boxes of different classes compete too. multi_label: a box may be of several classes, not only its best.
    Returns for each image (n <= max_det, 6): xyxy, confidence, class; most confident first, float32.
    """
    rows = [p[p[:, 4] > conf].float() for p in pred]
    one = partial(_nms_image, conf=conf, iou=iou, classes=classes, agnostic=agnostic, multi_label=multi_label,
                  max_det=max_det)
    threads = min(torch.get_num_threads(), len(rows)) if pred.device.type == "cpu" else 1
    if threads < 2:
        return list(map(one, rows))
    with ThreadPoolExecutor(threads) as pool:  # the operators run without Python's lock
        return list(pool.map(one, rows))


def _nms_image(rows: Tensor, conf: float, iou: float, classes: Sequence[int] | None, agnostic: bool, multi_label: bool,
               max_det: int) -> Tensor:
    """One image: (k, nc + 5) rows with enough objectness -> (n, 6)."""
    index, score, label = _candidates(rows, conf, multi_label)
    if classes is not None:
        in_classes = torch.isin(label, torch.as_tensor(classes, dtype=label.dtype, device=label.device))
        index, score, label = index[in_classes], score[in_classes], label[in_classes]
    if len(score) > MAX_CANDIDATES:  # far cheaper than sorting the millions that an untrained model gives
        top = score.topk(MAX_CANDIDATES, sorted=False).indices.sort().values
        index, score, label = index[top], score[top], label[top]
    score, order = score.sort(descending=True, stable=True)
    boxes, label = xywh2xyxy(rows[index[order], :4]), label[order].to(rows.dtype)
    plane = boxes if agnostic else boxes + label[:, None] * CLASS_OFFSET
    keep = _nms_first(plane, score, iou, max_det)
    return torch.cat((boxes[keep], score[keep, None], label[keep, None]), 1)


def _candidates(rows: Tensor, conf: float, multi_label: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(k, nc + 5) -> row index, confidence and class, each (c,), of what exceeds `conf`."""
    scores = rows[:, 5:] * rows[:, 4:5]
    if multi_label and scores.shape[1] > 1:
        index, label = (scores > conf).nonzero(as_tuple=True)
        return index, scores[index, label], label
    best, label = scores.max(1)
    index = (best > conf).nonzero(as_tuple=True)[0]
    return index, best[index], label[index]


def _nms_first(boxes: Tensor, score: Tensor, iou: float, max_det: int) -> Tensor:
    """Indices of the first max_det boxes that greedy NMS keeps; boxes (n, 4) xyxy, most confident first.

    A box is judged by more confident ones alone, so NMS of a prefix gives a prefix of the answer. NMS is quadratic:
    growing the prefix until it holds max_det survivors gives the same boxes and saves most of the work.
    """
    greedy_nms, chunk = _greedy_nms(), FIRST_CHUNK
    while True:
        keep = greedy_nms(boxes[:chunk], score[:chunk], iou)
        if len(keep) >= max_det or chunk >= len(boxes):
            return keep[:max_det]
        chunk *= 4


@cache
def _greedy_nms() -> Callable[[Tensor, Tensor, float], Tensor]:
    """torchvision's operator. Importing the package takes as long as importing torch; loading its library does not."""
    spec = find_spec("torchvision")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for library in Path(folder).glob("_C*.so"):
            with suppress(OSError):  # one that is built in another way is loaded by the package
                torch.ops.load_library(str(library))
    if not hasattr(torch.ops.torchvision, "nms"):
        import torchvision  # noqa: F401
    return torch.ops.torchvision.nms
