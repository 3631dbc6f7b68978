"""What a scan of images and labels found, kept for the next start in a cache folder outside the data set.

A record is reused only while the path, size and modification time of both the image and its label file are unchanged;
all other images are scanned again. The cache holds numbers and text, never pickled objects, so reading a file that
somebody else made is safe.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.data.image_files import Record, label_path
from utils.errors import UserError
from utils.files import write_text

VERSION = 2                          # raise it with every change of what a scan finds
FOLDER = "~/.cache/yolov5-slimming"  # the variable YOLO_CACHE names another


def cache_folder(kind: str) -> Path:
    """Where cached files of a kind ("labels", "images") are."""
    return Path(os.environ.get("YOLO_CACHE") or FOLDER).expanduser() / kind


def scan_with_cache(images: Sequence[Path], settings: str,
                    scan: Callable[[Sequence[Path]], list[Record]]) -> list[Record]:
    """Records of `images` in their order: from the cache where nothing has changed, from `scan` for the others.

    `settings` names whatever else a record depends on. A cache that can't be read or written only costs time.
    """
    stamps = [_stamp(image, settings) for image in images]
    digest = hashlib.sha256("\n".join((settings, *map(str, images))).encode()).hexdigest()[:40]
    file = cache_folder("labels") / f"{digest}.json"
    cached = _read(file)
    missing = [i for i, stamp in enumerate(stamps) if stamp not in cached]
    if not missing:
        return [cached[stamp]._replace(path=image) for image, stamp in zip(images, stamps)]
    scanned = dict(zip(missing, scan([images[i] for i in missing])))
    records = [scanned[i] if i in scanned else cached[stamp]._replace(path=images[i]) for i, stamp in enumerate(stamps)]
    # float32 -> float64 -> text -> float32 is exact.
    rows = [(stamp, r.size, r.orientation, r.labels.astype(float).tolist(), r.problems, r.refused)
            for stamp, r in zip(stamps, records)]
    with suppress(UserError):
        write_text(file, json.dumps(rows))
    return records


def _stamp(image: Path, settings: str) -> str:
    """Text that changes whenever a record of `image` may no longer hold."""
    parts = [f"{VERSION} {settings}", str(image)]
    for path in (image, label_path(image)):
        try:
            stat = path.stat()
            parts.append(f"{stat.st_mtime_ns} {stat.st_size}")
        except OSError:
            parts.append("none")
    return "|".join(parts)


def _read(file: Path) -> dict[str, Record]:
    """Stamp -> record, with an empty path; {} if there is no cache or it is damaged."""
    records = {}
    try:
        for stamp, (w, h), orientation, labels, problems, refused in json.loads(file.read_bytes()):
            boxes = np.array(labels, np.float32).reshape(-1, 5)
            counts = Counter({str(problem): int(count) for problem, count in problems.items()})
            records[str(stamp)] = Record(Path(), (int(w), int(h)), int(orientation), boxes, counts, str(refused))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return records
