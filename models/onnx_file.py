"""Writing a model as ONNX, and how fast onnxruntime runs it."""
from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.yolo import Model
from utils.slimming.cost import medians


class Decoded(nn.Module):
    """The model as others want it: images in, (B, N, nc + 5) out, nothing beside it."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[0]


def write_onnx(model: Model, image: Tensor, path: Path, dynamic: bool = False, opset: int = 17, meta: dict[str, Any] | None = None) -> None:
    """Write a (fused) model for images of the shape of `image`, (B, C, h, w), or of any shape if `dynamic`. Needs the package onnx."""
    import onnx

    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output0": {0: "batch", 1: "boxes"}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter needs another package and fixes more shapes
        torch.onnx.export(Decoded(model).eval(), (image,), str(path), input_names=["images"], output_names=["output0"], opset_version=opset,
                          dynamic_axes=axes, dynamo=False)
    written = onnx.load(path)
    for key, value in (meta or {}).items():
        entry = written.metadata_props.add()
        entry.key, entry.value = key, str(value)
    onnx.checker.check_model(written)
    onnx.save(written, path)


def onnx_latency(models: list[Model], imgsz: int, batch: int = 1, runs: int = 20) -> list[float] | None:
    """Median milliseconds an image of fused models under onnxruntime on the CPU, measured in turn; None where it isn't installed, or fails.

    It has as many threads as PyTorch.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or the threads of one model would take time from the next
    calls = []
    with tempfile.TemporaryDirectory() as folder:
        for i, model in enumerate(models):
            image = torch.rand(batch, model.yaml["ch"], imgsz, imgsz)
            try:
                write_onnx(model, image, path := Path(folder) / f"{i}.onnx")
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # a block of the user's that ONNX has no word for fails in many ways
                print(f"note: not measured under onnxruntime ({(str(error) or type(error).__name__).splitlines()[0][:100]})")
                return None
            pixels = np.ascontiguousarray(image.numpy())
            calls.append(lambda session=session, pixels=pixels: session.run(None, {"images": pixels}))
    return [ms / batch for ms in medians(calls, runs)]
