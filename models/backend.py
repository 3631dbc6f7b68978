"""Any detector file as one callable: .pt (dense, slim, official) by PyTorch, .onnx by onnxruntime."""
from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
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


class Augmented:
    """Test-time augmentation: the image, its mirror image at 0.83 and itself at 0.67, and the boxes of all three."""

    VIEWS = ((1.0, False), (0.83, True), (0.67, False))

    def __init__(self, model: Detector):
        self.model, self.names, self.stride, self.dtype = model, model.names, model.stride, model.dtype

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, 3, h, w) -> (decoded (B, N, nc + 5), None)."""
        strides = torch.as_tensor(self.stride).tolist()
        width, found = images.shape[3], []
        for scale, mirrored in self.VIEWS:
            boxes = self.model(_scaled(images.flip(3) if mirrored else images, scale, int(max(strides))))[0].clone()
            boxes[..., :4] /= scale
            if mirrored:
                boxes[..., 0] = width - boxes[..., 0]
            found.append(boxes)
        # The level that a view is too large or too small for is left out: the coarsest of the first, the finest of the last.
        shares = [1 / s ** 2 for s in strides]
        coarsest, finest = (round(share / sum(shares) * y.shape[1]) for share, y in ((shares[-1], found[0]), (shares[0], found[-1])))
        return torch.cat((found[0][:, :-coarsest], *found[1:-1], found[-1][:, finest:]), 1), None


def _scaled(images: Tensor, scale: float, stride: int) -> Tensor:
    """Images of `scale` times the size, padded at the right and below to whole strides with ImageNet's mean."""
    if scale == 1:
        return images
    sides = [int(s * scale) for s in images.shape[2:]]
    smaller = F.interpolate(images, size=sides, mode="bilinear", align_corners=False)
    height, width = (math.ceil(s * scale / stride) * stride for s in images.shape[2:])
    return F.pad(smaller, (0, width - sides[1], 0, height - sides[0]), value=0.447)


def load(path: str | Path, device: torch.device, half: bool = False, augment: bool = False) -> tuple[Detector, dict[str, Any]]:
    """(detector ready to run, what its file says: imgsz, opt, data ... as far as it does)."""
    path = Path(path)
    if augment and path.suffix == ".onnx":
        raise UserError("--augment: not with ONNX, whose size is fixed; give the .pt")
    if path.suffix == ".onnx":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        onnx_model = OnnxModel(path, device)
        return onnx_model, {"imgsz": onnx_model.shape[2] or None}
    data = checkpoint.read(path)
    model = on_device(fused(checkpoint.build(data, path=path)), device)
    model = model.half() if half else model
    return Augmented(model) if augment else model, data
