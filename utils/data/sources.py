"""The images that detect.py looks at: files, folders, patterns, lists, videos, streams and cameras."""
from __future__ import annotations

import glob
import os
import re
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import cv2
import numpy as np

from utils.data.image_files import IMAGE_SUFFIXES, UNREADABLE, decode, listed_path, read_header, reason_of, walk
from utils.downloads import fetch
from utils.errors import UserError
from utils.files import printable, safe_name
from utils.text import read_lines

VIDEO_SUFFIXES = frozenset({".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm",
                            ".wmv"})
STREAM = "stream.mp4"  # the name of its result
STREAMS = ("rtsp://", "rtmp://", "http://", "https://", "tcp://")


@dataclass
class Frame:
    """An image, or a frame of a video or stream."""

    image: np.ndarray           # uint8 (h, w, 3) BGR
    path: Path                  # the file; for a camera or a stream a name to write the result under
    number: int | None = None   # of the frame in its video or stream; None for an image
    fps: float = 30.0           # of the frames that are read, in a video or stream


def frames(source: str, every: int = 1, skipped: Counter[str] | None = None) -> Iterator[Frame]:
    """The images that `source` names; of videos and streams every `every`-th frame.

    source: an image, a video, a folder of them, a pattern such as 'photos/*.jpg', a .txt list, the URL of an image or
    a stream, a camera's number, or a .streams file of such, which are read in turns. A file or folder of that name
    comes first: a folder may be called 2024. UserError where there is nothing; among several sources one that can't be
    read is reported on stdout, counted in `skipped` by its reason, and left out.
    """
    skipped = Counter() if skipped is None else skipped
    path = Path(source)
    if _is_live(source) and not path.exists():
        name = _name_in(source)
        if name.suffix.lower() in IMAGE_SUFFIXES:
            yield Frame(fetched(source), name)
        else:
            yield from _video_frames(source, every, name.name if name.suffix.lower() in VIDEO_SUFFIXES else STREAM)
        return
    if path.suffix == ".streams":
        yield from _in_turns(path, every, skipped)
        return
    paths = files(source)
    for file in paths:
        try:
            if file.exists() and not file.is_file():  # a pipe might never end
                raise UserError(f"--source {file}: not a file")
            if file.suffix.lower() in VIDEO_SUFFIXES:
                yield from _video_frames(str(file), every)
            else:
                yield Frame(decode(file, read_header(file).orientation), file)
        except UNREADABLE as error:
            if len(paths) == 1 and file.suffix.lower() in VIDEO_SUFFIXES:
                raise
            _skip(str(file), reason_of(error, file), skipped)


def _is_live(source: str) -> bool:
    """Whether a source is a stream's address or a camera's number."""
    return source.lower().startswith(STREAMS) or re.fullmatch("[0-9]{1,4}", source) is not None


def _name_in(url: str) -> Path:
    """The name of the file that a URL leads to. UserError where it is none."""
    try:
        return Path(safe_name(Path(unquote(urlparse(url).path)).name))
    except ValueError as error:
        raise UserError(f"--source {url}: is no address ({error}); mend it") from None


def fetched(url: str) -> np.ndarray:
    """uint8 (h, w, 3) BGR of the image at a URL. UserError where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        fetch(url, path, lambda file: True, "give an address that answers, or the path of a file")
        try:
            return decode(path, read_header(path).orientation)
        except UNREADABLE as error:
            raise UserError(f"{url}: can't be read as an image ({reason_of(error, path)})") from None


def _skip(source: str, reason: str, skipped: Counter[str]) -> None:
    reason = reason.removeprefix(f"--source {source}: ")
    print(f"skipped: {source} ({reason})")
    skipped[reason] += 1


def files(source: str) -> list[Path]:
    """The image and video files that a path, pattern or list names. UserError if there are none."""
    path = Path(source)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.is_file())
    elif path.suffix == ".txt":
        return [listed_path(path.parent, line) for line in _lines(path)]  # whatever they are: each is told about
    elif path.is_file():
        paths = [path]
    else:
        paths = sorted(set(map(Path, _matches(source))))
    if not paths and not path.is_dir():
        raise UserError(f"--source {source}: no such file, folder or pattern")
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    media = [p for p in paths if p.suffix.lower() in suffixes]
    if not media:
        kinds = ", ".join(sorted(suffix[1:] for suffix in suffixes))
        raise UserError(f"--source {source}: no images or videos there ({kinds})")
    return media


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
    """The lines of a list that hold something. UserError if there are none."""
    lines = read_lines(path, "--source")
    if not lines:
        raise UserError(f"--source {path}: is empty; give it a line for each image, video or stream")
    return lines


def _video_frames(source: str, every: int, stream: str = STREAM) -> Iterator[Frame]:
    """Every `every`-th frame of a video, a stream or a camera. stream: the name of a stream's result.

    UserError where there is none.
    """
    if printable(source) != source:
        raise UserError(f"--source {source}: OpenCV opens no video whose name is not UTF-8; rename it")
    if os.path.exists(source) and stat.S_ISFIFO(os.stat(source).st_mode):
        raise UserError(f"--source {source}: is a pipe, which might never end; give a file or an address")
    camera = _is_live(source) and source.isdecimal()
    capture = cv2.VideoCapture(int(source) if camera else source)
    if not capture.isOpened():
        raise UserError(f"--source {source}: can't be opened as a video, stream or camera")
    path = Path(f"camera{source}.mp4" if camera else stream if "://" in source else source)
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps / every if 0 < fps < 1000 else 30.0
    number, shown = -1, 0
    try:
        while capture.grab():
            number += 1
            if number % every:
                continue
            ok, image = capture.retrieve()
            if ok:
                shown += 1
                yield Frame(image, path, number, fps)
    finally:
        capture.release()
    if not shown:
        raise UserError(f"--source {source}: no frame of it can be read")


def _in_turns(path: Path, every: int, skipped: Counter[str]) -> Iterator[Frame]:
    """The frames of all sources in a .streams file, one of each in a turn; each is read by a thread of its own.

    Of a stream or camera the newest frame counts, so that none lags behind; of a video every frame. A source
    that has no new frame is left out of the turn.
    """
    lines = list(dict.fromkeys(_lines(path)))
    lines = [line if _is_live(line) else str(listed_path(path.parent, line)) for line in lines]
    readers = [_video_frames(line, every, f"stream{n}.mp4") for n, line in enumerate(lines, 1)]
    newest: dict[int, Frame] = {}     # of the readers that have one
    running, changed, ended = set(range(len(lines))), threading.Condition(), threading.Event()

    def read(n: int) -> None:
        try:
            for frame in readers[n]:
                with changed:
                    changed.wait_for(lambda: ended.is_set() or n not in newest or _is_live(lines[n]))
                    if ended.is_set():
                        return
                    newest[n] = frame
                    changed.notify_all()
        except (UserError, cv2.error) as error:
            _skip(lines[n], reason_of(error, Path(lines[n])), skipped)
        finally:
            with changed:
                running.discard(n)
                changed.notify_all()

    for n in running.copy():
        threading.Thread(target=read, args=(n,), daemon=True).start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: newest or not running)
                turn = [newest.pop(n) for n in sorted(newest)]
                changed.notify_all()
            if not turn:
                return
            yield from turn
    finally:
        with changed:
            ended.set()
            changed.notify_all()
