"""What the examples without PyTorch share: letterbox, NMS, output. Needs numpy and OpenCV (4.7 or later)."""
from __future__ import annotations

import cv2
import numpy as np


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (h, w, 3) BGR -> float32 (1, 3, height, width) RGB in 0..1: resized, in the middle of grey."""
    ratio = min(height / image.shape[0], width / image.shape[1])
    h, w = (max(round(side * ratio), 1) for side in image.shape[:2])
    top, left = round((height - h) / 2 - 0.1), round((width - w) / 2 - 0.1)
    canvas = np.full((height, width, 3), 114, np.uint8)
    canvas[top:top + h, left:left + w] = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(canvas[:, :, ::-1].transpose(2, 0, 1)[None], np.float32) / 255


def find(decoded: np.ndarray, size: tuple[int, int], shape: tuple[int, ...], conf: float = 0.25,
         iou: float = 0.45) -> np.ndarray:
    """The model's output (1, N, nc + 5) for a letterbox of `size` (h, w) -> boxes in an image of `shape` (h, w, ...).

    (n, 6): x1, y1, x2, y2 in pixels, confidence, class; most confident first.
    """
    rows = decoded[0][decoded[0, :, 4] > conf]
    scores = rows[:, 5:] * rows[:, 4:5]  # class x objectness
    confidence, label = scores.max(1), scores.argmax(1)
    corner, extent = rows[:, :2] - rows[:, 2:4] / 2, rows[:, 2:4]
    boxes = np.hstack((corner, extent)).tolist()
    kept = np.array(cv2.dnn.NMSBoxesBatched(boxes, confidence.tolist(), label.tolist(), conf, iou), int).reshape(-1)
    ratio = min(size[0] / shape[0], size[1] / shape[1])
    border = np.array([size[1] - shape[1] * ratio, size[0] - shape[0] * ratio]) / 2
    both = np.hstack((corner - border, corner + extent - border))[kept] / ratio
    both = both.clip(0, [shape[1], shape[0], shape[1], shape[0]])
    return np.column_stack((both, confidence[kept], label[kept]))


def show(image: np.ndarray, detections: np.ndarray, names: dict[int, str], path: str) -> None:
    """Print class, confidence, x1, y1, x2, y2 of each box, and write the picture with the boxes drawn."""
    for x1, y1, x2, y2, confidence, label in detections.tolist():
        name = names[int(label)].replace(" ", "_")
        print(f"{name} {confidence:.4f} {x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f}")
        cv2.rectangle(image, (round(x1), round(y1)), (round(x2), round(y2)), (56, 56, 255), 2)
        cv2.putText(image, name, (round(x1), max(round(y1) - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (56, 56, 255), 1)
    cv2.imwrite(path, image)
