"""Image and label files: which there are, what they hold, what is wrong with them. Files are only ever read."""
from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from pathlib import Path, PureWindowsPath
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.data.labels import LABEL_LOSSES, NO_TEXT, parse_labels, reading_of
from utils.errors import UserError
from utils.text import decoded, read_lines

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"})
LEAST_IMAGE_SIDE = 10    # pixels; smaller images are left out
EXIF_ORIENTATION = 274   # the tag's number
SAMPLED_FILES = 200      # label files that tell what the rows of a set mean
# What Pillow raises for a file that it can't read, and decode().
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, UserError)


class DamagedImageError(UserError):
    """An image can't be decoded. A file that can't be read at all is another error: all files may be so."""


class Header(NamedTuple):
    """What an image file says about itself."""

    size: tuple[int, int]          # w, h as displayed, after the EXIF rotation
    orientation: int               # EXIF, 1..8
    common: bool                   # JPEG, or PNG of 8 bits: most damage is seen without decoding


class Record(NamedTuple):
    """What the scan finds out about one image."""

    path: Path
    size: tuple[int, int]          # w, h as displayed, after the EXIF rotation
    orientation: int               # EXIF, 1..8
    labels: np.ndarray             # float32 (m, 5): class, xywh normalised
    problems: Counter[str]         # what was repaired or left out
    refused: str = ""              # why the image can't be used


def walk(*roots: str | Path, skip: Callable[[str], bool] = lambda name: False) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of what is in it and no folder) of some folders and those below them, in no order.

    Links are followed, but a folder comes once, however many lead to it: under its own path where that is below one of
    `roots`, else under the shortest. skip: whether to leave out the folders of a name.
    """
    seen: set[tuple[int, int]] = set()
    folders = [os.fspath(root) for root in roots if not os.path.islink(root)]
    linked = sorted((len(os.fspath(root)), os.fspath(root)) for root in roots if os.path.islink(root))
    while folders or linked:
        folder = folders.pop() if folders else heappop(linked)[1]
        names = []
        try:
            place = os.stat(folder)
            if (place.st_dev, place.st_ino) in seen:
                continue
            seen.add((place.st_dev, place.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
                        names.append(entry.name)
                    elif entry.is_symlink() and not skip(entry.name):
                        heappush(linked, (len(entry.path), entry.path))
                    elif not skip(entry.name):
                        folders.append(entry.path)
        except OSError:
            continue  # as os.walk() does
        yield folder, names


def find_images(source: Path) -> list[str]:
    """The images in a folder and its subfolders or in a txt list, or `source` itself. UserError if it is missing."""
    if source.is_dir():
        return [os.path.join(folder, name) for folder, names in walk(source) for name in names
                if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    if not source.is_file():
        raise UserError(f"{source}: no such folder, list or image; correct the data yaml")
    if source.suffix.lower() != ".txt":
        return [str(source)] if source.suffix.lower() in IMAGE_SUFFIXES else []
    return [str(listed_path(source.parent, line)) for line in read_lines(source)]


def path_order(path: str) -> str:
    """The key by which paths sort as Path does, folder by folder: no separator may come after a letter."""
    return os.path.normcase(path).replace(os.sep, "\0")


def listed_path(folder: Path, line: str) -> Path:
    """A path in a list in `folder`: relative to the folder, or to the working directory if only that file exists."""
    beside = find_below(folder, line)
    return beside if os.path.exists(beside) or not os.path.exists(line) else Path(line).absolute()


def find_below(base: Path, text: str) -> Path:
    """base / text. A path of Windows is looked for with this system's separators, and without its first folders."""
    path = base / text
    if "\\" not in text or os.path.exists(path):
        return path
    foreign = PureWindowsPath(text)
    parts = foreign.parts[1:] if foreign.anchor else foreign.parts
    ends = [base.joinpath(*parts[i:]) for i in range(len(parts) if foreign.anchor else 1)]
    return next((end for end in ends if os.path.exists(end)), path)


