"""TorchScript: a traced module with the metadata in config.txt, as YOLOv5 writes it.

Such a file is a program, and opening it runs it.
"""
from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from models.formats.format import Decoded, ExportOptions, FileDetector, Format
from models.yolo import Model, fused
from utils.errors import UserError, first_line
from utils.files import atomic

WRITER = "yolov5-slimming"  # a mark that anyone can copy: no proof of anything


def write(model: Model, path: Path, options: ExportOptions) -> None:
    """Trace the model for images of the shape of options.image. The file is there whole or not at all."""
    with torch.no_grad(), without_warnings():
        traced = torch.jit.trace(Decoded(fused(model)).eval().to(options.device), options.image.to(options.device),
                                 strict=False)  # the places of the grid are made on that device, wherever it is loaded
    with atomic(path) as temporary:
        temporary.write_bytes(packed(traced, {"config.txt": json.dumps({**options.metadata, "writer": WRITER})}))


def packed(traced: torch.jit.ScriptModule, extra: dict[str, str] | None = None) -> bytes:
    """What a file of the module holds. PyTorch's own save() ends the process where the disk is full."""
    with without_warnings():
        torch.jit.save(traced, buffer := io.BytesIO(), _extra_files=extra)
    return buffer.getvalue()


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
        try:
            config = _config(path)
            super().__init__(config, (0, *config["shape"][1:]))
            if config.get("writer") != WRITER:
                print(f"{path}: has no mark of this project's export.py; a TorchScript file, marked or not, is a "
                      "program that may do what you may do: open only those that you trust")
            with without_warnings(), open(path, "rb") as file:
                self.module = torch.jit.load(file, map_location=device)
            self.dtype = next((p.dtype for p in self.module.parameters()), torch.float32)
        except (OSError, zipfile.BadZipFile, RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:100]
            raise UserError(f"{path}: not a TorchScript detector with 'config.txt' inside ({reason})") from None

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, C, h, w) -> (decoded (B, N, nc + 5), None), on the images' device."""
        self.check_images(images)
        try:
            output = self.module(images)
            if isinstance(output, (tuple, list)):  # YOLOv5's give a tuple
                output = next(iter(output), None)
        except RuntimeError as error:
            raise UserError(f"{self.file}: can't run here ({first_line(error)}); export it again") from None
        return self.check_output(output), None


def _config(path: Path) -> dict:
    """The metadata, read without opening the program."""
    with zipfile.ZipFile(path) as file:
        name = next(name for name in [*file.namelist(), ""] if name.endswith("/extra/config.txt") or not name)
        return dict(json.loads(file.read(name)))


FORMAT = Format("torchscript", ".torchscript", write, TorchScriptDetector)
