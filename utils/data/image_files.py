"""Image and label files: which there are, what they hold, what is wrong with them. Files are only ever read."""
from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.boxes import xywh2xyxy, xyxy2xywh
from utils.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"})
LEAST_SIDE = 10          # pixels; smaller images are left out
MARGIN = 1e-5            # of an image's side: many times what float32 rounds away
EXIF_ORIENTATION = 274   # the tag's number
CHECKED = ("JPEG", "PNG")   # read_header() notices a damaged one without decoding it
# What Pillow raises for a file that it can't read, and decode().
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, UserError)


class Header(NamedTuple):
    """What an image file says about itself."""

    size: tuple[int, int]          # w, h as displayed, after the EXIF rotation
    orientation: int               # EXIF, 1..8
    kind: str                      # Pillow's name of the format


class Record(NamedTuple):
    """What the scan finds out about one image."""

    path: Path
    size: tuple[int, int]          # w, h as displayed, after the EXIF rotation
    orientation: int               # EXIF, 1..8
    labels: np.ndarray             # float32 (m, 5): class, xywh normalised
    problems: Counter[str]         # what was repaired or left out
    refused: str = ""              # why the image can't be used


def find_images(source: Path) -> list[str]:
    """The images in a folder and its subfolders or in a txt list, or `source` itself. UserError if it is missing."""
    if source.is_dir():
        return [os.path.join(folder, name) for folder, _, names in os.walk(source, followlinks=True) for name in names
                if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    if not source.is_file():
        raise UserError(f"{source}: no such folder, list or image; correct the data yaml")
    if source.suffix.lower() != ".txt":
        return [str(source)] if source.suffix.lower() in IMAGE_SUFFIXES else []
    lines = source.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [str(listed_path(source.parent, line.strip())) for line in lines if line.strip()]


def path_order(path: str) -> str:
    """The key by which paths sort as Path does, folder by folder: no separator may come after a letter."""
    return os.path.normcase(path).replace(os.sep, "\0")


def listed_path(folder: Path, line: str) -> Path:
    """A path in a list in `folder`: relative to the folder, or to the working directory if only that file exists."""
    beside = folder / line
    return beside if beside.exists() or not Path(line).exists() else Path(line).absolute()


def label_path(image: Path) -> Path:
    """.../images/a/b.jpg -> .../labels/a/b.txt: the last folder called images counts; without one, beside the image."""
    return Path(next(label_files([str(image)])))


def label_files(images: Iterable[str]) -> Iterator[str]:
    """label_path() of each image. Neighbours mostly share their folder, which is looked at once."""
    before = labels = None
    for image in images:
        folder, name = os.path.split(image)
        if folder != before:
            before, folders = folder, folder.split(os.sep)
            if "images" in folders:
                folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
            labels = os.sep.join(folders)
        yield os.path.join(labels or "", f"{os.path.splitext(name)[0]}.txt")


def read_header(path: Path) -> Header:
    """An image's size, orientation and format, mostly without decoding.

    One of UNREADABLE for a file that is not an image, or not a whole one if its format is CHECKED.
    """
    with open(path, "rb") as file, Image.open(file) as image:
        size, kind = image.size, image.format or ""
        orientation = 1
        # A PNG's EXIF may follow its pixels, and reading it would decode them. TIFF decoders rotate by themselves.
        if kind not in ("PNG", "TIFF") or (kind == "PNG" and "exif" in image.info):
            try:
                orientation = int(image.getexif().get(EXIF_ORIENTATION, 1))
            except Exception:  # damaged EXIF raises many kinds of exceptions, but the pixels may be intact
                orientation = 1
        if kind == "PNG":
            image.verify()  # checksums
        elif kind == "JPEG" and not _ends_with(file, b"\xff\xd9"):
            image.load()    # truncated, or data follows the image: only decoding tells which
        elif kind != "JPEG" and not cv2.haveImageReader(str(path)):
            raise ValueError(f"OpenCV reads no {kind}")
    orientation = orientation if 1 <= orientation <= 8 else 1
    return Header(size[::-1] if orientation >= 5 else size, orientation, kind)


def _ends_with(file: BinaryIO, mark: bytes) -> bool:
    """Whether a file ends with `mark`. Its position stays."""
    position = file.tell()
    file.seek(-len(mark), os.SEEK_END)
    found = file.read() == mark
    file.seek(position)
    return found


def decode(path: Path, orientation: int = 1) -> np.ndarray:
    """uint8 (h, w, 3) BGR of an image of any format, rotated by its EXIF orientation. UserError if that fails.

    The orientation is applied here and not by OpenCV, so that sizes and pixels agree in every format and version.
    """
    image = None
    try:
        data = np.fromfile(path, np.uint8)  # on Windows, cv2.imread can't open some file names
        if data.size:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); put it back or start again without it") from None
    except cv2.error:
        pass  # for some damaged files OpenCV raises, for others it returns None
    if image is None:
        raise UserError(f"{path}: can't be decoded; replace it or remove it from the data set")
    if orientation in (5, 6, 7, 8):  # mirrored along a diagonal; 6 to 8 need a flip as well
        image = cv2.transpose(image)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return image if flip is None else cv2.flip(image, flip)


