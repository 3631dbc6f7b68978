"""What a format is, and what a detector in any format offers."""
from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.detector import Detector, require_finite
from models.yolo import Model
from utils.boxes import xyxy2xywh
from utils.device import require_memory
from utils.errors import UserError, first_line

LARGEST_SIDE = 65_536  # pixels
PRECISIONS = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}  # precision -> what a file's name says of it


@dataclass(frozen=True)
class Suppression:
    """Non-maximum suppression inside of a file; the arguments are those of utils.boxes.nms."""

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    agnostic: bool = False


@dataclass(frozen=True)
class ExportOptions:
    """What a writer is told beside the model and the path."""

    image: Tensor                            # (B, C, h, w): an image of the size to export for
    metadata: dict[str, Any]                 # stride, names, shape, ...: travels in the file
    dynamic: bool = False                    # leave batch, height and width open
    opset: int = 17                          # version of ONNX's operator set
    precision: str = "fp32"                  # one of PRECISIONS
    calibration: Sequence[np.ndarray] = ()   # int8: images (1, C, h, w) float32 in 0..1, to measure activations on
    keep: tuple[str, ...] = ()               # int8: patterns of modules that stay in float, such as model.0
    suppression: Suppression | None = None   # onnx: boxes instead of all predictions
    simplify: bool = False                   # onnx: by onnxslim, where that is installed
    device: torch.device = torch.device("cpu")  # torchscript: the kind of device that the file will run on


def export_options(model: Model, shape: Sequence[int], precision: str = "fp32", **rest: Any) -> ExportOptions:
    """Options to export a model for images of `shape` (B, C, h, w), with the metadata that every file carries.

    UserError where they are larger than the memory.
    """
    require_memory(shape[0] * shape[2] * shape[3], "cpu")
    metadata = {"stride": model.divisor, "names": dict(model.names), "shape": list(shape),
                "imgsz": list(shape[2:]), "letterbox": {"colour": 114, "centred": True, "scale_up": True},
                "precision": precision}
    return ExportOptions(torch.rand(*shape), metadata, precision=precision, **rest)


@dataclass(frozen=True)
class Format:
    """A file format: its writer and the runtime that reads the file back."""

    name: str                                                         # as export.py --include takes it
    suffix: str                                                       # of its files or folders
    write: Callable[[Model, Path, ExportOptions], None]               # gets the model with its BatchNorms, in fp32
    load: Callable[[Path, torch.device], Detector] | None = None      # None: the file is a checkpoint
    precisions: tuple[str, ...] = ("fp32",)                           # those that it can be written in
    dynamic: bool = False                                             # its size may be left open
    packages: tuple[str, ...] = ()                                    # to install for it
    int8_packages: tuple[str, ...] = ()                               # ... and for writing int8
    content: str = ""                                                 # a folder: pattern of the file that tells it
    runtime: str = ""                                                 # its runtime, where that has another name

    def missing(self, precision: str = "fp32") -> list[str]:
        """The packages that are not installed."""
        packages = self.packages + (self.int8_packages if precision == "int8" else ())
        return [package for package in packages if importlib.util.find_spec(package) is None]

    def need(self, what: str, precision: str = "fp32") -> None:
        """UserError, in a line that begins with `what`, where a package is missing."""
        if missing := self.missing(precision):
            names, verb = " and ".join(missing), "are" if len(missing) > 1 else "is"
            raise UserError(f"{what}: {names} {verb} missing; pip install -r requirements-export.txt "
                            f"(or pip install {' '.join(missing)})")

    def there_and_back(self, model: Model, weights: Path, options: ExportOptions,
                       device: torch.device) -> tuple[Path, Detector]:
        """Write a model beside `weights`, and load what was written: (its path, the detector)."""
        assert self.load is not None, f"{self.name} has no runtime"
        self.write(model, path := self.path(weights, options.precision), options)
        return path, self.load(path, device)

    def path(self, weights: Path, precision: str = "fp32") -> Path:
        """Where the export of a checkpoint lies: beside it."""
        return weights.with_name(weights.with_suffix("").name + PRECISIONS[precision] + self.suffix)

    def fits(self, path: Path) -> bool:
        """Is this a file or folder of the format: by its name or, for a folder, by what is in it?"""
        inside = bool(self.content) and (fnmatch(path.name, self.content) or any(path.glob(self.content)))
        return path.name.endswith(self.suffix) or inside


