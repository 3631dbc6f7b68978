"""What the converters share: the plan of what goes where, the writing of it in YOLO layout, the report.

A converter fills a list of Items and a Tally of what it mended and left out. Only files that an earlier call made are
ever replaced, and the input is only read.
"""
from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from PIL import Image
from tqdm import tqdm

from utils.errors import UserError
from utils.image_files import read_header

MARKER = ".converted.json"     # in the output folder: the files that a converter has put there
YAML_TITLE = "# Written by data/scripts/"
MOST_NAMED = 10                # files named for each reason to leave them out

Corners = tuple[float, float, float, float]


@dataclass
class Tally:
    """What was mended and what was left out, by reason, and the files that were left out."""

    repaired: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    files: dict[str, list[str]] = field(default_factory=dict)

    def drop_file(self, reason: str, file: str | Path) -> None:
        self.dropped[reason] += 1
        self.files.setdefault(reason, []).append(str(file))


@dataclass(frozen=True)
class Item:
    """One picture to convert."""

    split: str
    source: Path                              # the image
    name: str                                 # its name in the output, without suffix
    boxes: tuple[tuple[str, Corners], ...]    # class name, x1 y1 x2 y2 in 0..1


class Skipped(Exception):
    """A file can't be used; the message is the reason."""


def displayed_size(path: Path) -> tuple[int, int]:
    """(w, h) of an image as the training will see it, after the EXIF rotation. Skipped if it is no image."""
    try:
        return read_header(path)[0]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise Skipped("image unreadable") from None


def free_name(stem: str, folder: Path, split: str, taken: set[tuple[str, str]], tally: Tally) -> str:
    """`stem`, with the folder's name before it, and then a number, as long as another picture of the split has it."""
    candidates = [stem, f"{folder.resolve().name}_{stem}", *(f"{stem}_{n}" for n in range(2, len(taken) + 3))]
    name = next(c for c in candidates if (split, c.casefold()) not in taken)
    tally.repaired["image renamed, its name was taken"] += name != stem
    taken.add((split, name.casefold()))
    return name


def check_output(out: Path, yaml_file: Path, sources: Iterable[Path], exist_ok: bool, given: str) -> None:
    """Refuse to write into what is not ours: the input, somebody's folder, somebody's yaml."""
    for source in sources:
        for target in (out, out / "images", out / "labels", yaml_file):
            ours, theirs = target.resolve(), source.resolve()
            if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
                flag = "--yaml" if target == yaml_file else "--out"
                raise UserError(f"{flag} {target}: overlaps with {given} {source}, which stays as it is; choose another")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose another name")
    if not exist_ok and out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"--out {out}: is not empty and not made by this program; choose another, or add --exist-ok")
    if not exist_ok and yaml_file.is_file() and not yaml_file.read_text("utf-8", "replace").startswith(YAML_TITLE):
        raise UserError(f"--yaml {yaml_file}: exists and is not by this program; choose another, or add --exist-ok")


def write(items: Sequence[Item], names: Sequence[str], out: Path, how: str) -> None:
    """Images and labels. What an earlier call put into `out` is removed first; what anybody else put there stays."""
    number = {name: i for i, name in enumerate(names)}
    files = {item: (f"images/{item.split}/{item.name}{item.source.suffix}", f"labels/{item.split}/{item.name}.txt")
             for item in items}
    _remove_earlier(out)
    out.mkdir(parents=True, exist_ok=True)
    # Before the first file: so a call that was interrupted can be repeated.
    (out / MARKER).write_text(json.dumps({"files": [f for pair in files.values() for f in pair]}), encoding="utf-8")
    for kind in ("images", "labels"):
        for split in {item.split for item in items}:
            (out / kind / split).mkdir(parents=True, exist_ok=True)
    for item, (image, label) in tqdm(files.items(), "writing", delay=1.0, leave=False, disable=None):
        _place(item.source, out / image, how)
        rows = [_row(number[name], box) for name, box in item.boxes if name in number]
        (out / label).unlink(missing_ok=True)
        (out / label).write_bytes("".join(rows).encode())  # bytes: \n on every system


def _row(number: int, box: Corners) -> str:
    x1, y1, x2, y2 = box
    return f"{number} {(x1 + x2) / 2:.6f} {(y1 + y2) / 2:.6f} {x2 - x1:.6f} {y2 - y1:.6f}\n"


def _remove_earlier(out: Path) -> None:
    try:
        files = json.loads((out / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{out / MARKER}: damaged; delete {out} and start again") from None
    for file in files:
        if file.startswith(("images/", "labels/")) and ".." not in Path(file).parts:
            (out / file).unlink(missing_ok=True)


def _place(source: Path, target: Path, how: str) -> None:
    target.unlink(missing_ok=True)  # it may be a link to the input, which must not be written through
    try:
        if how == "copy":
            shutil.copyfile(source, target)
        elif how == "link":
            target.symlink_to(source.resolve())
        else:
            os.link(source.resolve(), target)
    except OSError as error:
        mend = "free some space" if how == "copy" else "use --images copy"
        raise UserError(f"{target}: can't be written ({error.strerror}); {mend}") from None


def write_yaml(path: Path, out: Path, splits: Sequence[str], names: Sequence[str], by: str) -> None:
    """The data yaml; the data folder stands in it relative to the yaml, so that both can be moved together."""
    try:
        root = Path(os.path.relpath(out.resolve(), path.parent.resolve())).as_posix()
    except ValueError:  # another drive of a Windows machine
        root = out.resolve().as_posix()
    roles = {"train": next((s for s in ("train", "trainval") if s in splits), None),
             "val": next((s for s in ("val", "test", "train", "trainval") if s in splits), None),
             "test": "test" if "test" in splits else None}
    lines = [f"{YAML_TITLE}{by}", yaml.safe_dump({"path": root}, allow_unicode=True).rstrip()]
    for role, split in roles.items():
        if split:
            note = f"   # there is no val split: this is {split}" if role == "val" and split != "val" else ""
            lines.append(f"{role}: images/{split}{note}")
    body = yaml.safe_dump({"names": dict(enumerate(names))}, allow_unicode=True, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n" + body, encoding="utf-8")


def report(items: Sequence[Item], splits: Sequence[str], names: Sequence[str], found: Sequence[str],
           tally: Tally) -> str:
    """The table at the end, as text."""
    wanted = set(names)
    per_class = Counter(name for item in items for name, _ in item.boxes if name in wanted)
    lines = [f"{'split':<10} | {'images':>7} | {'boxes':>8}", f"{'-' * 10}-|-{'-' * 7}-|-{'-' * 8}"]
    for split in splits:
        chosen = [item for item in items if item.split == split]
        boxes = sum(name in wanted for item in chosen for name, _ in item.boxes)
        lines.append(f"{split:<10} | {len(chosen):>7} | {boxes:>8}")
    lines.append("classes: " + ", ".join(f"{name} {per_class[name]}" for name in names))
    for title, counter in (("repaired", tally.repaired), ("left out", tally.dropped)):
        lines += [f"{title}: {count} x {reason}" for reason, count in counter.most_common() if count]
    for reason, files in tally.files.items():
        rest = f" and {len(files) - MOST_NAMED} more" if len(files) > MOST_NAMED else ""
        lines.append(f"{reason}: {', '.join(files[:MOST_NAMED])}{rest}")
    lines += [f"note: no object of class '{name}' was found" for name in names if name not in found]
    return "\n".join(lines)
