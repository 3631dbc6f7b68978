"""Where detect.py's pictures come from: images, folders, globs, lists, videos, streams and webcams."""
from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.image_files import IMAGE_SUFFIXES, decode, read_header

VIDEO_SUFFIXES = frozenset({".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
STREAMS = ("rtsp://", "rtmp://", "http://", "https://", "tcp://")


@dataclass
class Frame:
    """A picture to look at: uint8 (h, w, 3) BGR, where it is from, and for films its number and frames a second."""

    image: np.ndarray
    path: Path
    number: int | None = None
    fps: float = 30.0


def frames(source: str, every: int = 1) -> Iterator[Frame]:
    """Frames of whatever `source` names; of films and streams each `every`-th.

    A camera's number, a stream's address, a .streams file of addresses, an image or film, a folder of them, a pattern such
    as 'shots/*.jpg', or a .txt list. UserError where there is nothing; unreadable files are said and left out.
    """
    if source.isnumeric() or source.lower().startswith(STREAMS):
        yield from _film(source, every)
        return
    path = Path(source)
    if path.suffix == ".streams":
        for line in _lines(path):
            yield from _film(line, every)
        return
    for file in files(source):
        if file.suffix.lower() in VIDEO_SUFFIXES:
            yield from _film(str(file), every)
            continue
        try:
            yield Frame(decode(file, read_header(file)[1]), file)
        except (UserError, OSError, SyntaxError, ValueError) as error:
            print(f"skipped: {file} ({error})")


def files(source: str) -> list[Path]:
    """The image and film files that a path, pattern or list names."""
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file())
    elif path.suffix == ".txt":
        found = [Path(line) if Path(line).is_absolute() or not (path.parent / line).exists() else path.parent / line for line in _lines(path)]
    elif path.is_file():
        found = [path]
    else:
        found = sorted(map(Path, glob.glob(source, recursive=True)))
    if not found and not path.is_dir():
        raise UserError(f"--source {source}: no such file, folder or pattern")
    wanted = [p for p in found if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if not wanted:
        raise UserError(f"--source {source}: no images or films there ({', '.join(sorted(s[1:] for s in IMAGE_SUFFIXES | VIDEO_SUFFIXES))})")
    return wanted


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"--source {path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _film(source: str, every: int) -> Iterator[Frame]:
    """Frames of a film, a stream or a camera."""
    capture = cv2.VideoCapture(int(source) if source.isnumeric() else source)
    if not capture.isOpened():
        raise UserError(f"--source {source}: can't be opened as a film, stream or camera")
    name = Path(f"camera{source}.mp4" if source.isnumeric() else source if "://" not in source else "stream.mp4")
    fps = capture.get(cv2.CAP_PROP_FPS)
    number = -1
    try:
        while capture.grab():
            number += 1
            if number % every:
                continue
            ok, image = capture.retrieve()
            if ok:
                yield Frame(image, name, number, fps / every if 0 < fps < 1000 else 30.0)
    finally:
        capture.release()