def label_path(image: Path) -> Path:
    """.../images/a/b.jpg -> .../labels/a/b.txt: the last folder called images counts; without one, beside the image.

    Images and Labels may be written in any case; where both are there, lower case counts.
    """
    return Path(next(label_files([str(image)])))


def label_files(images: Iterable[str]) -> Iterator[str]:
    """label_path() of each image. Neighbours mostly share their folder, which is looked at once."""
    before = labels = None
    for image in images:
        folder, name = os.path.split(image)
        if folder != before:
            before, labels = folder, _label_folder(folder)
        yield os.path.join(labels or "", f"{os.path.splitext(name)[0]}.txt")


def _label_folder(folder: str) -> str:
    usual, parts = folder, folder.split(os.sep)
    if "images" in parts:
        at = _last(parts, "images")
        usual = os.sep.join([*parts[:at], "labels", *parts[at + 1:]])
        if os.path.isdir(usual):
            return usual
    lower = [part.lower() for part in parts]
    if "images" not in lower:
        return usual
    at = _last(lower, "images")
    above = os.sep.join(parts[:at]) or os.sep
    beside = sorted(os.listdir(above)) if os.path.isdir(above) else []
    others = (os.path.join(above, name, *parts[at + 1:]) for name in beside if name.lower() == "labels")
    return next(filter(os.path.isdir, others), usual)


def _last(parts: Sequence[str], name: str) -> int:
    return len(parts) - 1 - parts[::-1].index(name)


def _opened(path: Path) -> BinaryIO:
    """A file, open to be read. OSError if it is a pipe or a device, which one could wait for without end."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(handle, "rb")


def label_text(path: Path) -> str | None:
    """What a label file says; nothing where there is none, None where it is no text. UserError if it can't be read."""
    try:
        with _opened(path) as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); remove it or mend its permissions") from None
    try:
        return decoded(data, path)
    except UserError:
        return None


