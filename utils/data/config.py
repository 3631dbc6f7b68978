"""The data yaml: where the images are, the names of the classes, settings that suit the set."""
from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from utils.data.image_files import find_below
from utils.errors import UserError
from utils.files import ROOT
from utils.text import read_yaml_mapping

SPLITS = ("train", "val", "test")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class DataConfig:
    """A data yaml, read and checked. Paths are absolute; a split that the yaml does not mention is empty."""

    file: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...]
    names: dict[int, str]
    defaults: dict[str, Any] = field(default_factory=dict)  # settings that suit this set, e.g. imgsz and epochs

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)


def read_data(path: str | Path, needed: Sequence[str] = ("train", "val")) -> DataConfig:
    """Read a data yaml; draw the built-in set, or download an archive, where the yaml says so and images are missing.

    Nothing in the file is ever executed. UserError where the file is missing or contradicts itself, and where the
    images of a split that is `needed` are missing: who only validates has no training images.
    """
    yaml_path = Path(path)
    places = [yaml_path, ROOT / yaml_path, ROOT / "data" / yaml_path]
    places += [folder / "data.yaml" for folder in places]
    file = next((p for p in places if p.is_file()), yaml_path).absolute()
    if file.is_dir():
        raise UserError(f"--data {path}: is a folder without a data.yaml; give the data yaml itself")
    content = read_yaml_mapping(file, "--data", texts=("path", "names", *SPLITS))
    root = _find_root(file, content)
    names = _read_names(file, content)
    if not content.get("train") and not content.get("val"):
        raise UserError(f"{file}: has neither 'train:' nor 'val:'; give each a folder of images, or a list (.txt)")
    defaults = content.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise UserError(f"{file}: 'defaults:' must be a mapping 'key: value'")
    _make_builtin(file, content, root)
    _download(file, content, root)
    splits = {split: _find_sources(file, content, root, split) for split in SPLITS}
    for split in needed:
        for source in splits[split]:
            if not os.path.exists(source):
                raise UserError(f"{file}: {split}: {source} does not exist; {_remedy(content, source)}")
    return DataConfig(file, splits["train"], splits["val"], splits["test"], names, dict(defaults))


def set_of_classes(names: Mapping[int, str], files: Sequence[str]) -> Path | None:
    """The first of these data yamls of the repository that names the same classes. Nothing is drawn or downloaded."""
    for file in (ROOT / name for name in files):
        if not other_names(_read_names(file, read_yaml_mapping(file, "--data", texts=("names",))), names):
            return file
    return None


def other_names(now: Mapping[int, str], before: Mapping[int, str]) -> str:
    """How the classes of a data set differ from those before, as a sentence's predicate; "" where they do not."""
    if len(now) != len(before):
        return f"names {len(now)} classes, not {len(before)}"
    pairs = zip(now.items(), before.values())
    return next((f"calls class {number} '{name}', not '{was}'" for (number, name), was in pairs if name != was), "")


def _find_root(file: Path, content: dict[str, Any]) -> Path:
    """The folder `path:`: beside the yaml, in the repository, or in `datasets` beside the repository.

    A set whose absolute path is gone was moved: if its images are beside the yaml, they are taken.
    """
    folder = content.get("path") or "."
    if not isinstance(folder, str):
        raise UserError(f"{file}: 'path:' must be a folder, not {str(folder)[:40]}")
    # A path of Windows is tried as it is written, and with this system's separators.
    tails = [Path(os.path.expanduser(text)) for text in dict.fromkeys((folder, folder.replace("\\", "/")))]
    candidates = [base / tail for tail in tails for base in (file.parent, ROOT, ROOT.parent / "datasets")]
    # If none exists yet: a yaml in data/ means a folder of the repository; others, and the built-in set, one beside it.
    relative_to_repository = file.parent == ROOT / "data" and not content.get("builtin")
    default = candidates[1] if relative_to_repository else candidates[0]
    from_elsewhere = tails[-1].is_absolute() or PureWindowsPath(folder).drive
    around = [p / tails[-1].name for p in (file.parent, file.parent.parent)]
    existing = [p for p in candidates if os.path.isdir(p)]
    holding = [p for p in (*existing, *((file.parent, *around) if from_elsewhere else ())) if _holds_images(p, content)]
    return Path(os.path.realpath((holding or existing or [default])[0]))


