"""TorchScript: a traced module with the metadata in config.txt, as YOLOv5 writes it."""
from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from models.formats.format import Decoded, ExportOptions, FileDetector, Format
from models.yolo import Model, fused
from utils.errors import UserError
from utils.files import atomic


def write(model: Model, path: Path, options: ExportOptions) -> None:
    """Trace the model for images of the shape of options.image. The file is there whole or not at all."""
    with torch.no_grad(), without_warnings():
        traced = torch.jit.trace(Decoded(fused(model)).eval(), options.image, strict=False)
    with atomic(path) as temporary:
        traced.save(str(temporary), _extra_files={"config.txt": json.dumps(options.metadata)})


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without PyTorch's advice to use torch.export, as other runtimes want TorchScript, and on sizes that are fixed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


class TorchScriptDetector(FileDetector):
    """A traced detector. Its image size is fixed, the number of images is not."""

    def __init__(self, path: Path, device: torch.device):
        extra = {"config.txt": ""}
        try:
            with without_warnings():
                self.module = torch.jit.load(str(path), map_location=device, _extra_files=extra)
            config = json.loads(extra["config.txt"])
            super().__init__(config, (0, *config["shape"][1:]))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:100]
            raise UserError(f"{path}: not a TorchScript detector with 'config.txt' inside ({reason})") from None

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, C, h, w) -> (decoded (B, N, nc + 5), None), on the images' device."""
        self.check(images)
        return self.module(images), None


FORMAT = Format("torchscript", ".torchscript", write, TorchScriptDetector)