def parse_labels(text: str, path: Path, nc: int | None = None,
                 single_cls: bool = False) -> tuple[np.ndarray, Counter[str]]:
    """Text of the label file `path` -> float32 (m, 5) class, xywh normalised, and the number of each problem in it.

    A row is `class x y w h`, or `class x1 y1 x2 y2 x3 y3 ...`: a polygon, which is replaced by its bounding box.
    UserError for a class that is not below `nc`: there is no way to tell which class was meant.
    """
    problems: Counter[str] = Counter()
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = _parse_row(line)
        if row is None:
            problems["malformed rows skipped"] += 1
        elif single_cls:
            rows.append([0.0, *row[1:]])
        elif nc is not None and row[0] >= nc:
            raise UserError(f"{path}: line {number}: class {row[0]:.0f}, but the data yaml names {nc} (0 to {nc - 1}); "
                            "correct the label or add the name")
        else:
            rows.append(row)
    labels = np.array(rows, np.float32).reshape(-1, 5)
    if not all(_well_inside(*row[1:]) for row in rows) or len(set(map(tuple, labels.tolist()))) < len(rows):
        labels = _repair(labels, problems)
    return labels, +problems  # without zeros


def _parse_row(line: str) -> list[float] | None:
    """[class, x, y, w, h], or None for a malformed row."""
    try:
        values = [float(token) for token in line.split()]
    except ValueError:
        return None
    if len(values) < 5 or len(values) % 2 == 0 or not all(map(math.isfinite, values)):
        return None
    if values[0] < 0 or values[0] % 1:
        return None
    if len(values) == 5:
        return values
    xs, ys = values[1::2], values[2::2]
    x1, x2, y1, y2 = min(xs), max(xs), min(ys), max(ys)
    return [values[0], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def _well_inside(x: float, y: float, w: float, h: float) -> bool:
    """Is a box so far from the edge, and so large, that rounding to float32 can't leave anything to repair?"""
    return w > MARGIN and h > MARGIN and (w + MARGIN) / 2 < x < 1 - (w + MARGIN) / 2 \
        and (h + MARGIN) / 2 < y < 1 - (h + MARGIN) / 2


def _repair(labels: np.ndarray, problems: Counter[str]) -> np.ndarray:
    """Cut boxes at the image's edge; drop duplicates and boxes without area inside the image. Count each."""
    corners = xywh2xyxy(labels[:, 1:])
    inside = corners.clip(0, 1)
    excess = np.abs(corners - inside).max(1, initial=0)
    keep = (labels[:, 3:] > 0).all(1) & (inside[:, 2:] > inside[:, :2]).all(1)
    repaired = labels.copy()
    repaired[excess > 0, 1:] = xyxy2xywh(inside[excess > 0])
    repaired = repaired[keep]
    first: dict[tuple[float, ...], int] = {}
    for i, row in enumerate(repaired.tolist()):
        first.setdefault(tuple(row), i)
    # Coordinates rounded to a few digits often exceed the edge slightly: such boxes are cut, but not counted.
    problems["boxes cut at the edge"] = int((keep & (excess > 1e-4)).sum())
    problems["boxes dropped (no area in the image)"] = int((~keep).sum())
    problems["duplicate rows removed"] = len(repaired) - len(first)
    return repaired[list(first.values())] if first else repaired


def reason_of(error: Exception, path: Path) -> str:
    """Why the image is UNREADABLE, in a few words and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return str(getattr(error, "strerror", None) or error).removeprefix(f"{path}: ")


def scan_image(path: Path, nc: int | None = None, single_cls: bool = False) -> Record:
    """Read an image and its labels. UserError for a class not below `nc`, or a label file that can't be read."""
    no_labels = np.zeros((0, 5), np.float32)
    try:
        size, orientation, kind = read_header(path)
        if kind not in CHECKED:  # nothing but decoding tells, and in the middle of a training is too late
            decode(path)
    except UNREADABLE as error:
        reason = reason_of(error, path)
        return Record(path, (0, 0), 1, no_labels, Counter({"unreadable images skipped": 1}), reason)
    if min(size) < LEAST_SIDE:
        problems = Counter({f"images under {LEAST_SIDE} px skipped": 1})
        return Record(path, size, 1, no_labels, problems, f"{size[0]} x {size[1]} px")
    file = label_path(path)
    try:
        text = file.read_bytes().decode("utf-8-sig", "replace")
    except (FileNotFoundError, NotADirectoryError):
        text = ""
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}); mend its permissions") from None
    labels, problems = parse_labels(text, file, nc, single_cls)
    return Record(path, size, orientation, labels, problems)
