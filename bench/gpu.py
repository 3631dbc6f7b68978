"""What half of the FLOPs and fp16 are worth on a CUDA GPU, one image at a time and 32 at once.

    python bench/gpu.py            # yolov5n, s and m at 640 px: a minute

Weights and gammas are random: speed does not depend on them. Half of the FLOPs go, in blocks of 16 channels. "eager" is
PyTorch, one kernel after the other; "CUDA graph" replays the same kernels without the time that Python and the driver
take to launch them, which an engine such as TensorRT saves as well. Medians; dense and slim take turns.
Writes bench/results/gpu.csv.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from columns import Row, publish
from runtimes import models_of
from torch import Tensor, nn

from models.yolo import fused, on_device
from utils.errors import UserError, run_cli
from utils.parser import HelpfulParser
from utils.slimming.timing import medians

IMGSZ, BLOCK, BATCHES = 640, 16, (1, 32)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
BEFORE = 3  # passes before a capture: cuDNN chooses its kernels in them


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


def finished(call: Callable[[], object]) -> None:
    """The call, and the wait for the GPU."""
    call()
    torch.cuda.synchronize()


def measure_model(cfg: str, runs: int) -> list[Row]:
    """A row per precision, batch and way to run it: milliseconds an image of the dense and of the slim model."""
    models = [on_device(fused(model), "cuda:0") for model in models_of(cfg, IMGSZ, (BLOCK,)).values()]
    return [{"model": cfg, "precision": precision, **row} for precision, dtype in DTYPES.items()
            for batch in BATCHES for row in times([model.to(dtype) for model in models], batch, dtype, runs)]


@torch.inference_mode()
def times(models: Sequence[nn.Module], batch: int, dtype: torch.dtype, runs: int) -> list[Row]:
    """A row per way to run the dense and the slim model."""
    images = torch.rand(batch, 3, IMGSZ, IMGSZ, device="cuda:0", dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    ways: dict[str, list[Callable[[], object]]] = {"eager": [partial(model, images) for model in models],
                                                   "CUDA graph": [captured(model, images) for model in models]}
    rows = []
    for way, calls in ways.items():
        dense, slim = medians([partial(finished, call) for call in calls], runs)
        rows.append({"batch": batch, "way": way, "dense": dense / batch, "slim": slim / batch})
    return rows


def main() -> None:
    """Measure, write the csv, print the table."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--models", nargs="+", default=["yolov5n", "yolov5s", "yolov5m"], help="yamls in models/")
    parser.add_argument("--runs", type=int, default=50, help="turns")
    opt = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("bench/gpu.py: needs a CUDA GPU, and PyTorch sees none; bench/runtimes.py measures CPUs")
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name()
    for cfg in opt.models:  # written after each model: a time limit does not take what is measured
        publish("gpu", [{"gpu": name, **row} for row in measure_model(cfg, opt.runs)], "model")


if __name__ == "__main__":
    run_cli(main)
