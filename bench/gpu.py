"""What half of the FLOPs, fp16 and blocks of channels are worth on a CUDA GPU, and how long an epoch takes there.

    python bench/gpu.py                                                                      # a minute
    python bench/gpu.py --data aquarium/data.yaml --weights yolov5n.pt --stock ../yolov5     # and epochs of training

Inference: models with random weights (speed does not depend on them), dense and without half of their FLOPs, at 640 px.
"eager" is PyTorch, one kernel after the other; "graph" replays the same kernels as a CUDA graph, without the time that
Python and the driver take to launch them, which is what an engine such as TensorRT saves as well. Medians, in turns.
Training: the median time between two epochs of one run, validation included. Writes bench/results/gpu.csv.
"""
from __future__ import annotations

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from columns import GPU, RESULTS, Row, formatted, gpu_rows
from common import absolute
from runtimes import models_of
from speed import commands
from torch import Tensor, nn

from models.yolo import fused, on_device
from utils.errors import UserError, run_cli
from utils.files import ROOT, scratch
from utils.options import HelpfulParser
from utils.slimming.timing import medians
from utils.tables import text_table, write_csv

IMGSZ = 640
BATCHES = (1, 32)
BEFORE = 3  # passes before a capture: cuDNN chooses its kernels in them
TRAIN = ("train.py --data {data} --weights {weights} --imgsz 416 --batch-size 16 --epochs 6 --workers 8 "
         "--project {folder} --name {name}")


def captured(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A call that replays the model's kernels on these images as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(BEFORE):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    return graph.replay


def measure(cfg: str, runs: int) -> list[Row]:
    """A row per batch, precision, way to run it and block of channels (0: dense): milliseconds an image."""
    models = {block: fused(model) for block, model in models_of(cfg, IMGSZ).items()}
    rows: list[Row] = []
    for batch in BATCHES:
        for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
            calls, made = [], []
            for block, model in models.items():
                ready = on_device(model, "cuda:0").to(dtype)
                images = torch.rand(batch, 3, IMGSZ, IMGSZ, device="cuda:0", dtype=dtype)
                images = images.contiguous(memory_format=torch.channels_last)
                for way, call in (("eager", partial(ready, images)), ("graph", captured(ready, images))):
                    calls.append(partial(finished, call))
                    made.append({"model": cfg, "batch": batch, "precision": precision, "way": way, "block": block})
            rows += [{**row, "ms": ms / batch} for row, ms in zip(made, medians(calls, runs))]
    return rows


def finished(call: Callable[[], object]) -> None:
    """The call, and the wait for the GPU."""
    call()
    torch.cuda.synchronize()


def epoch_seconds(command: list[str], results: Path) -> float:
    """Median seconds between two rows of a training's results.csv. UserError where the training fails."""
    process = subprocess.Popen(command, cwd=Path(command[1]).parent, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    ends: list[float] = []
    while process.poll() is None:
        if results.is_file() and results.read_text().count("\n") > len(ends) + 1:
            ends.append(time.perf_counter())
        time.sleep(0.01)
    if process.returncode or len(ends) < 3:
        raise UserError(f"'{' '.join(command)}' ended with exit code {process.returncode}")
    return float(np.median(np.diff(ends)))


def training(opt: Namespace) -> list[Row]:
    """A row per repository: seconds of an epoch with validation."""
    rows = []
    with scratch(ROOT / "runs" / "gpu") as folder:
        values = {"data": opt.data, "weights": opt.weights, "folder": folder}
        for name in commands(TRAIN.format(**values, name="x"), opt):
            command = commands(TRAIN.format(**values, name=name or "ours"), opt)[name]
            seconds = epoch_seconds(command, folder / (name or "ours") / "results.csv")
            rows.append({"model": "yolov5n", "batch": 16, "precision": "fp16", "way": f"training {name}".strip(),
                         "block": 0, "ms": seconds * 1000})
    return rows


def main() -> None:
    """Measure, write the csv, print the table."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=["yolov5n", "yolov5s"], help="names of yamls in models/")
    add("--runs", type=int, default=50, help="turns")
    add("--data", type=absolute, help="data yaml to train on")
    add("--weights", type=absolute, help="yolov5n.pt")
    add("--stock", type=absolute, help="folder of YOLOv5's repository, to train with it as well")
    add("--stock-python", default=sys.executable, help="the interpreter that runs it")
    opt = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("bench/gpu.py: needs a CUDA GPU, and PyTorch sees none; bench/runtimes.py measures CPUs")
    torch.backends.cudnn.benchmark = True
    with torch.inference_mode():
        rows = [row for cfg in opt.models for row in measure(cfg, opt.runs)]
    rows += training(opt) if opt.data and opt.weights else []
    rows = [{"gpu": torch.cuda.get_device_name(), **row} for row in rows]
    write_csv(RESULTS / "gpu.csv", rows)
    print(text_table(*formatted(gpu_rows(rows), GPU)))


if __name__ == "__main__":
    run_cli(main)
