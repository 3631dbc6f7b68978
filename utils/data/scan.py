"""A scan of many images: what it found, in columns, and the processes that read the files."""
from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.data.image_files import LEAST_IMAGE_SIDE, Record, label_files
from utils.data.ragged import Ragged
from utils.errors import UserError

MANY = 2000      # images; fewer are read in threads, which start at once
MOST_READERS = 8
BATCH = 256      # images that a process reads at a time


@dataclass(frozen=True)
class Scan:
    """What is known of n images: row i of every column belongs to image i."""

    sizes: np.ndarray          # int32 (n, 2): w, h as displayed
    orientations: np.ndarray   # uint8 (n,): EXIF, 1..8
    labels: Ragged             # float32 (m, 5) each: class, xywh normalised
    notes: Ragged              # uint8 each: JSON of [problems, refused]; empty where there is neither

    @classmethod
    def of(cls, records: Sequence[Record]) -> Scan:
        """The columns of some records, at least one."""
        notes = [json.dumps([r.problems, r.refused]).encode() if r.problems or r.refused else b"" for r in records]
        return cls(np.array([r.size for r in records], np.int32), np.array([r.orientation for r in records], np.uint8),
                   Ragged.of([r.labels for r in records]), Ragged.of([np.frombuffer(n, np.uint8) for n in notes]))

    @classmethod
    def joined(cls, scans: Sequence[Scan]) -> Scan:
        """All images of some scans, at least one, one after the other."""
        if len(scans) == 1:
            return scans[0]
        return cls(np.concatenate([s.sizes for s in scans]), np.concatenate([s.orientations for s in scans]),
                   Ragged.joined([s.labels for s in scans]), Ragged.joined([s.notes for s in scans]))

    def take(self, index: np.ndarray) -> Scan:
        """The images at (n,) `index` in that order."""
        return Scan(self.sizes[index], self.orientations[index], self.labels.take(index), self.notes.take(index))

    def remarks(self) -> Iterator[tuple[int, Counter[str], str]]:
        """(image, what was repaired or left out, why it can't be used) of the images that have one of them."""
        for i in np.flatnonzero(self.notes.counts).tolist():
            problems, refused = json.loads(self.notes[i].tobytes())
            yield i, Counter(problems), refused

    def possible(self, nc: int | None) -> bool:
        """Can scan_image() have found this, with classes below `nc`? What comes from a file may be anything.

        Raises ValueError, TypeError or another exception for notes that are none.
        """
        refused = np.zeros(len(self), bool)
        for i, problems, reason in self.remarks():
            refused[i] = reason != ""
            if not isinstance(reason, str) or not all(isinstance(times, int) for times in problems.values()):
                return False
        classes, boxes = self.labels.flat()[:, 0], self.labels.flat()[:, 1:]
        return bool(((classes >= 0) & (classes < (nc or math.inf)) & (np.floor(classes) == classes)).all()
                    and ((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, 2:] > 0).all()
                    and ((self.orientations >= 1) & (self.orientations <= 8)).all()
                    and (self.sizes[~refused] >= LEAST_IMAGE_SIDE).all())

    def __len__(self) -> int:
        return len(self.sizes)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scan_groups(scan: Callable[..., Record], groups: Sequence[Sequence[str]], title: str) -> Iterator[Scan]:
    """A Scan of each group of images, by scan_image(), in order; a progress bar appears after a second.

    Many images are read in as many processes as there are cores: what takes the time is Python. Where processes can't
    be forked there are threads, which at least wait for files at the same time.
    """
    total = sum(map(len, groups))
    readers = min(cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), MOST_READERS)  # torchrun's, on this machine
    processes = total >= MANY and readers > 1 and "fork" in get_all_start_methods()
    size = BATCH if total >= MANY else 8
    executor: Executor
    if processes:
        executor = ProcessPoolExecutor(readers, get_context("fork"), _start_process)
    else:
        executor = ThreadPoolExecutor(MOST_READERS)
    batches = [group[i:i + size] for group in groups for i in range(0, len(group), size)]
    with tqdm(desc=title, total=total, delay=1.0, leave=False, disable=None) as bar:
        try:
            results = executor.map(partial(_scan_batch, scan), batches)
            for group in groups:
                parts = []
                for _ in range(0, len(group), size):
                    parts.append(next(results))
                    bar.update(len(parts[-1]))
                yield Scan.joined(parts)
        except BrokenProcessPool:
            raise UserError(f"{title}: a process that read images was killed, or died of a damaged file; what was read "
                            "is kept, start again (if it was out of memory: with more of it)") from None
        finally:
            executor.shutdown(cancel_futures=True)


def _scan_batch(scan: Callable[..., Record], images: Sequence[str]) -> Scan:
    return Scan.of([scan(Path(image), labels=Path(file)) for image, file in zip(images, label_files(images))])


def _start_process() -> None:
    """Signals are the main process's: it stops these by itself, and a handler that was forked would keep them alive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork
