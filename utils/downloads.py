"""Downloading weights and data sets: only where a user names something that is missing, and whole or not at all."""
from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError
from utils.files import atomic, exclusive, scratch

TIMEOUT = 20         # seconds without data
BLOCK = 1 << 16      # bytes


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
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
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

    The archive holds a folder of that name, whose neighbours get beside `folder` unless something is there; or all of
    it belongs into `folder`. Errors and several processes as in fetch().
    """
    with exclusive(folder):
        if folder.exists():  # while this process has waited, another may have been here
            return
        print(f"{folder} is not there yet: fetching {url}")
        try:
            with scratch(folder) as temporary:
                archive, content = temporary / url.rpartition("/")[2], temporary / "content"
                fetch(url, archive, is_archive, mend)
                unpack(archive, content)
                _move(content, folder)
        except OSError as error:
            raise UserError(f"{folder}: can't be written ({error.strerror}); {mend}") from None


def _move(content: Path, folder: Path) -> None:
    """Put what was unpacked where it belongs; `folder` comes last, because it says that all is there."""
    inner = content / folder.name
    if not inner.is_dir():
        content.rename(folder)
        return
    for entry in content.iterdir():
        if entry != inner and not (folder.parent / entry.name).exists():
            entry.rename(folder.parent / entry.name)
    inner.rename(folder)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar* into `folder`. UserError, before anything is written, for members outside the folder."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                _refuse_outside(file.namelist(), archive, folder)
                file.extractall(folder)
            return
        with tarfile.open(archive) as tar:
            _refuse_outside(tar.getnames(), archive, folder)
            tar.extractall(folder, filter="data")  # refuses links out of the folder and devices, ignores owners
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:  # the last: encrypted
        raise UserError(f"{archive}: can't be unpacked ({error})") from None


def is_archive(path: Path) -> bool:
    """Whether this is a .zip or .tar* file."""
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def _refuse_outside(names: list[str], archive: Path, folder: Path) -> None:
    root = folder.resolve()
    for name in names:
        if not (root / name).resolve().is_relative_to(root):
            raise UserError(f"{archive}: refused, its member '{name}' would lie outside of {folder}")
