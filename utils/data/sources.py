"""The images that detect.py looks at: files, folders, patterns, lists, videos, streams and cameras."""
from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.data.image_files import IMAGE_SUFFIXES, UNREADABLE, decode, listed_path, read_header, reason_of, walk
from utils.errors import UserError

VIDEO_SUFFIXES = frozenset({".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm",
                            ".wmv"})
STREAMS = ("rtsp://", "rtmp://", "http://", "https://", "tcp://")


@dataclass
class Frame:
    """An image, or a frame of a video or stream."""

    image: np.ndarray           # uint8 (h, w, 3) BGR
    path: Path                  # the file; for a camera or a stream a name to write the result under
    number: int | None = None   # of the frame in its video or stream; None for an image
    fps: float = 30.0           # of the frames that are read, in a video or stream


def frames(source: str, every: int = 1) -> Iterator[Frame]:
    """The images that `source` names; of videos and streams every `every`-th frame.

    source: an image, a video, a folder of them, a pattern such as 'photos/*.jpg', a .txt list, a stream's URL, a
    .streams file of URLs, or a camera's number. UserError where there is nothing; among several files an unreadable one
    is reported on stdout and skipped.
    """
    if source.isnumeric() or source.lower().startswith(STREAMS):
        yield from _video_frames(source, every)
        return
    path = Path(source)
    if path.suffix == ".streams":
        for number, line in enumerate(_lines(path), 1):
            yield from _video_frames(line, every, f"stream{number}.mp4")
        return
    found = files(source)
    for file in found:
        if file.suffix.lower() in VIDEO_SUFFIXES:
            try:
                yield from _video_frames(str(file), every)
            except UserError as error:
                if len(found) == 1:
                    raise
                print(f"skipped: {file} ({error})")
            continue
        try:
            image = decode(file, read_header(file).orientation)
        except UNREADABLE as error:
            print(f"skipped: {file} ({reason_of(error, file)})")
            continue
        yield Frame(image, file)


def files(source: str) -> list[Path]:
    """The image and video files that a path, pattern or list names. UserError if there are none."""
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file())
    elif path.suffix == ".txt":
        found = [listed_path(path.parent, line) for line in _lines(path)]
    elif path.is_file():
        found = [path]
    else:
        found = sorted(set(map(Path, _matches(source))))
    if not found and not path.is_dir():
        raise UserError(f"--source {source}: no such file, folder or pattern")
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    wanted = [p for p in found if p.suffix.lower() in suffixes]
    if not wanted:
        known = ", ".join(sorted(suffix[1:] for suffix in suffixes))
        raise UserError(f"--source {source}: no images or videos there ({known})")
    return wanted


def _matches(pattern: str) -> Iterator[str]:
    """glob.iglob(), but that ** comes to every folder once, however many links lead to it; hidden ones are left out."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    tops = glob.iglob(os.path.join(*parts[:at])) if at else [os.curdir]
    for folder, _ in walk(*tops, skip=lambda name: name.startswith(".")):
        yield from _matches(os.path.join(glob.escape(folder), *(parts[at + 1:] or "*")))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"--source {path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _video_frames(source: str, every: int, stream: str = "stream.mp4") -> Iterator[Frame]:
    """Every `every`-th frame of a video, a stream or a camera. stream: the name of a stream's result."""
    capture = cv2.VideoCapture(int(source) if source.isnumeric() else source)
    if not capture.isOpened():
        raise UserError(f"--source {source}: can't be opened as a video, stream or camera")
    if source.isnumeric():
        path = Path(f"camera{source}.mp4")
    else:
        path = Path(stream if "://" in source else source)
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps / every if 0 < fps < 1000 else 30.0
    number = -1
    try:
        while capture.grab():
            number += 1
            if number % every:
                continue
            ok, image = capture.retrieve()
            if ok:
                yield Frame(image, path, number, fps)
    finally:
        capture.release()
