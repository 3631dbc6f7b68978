"""Write a model, dense or slim, in the formats that other programs open.

    python export.py --weights runs/train/exp/weights/best.pt --include onnx
    python export.py --weights pruned_model.pt --include yolov5 onnx torchscript

yolov5 is a .pt that unmodified YOLOv5 validates, detects with and exports further: to every format that it knows.
onnx needs two more packages: pip install -r requirements-export.txt
"""
from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import checkpoint, stock
from models.onnx_file import Decoded, write_onnx
from models.yolo import Model, fused
from utils.errors import UserError, run_cli
from utils.options import HelpfulParser

SUFFIXES = {"onnx": ".onnx", "torchscript": ".torchscript", "yolov5": ".yolov5.pt"}


def export_onnx(model: Model, image: Tensor, path: Path, opt: Namespace, meta: dict[str, Any]) -> None:
    """ONNX with names and stride in its metadata; the largest difference to torch is printed."""
    try:
        import onnx  # noqa: F401  (the writer needs it)
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--include onnx: {error.name} is missing; pip install -r requirements-export.txt") from None
    write_onnx(model, image, path, opt.dynamic, opt.opset, meta)
    wrapped = Decoded(model).eval()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    sizes = [image.shape] if not opt.dynamic else [image.shape, (2, image.shape[1], image.shape[2] + 32, image.shape[3])]
    worst = 0.0
    for size in sizes:
        x = torch.rand(size)
        with torch.no_grad():
            expected = wrapped(x).numpy()
        found = session.run(None, {"images": x.numpy()})[0]
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    print(f"onnx: largest difference to torch {worst:.1e} (relative to the largest output)")


def export_torchscript(model: Model, image: Tensor, path: Path, opt: Namespace, meta: dict[str, Any]) -> None:
    """A traced module with the same metadata in config.txt, as YOLOv5 writes it."""
    with torch.no_grad():
        traced = torch.jit.trace(Decoded(model).eval(), image, strict=False)
    traced.save(str(path), _extra_files={"config.txt": json.dumps(meta)})


def export_yolov5(model: Model, image: Tensor, path: Path, opt: Namespace, meta: dict[str, Any]) -> None:
    """A checkpoint for unmodified YOLOv5."""
    stock.save(path, model)


EXPORTERS = {"onnx": export_onnx, "torchscript": export_torchscript, "yolov5": export_yolov5}


def parse(argv: list[str] | None = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint: dense or slim, ours or an official one")
    add("--include", nargs="+", choices=list(EXPORTERS), default=["onnx"], help="formats to write, beside the checkpoint")
    add("--imgsz", "--img", "--img-size", nargs="+", type=int, help="height and width, or one number for both (the checkpoint's, or 640)")
    add("--batch-size", type=int, default=1, help="images a batch")
    add("--dynamic", action="store_true", help="onnx: leave batch, height and width open")
    add("--opset", type=int, default=17, help="onnx: version of the operator set")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Path]:
    """Command line -> the files written."""
    opt = parse(argv)
    data = checkpoint.read(opt.weights)
    model = checkpoint.build(data, path=opt.weights)
    size = (opt.imgsz or [int(data.get("imgsz") or 640)])
    height, width = size[0], size[-1]
    stride = int(model.stride.max())
    if len(size) > 2 or height % stride or width % stride:
        raise UserError(f"--imgsz {' '.join(map(str, size))}: one or two multiples of {stride} are needed")
    meta = {"stride": stride, "names": dict(model.names), "shape": [opt.batch_size, model.yaml["ch"], height, width]}
    image = torch.rand(opt.batch_size, model.yaml["ch"], height, width)
    ready = fused(model)
    written = []
    for kind in dict.fromkeys(opt.include):
        path = Path(opt.weights).with_suffix(SUFFIXES[kind])
        # YOLOv5 folds the BatchNorms itself, and its trained files have them.
        EXPORTERS[kind](model if kind == "yolov5" else ready, image, path, opt, meta)
        print(f"{kind}: {path} ({path.stat().st_size / 1e6:.2f} MB)")
        written.append(path)
    return written


if __name__ == "__main__":
    run_cli(main)
