"""The data yaml: where images are, what the classes are called, which settings suit the set."""
from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import ROOT, read_yaml_mapping

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DataConfig:
    """A data yaml, read and checked. Paths are absolute; a split that the yaml does not mention is empty."""

    file: Path
    root: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...]
    names: dict[int, str]
    defaults: dict[str, Any] = field(default_factory=dict)  # settings that suit this set, e.g. imgsz and epochs
    raw: dict[str, Any] = field(default_factory=dict)       # everything that the yaml says

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)


def read_data(path: str | Path) -> DataConfig:
    """Read a data yaml; the built-in set is generated when its images are not there yet.

    Nothing in the file is ever executed. Raises UserError where the file is missing or says something impossible, and
    where the images of train or val are missing. (Those of test are missed by whoever uses them: many sets lack them.)
    """
    given = Path(path)
    file = next((p for p in (given, ROOT / given, ROOT / "data" / given) if p.is_file()), given).absolute()
    raw = read_yaml_mapping(file, "--data")
    root = _find_root(file, raw)
    names = _read_names(file, raw)
    if not raw.get("train") and not raw.get("val"):
        raise UserError(f"{file}: has neither 'train:' nor 'val:'; give each a folder of images, or a list (.txt)")
    defaults = raw.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise UserError(f"{file}: 'defaults:' must be a mapping 'key: value'")
    _make_builtin(file, raw, root)
    _download(file, raw, root)
    splits = {split: _find_sources(file, raw, root, split) for split in SPLITS}
    for split in ("train", "val"):
        for source in splits[split]:
            if not source.exists():
                raise UserError(f"{file}: {split}: {source} does not exist; {_remedy(raw)}")
    return DataConfig(file, root, splits["train"], splits["val"], splits["test"], names, dict(defaults), raw)


def _find_root(file: Path, raw: dict[str, Any]) -> Path:
    """`path:`, looked for beside the yaml, in the repository and in the `datasets` folder beside the repository."""
    given = raw.get("path") or "."
    if not isinstance(given, str):
        raise UserError(f"{file}: 'path:' must be a folder, not {given!r}")
    tail = Path(given).expanduser()
    candidates = [base / tail for base in (file.parent, ROOT, ROOT.parent / "datasets")]
    # The yamls of this repository mean a folder beside it; where nothing is there yet, it is going to be made there.
    return next((p for p in candidates if p.is_dir()), candidates[1 if file.parent == ROOT / "data" and not raw.get("builtin") else 0]).resolve()


def _read_names(file: Path, raw: dict[str, Any]) -> dict[int, str]:
    """`names:` as {0: name, 1: name ...}, checked against the optional `nc:`."""
    names = raw.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise UserError(f"{file}: needs 'names:', the list of its classes, e.g. names: [cat, dog]")
    if any(isinstance(k, bool) or not isinstance(k, int) for k in names) or set(names) != set(range(len(names))):
        raise UserError(f"{file}: 'names:' must number its {len(names)} classes 0 to {len(names) - 1} without a gap")
    nc = raw.get("nc")
    if nc is not None and nc != len(names):
        raise UserError(f"{file}: says nc: {nc} but names {len(names)} classes; mend one of them, or leave 'nc:' out")
    return {k: str(names[k]) for k in sorted(names)}


def _make_builtin(file: Path, raw: dict[str, Any], root: Path) -> None:
    """`builtin: shapes` = draw the images unless an earlier call has finished doing so."""
    builtin = raw.get("builtin")
    if builtin is None:
        return
    if builtin != "shapes":
        raise UserError(f"{file}: builtin: {builtin!r} is unknown; the built-in data set is 'shapes'")
    from utils.shapes import generate

    try:
        generate(root)
    except OSError as error:
        raise UserError(f"{root}: the built-in data set can't be written there ({error.strerror}); "
                        f"change 'path:' in {file}") from None


def _download(file: Path, raw: dict[str, Any], root: Path) -> None:
    """`download:` with the address of an archive = fetch and unpack it beside `path`'s folder, if that is missing."""
    url = _archive_address(raw)
    if root.exists() or not url:
        return
    from utils.downloads import fetch, is_archive, unpack

    archive = root.parent / url.rpartition("/")[2]
    print(f"{root} is not there yet: fetching {url}")
    fetch(url, archive, is_archive, f"fetch it elsewhere and unpack it into {root.parent}, or correct 'path:' in {file}")
    try:
        unpack(archive, root.parent)
    finally:
        archive.unlink(missing_ok=True)


def _archive_address(raw: dict[str, Any]) -> str:
    """What stands under `download:` if it is the address of an archive; commands are never run."""
    text = str(raw.get("download") or "").strip()
    return text if text.startswith(("http://", "https://")) and "\n" not in text and text.endswith((".zip", ".tar", ".tar.gz", ".tgz")) else ""


def _find_sources(file: Path, raw: dict[str, Any], root: Path, split: str) -> tuple[Path, ...]:
    """The absolute paths of a split: folders, txt lists or single images."""
    entry = raw.get(split)
    entries = [entry] if isinstance(entry, str) else entry or []
    if not isinstance(entries, list) or not all(isinstance(e, str) and e for e in entries):
        raise UserError(f"{file}: '{split}:' must be a folder, a list (.txt) or several of these, not {entry!r}")
    return tuple(_find_source(root, e) for e in entries)


def _find_source(root: Path, entry: str) -> Path:
    source = root / Path(entry).expanduser()
    # Some labelling services export '../train/images' where the folder lies beside the yaml.
    beside = root / entry.removeprefix("../")
    chosen = beside if not source.exists() and beside.exists() else source
    # Links are not followed: the labels are looked for beside the link, where the user has put them.
    return Path(os.path.normpath(chosen))


def _remedy(raw: dict[str, Any]) -> str:
    """What to do about missing images, in half a sentence."""
    if url := _archive_address(raw):
        return f"fetch {url} and unpack it there, or correct 'path:'"
    if raw.get("download"):
        return "fetch the images yourself (what stands under 'download:' is not run), or correct 'path:'"
    return "correct 'path:' or the entry"
