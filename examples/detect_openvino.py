"""Detect in an image with OpenVINO, without PyTorch. Any precision: fp32, fp16, int8.

    pip install openvino opencv-python-headless numpy
    python examples/detect_openvino.py best_openvino_model/model.xml photo.jpg detected.jpg
"""
from __future__ import annotations

import ast
import sys

import cv2
import openvino
from boxes import find, letterbox, show


def main(model: str, photo: str, output: str) -> None:
    """Print the objects in `photo`, and write it to `output` with boxes drawn."""
    core = openvino.Core()
    network = core.read_model(model)
    metadata = network.get_rt_info("detector").value  # what export.py has written: texts
    names, (height, width) = (ast.literal_eval(metadata[key]) for key in ("names", "imgsz"))
    # Without the hint a CPU that has bf16 instructions rounds to 8 bits of mantissa.
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(network, "CPU", config)  # or "GPU", "NPU"
    image = cv2.imread(photo)
    if image is None:
        sys.exit(f"{photo}: no image that OpenCV can read")
    decoded = compiled([letterbox(image, height, width)])[0]
    show(image, find(decoded, (height, width), image.shape), names, output)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
