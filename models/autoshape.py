"""Detection from Python as YOLOv5's users know it: AutoShape takes images of many kinds and gives Detections."""
from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, ImageShow
from torch import Tensor, nn

from models.augmented import TestTimeAugmentation
from models.detector import Detector
from models.inference import detect, image_size, require_rgb
from models.schema import number, whole
from models.yolo import Model
from utils.boxes import cut_out, nms, xyxy2xywh
from utils.data.image_files import UNREADABLE, decode, read_header, reason_of
from utils.data.sources import fetched
from utils.errors import UserError
from utils.files import UniqueNames, atomic, new_run_folder, safe_name
from utils.plots.detections import draw_boxes

CORNERS = ("xmin", "ymin", "xmax", "ymax")
CENTRES = ("xcenter", "ycenter", "width", "height")


class AutoShape(nn.Module):
    """A detector with letterbox and NMS inside, for one image or a list of them.

    The attributes of NMS may be set at any time: model.conf = 0.4; model.classes = [0, 2].
    """

    conf = 0.25                            # least confidence
    iou = 0.45                             # of two boxes that overlap by more the less confident goes
    agnostic = False                       # boxes of different classes compete, too
    multi_label = False                    # a box may be of several classes
    classes: Sequence[int] | None = None   # class numbers to keep; None: all
    max_det = 1000                         # boxes an image
    amp = False                            # mixed precision, of a .pt on a GPU

    def __init__(self, model: Detector, device: torch.device, imgsz: int | None = None):
        """model: in any format, ready to run on `device`. imgsz: longest side in pixels where a call names none."""
        super().__init__()
        require_rgb(model, "the model", "ask for autoshape=False")
        self.model: Any = model
        self.imgsz = imgsz or 640
        self._device = device

    @property
    def names(self) -> dict[int, str]:
        """Class number -> name."""
        return self.model.names

    @property
    def stride(self) -> Any:
        """Strides in pixels."""
        return self.model.stride

    @property
    def device(self) -> torch.device:
        """Where it computes; .to(), .cuda() and .cpu() move a .pt model."""
        return next((p.device for p in self.parameters()), self._device)

    def forward(self, images: Any, size: int | Sequence[int] | None = None, augment: bool = False,
                profile: bool = False) -> Any:
        """Detect in one image or a list of them -> Detections.

        An image is a path, an http(s) URL, an open file or its bytes, a PIL image, or an array of values 0..255:
        (h, w, 3) RGB (an OpenCV image is BGR: give image[..., ::-1]), (h, w) grey, or with the channels in front.
        size: longest side in pixels, or (h, w), whose larger one counts, as in YOLOv5; not given: the one that the
        checkpoint was trained at, else 640. profile: changes nothing, the times are always taken.
        augment: test-time augmentation, .pt only. All images go through the model in one batch, or as many at a time
        as its file was exported for. A tensor (B, 3, H, W) in 0..1 goes through the model as it is; the answer is
        then its decoded (B, N, nc + 5).
        """
        self._require_settings(size)
        model = self.model
        if isinstance(model, nn.Module):
            model.eval()  # whatever .train() was called: its BatchNorms are part of its convolutions
        if augment:
            if not isinstance(model, Model):
                raise UserError("augment=True: not with an exported model, whose size may be fixed; load the .pt")
            model = TestTimeAugmentation(model)
        if isinstance(images, Tensor):
            if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
                raise UserError(f"a tensor of shape {tuple(images.shape)} is no batch of images; give (B, 3, H, W) in "
                                "0..1")
            with torch.inference_mode(), self._precision():
                return model(images.to(self.device, model.dtype))[0].clone()
        several = images if isinstance(images, (list, tuple)) else [images]
        loaded = [read_image(image, i) for i, image in enumerate(several)]
        size = max(size) if isinstance(size, (list, tuple)) else size
        return self._detect(model, loaded, image_size(model, size, self.imgsz, "size"))

    def _require_settings(self, size: Any) -> None:
        """UserError for a size, or an attribute of NMS, that can't be: most would find nothing, without a word."""
        for name, kind in (("conf", number(0, 1)), ("iou", number(0, 1)), ("max_det", whole(1))):
            if not kind.fits(value := getattr(self, name)):
                raise UserError(f"model.{name}: must be {kind.what}, not {value!r}")
        classes = [] if self.classes is None else self.classes
        ids = classes if isinstance(classes, (list, tuple)) else [classes]
        if unknown := [c for c in ids if not isinstance(c, int) or c not in self.names]:
            raise UserError(f"model.classes: {unknown[0]!r} is no class of the model; it has 0 to {max(self.names)}")
        sides = size if isinstance(size, (list, tuple)) else [self.imgsz if size is None else size]
        if not 1 <= len(sides) <= 2 or not all(whole(1, 65_536).fits(side) for side in sides):
            raise UserError(f"size: must be the longest side in pixels, or (h, w), not {size!r}")

    def _precision(self) -> torch.autocast:
        """Mixed precision where .amp asks for it and a GPU computes."""
        kind = self.device.type
        return torch.autocast(kind, enabled=self.amp and kind != "cpu" and isinstance(self.model, Model))

    def _detect(self, model: Detector, loaded: list[tuple[np.ndarray, str]],
                size: int | tuple[int, int]) -> Detections:
        suppress = partial(nms, conf=self.conf, iou=self.iou, classes=self.classes, agnostic=self.agnostic,
                           multi_label=self.multi_label, max_det=self.max_det)
        at_once = model.input_shape[0] or max(len(loaded), 1)
        boxes: list[Tensor] = []
        seconds, shape = np.zeros(3), torch.Size((0, 3, *np.broadcast_to(size, 2).tolist()))
        for start in range(0, len(loaded), at_once):
            batch = [cv2.cvtColor(image, cv2.COLOR_RGB2BGR) for image, _ in loaded[start:start + at_once]]
            with torch.inference_mode(), self._precision():
                result = detect(model, batch, size, self.device, suppress)
            boxes += [b.clone() for b in result.boxes]  # tensors of inference_mode can't be changed in place
            seconds, shape = seconds + result.seconds, result.shape
        unique = UniqueNames()
        files = [f"{unique(i, safe_name(Path(name).stem), i)}.jpg" for i, (_, name) in enumerate(loaded)]
        return Detections([image for image, _ in loaded], boxes, files, self.names, (len(loaded), *shape[1:]),
                          tuple(Seconds(s) for s in seconds.tolist()))


