"""Write a model, dense or slim, in the formats that other programs open.

    python export.py --weights runs/train/exp/weights/best.pt --include onnx
    python export.py --weights pruned_model.pt --include yolov5 onnx torchscript

yolov5 is a .pt that unmodified YOLOv5 validates, detects with and exports further: to every format that it knows.
onnx needs two more packages: pip install -r requirements-export.txt
"""
from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from models import checkpoint
from models.formats import ExportOptions, formats
from utils.errors import UserError, run_cli
from utils.options import HelpfulParser, add_imgsz_flag, at_least


def parse(argv: list[str] | None = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint: dense or slim, ours or an official one")
    add("--include", nargs="+", choices=list(formats()), default=["onnx"],
        help="formats to write, beside the checkpoint")
    add_imgsz_flag(parser, "height and width, or one number for both (the checkpoint's, or 640)", nargs="+")
    add("--batch-size", type=at_least(1), default=1, help="images a batch")
    add("--dynamic", action="store_true", help="onnx: leave batch, height and width open")
    add("--opset", type=int, default=17, help="onnx: version of the operator set")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Path]:
    """Command line -> the files written."""
    opt = parse(argv)
    data = checkpoint.read(opt.weights)
    model = checkpoint.build(data, path=opt.weights)
    size = opt.imgsz or [int(data.get("imgsz") or 640)]
    stride = int(model.stride.max())
    if len(size) > 2 or any(side % stride for side in size):
        raise UserError(f"--imgsz {' '.join(map(str, size))}: one or two multiples of {stride} are needed")
    shape = [opt.batch_size, model.yaml["ch"], size[0], size[-1]]
    metadata = {"stride": stride, "names": dict(model.names), "shape": shape}
    options = ExportOptions(torch.rand(shape), metadata, opt.dynamic, opt.opset)
    written = []
    for name in dict.fromkeys(opt.include):
        path = Path(opt.weights).with_suffix(formats()[name].suffix)
        formats()[name].write(model, path, options)
        print(f"{name}: {path} ({path.stat().st_size / 1e6:.2f} MB)")
        written.append(path)
    return written


if __name__ == "__main__":
    run_cli(main)
