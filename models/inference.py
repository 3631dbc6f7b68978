"""From images to boxes with any Detector: letterbox, model, NMS, and back into the images' own pixels."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.detector import Detector, require_finite
from models.yolo import whole_strides
from utils.boxes import letterbox, scale_boxes
from utils.data.augmentations import to_tensor_layout
from utils.device import require_memory
from utils.errors import UserError
from utils.slimming.timing import synchronize


@dataclass
class BatchDetections:
    """What detect() finds in a batch."""

    boxes: list[Tensor]                    # per image (n, 6), float32 on the CPU: xyxy in its pixels, confidence, class
    shape: torch.Size                      # (B, 3, H, W) that the model saw
    seconds: tuple[float, float, float]    # letterbox, model, NMS


def image_size(model: Detector, size: int | Sequence[int] | None, usual: int | None,
               flag: str = "--imgsz") -> int | tuple[int, int]:
    """Pixels to detect at, in whole strides: the longest side, or (height, width) where two numbers were asked for.

    Where none was asked for it is the `usual` one. A file of a fixed size has its own: UserError, which names `flag`,
    where another one was asked for.
    """
    sides = (size,) if isinstance(size, int) else tuple(size or ())
    text, fixed = " ".join(map(str, sides)), tuple(model.input_shape[2:])
    if len(sides) > 2:
        raise UserError(f"{flag} {text}: give the longest side, or height and width")
    rounded = tuple(whole_strides(side, model.divisor) for side in sides or [usual or 640])
    if not any(fixed):
        return rounded[0] if len(rounded) == 1 else (rounded[0], rounded[1])
    own = fixed if len(sides) == 2 else (max(fixed),)
    if sides and own not in (sides, rounded):
        raise UserError(f"{flag} {text}: this file takes images of {fixed[0]} x {fixed[1]} (height x width) only; "
                        "leave it out, or export with --dynamic")
    return max(fixed)


def require_rgb(model: Detector, name: str, mend: str = "give one whose yaml says ch: 3") -> None:
    """UserError where a model does not take RGB images. name: of the model, for the message."""
    channels = model.input_shape[1]
    if channels not in (0, 3):
        raise UserError(f"{name}: takes images of {channels} channels, not RGB; {mend}")


def to_batch(images: Sequence[np.ndarray], imgsz: int | tuple[int, int], stride: int, square: bool,
             device: torch.device, dtype: torch.dtype) -> Tensor:
    """uint8 (h, w, 3) BGR each -> (B, 3, H, W) in 0..1: letterboxed to `imgsz`, or to (H, W).

    The shorter side is only as long as the images need it, unless they are to be `square`. Images of several shapes
    get more grey around them, up to the longest sides of the batch, as in YOLOv5's AutoShape. UserError where they are
    larger than the memory.
    """
    height, width = np.broadcast_to(imgsz, 2).tolist()
    shares = [min(height / image.shape[0], width / image.shape[1]) for image in images]
    require_memory(sum(image.shape[0] * image.shape[1] * share ** 2 for image, share in zip(images, shares)),
                   device.type, "--imgsz")
    boxed = [letterbox(image, imgsz, auto=not square, stride=stride)[0] for image in images]
    shape = max(b.shape[0] for b in boxed), max(b.shape[1] for b in boxed)
    boxed = [letterbox(b, shape, scale_up=False)[0] for b in boxed]
    x = np.stack([to_tensor_layout(b) for b in boxed])
    return torch.from_numpy(x).to(device, dtype) / 255


def detect(model: Detector, images: Sequence[np.ndarray], imgsz: int | tuple[int, int], device: torch.device,
           suppress: Callable[[Tensor], list[Tensor]]) -> BatchDetections:
    """Detect in uint8 (h, w, 3) BGR images, all in one batch, at what image_size() gives.

    suppress: utils.boxes.nms with its options. Call it without gradients. NonFiniteError for predictions that are none.
    """
    start = time.perf_counter()
    height, width = model.input_shape[2:]
    x = to_batch(images, (height, width) if height else imgsz,  # a file of a fixed size has its own
                 model.divisor, bool(height), device, model.dtype)
    synchronize(device)
    prepared = time.perf_counter()
    decoded = model(x)[0].float()
    synchronize(device)
    decided = time.perf_counter()
    require_finite(decoded, model)
    boxes = [scale_boxes(x.shape[2:], rows, image.shape[:2]).cpu() for rows, image in zip(suppress(decoded), images)]
    seconds = prepared - start, decided - prepared, time.perf_counter() - decided
    return BatchDetections(boxes, x.shape, seconds)