def read_image(source: Any, number: int = 0) -> tuple[np.ndarray, str]:
    """An image as AutoShape takes it -> (uint8 (h, w, 3) RGB, its name); without a name it is image<number>.

    EXIF rotations are applied. UserError in one line for what is no image.
    """
    name = f"image{number}"
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return cv2.cvtColor(fetched(source), cv2.COLOR_BGR2RGB), Path(unquote(urlparse(source).path)).name or name
    if isinstance(source, (str, Path)):
        path = Path(source)
        return _decoded(path), path.name
    if isinstance(source, bytes) or hasattr(source, "read"):
        name = Path(str(getattr(source, "name", name))).name
        try:
            source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        except UNREADABLE as error:
            raise UserError(f"{name}: these bytes are not an image ({reason_of(error, Path(name))})") from None
        return read_image(source, number)[0], name
    if isinstance(source, Image.Image):
        name = Path(getattr(source, "filename", "") or name).name
        if not all(source.size):
            raise UserError(f"{name}: an image of {source.width} x {source.height} pixels is empty")
        try:
            return np.array(ImageOps.exif_transpose(source).convert("RGB")), name
        except UNREADABLE as error:
            raise UserError(f"{name}: can't be read as an image ({reason_of(error, Path(name))})") from None
    if isinstance(source, np.ndarray):
        return _rgb(source, name), name
    raise UserError(f"{name}: an image is a path, a URL, bytes, a PIL image or an array, not {type(source).__name__}")


def _decoded(path: Path) -> np.ndarray:
    """The image of a file, decoded as detect.py does it."""
    try:
        return cv2.cvtColor(decode(path, read_header(path).orientation), cv2.COLOR_BGR2RGB)
    except UNREADABLE as error:
        raise UserError(f"{path}: can't be read as an image ({reason_of(error, path)})") from None


