"""What a format is, and what a detector in any format offers."""
from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.yolo import Model


class Detector(Protocol):
    """What val.py and detect.py ask of a model. Model itself is one."""

    names: dict[int, str]

    @property
    def stride(self) -> Any:
        """Largest stride, or one per level, in pixels."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the images, whose values lie in 0..1."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(B, C, h, w) that the model takes; 0 stands for any number."""

    def __call__(self, images: Tensor) -> Any:
        """(B, C, h, w) -> (decoded (B, N, nc + 5), raw outputs or None)."""


@dataclass(frozen=True)
class ExportOptions:
    """What a writer is told beside the model and the path."""

    image: Tensor              # (B, C, h, w): an image of the size to export for
    metadata: dict[str, Any]   # stride, names, shape: travels in the file
    dynamic: bool = False      # leave batch, height and width open
    opset: int = 17            # version of ONNX's operator set


@dataclass(frozen=True)
class Format:
    """A file format: its writer and the runtime that reads the file back."""

    name: str                                                         # as export.py --include takes it
    suffix: str                                                       # of its files, with the dot
    write: Callable[[Model, Path, ExportOptions], None]               # gets the model with its BatchNorms, in fp32
    load: Callable[[Path, torch.device], Detector] | None = None      # None: the file is a checkpoint


class Decoded(nn.Module):
    """The model as runtimes want it: images in, (B, N, nc + 5) out."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[0]


@cache
def formats() -> dict[str, Format]:
    """Name -> format: the FORMAT of every file in this folder, and what register() has added."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    modules = [importlib.import_module(f"{__package__}.{info.name}") for info in found]
    return {module.FORMAT.name: module.FORMAT for module in modules if hasattr(module, "FORMAT")}


def register(new: Format) -> Format:
    """Make a format known that is defined outside of this folder."""
    formats()[new.name] = new
    return new


def format_of(path: Path) -> Format | None:
    """The format that a file's name tells, by the longest suffix that fits; None for a checkpoint."""
    fitting = [f for f in formats().values() if path.name.endswith(f.suffix)]
    return max(fitting, key=lambda f: len(f.suffix), default=None)
