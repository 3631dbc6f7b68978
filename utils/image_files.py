"""Image and label files: what is found, what it holds, what is wrong with it. The user's files are only ever read."""
from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.boxes import xywh2xyxy, xyxy2xywh
from utils.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"})
LEAST_SIDE = 10          # pixels; smaller images are left out
EXIF_ORIENTATION = 274


class Record(NamedTuple):
    """What the scan learns about one image."""

    path: Path
    size: tuple[int, int]          # w, h as seen, after the EXIF rotation
    orientation: int               # EXIF, 1..8
    labels: np.ndarray             # (m, 5)
    problems: Counter[str]
    refused: str = ""              # why the image can't be used


def find_images(source: Path) -> list[Path]:
    """Images of a folder and all below it, of a txt list, or the one that `source` is. UserError if it is missing."""
    if source.is_dir():
        return [Path(folder, name) for folder, _, names in os.walk(source, followlinks=True) for name in names
                if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not source.is_file():
        raise UserError(f"{source}: no such folder, list or image; correct the data yaml")
    if source.suffix.lower() != ".txt":
        return [source] if source.suffix.lower() in IMAGE_SUFFIXES else []
    lines = source.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    beside = [(source.parent / line.strip(), Path(line.strip())) for line in lines if line.strip()]
    # './x' is relative to the list; other relative paths may also be meant from the working directory.
    return [here if here.exists() or not there.exists() else there.absolute() for here, there in beside]


def label_path(image: Path) -> Path:
    """.../images/a/b.jpg -> .../labels/a/b.txt: the last folder called images counts; without one, beside the image."""
    folders = list(image.parent.parts)
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return Path(*folders, image.stem + ".txt")


def read_header(path: Path) -> tuple[tuple[int, int], int]:
    """((w, h) as seen, EXIF orientation) without decoding; OSError, SyntaxError or ValueError for no whole image."""
    with Image.open(path) as image:
        size, kind = image.size, image.format
        orientation = 1
        # PNG's EXIF may follow the pixels: asking for it would decode the image. TIFF decoders turn by themselves.
        if kind not in ("PNG", "TIFF") or (kind == "PNG" and "exif" in image.info):
            try:
                orientation = int(image.getexif().get(EXIF_ORIENTATION, 1))
            except Exception:  # damaged EXIF fails in many ways, and the picture is good all the same
                orientation = 1
        if kind == "PNG":
            image.verify()  # check sums
        elif kind == "JPEG" and not _ends_with(path, b"\xff\xd9"):
            image.load()    # cut off, or something follows the picture: only decoding can tell
        elif kind != "JPEG" and not cv2.haveImageReader(str(path)):
            raise ValueError(f"OpenCV reads no {kind}")
    orientation = orientation if 1 <= orientation <= 8 else 1
    return (size[::-1] if orientation >= 5 else size), orientation


def _ends_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(-len(mark), os.SEEK_END)
        return file.read() == mark


def decode(path: Path, orientation: int = 1) -> np.ndarray:
    """uint8 (h, w, 3) BGR of any kind of image, turned by its EXIF orientation. UserError if that fails.

    The orientation is applied here and not by OpenCV, so that sizes and pixels agree in every format and version.
    """
    image = None
    try:
        data = np.fromfile(path, np.uint8)  # imread would stumble over some file names on Windows
        if data.size:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); put it back or start again without it") from None
    except cv2.error:
        pass  # OpenCV raises for some damages and returns None for the others
    if image is None:
        raise UserError(f"{path}: can't be decoded; replace it or remove it from the data set")
    if orientation in (5, 6, 7, 8):  # mirrored along a diagonal; 6 to 8 need one mirroring more
        image = cv2.transpose(image)
    code = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return image if code is None else cv2.flip(image, code)


def parse_labels(text: str, file: Path, nc: int | None = None,
                 single_cls: bool = False) -> tuple[np.ndarray, Counter[str]]:
    """Text of a label file -> float32 (m, 5) class, xywh normalised, and what was wrong with it, counted.

    A row is `class x y w h`, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon of which the box is taken. UserError for a
    class that does not exist (nc given): no repair could guess what was meant.
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
            raise UserError(f"{file}: line {number}: class {row[0]:.0f}, but the data yaml names {nc} (0 to {nc - 1}); "
                            "correct the label or add the name")
        else:
            rows.append(row)
    return _repair(np.array(rows, np.float32).reshape(-1, 5), problems), problems


def _parse_row(line: str) -> list[float] | None:
    """[class, x, y, w, h] or None if the row makes no sense."""
    try:
        values = [float(token) for token in line.split()]
    except ValueError:
        return None
    if len(values) < 5 or len(values) % 2 == 0 or not all(map(math.isfinite, values)) or values[0] < 0 or values[0] % 1:
        return None
    if len(values) == 5:
        return values
    xs, ys = values[1::2], values[2::2]
    x1, x2, y1, y2 = min(xs), max(xs), min(ys), max(ys)
    return [values[0], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def _repair(labels: np.ndarray, problems: Counter[str]) -> np.ndarray:
    """Drop boxes without area in the image and duplicates, cut at the image's edge what reaches over it; count each."""
    corners = xywh2xyxy(labels[:, 1:])
    inside = corners.clip(0, 1)
    excess = np.abs(corners - inside).max(1, initial=0)
    keep = (labels[:, 3:] > 0).all(1) & (inside[:, 2:] > inside[:, :2]).all(1)
    # Rounding to a few digits puts many a box a hair outside: cut as well, but no reason to alarm anybody.
    _count(problems, "boxes cut at the edge", int((keep & (excess > 1e-4)).sum()))
    _count(problems, "boxes dropped (no area in the image)", int((~keep).sum()))
    repaired = labels.copy()
    repaired[excess > 0, 1:] = xyxy2xywh(inside[excess > 0])
    repaired = repaired[keep]
    first = np.sort(np.unique(repaired, axis=0, return_index=True)[1])
    _count(problems, "duplicate rows removed", len(repaired) - len(first))
    return repaired[first]


def _count(problems: Counter[str], what: str, number: int) -> None:
    if number:
        problems[what] += number


def scan_image(path: Path, nc: int | None = None, single_cls: bool = False) -> Record:
    """Header and labels of one image."""
    none = np.zeros((0, 5), np.float32)
    try:
        size, orientation = read_header(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image" if unknown else str(getattr(error, "strerror", None) or error)
        return Record(path, (0, 0), 1, none, Counter({"unreadable images skipped": 1}), reason)
    if min(size) < LEAST_SIDE:
        tiny = Counter({f"images under {LEAST_SIDE} px skipped": 1})
        return Record(path, size, 1, none, tiny, f"{size[0]} x {size[1]} px")
    file = label_path(path)
    try:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        text = ""
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}); mend its permissions") from None
    labels, problems = parse_labels(text, file, nc, single_cls)
    return Record(path, size, orientation, labels, problems)
