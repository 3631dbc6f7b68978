"""What a scan of images and labels found, kept for the next start, away from the user's folders.

A record is used again only while path, size and time of both the image and its label file are what they were; all
others are scanned anew. The file holds numbers and text, never objects, so reading one that somebody else made is safe.
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

from utils.files import write_array
from utils.image_files import Record, label_path

VERSION = 1                          # raise it with every change of what a scan finds
FOLDER = "~/.cache/yolov5-slimming"  # the variable YOLO_CACHE names another


def cache_folder(kind: str) -> Path:
    """Where cached files of a kind ("labels", "images") lie."""
    return Path(os.environ.get("YOLO_CACHE") or FOLDER).expanduser() / kind


def scan_with_cache(images: Sequence[Path], settings: str, scan: Callable[[Sequence[Path]], list[Record]]) -> list[Record]:
    """Records of `images` in their order: from the cache where nothing has changed, else by scan(those that have).

    `settings` says what else a record depends on. A cache that can't be read or written costs time and nothing else.
    """
    stamps = [_stamp(image, settings) for image in images]
    name = hashlib.sha256("\n".join((settings, *map(str, images))).encode()).hexdigest()[:40]
    file = cache_folder("labels") / f"{name}.npy"
    known = _read(file)
    missing = [i for i, stamp in enumerate(stamps) if stamp not in known]
    fresh = dict(zip(missing, scan([images[i] for i in missing]))) if missing else {}
    records = [fresh[i] if i in fresh else known[stamp]._replace(path=images[i]) for i, stamp in enumerate(stamps)]
    if missing:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_array(file, np.frombuffer(json.dumps([[s, *_plain(r)] for s, r in zip(stamps, records)]).encode(), np.uint8))
    return records


def _stamp(image: Path, settings: str) -> str:
    """What must not change for a record to hold."""
    parts = [f"{VERSION} {settings}", str(image)]
    for path in (image, label_path(image)):
        try:
            stat = path.stat()
            parts.append(f"{stat.st_mtime_ns} {stat.st_size}")
        except OSError:
            parts.append("none")
    return "|".join(parts)


def _plain(record: Record) -> tuple:
    # float32 -> float64 -> text -> float32 is exact.
    return record.size, record.orientation, record.labels.astype(float).tolist(), dict(record.problems), record.refused


def _read(file: Path) -> dict[str, Record]:
    """Stamp -> record; empty where there is no cache, or one that is damaged."""
    try:
        rows = json.loads(np.load(file, allow_pickle=False).tobytes())
        return {str(stamp): Record(Path(), (int(size[0]), int(size[1])), int(orientation), np.array(labels, np.float32).reshape(-1, 5),
                                   Counter({str(k): int(v) for k, v in problems.items()}), str(refused))
                for stamp, size, orientation, labels, problems, refused in rows}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, IndexError):
        return {}