class Decoded(nn.Module):
    """The model as runtimes want it: images in, (B, N, nc + 5) out."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[0]


class FileDetector:
    """A detector that was read from a file: the metadata, and what to do with a batch that the file does not take.

    metadata: at least names and stride. Values may be texts. shape: (B, C, h, w) of its input, 0 for any number.
    A subclass gives run(). Raises ValueError, KeyError or TypeError where the metadata is not that of a detector.
    """

    dtype = torch.float32
    file = "this file"  # for messages; load() puts its name there

    def __init__(self, metadata: Mapping[str, Any], shape: Sequence[int]):
        names = plain(metadata["names"])
        if isinstance(names, (list, tuple)):  # as files of older YOLOv5 have them
            names = dict(enumerate(names))
        try:
            self.names = {int(k): str(v) for k, v in dict(names).items()}
            self.divisor = self.stride = int(plain(metadata["stride"]))
            self.precision = str(metadata.get("precision", "fp32"))
            self.imgsz = int(np.max(plain(metadata.get("imgsz")) or 0))  # of the export; 0 where the file does not say
            self.has_nms = plain(metadata.get("nms")) is True
            self.input_shape = tuple(int(n) for n in shape)
        except OverflowError:  # infinity is no whole number
            raise ValueError("a number in its metadata is too large") from None
        if sorted(self.names) != list(range(len(self.names))):
            raise ValueError("its names are not numbered from 0")
        if max(self.input_shape, default=0) > LARGEST_SIDE:
            raise ValueError(f"its images would have more than {LARGEST_SIDE} pixels a side")
        if not self.names or self.stride < 1 or self.imgsz < 0 or len(shape) != 4 or min(self.input_shape) < 0:
            raise ValueError("its names, stride, imgsz or shape can't be a detector's")

    def run(self, images: np.ndarray) -> np.ndarray:
        """(B, C, h, w) of the input's shape and type -> decoded (B, N, nc + 5)."""
        raise NotImplementedError

    def check_images(self, images: Tensor) -> None:
        """UserError for images (B, C, h, w) of a size that the file does not take."""
        if any(want and want != have for want, have in zip(self.input_shape[1:], images.shape[1:])):
            raise UserError(f"{self.file}: takes images of shape {self.input_shape[1:]} only, not "
                            f"{tuple(images.shape[1:])}; give this --imgsz, or export it with --dynamic")

    def check_output(self, decoded: Any) -> Tensor:
        """What the file computed, as (B, N, nc + 5). UserError for what other kinds of models give.

        The boxes of a file with NMS inside, (B, N, 6), become predictions again: NMS leaves them as they are.
        NonFiniteError where they are not finite: no number of a class could be made of NaN.
        """
        shape, columns = tuple(getattr(decoded, "shape", ())), 6 if self.has_nms else len(self.names) + 5
        if not isinstance(decoded, Tensor) or len(shape) != 3 or shape[2] != columns:
            raise UserError(f"{self.file}: is no YOLOv5 detector of {len(self.names)} classes: it gives {shape}, not "
                            f"(images, boxes, {columns}); export a detection model again")
        if not self.has_nms:
            return decoded
        require_finite(decoded, self)
        if decoded.numel() and not 0 <= decoded[..., 5].min() <= decoded[..., 5].max() < len(self.names):
            raise UserError(f"{self.file}: gives classes that are not 0 to {len(self.names) - 1}; export it again")
        label = nn.functional.one_hot(decoded[..., 5].long(), len(self.names))
        return torch.cat((xyxy2xywh(decoded[..., :4]), decoded[..., 4:5], label), 2)

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, C, h, w) -> (decoded (B, N, nc + 5), None). A fixed batch is filled up, and a larger one cut."""
        self.check_images(images)
        batch, parts = self.input_shape[0] or len(images), []
        for part in images.split(batch):
            full = torch.cat((part, part.new_zeros(batch - len(part), *part.shape[1:]))) if len(part) < batch else part
            try:
                decoded = torch.from_numpy(self.run(np.ascontiguousarray(full.cpu().numpy())))
            except (UserError, MemoryError):
                raise
            except Exception as error:  # of the runtime's own kinds
                raise UserError(f"{self.file}: can't be run on images alone, as a detector is ({first_line(error)}); "
                                "export it again") from None
            parts.append(self.check_output(decoded)[:len(part)])
        return torch.cat(parts), None


def plain(value: Any) -> Any:
    """A value of a file's metadata, which may be a text: '{0: "cat"}' -> {0: "cat"}."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, RecursionError, MemoryError) as error:  # the last two: nested too deep
        raise ValueError(first_line(error)) from None


@cache
def formats() -> dict[str, Format]:
    """Name -> format: the FORMAT of every file in this folder, and what register() has added."""
    infos = pkgutil.iter_modules([str(Path(__file__).parent)])
    modules = [importlib.import_module(f"{__package__}.{info.name}") for info in infos]
    return {module.FORMAT.name: module.FORMAT for module in modules if hasattr(module, "FORMAT")}


def runtimes() -> dict[str, Format]:
    """Name of a runtime, such as onnxruntime -> the format that it reads."""
    return {f.runtime or f.name: f for f in formats().values() if f.load is not None}


def register(new: Format) -> Format:
    """Make a format known that is defined outside of this folder."""
    formats()[new.name] = new
    return new


def format_of(path: Path) -> Format | None:
    """The format of a file or folder, by the longest suffix that fits, or by what is in the folder.

    None for a checkpoint. UserError for a folder that is none of them.
    """
    named = [f for f in formats().values() if path.name.endswith(f.suffix)]
    fitting = named or [f for f in formats().values() if f.fits(path)]
    if not fitting and path.is_dir():
        raise UserError(f"{path}: is a folder, and no file in it tells its format; known are "
                        + ", ".join(f"{f.name} ({f.content})" for f in formats().values() if f.content))
    return max(fitting, key=lambda f: len(f.suffix), default=None)
