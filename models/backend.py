"""Any detector file as one callable: .pt (dense, slim, official) by PyTorch, .onnx by onnxruntime."""
from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models import checkpoint
from models.yolo import fused, on_device
from utils.errors import UserError


class Detector(Protocol):
    """What val.py and detect.py ask of a model; Model itself is one."""

    names: dict[int, str]

    @property
    def stride(self) -> Any:
        """Largest stride, or one a level, in pixels."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the images it wants, in 0..1."""

    def __call__(self, images: Tensor) -> Any:
        """(B, 3, h, w) -> (decoded (B, N, nc + 5), raw outputs or None)."""


class OnnxModel:
    """A model that export.py (or YOLOv5's) has written as ONNX. `shape` is (B, 3, h, w); 0 stands for any."""

    dtype = torch.float32

    def __init__(self, path: Path, device: torch.device):
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path}: onnxruntime is missing; pip install -r requirements-export.txt") from None
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        providers = [p for p in (*wanted, "CPUExecutionProvider") if p in onnxruntime.get_available_providers()]
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=providers)
            meta = self.session.get_modelmeta().custom_metadata_map
            self.names = {int(k): str(v) for k, v in ast.literal_eval(meta["names"]).items()}
            self.stride = int(meta["stride"])
        except Exception as error:  # onnxruntime has many kinds, none of them public
            raise UserError(f"{path}: not an ONNX detector with 'names' and 'stride' in its metadata ({str(error)[:100]})") from None
        image = self.session.get_inputs()[0]
        self.input, self.shape = image.name, tuple(n if isinstance(n, int) else 0 for n in image.shape)

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, 3, h, w) float -> (decoded (B, N, nc + 5), None)."""
        count = len(images)
        if 0 < count < self.shape[0]:  # the last batch of a data set
            images = torch.cat((images, images.new_zeros(self.shape[0] - count, *images.shape[1:])))
        if any(want and want != have for want, have in zip(self.shape, images.shape)):
            raise UserError(f"this ONNX model takes {self.shape} only, not {tuple(images.shape)}; give these sizes, or export it with --dynamic")
        found = self.session.run(None, {self.input: np.ascontiguousarray(images.cpu().numpy())})[0]
        return torch.from_numpy(found)[:count], None


def load(path: str | Path, device: torch.device, half: bool = False) -> tuple[Detector, dict[str, Any]]:
    """(detector ready to run, what its file says: imgsz, opt, data ... as far as it does)."""
    path = Path(path)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        onnx_model = OnnxModel(path, device)
        return onnx_model, {"imgsz": onnx_model.shape[2] or None}
    data = checkpoint.read(path)
    model = on_device(fused(checkpoint.build(data, path=path)), device)
    return model.half() if half else model, data
