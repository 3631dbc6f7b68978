"""Fetching weights and data sets: only when a user names something that is missing, and whole or not at all."""
from __future__ import annotations

import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError

TIMEOUT = 20         # seconds without a byte
BLOCK = 1 << 16


def fetch(url: str, path: Path, check: Callable[[Path], bool], mend: str) -> None:
    """Fetch `url` into `path`, through a temporary file that must pass `check`.

    UserError, one line with the address and `mend` (what to do instead), where that fails; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(temporary, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=f"fetching {path.name}", disable=None) as bar:
                while block := answer.read(BLOCK):
                    file.write(block)
                    bar.update(len(block))
        if size and temporary.stat().st_size != size:
            raise UserError(f"{url}: cut off after {temporary.stat().st_size} of {size} bytes; try again, or {mend}")
        if not check(temporary):
            raise UserError(f"{url}: answered with something else than {path.name}; {mend}")
        os.replace(temporary, path)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: can't be fetched ({reason}); {mend}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); {mend}") from None
    finally:
        temporary.unlink(missing_ok=True)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar* into `folder`. UserError for members that would lie outside of it, before anything is written."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                _refuse_outside(file.namelist(), archive, folder)
                file.extractall(folder)
            return
        with tarfile.open(archive) as tar:
            _refuse_outside(tar.getnames(), archive, folder)
            tar.extractall(folder, filter="data")  # no links out of the folder, no devices, no owners
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive}: can't be unpacked ({error})") from None


def is_archive(path: Path) -> bool:
    """Is this a .zip or .tar* file?"""
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def _refuse_outside(names: list[str], archive: Path, folder: Path) -> None:
    root = folder.resolve()
    for name in names:
        if not (root / name).resolve().is_relative_to(root):
            raise UserError(f"{archive}: refused, its member '{name}' would lie outside of {folder}")
