"""Detect in an image with onnxruntime, without PyTorch. Any precision: fp32, fp16, int8.

    pip install onnxruntime opencv-python-headless numpy
    python examples/detect_onnxruntime.py best.onnx photo.jpg detected.jpg
"""
from __future__ import annotations

import ast
import sys

import cv2
import onnxruntime
from boxes import find, letterbox, show


def main(model: str, photo: str, output: str) -> None:
    """Print the objects in `photo`, and write it to `output` with boxes drawn."""
    session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
    metadata = session.get_modelmeta().custom_metadata_map  # what export.py has written: texts
    names, (height, width) = ast.literal_eval(metadata["names"]), ast.literal_eval(metadata["imgsz"])
    image = cv2.imread(photo)
    if image is None:
        sys.exit(f"{photo}: no image that OpenCV can read")
    decoded = session.run(None, {session.get_inputs()[0].name: letterbox(image, height, width)})[0]
    show(image, find(decoded, (height, width), image.shape), names, output)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
