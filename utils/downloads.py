"""Downloading weights and data sets: only where a user names something that is missing, and whole or not at all."""
from __future__ import annotations

import re
import shutil
import site
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

from tqdm import tqdm

from utils.errors import UserError, first_line
from utils.files import ROOT, atomic, exclusive, scratch

TIMEOUT = 20         # seconds without data
BLOCK = 1 << 16      # bytes
# What an archive may bring: images, labels, lists and texts, but nothing that Python or another program would run.
ENDINGS = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp", ".csv", ".json", ".md", ".txt",
                     ".xml", ".yaml", ".yml"})
T = TypeVar("T")


def fetch(url: str, path: Path, check: Callable[[Path], bool], mend: str) -> None:
    """Download `url` to `path`, which is missing, through a temporary file that must pass `check`.

    Of processes that do this at the same time one downloads and the others wait. UserError with the URL and `mend`
    (what to do instead) where that fails; nothing is left behind.
    """
    with exclusive(path):
        if not path.exists():  # while this process has waited, another may have been here
            _fetch(url, path, check, mend)


def _fetch(url: str, path: Path, check: Callable[[Path], bool], mend: str) -> None:
    from http.client import HTTPException  # here, because every script starts without them
    from urllib.error import URLError

    with atomic(path) as temporary:
        try:
            size = _receive(url, temporary, path.name)
        except (URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as error:  # the last: no address
            reason = getattr(error, "reason", None) or error
            raise UserError(f"{url}: can't be fetched ({reason}); {mend}") from None
        received = temporary.stat().st_size
        if size and received != size:
            raise UserError(f"{url}: cut off after {received} of {size} bytes; try again, or {mend}")
        if not check(temporary):
            raise UserError(f"{url}: answered with something else than {path.name}; {mend}")


def _receive(url: str, path: Path, title: str) -> int:
    """Write the response to `path`; return the size that the server announced, or 0."""
    from urllib.request import urlopen

    with urlopen(url, timeout=TIMEOUT) as answer, open(path, "wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=f"fetching {title}", disable=None) as bar:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    return size


def fetch_folder(url: str, folder: Path, mend: str) -> None:
    """Download an archive and unpack it, so that `folder`, which is missing, is there whole or not at all.

    The archive holds a folder of that name, whose neighbours get into it unless something is there; or all of it
    belongs into `folder`. Nothing of it gets anywhere else. UserError also for a folder that Python imports from.
    Errors and several processes as in fetch().
    """
    _refuse_imported(folder, mend)
    with exclusive(folder):
        if folder.exists():  # while this process has waited, another may have been here
            return
        print(f"{folder} is not there yet: fetching {url}")
        try:
            with scratch(folder) as temporary:
                archive, content = temporary / "archive", temporary / "content"
                fetch(url, archive, is_archive, mend)
                if left_out := unpack(archive, content):
                    print(f"{url}: {left_out} files are left out, which are no images, labels or texts")
                if not any(content.iterdir()):
                    raise UserError(f"{url}: holds no images and labels; {mend}")
                inner = content / folder.name
                if inner.is_dir():
                    for entry in content.iterdir():
                        if entry != inner and not (inner / entry.name).exists():
                            entry.rename(inner / entry.name)
                    content = inner
                content.rename(folder)
        except OSError as error:
            raise UserError(f"{folder}: can't be written ({error.strerror}); {mend}") from None


def _refuse_imported(folder: Path, mend: str) -> None:
    """UserError for a folder that Python imports from, or that holds such a one or is in a package."""
    folder = folder.resolve()
    places = [Path(entry).resolve() for entry in (str(ROOT), *sys.path, site.getusersitepackages())]
    packages = [p for p in folder.parents if p.name in ("site-packages", "dist-packages")
                or (p.is_relative_to(ROOT) and (p / "__init__.py").exists())]
    if packages or any(place.is_relative_to(folder) for place in places):
        raise UserError(f"{folder}: no archive is unpacked there, for Python imports from it; {mend}")


def unpack(archive: Path, folder: Path) -> int:
    """Write the files of a .zip or .tar* that have one of ENDINGS into `folder`; returns how many are left out.

    Hidden files don't count: they are notes of the system that packed them. No link is made: one to a file of the
    archive becomes a copy. UserError, before anything is written, for members and links that lead outside, and for
    more than the disk has room for.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                files = {member.filename: member for member in packed.infolist() if not member.is_dir()}
                return _write_members(archive, folder, files, packed.open, attrgetter("file_size"))
        with tarfile.open(archive) as tar:
            members = {member.name: member for member in tar.getmembers() if not member.isdir()}
            for member in members.values():
                tarfile.data_filter(member, str(folder))  # refuses links out of the folder, and devices
            return _write_members(archive, folder, members, tar.extractfile, attrgetter("size"))
    except (OSError, UserError):
        raise
    except Exception as error:  # damaged, encrypted, of an unknown compression, links in a circle: many kinds
        raise UserError(f"{archive}: can't be unpacked ({first_line(error)})") from None


def _write_members(archive: Path, folder: Path, members: Mapping[str, T],
                   open_member: Callable[[T], IO[bytes] | None], size: Callable[[T], int]) -> int:
    """Write an archive's files, by their names in it, into the new `folder`; returns how many are left out."""
    targets = {name: PurePosixPath(name.replace("\\", "/")) for name in members}  # some programs write Windows' paths
    for name, target in targets.items():
        if target.is_absolute() or ".." in target.parts or re.match("[A-Za-z]:", name):
            raise UserError(f"{archive}: refused, its member '{name}' would lie outside of {folder}")
    need, free = sum(map(size, members.values())), shutil.disk_usage(folder.parent).free
    if need > free:
        raise UserError(f"{archive}: holds {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free beside {folder}; free "
                        "some space or choose another 'path:'")
    folder.mkdir(parents=True)
    left_out = 0
    for name, target in targets.items():
        if any(part.startswith((".", "__MACOSX")) for part in target.parts):
            continue
        source = None
        if target.suffix.lower() in ENDINGS:
            with suppress(KeyError):  # a link to something that is not in the archive
                source = open_member(members[name])
        if source is None:
            left_out += 1
            continue
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        with source, open(folder / target, "wb") as file:
            shutil.copyfileobj(source, file)
    return left_out


def is_archive(path: Path) -> bool:
    """Whether this is a .zip or .tar* file."""
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except Exception:  # a damaged one raises many kinds
        return False
