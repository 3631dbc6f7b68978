"""Several detectors as one, as YOLOv5's --weights a.pt b.pt."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.detector import Detector
from utils.errors import UserError


class Ensemble:
    """The boxes of all of them, among which NMS then chooses. A Detector."""

    def __init__(self, models: Sequence[Detector], titles: Sequence[str | Path]):
        """titles: the models' files, for the UserError where they do not go together."""
        first = models[0]
        self.models, self.names, self.dtype = models, first.names, first.dtype
        self.file = " ".join(map(str, titles))
        self.divisor = self.stride = math.lcm(*(model.divisor for model in models))
        # How many images at once is each model's own affair.
        self.input_shape = (0, *(max(sides) for sides in list(zip(*(model.input_shape for model in models)))[1:]))
        for model, title in zip(models, titles):
            if len(model.names) != len(first.names):
                raise UserError(f"{title}: knows {len(model.names)} classes, {titles[0]} {len(first.names)}; the models"
                                " of an ensemble have the same classes")
            if any(own not in (0, all_) for own, all_ in zip(model.input_shape[1:], self.input_shape[1:])):
                raise UserError(f"{title}: takes images of shape {model.input_shape[1:]}, another one of the ensemble "
                                f"{self.input_shape[1:]}; export them for one size")

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, C, h, w) -> (decoded (B, N of all models, nc + 5), None)."""
        return torch.cat([model(images.to(model.dtype))[0].float() for model in self.models], 1), None
