"""What every detector offers, a Model or a file in another format."""
from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from utils.errors import NonFiniteError


class Detector(Protocol):
    """What val.py and detect.py ask of a model. Model itself is one. It may have a `file`, for messages."""

    names: dict[int, str]

    @property
    def divisor(self) -> int:
        """Sides of the images, in pixels, are multiples of it."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the images, whose values lie in 0..1."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(B, C, h, w) that the model takes; 0 stands for any number."""

    def __call__(self, images: Tensor) -> Any:
        """(B, C, h, w) -> (decoded (B, N, nc + 5), raw outputs or None)."""


def require_finite(decoded: Tensor, model: Detector) -> None:
    """NonFiniteError, which names the detector's file, where a prediction of (B, N, nc + 5) is NaN or infinite.

    NMS would find nothing there, as in an image without objects.
    """
    # A sum takes one pass and no memory; that of finite numbers may be infinite all the same.
    if not bool(decoded.sum().isfinite()) and not bool(decoded.isfinite().all()):
        raise NonFiniteError(f"{getattr(model, 'file', 'the model')}: its predictions are NaN or infinite, its numbers "
                             "are too large to compute with; give another file, or fp32 where this is fp16")
