"""Paths of runs and files that are written whole or not at all."""
from __future__ import annotations

import glob
import json
import os
import platform
import re
import shutil
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[1]
STALE = 3600  # seconds; what is half written and older than this belongs to a killed process
# What atomic() writes first: a machine, a process and a thread. The first two are missing in files of older versions.
HALF_WRITTEN = re.compile(r"\..+\.(?:slimming-(?P<machine>[0-9a-f]{8})-)?(?P<process>\d+)-\d+\.tmp")
MOST_REPEATED = 150  # bytes of a name that a temporary one repeats: file systems take 255
MOST_BYTES = 240  # of a result's name: file systems take 255, and _frame_crop.jpg may follow
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices on Windows, whatever the ending


def new_run_folder(project: str | Path, name: str = "exp", exist_ok: bool = False) -> Path:
    """Make and return project/name, or project/name2, name3 ... where that is taken and exist_ok is not given."""
    if not name:
        raise UserError("--name: is empty; give the run a name")
    base = Path(project) / name
    try:
        if exist_ok:
            base.mkdir(parents=True, exist_ok=True)
            return base
        for n in range(1, 100_000):
            folder = base if n == 1 else base.with_name(f"{base.name}{n}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"{base}: can't be made ({error.strerror}); choose another --project") from None
    raise UserError(f"{base}: too many runs; choose another --name")


def clipped(name: str, most: int) -> str:
    """The beginning of a file name, in whole letters and at most `most` bytes."""
    name = name[:most]
    while len(name.encode("utf-8", "replace")) > most:
        name = name[:-1]
    return name


def printable(text: str) -> str:
    """A text that can be shown and drawn: bytes of a file name that are no UTF-8 (surrogates) become ?.

    OpenCV crashes on them.
    """
    return text.encode("utf-8", "replace").decode()


def safe_name(text: str) -> str:
    """A text that comes from data, such as a class name, as the name of one file or folder on any system.

    What would lead elsewhere, can't be in a name, or has no form in this system's encoding becomes _. Two texts may get
    the same name: see UniqueNames.
    """
    encoding = sys.getfilesystemencoding()
    text = text.encode(encoding, "replace").decode(encoding)
    name = clipped(re.sub(r'[\x00-\x1f\x7f/\\<>:"|?*]', "_", text), MOST_BYTES).strip().rstrip(". ")
    return f"_{name}" if not name or RESERVED.fullmatch(name) else name


class UniqueNames:
    """File names of at most MOST_BYTES, one for each key: of keys with equal names the later ones get a number."""

    def __init__(self) -> None:
        self.names: dict[Any, str] = {}
        self.taken: set[str] = set()

    def __call__(self, key: Any, name: str, number: int = 2) -> str:
        """The key's name: `name`, or name_2, name_3 ... where that is taken; `number`: the first one to try."""
        if key not in self.names:
            candidate = clipped(name, MOST_BYTES)
            while os.path.normcase(candidate) in self.taken:
                candidate, number = f"{clipped(name, MOST_BYTES - 8)}_{number}", number + 1
            self.names[key] = candidate
            self.taken.add(os.path.normcase(candidate))
        return self.names[key]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for the block to write. It becomes `path` when the block ends well.

    Whatever happens, `path` is the old file or the new one, whole. What killed processes have left beside it goes.
    UserError where the disk refuses.
    """
    begin = clipped(path.name, MOST_REPEATED)
    temporary = path.with_name(f".{begin}.slimming-{_machine()}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_half_written(path.parent.absolute())
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: can't be written ({reason}); free some space or choose another folder") from error
    finally:
        with suppress(OSError):  # a parent is a file, say: the error above tells
            temporary.unlink(missing_ok=True)


@cache
def _machine() -> str:
    """Eight digits for this machine. Containers count: their process ids are their own."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{zlib.crc32(f'{platform.node()} {namespace}'.encode()):08x}"


@cache  # once in a process is enough, and a folder of very many files takes its time
def _remove_half_written(folder: Path) -> None:
    """Remove what processes have left that were killed while they wrote into this folder with atomic()."""
    with suppress(OSError):  # a folder that can be written but not read, or another process was faster
        for entry in os.scandir(folder):
            if (match := HALF_WRITTEN.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                dead = match["machine"] == _machine() and not _alive(int(match["process"]))
                if dead or time.time() - entry.stat().st_mtime > STALE:
                    os.unlink(entry.path)


def _alive(process: int) -> bool:
    """Does this process run? Unless that is certain the answer is yes."""
    if os.name != "posix":  # elsewhere the signal 0 is not a mere question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """The block has a run's folder to itself. UserError, with the number of the process, while another one has it.

    The lock is this process's, not that of its forks, and the system lets go of it when the process dies, however it
    does. Where there are no locks nobody is refused.
    """
    file = folder / ".in_use"
    try:
        descriptor = _lock(file, os.O_RDWR, lambda opened: fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        holder = "?"
        with suppress(OSError):
            holder = file.read_bytes().decode("utf-8", "replace").strip()
        raise UserError(f"{folder}: is in use by process {holder}; wait for its end, or choose another folder (--name)"
                        ) from None
    if descriptor is not None:
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {platform.node()}".encode())
    try:
        yield
    finally:
        _unlock(file, descriptor)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time is in this block for the same `path`; the others wait.

    The system lets go of the lock when its holder dies. Where there are no locks (Windows, some network drives, a
    folder that can't be written) nobody waits.
    """
    file = path.with_name(f".{path.name}.lock")
    descriptor = _lock(file, os.O_RDONLY, lambda opened: fcntl.flock(opened, fcntl.LOCK_EX))
    try:
        yield
    finally:
        _unlock(file, descriptor)


def _lock(file: Path, mode: int, take: Callable[[int], None]) -> int | None:
    """Descriptor of the lock file, which this process now holds; None where there are no locks.

    take: gets the descriptor, and waits for the lock or raises BlockingIOError or PermissionError if another has it.
    """
    if fcntl is None:
        return None
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, mode | os.O_CREAT, 0o644)
        except OSError:
            return None
        try:
            take(descriptor)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        os.close(descriptor)  # the holder before has removed the file: others may hold a new one


def _unlock(file: Path, descriptor: int | None) -> None:
    if descriptor is not None:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to build it in, which is removed in the end. OSError where the disk refuses.

    Folders that killed processes have left go, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # another process may have removed it
            if time.time() - leftover.stat().st_mtime > STALE:
                shutil.rmtree(leftover, ignore_errors=True)
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder for the block to fill. It becomes `path` when the block ends well.

    A folder that is there already is replaced if it holds nothing but files of the same names. UserError otherwise, and
    where the disk refuses.
    """
    try:
        with scratch(path) as new:
            yield new
            if path.exists():
                strangers = {p.name for p in path.iterdir()} - {p.name for p in new.iterdir()}
                if strangers:
                    raise UserError(f"{path}: holds {min(strangers)}, which is not of an export; move it away")
                path.rename(new.with_name(f"{new.name}.old"))
            new.rename(path)
            shutil.rmtree(new.with_name(f"{new.name}.old"), ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: can't be written ({reason}); free some space or choose another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. What UTF-8 has no form for, in the names of some files, is written as \\udcff.

    In JSON that is what it means.
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, data: dict) -> None:
    """Write plain data as yaml in its own order, atomically."""
    write_text(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def newest(*patterns: str) -> Path | None:
    """The most recently written file that matches one of these glob patterns, or None."""
    files = [p for pattern in patterns for p in map(Path, glob.glob(pattern)) if p.is_file()]
    return max(files, key=lambda p: p.stat().st_mtime) if files else None


def command_script() -> str:
    """Name of the script that runs now."""
    return Path(sys.argv[0]).name


def command_line() -> str:
    """The command that runs now, for the checkpoint's record."""
    return " ".join(["python", command_script(), *sys.argv[1:]])


def copy_file(source: Path, path: Path) -> None:
    """Copy a file atomically."""
    with atomic(path) as temporary:
        shutil.copyfile(source, temporary)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
