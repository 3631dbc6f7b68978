"""What every detector offers, a Model or a file in another format."""
from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Detector(Protocol):
    """What val.py and detect.py ask of a model. Model itself is one."""

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
