"""Detect in an image with ncnn, without PyTorch. fp32 or fp16.

    pip install ncnn opencv-python-headless numpy pyyaml
    python examples/detect_ncnn.py best_ncnn_model photo.jpg detected.jpg
"""
from __future__ import annotations

import sys
from pathlib import Path

import cv2
import ncnn
import numpy as np
import yaml
from boxes import find, letterbox, show


def main(model: str, photo: str, output: str) -> None:
    """Print the objects in `photo`, and write it to `output` with boxes drawn."""
    metadata = yaml.safe_load((Path(model) / "metadata.yaml").read_text(encoding="utf-8"))
    height, width = metadata["imgsz"]
    net = ncnn.Net()
    if metadata["precision"] == "fp32":  # ncnn's default is fp16 wherever the processor has it
        net.opt.use_fp16_storage = net.opt.use_fp16_packed = net.opt.use_fp16_arithmetic = False
    net.load_param(f"{model}/model.ncnn.param")
    net.load_model(f"{model}/model.ncnn.bin")
    image = cv2.imread(photo)
    if image is None:
        sys.exit(f"{photo}: no image that OpenCV can read")
    pixels = np.ascontiguousarray(letterbox(image, height, width)[0])  # ncnn reads it where it lies: keep it
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(pixels))
    decoded = np.array(extractor.extract("out0")[1]).reshape(1, -1, len(metadata["names"]) + 5)
    show(image, find(decoded, (height, width), image.shape), metadata["names"], output)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