def label_reading(images: Sequence[str]) -> str:
    """What rows of more than five numbers mean in the labels of some images: see labels.reading_of()."""
    sample = images[::-(-len(images) // SAMPLED_FILES)]
    return reading_of(label_text(Path(file)) or "" for file in label_files(sample))


def why_unlabelled(images: Iterable[Path], problems: Mapping[str, int], examples: Mapping[str, str]) -> str:
    """Why no image has a label: what happened to most of them, by the scan's `problems`, with an example, and the mend.

    examples: an image that has each problem.
    """
    lost = {what: problems[what] for what in LABEL_LOSSES if what in problems}
    if not lost:
        files = [Path(file) for file in label_files(map(str, images))]
        missing = sum(not file.is_file() for file in files)
        if missing < len(files):
            return f"{len(files) - missing} label files are empty, {missing} are missing"
        return f"there are no label files, looked for {files[0]} and so on"
    what = max(lost, key=lambda key: lost[key])
    file = label_path(Path(examples[what]))
    lines = enumerate((label_text(file) or "").splitlines(), 1)
    rows = [f"line {number} of {file}: {line[:80]}" for number, line in lines
            if line.strip() and what in parse_labels(line, file, single_cls=True)[1]]
    return f"{lost[what]} {what}, e.g. {next(iter(rows), file)}; a row is class x y w h, in 0..1"


def read_header(path: Path) -> Header:
    """An image's size and orientation, mostly without decoding.

    One of UNREADABLE for a file that is not an image, or not a whole one as far as that is seen.
    """
    try:
        return _read_header(path)
    except UNREADABLE:
        raise
    except Exception as error:  # damaged files raise many kinds of exceptions in Pillow's parsers
        raise ValueError(f"damaged ({type(error).__name__})") from None


def _read_header(path: Path) -> Header:
    with _opened(path) as file, Image.open(file) as image:
        size, kind = image.size, image.format
        common = kind == "JPEG" or (kind == "PNG" and "16" not in str(image.tile))
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
    orientation = orientation if 1 <= orientation <= 8 else 1
    return Header(size[::-1] if orientation >= 5 else size, orientation, common)


def _ends_with(file: BinaryIO, mark: bytes) -> bool:
    """Whether a file ends with `mark`. Its position stays."""
    position = file.tell()
    file.seek(-len(mark), os.SEEK_END)
    matches = file.read() == mark
    file.seek(position)
    return matches


def decode(path: Path, orientation: int = 1) -> np.ndarray:
    """uint8 (h, w, 3) BGR of an image of any format, rotated by its EXIF orientation. UserError if that fails.

    The orientation is applied here and not by OpenCV, so that sizes and pixels agree in every format and version.
    Of 16 bits a channel those count that the image uses: 8, 10, 12, 14 or 16.
    """
    image = _stored_pixels(path)
    if image.dtype == np.uint16:
        image = (image >> (_used_bits(image) - 8)).astype(np.uint8)
    if orientation in (5, 6, 7, 8):  # mirrored along a diagonal; 6 to 8 need a flip as well
        image = cv2.transpose(image)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return image if flip is None else cv2.flip(image, flip)


def _stored_pixels(path: Path) -> np.ndarray:
    """uint8 or uint16 (h, w, 3) BGR of an image file. DamagedImageError if it holds nothing like that."""
    image = None
    try:
        data = np.fromfile(path, np.uint8)  # on Windows, cv2.imread can't open some file names
        if data.size:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); put it back or start again without it") from None
    except cv2.error:
        pass  # for some damaged files OpenCV raises, for others it returns None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise DamagedImageError(f"{path}: can't be decoded; replace it or remove it from the data set")
    return image


def _used_bits(image: np.ndarray) -> int:
    """How many of a channel's 16 bits hold the picture. Cameras write 10, 12 or 14 bits into files of 16."""
    bits = int(image.max()).bit_length()
    return max(bits + bits % 2, 8)


def reason_of(error: Exception, path: Path) -> str:
    """Why the image is UNREADABLE, in a few words and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if not os.path.exists(path):
        if re.search("(https?|rtsp):/", str(path)):
            return "an address, not a file: fetch it first"
        if os.sep == "/" and "\\" in str(path):
            return "no such file, its backslashes are of Windows"
    return str(getattr(error, "strerror", None) or error).removeprefix(f"{path}: ")


def scan_image(path: Path, nc: int | None = None, single_cls: bool = False, reading: str = "",
               whole: bool = True, labels: Path | None = None) -> Record:
    """Read an image and its labels. UserError for a class not below `nc`, or a label file that can't be read.

    reading: see parse_labels(). whole: decode the image whatever its format; else only where its header does not
    tell most damage. labels: label_path() where it is known.
    """
    no_labels = np.zeros((0, 5), np.float32)
    fewer_bits = False
    try:
        size, orientation, common = read_header(path)
        if whole or not common:
            pixels = _stored_pixels(path)
            fewer_bits = pixels.dtype == np.uint16 and _used_bits(pixels) < 16
    except UNREADABLE as error:
        reason = reason_of(error, path)
        return Record(path, (0, 0), 1, no_labels, Counter({"unreadable images skipped": 1}), reason)
    if min(size) < LEAST_IMAGE_SIDE:
        problems = Counter({f"images under {LEAST_IMAGE_SIDE} px skipped": 1})
        return Record(path, size, 1, no_labels, problems, f"{size[0]} x {size[1]} px")
    file = labels or label_path(path)
    text = label_text(file)
    boxes, problems = (no_labels, Counter({NO_TEXT: 1})) if text is None else parse_labels(
        text, file, nc, single_cls, reading)
    if fewer_bits:
        problems["images of fewer than 16 bits in files of 16 (scaled by the bits that they use)"] += 1
    return Record(path, size, orientation, boxes, problems)