def _rgb(array: np.ndarray, name: str) -> np.ndarray:
    """Grey, channels in front, a fourth channel, other number types -> contiguous uint8 (h, w, 3)."""
    image = array[..., None] if array.ndim == 2 else array
    if image.ndim == 3 and image.shape[0] < 5:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or not image.size:
        raise UserError(f"{name}: an array of shape {array.shape} is no image; give (h, w, 3) RGB or (h, w) grey")
    image = image.repeat(3, 2) if image.shape[2] == 1 else image[..., :3]
    if image.dtype != np.uint8:
        image = image.clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(image)


class Seconds(NamedTuple):
    """A time, as results.times holds it."""

    t: float


class Detections:
    """What AutoShape found in n images.

    .xyxy .xywh       per image (n, 6): box in pixels, confidence, class; most confident first, on the CPU
    .xyxyn .xywhn     the same with the boxes as shares of the image's sides
    .pred             .xyxy
    .ims .files       the images, uint8 (h, w, 3) RGB, and names for their pictures
    .names            class number -> name
    .n .s .t          number of images; (B, 3, H, W) that the model saw; ms an image: letterbox, model, NMS
    .times .imgs      for scripts of older YOLOv5: the seconds of the three, each as .t; and .ims
    """

    def __init__(self, ims: list[np.ndarray], pred: list[Tensor], files: list[str], names: dict[int, str],
                 s: tuple[int, ...], times: tuple[Seconds, ...]):
        sides = [torch.tensor([*image.shape[1::-1], *image.shape[1::-1], 1, 1]) for image in ims]
        self.ims, self.pred, self.files, self.names, self.s, self.times = ims, pred, files, names, s, times
        self.n = len(pred)
        self.t = tuple(time.t * 1000 / max(self.n, 1) for time in times)
        # After pandas() these are DataFrames.
        self.xyxy: list[Any] = pred
        self.xywh: list[Any] = [xyxy2xywh(p) for p in pred]
        self.xyxyn: list[Any] = [b / by for b, by in zip(self.xyxy, sides)]
        self.xywhn: list[Any] = [b / by for b, by in zip(self.xywh, sides)]

    @property
    def imgs(self) -> list[np.ndarray]:
        """.ims"""
        return self.ims

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Detections]:
        return iter(self.tolist())

    def tolist(self) -> list[Detections]:
        """A Detections for each image."""
        times = tuple(Seconds(time.t / max(self.n, 1)) for time in self.times)
        return [Detections([image], [boxes], [file], self.names, self.s, times)
                for image, boxes, file in zip(self.ims, self.pred, self.files)]

    def pandas(self) -> Detections:
        """A copy whose .xyxy, .xyxyn, .xywh and .xywhn are DataFrames, one an image, with a column `name`."""
        try:
            from pandas import DataFrame
        except ImportError:
            raise UserError("pandas(): pandas is missing; pip install pandas") from None
        if self.xyxy is not self.pred:  # they are already
            return self
        new = copy(self)
        for key, columns in (("xyxy", CORNERS), ("xyxyn", CORNERS), ("xywh", CENTRES), ("xywhn", CENTRES)):
            rows = [[[*row[:5], int(row[5]), self._name(row[5])] for row in boxes.tolist()]
                    for boxes in getattr(self, key)]
            setattr(new, key, [DataFrame(r, columns=[*columns, "confidence", "class", "name"]) for r in rows])
        return new

    def print(self) -> None:
        """Print what was found, an image a line, and the speed."""
        print(self)

    def __str__(self) -> str:
        lines = []
        for i, (image, boxes) in enumerate(zip(self.ims, self.pred), 1):
            classes, counts = boxes[:, 5].unique(return_counts=True)
            listed = ", ".join(f"{n} {self._name(c)}{'s' * (n > 1)}" for c, n in zip(classes.tolist(), counts.tolist()))
            lines.append(f"image {i}/{self.n}: {image.shape[0]}x{image.shape[1]} {listed or '(no detections)'}")
        speeds = ", ".join(f"{ms:.1f}ms {stage}" for ms, stage in zip(self.t, ("pre-process", "inference", "NMS")))
        return "\n".join([*lines, f"Speed: {speeds} per image at shape {self.s}"])

    __repr__ = __str__  # what a notebook shows

    def render(self, labels: bool = True) -> list[np.ndarray]:
        """Draw the boxes, with their captions if `labels`, into .ims; returns .ims."""
        self.ims = self._drawn(labels)
        return self.ims

    def show(self, labels: bool = True) -> None:
        """Show the images with their boxes, in a notebook or in the system's viewer of pictures."""
        for drawn, file in zip(self._drawn(labels), self.files):
            picture = Image.fromarray(drawn)
            if "ipykernel" in sys.modules:
                from IPython.display import display

                display(picture)
            elif not ImageShow.show(picture, file):
                raise UserError("show(): no viewer of pictures here; write them by .save(), or take .render()")

    def save(self, labels: bool = True, save_dir: str | Path = "runs/detect/exp", exist_ok: bool = False) -> None:
        """Write the images with their boxes as .jpg to `save_dir`, or to exp2, exp3 ... where that is taken."""
        folder = _new_folder(save_dir, exist_ok)
        for drawn, file in zip(self._drawn(labels), self.files):
            _write_jpg(folder / file, drawn)
        print(f"Saved {self.n} image{'s' * (self.n > 1)} to {folder}")

    def crop(self, save: bool = True, save_dir: str | Path = "runs/detect/exp",
             exist_ok: bool = False) -> list[dict[str, Any]]:
        """Every object as a dict: box, conf, cls, label, im (BGR, as OpenCV writes it).

        save: write them, too, as save_dir/crops/<class>/<image>_<number>.jpg. They are exactly the box, as those of
        detect.py --save-crop.
        """
        crops, classes = [], UniqueNames()
        folder = _new_folder(save_dir, exist_ok) if save else None
        for image, boxes, file in zip(self.ims, self.pred, self.files):
            for i, row in enumerate(boxes):
                name, cut = self._name(row[5]), cut_out(image, row.tolist())
                if folder is not None and cut.size:
                    place = folder / "crops" / classes(name, safe_name(name))
                    _write_jpg(place / f"{Path(file).stem}_{i}.jpg", cut)
                crops.append({"box": list(row[:4]), "conf": row[4], "cls": row[5], "label": f"{name} {row[4]:.2f}",
                              "im": cut[..., ::-1]})
        if folder is not None:
            print(f"Saved crops to {folder}")
        return crops

    def display(self, pprint: bool = False, show: bool = False, save: bool = False, crop: bool = False,
                render: bool = False, labels: bool = True, save_dir: str | Path = "") -> list[dict[str, Any]] | None:
        """What older YOLOv5 has for print, show, save, crop (whose result it returns) and render, in `save_dir`."""
        save_dir = Path(save_dir).absolute()
        if pprint:
            self.print()
        if show:
            self.show(labels)
        if save and not crop:
            self.save(labels, save_dir, exist_ok=True)
        if render:
            self.render(labels)
        return self.crop(save, save_dir, exist_ok=True) if crop else None

    def _name(self, cls: float | Tensor) -> str:
        return self.names.get(int(cls), str(int(cls)))

    def _drawn(self, labels: bool) -> list[np.ndarray]:
        """The images with their boxes; those without a box as they are."""
        drawn = []
        for image, boxes in zip(self.ims, self.pred):
            captions = [f"{self._name(c)} {score:.2f}" if labels else "" for score, c in boxes[:, 4:].tolist()]
            drawn.append(draw_boxes(image, boxes[:, :4].numpy(), captions, boxes[:, 5].int().tolist()))
        return drawn


def _new_folder(save_dir: str | Path, exist_ok: bool) -> Path:
    path = Path(save_dir)
    return new_run_folder(path.parent, path.name, exist_ok)


def _write_jpg(path: Path, image: np.ndarray) -> None:
    with atomic(path) as temporary:
        Image.fromarray(image).save(temporary, format="jpeg", quality=95)
