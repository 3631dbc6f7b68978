"""Models in other formats: one file per format, with its writer and the runtime that reads the file back.

A file of this folder that defines FORMAT is found by itself; register() adds a format that lives elsewhere.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models import checkpoint
from models.augmented import TestTimeAugmentation
from models.ensemble import Ensemble
from models.formats.format import (
    PRECISIONS,
    Detector,
    ExportOptions,
    FileDetector,
    Format,
    Suppression,
    export_options,
    format_of,
    formats,
    register,
    runtimes,
)
from models.yolo import fused, on_device
from utils.errors import UserError

__all__ = ["PRECISIONS", "Detector", "ExportOptions", "Format", "Suppression", "export_options", "format_of", "formats",
           "load", "register", "runtimes"]


def load(path: str | Path | Sequence[str | Path], device: torch.device, half: bool = False,
         augment: bool = False) -> tuple[Detector, dict[str, Any]]:
    """(detector ready to run, what its file says: imgsz, opt, data ... as far as it does).

    Several paths: an ensemble, and what the first one's file says. half: in fp16, unless `device` is a CPU.
    UserError where a file is missing, broken, or of a format that its name does not tell.
    """
    if not isinstance(path, (str, Path)):
        if not isinstance(path, (list, tuple)) or not path:
            raise UserError(f"weights: {path!r} is not the path of a model, nor a list of some")
        loaded = [load(one, device, half, augment) for one in path]
        return (Ensemble([model for model, _ in loaded], path) if len(loaded) > 1 else loaded[0][0]), loaded[0][1]
    path = Path(path)
    fmt = format_of(path)
    if fmt is not None and fmt.load is not None:
        if augment:
            raise UserError(f"--augment: not with {fmt.name.upper()}, whose size is fixed; give the .pt")
        if half:
            raise UserError(f"--half: not with {fmt.name.upper()}, which computes as it was exported; leave it out, "
                            "or export with --half")
        if not path.exists():
            raise UserError(f"{path}: no such file")
        detector = fmt.load(path, device)
        if isinstance(detector, FileDetector):
            detector.file = str(path)
        imgsz = max(detector.input_shape[2:]) or getattr(detector, "imgsz", 0) or None
        return detector, {"imgsz": imgsz, "opt": {"imgsz": imgsz}}
    if path.is_file() and path.suffix not in (".pt", ".pth", ""):
        suffixes = ", ".join(sorted({".pt"} | {f.suffix for f in formats().values()}))
        raise UserError(f"{path}: its name tells no format that is known here ({suffixes})")
    data = checkpoint.read(path)
    model = on_device(fused(checkpoint.build(data, path=path)), device)
    model.file = str(path)
    if half and device.type == "cpu":
        print("--half: a CPU computes in fp32; fp16 needs a GPU")
    elif half:
        model.half()
    return TestTimeAugmentation(model) if augment else model, data