def _holds_images(root: Path, content: dict[str, Any]) -> bool:
    """Whether the images of train or val are in `root`."""
    entries = [entry for split in ("train", "val") for entry in _entries(content, split)]
    return any(os.path.exists(_find_source(root, entry)) for entry in entries if not Path(entry).is_absolute())


def _read_names(file: Path, content: dict[str, Any]) -> dict[int, str]:
    """`names:` as {0: name, 1: name ...}, checked against the optional `nc:`."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise UserError(f"{file}: needs 'names:', the list of its classes, e.g. names: [cat, dog]")
    numbered = {int(k): name for k, name in names.items() if str(k).isdecimal() and len(str(k)) < 10}
    if set(numbered) != set(range(len(names))):
        raise UserError(f"{file}: 'names:' must number its {len(names)} classes 0 to {len(names) - 1} without a gap")
    for number, name in numbered.items():
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{file}: 'names:' class {number} must be a name, not {str(name)[:40]!r}")
    nc = content.get("nc")
    if nc is not None and str(nc).strip() != str(len(names)):
        raise UserError(f"{file}: says nc: {nc} but names {len(names)} classes; mend one of them, or leave 'nc:' out")
    return {number: numbered[number] for number in sorted(numbered)}


def _make_builtin(file: Path, content: dict[str, Any], root: Path) -> None:
    """`builtin: shapes`: draw the images, unless they are there already."""
    builtin = content.get("builtin")
    if builtin is None:
        return
    if builtin != "shapes":
        raise UserError(f"{file}: builtin: {builtin!r} is unknown; the built-in data set is 'shapes'")
    from utils.data.shapes import generate

    try:
        generate(root)
    except OSError as error:
        raise UserError(f"{root}: the built-in data set can't be written there ({error.strerror}); "
                        f"change 'path:' in {file}") from None


def _download(file: Path, content: dict[str, Any], root: Path) -> None:
    """`download:` with the URL of an archive: download and unpack it as `root`, if that is missing."""
    url = _archive_url(content)
    if url and not root.exists():
        from utils.downloads import fetch_folder

        if any(re.match(r"\.+[^.]", part) for part in Path(str(content.get("path") or ".")).parts):
            raise UserError(f"{file}: 'path: {content['path']}' is hidden; give a visible folder to unpack into")
        fetch_folder(url, root, f"fetch it elsewhere and unpack it into {root.parent}, or correct 'path:' in {file}")


def _archive_url(content: dict[str, Any]) -> str:
    """`download:` if it is the URL of an archive, else "": in YOLOv5's yamls it may be a script, which is never run."""
    text = str(content.get("download") or "").strip()
    is_url = text.startswith(("http://", "https://")) and "\n" not in text
    return text if is_url and text.endswith(ARCHIVE_SUFFIXES) else ""


def _find_sources(file: Path, content: dict[str, Any], root: Path, split: str) -> tuple[Path, ...]:
    """The absolute paths of a split: folders, txt lists or single images."""
    entry, entries = content.get(split), _entries(content, split)
    if (entry or entry == "") and not entries:
        raise UserError(f"{file}: '{split}:' must be a folder, a list (.txt) or several of these, "
                        f"not {str(entry)[:40]!r}")
    return tuple(_find_source(root, e) for e in entries)


def _entries(content: dict[str, Any], split: str) -> list[str]:
    """What the yaml says of a split; [] where that is nothing, or nonsense."""
    entry = content.get(split)
    entries = [entry] if isinstance(entry, str) else entry
    return entries if isinstance(entries, list) and all(isinstance(e, str) and e for e in entries) else []


def _find_source(root: Path, entry: str) -> Path:
    source = find_below(root, os.path.expanduser(entry))
    # Some labelling services export '../train/images' where the folder is beside the yaml.
    beside = find_below(root, entry.removeprefix("../").removeprefix("..\\"))
    chosen = beside if not os.path.exists(source) and os.path.exists(beside) else source
    # Symbolic links are not followed: labels are looked for beside the link.
    return Path(os.path.normpath(chosen))


def _remedy(content: dict[str, Any], source: Path) -> str:
    """What to do about the missing images at `source`, as the end of a sentence."""
    if os.sep == "/" and "\\" in str(source):
        return "its backslashes are of Windows, write / in the yaml"
    if url := _archive_url(content):
        return f"fetch {url} and unpack it there, or correct 'path:'"
    if content.get("download"):
        return "fetch the images yourself (what stands under 'download:' is not run), or correct 'path:'"
    return "correct 'path:' or the entry"
