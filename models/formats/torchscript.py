"""TorchScript: a traced module with the metadata in config.txt, as YOLOv5 writes it."""
from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from models.formats.format import Decoded, ExportOptions, Format
from models.yolo import Model, fused
from utils.errors import UserError


def write(model: Model, path: Path, options: ExportOptions) -> None:
    """Trace the model for images of the shape of options.image."""
    with torch.no_grad(), _without_warnings():
        traced = torch.jit.trace(Decoded(fused(model)).eval(), options.image, strict=False)
    traced.save(str(path), _extra_files={"config.txt": json.dumps(options.metadata)})


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without PyTorch's advice to use torch.export: other runtimes want TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class TorchScriptDetector:
    """A traced detector. Its image size is fixed."""

    dtype = torch.float32

    def __init__(self, path: Path, device: torch.device):
        extra = {"config.txt": ""}
        try:
            with _without_warnings():
                self.module = torch.jit.load(str(path), map_location=device, _extra_files=extra)
            config = json.loads(extra["config.txt"])
            self.names = {int(k): str(v) for k, v in dict(config["names"]).items()}
            self.stride, self.input_shape = int(config["stride"]), (0, *map(int, config["shape"][1:]))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1][:100]
            raise UserError(f"{path}: not a TorchScript detector with 'config.txt' inside ({reason})") from None

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, C, h, w) float -> (decoded (B, N, nc + 5), None)."""
        return self.module(images), None


FORMAT = Format("torchscript", ".torchscript", write, TorchScriptDetector)
