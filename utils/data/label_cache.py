"""What a scan of images and labels found, kept for the next start in a cache folder outside the data set.

Images are cached in parts of PART, each a file, which is written as soon as its images are read: a scan of very many
goes on where it was interrupted. What was found out about an image is reused only while the path, size and modification
time of both the image and its label file are unchanged; all other images are scanned again. The cache holds numbers and
text, never pickled objects, so reading a file that somebody else made is safe; one that no scan can have made is
thrown away.
"""
from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.data.image_files import label_files
from utils.data.ragged import Ragged
from utils.data.scan import Scan
from utils.errors import UserError
from utils.files import atomic

VERSION = 4                                # raise it with every change of what a scan finds
CACHE_FOLDER = "~/.cache/yolov5-slimming"  # the variable YOLO_CACHE names another
PART = 10_000                              # images
# Of the arrays in a file: type and shape of a row. The last two have the rows of all images.
COLUMNS = {"stamps": (np.int64, (4,)), "sizes": (np.int32, (2,)), "orientations": (np.uint8, ()),
           "boxes": (np.int64, ()), "lengths": (np.int64, ()), "labels": (np.float32, (5,)), "notes": (np.uint8, ())}


@dataclass
class _Part:
    """Some images, and what the cache knows of them."""

    images: Sequence[str]
    file: Path
    stamps: np.ndarray   # int64 (n, 4)
    scan: Scan | None    # of all images; outdated where `missing`
    missing: np.ndarray  # (k,) indices of images to scan


def cache_folder(kind: str) -> Path:
    """Where cached files of a kind ("labels", "images") are. Who has no home has a folder that takes no files."""
    try:
        return Path(os.environ.get("YOLO_CACHE") or CACHE_FOLDER).expanduser() / kind
    except RuntimeError:
        return Path(os.devnull) / kind


def scan_with_cache(images: Sequence[str], settings: str,
                    scan: Callable[[Sequence[Sequence[str]]], Iterator[Scan]], nc: int | None) -> Scan:
    """What is known of `images`, at least one: from the cache where nothing has changed, from `scan` for the others.

    scan: groups of images -> a Scan of each, with classes below `nc`. `settings` names whatever it depends on. A cache
    that can't be read or written only costs time.
    """
    parts = [_open(images[i:i + PART], settings, nc) for i in range(0, len(images), PART)]
    changed = [part for part in parts if len(part.missing)]
    fresh = scan([[part.images[i] for i in part.missing] for part in changed]) if changed else iter(())
    for new, part in zip(fresh, changed):
        _update(part, new)
        with suppress(UserError):
            _write(part)
    return Scan.joined([part.scan for part in parts if part.scan is not None])


def _open(images: Sequence[str], settings: str, nc: int | None) -> _Part:
    digest = hashlib.sha256(os.fsencode("\n".join((f"{VERSION} {settings}", *images)))).hexdigest()[:40]
    file, stamps = cache_folder("labels") / f"{digest}.npz", _stamps(images)
    old, scan = np.empty(0), None
    if os.path.isfile(file):
        try:
            old, scan = _read(file, len(images), nc)
        except Exception:  # a damaged file raises many kinds of exceptions
            tqdm.write(f"{file}: damaged or changed; it is made anew, the labels are read again", file=sys.stderr)
    missing = np.arange(len(images)) if scan is None else np.flatnonzero((old != stamps).any(1))
    return _Part(images, file, stamps, scan, missing)


def _stamps(images: Sequence[str]) -> np.ndarray:
    """int64 (n, 4): modification time in ns and size of each image and its label file; -1 for one that is missing."""
    numbers: list[int] = []
    for pair in zip(images, label_files(images)):
        for path in pair:
            try:
                stat = os.stat(path)
                numbers += stat.st_mtime_ns, stat.st_size
            except OSError:
                numbers += -1, -1
    return np.array(numbers, np.int64).reshape(-1, 4)


def _update(part: _Part, new: Scan) -> None:
    """Put what was found of the missing images in its place."""
    if part.scan is None:
        part.scan = new
        return
    index = np.arange(len(part.images))
    index[part.missing] = len(index) + np.arange(len(new))
    part.scan = Scan.joined([part.scan, new]).take(index)


def _write(part: _Part) -> None:
    scan = part.scan
    assert scan is not None
    with atomic(part.file) as temporary, open(temporary, "wb") as file:
        np.savez(file, stamps=part.stamps, sizes=scan.sizes, orientations=scan.orientations,
                 boxes=scan.labels.counts, lengths=scan.notes.counts, labels=scan.labels.flat(),
                 notes=scan.notes.flat())


def _read(file: Path, images: int, nc: int | None) -> tuple[np.ndarray, Scan]:
    """(stamps, scan) of a file. Some exception where it is not of so many images, or not what a scan can find."""
    with np.load(file, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in COLUMNS}
    stamps, sizes, orientations, boxes, lengths, labels, notes = columns.values()
    rows = [images] * 5 + [boxes.sum(dtype=float), lengths.sum(dtype=float)]  # whole numbers would wrap around
    for (kind, row), array, count in zip(COLUMNS.values(), columns.values(), rows):
        if array.dtype != kind or array.shape != (count, *row):
            raise ValueError("columns of another kind")
    scan = Scan(sizes, orientations, Ragged(labels, boxes), Ragged(notes, lengths))
    if min(boxes.min(), lengths.min()) < 0 or not scan.possible(nc):
        raise ValueError("no scan finds this")
    return stamps, scan
