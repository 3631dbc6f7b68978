"""How fast half of the FLOPs are in each runtime, and which blocks of channels suit it.

    python bench/runtimes.py            # yolov5s at 640 px and yolov5n at 320, one image, two threads: half an hour

Weights and gammas are random: speed does not depend on them. Half of the FLOPs go, channels ranked by gamma per FLOP as
--target-sparsity ranks them, one by one and in blocks of 8, 16 and 32. All models of a size are timed in turns, in
every runtime and precision that is installed. Writes bench/results/runtimes.csv; the times are relative to the dense
model in onnxruntime in fp32.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from columns import Row, publish
from torch import nn

from models.formats import export_options, runtimes
from models.pruning import model_pruner
from models.yolo import Model
from utils.errors import run_cli
from utils.parser import HelpfulParser
from utils.slimming import Rules
from utils.slimming.timing import medians

CPU = torch.device("cpu")
SIZES = {"yolov5s": 640, "yolov5n": 320}
BLOCKS = (1, 8, 16, 32)


def random_model(cfg: str) -> Model:
    """A model that looks trained to a ranking: no two gammas alike."""
    torch.manual_seed(0)
    model = Model(f"{cfg}.yaml", nc=80)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 1.5)
    return model.eval()


def models_of(cfg: str, imgsz: int, blocks: Sequence[int] = BLOCKS) -> dict[int, Model]:
    """Block size -> the model without half of its FLOPs; 0 is the dense one."""
    dense = random_model(cfg)
    models = {0: dense}
    for block in blocks:
        pruner = model_pruner(dense, imgsz).rank("gamma", Rules(min_share=0.1, round_to=block), per_flop=True)
        models[block] = pruner.cut(target=("flops", 0.5)).slim
    return models


def measure_model(cfg: str, imgsz: int, runs: int) -> list[Row]:
    """A row per model, runtime and precision."""
    rows: list[Row] = []
    calls = []
    image = torch.rand(1, 3, imgsz, imgsz)
    with TemporaryDirectory() as folder:
        for block, model in models_of(cfg, imgsz).items():
            for name, fmt in runtimes().items():
                for precision in fmt.precisions:
                    if fmt.missing(precision):
                        continue
                    options = export_options(model, image.shape, precision, calibration=[image.numpy()] * 2)
                    detector = fmt.there_and_back(model, Path(folder) / f"{block}.pt", options, CPU)[1]
                    calls.append(partial(detector, image.to(detector.dtype)))
                    rows.append({"model": cfg, "imgsz": imgsz, "runtime": name, "precision": precision, "block": block})
        with torch.inference_mode():
            return [{**row, "ms": ms} for row, ms in zip(rows, medians(calls, runs, seconds=600.0))]


def main() -> None:
    """Measure, write the csv, print the table."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES), help="models to measure")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    parser.add_argument("--runs", type=int, default=30, help="turns")
    opt = parser.parse_args()
    torch.set_num_threads(opt.threads)
    publish("runtimes", [row for cfg in opt.models for row in measure_model(cfg, SIZES[cfg], opt.runs)])


if __name__ == "__main__":
    run_cli(main)
