"""What the converters share: common flags, the plan of what is converted, writing it in YOLO layout, the report.

A converter fills a Plan, and write_data_set() does what it says. Only files that an earlier call has made are ever
replaced, and the input is only read.
"""
from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from utils.data.image_files import IMAGE_SUFFIXES, UNREADABLE, read_header
from utils.errors import OneLineParser, UserError
from utils.files import write_json, write_text
from utils.tables import text_table
from utils.text import read_bytes, read_json

SPLITS = ("train", "val", "trainval", "test")
# What folders and files of a split are called, in lower case.
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "trainval": "trainval", "test": "test", "testing": "test"}
MARKER = ".converted.json"     # in the output folder: lists the files that a converter has written
YAML_TITLE = "# Written by data/scripts/"
TRAIN_COMMAND = "python train.py --data {} --weights yolov5n.pt --adam"  # what comes next; the README has it, too
LONGEST_STEM = 250             # bytes of a file name: file systems take 255, with the suffix
SAME_SHAPE = 0.01              # by how much the aspect of an image that was scaled may differ: rounding
MOST_REASONS = 5               # that a message gives
MOST_NAMED = 10                # files that the report names for each reason to leave them out

Corners = tuple[float, float, float, float]
Box = tuple[str, Corners]      # class name and x1, y1, x2, y2, normalised


class Skipped(Exception):
    """A file or a box can't be used; the message is the reason."""


class Item(NamedTuple):
    """One image to convert."""

    split: str
    source: Path       # the image in the input
    image: str         # its path in the output folder
    label: str         # and that of its label file
    boxes: list[Box]


@dataclass
class Plan:
    """The images to convert and their boxes, and what was repaired or left out, counted by reason."""

    items: list[Item] = field(default_factory=list)
    class_names: set[str] = field(default_factory=set)          # names of the classes in the input
    repaired: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    files: dict[str, list[str]] = field(default_factory=dict)   # reason -> files that were left out
    taken: set[str] = field(default_factory=set)                # label paths of `items`, in lower case
    sources: set[Path] = field(default_factory=set)             # their images

    @contextmanager
    def skipping(self, file: Path | None = None) -> Iterator[None]:
        """Go on where the block raises Skipped; count it, and remember the file for the report."""
        try:
            yield
        except Skipped as reason:
            self.dropped[str(reason)] += 1
            if file:
                self.files.setdefault(str(reason), []).append(str(file))

    def add(self, split: str, source: Path, stem: str, folder: str, boxes: Sequence[Box]) -> None:
        """Add an image with its boxes, without duplicates.

        Its name is `stem`; if another image of the split has that, `folder`_`stem`, or else `stem` and a number.
        """
        unique = list(dict.fromkeys(boxes))
        self.dropped["box given twice"] += len(boxes) - len(unique)
        self.class_names.update(name for name, _ in unique)
        short = stem[:60] if len(os.fsencode(stem)) > LONGEST_STEM - 10 else stem  # at most 4 bytes a letter
        names = itertools.chain([stem, f"{folder}_{stem}"], (f"{short}_{n}" for n in itertools.count(2)))
        name = next(name for name in names if f"labels/{split}/{name}.txt".casefold() not in self.taken
                    and (name == stem or len(os.fsencode(name)) <= LONGEST_STEM))
        self.repaired["image renamed, its name was taken"] += name != stem
        item = Item(split, source, f"images/{split}/{name}{source.suffix}", f"labels/{split}/{name}.txt", unique)
        self.taken.add(item.label.casefold())
        self.sources.add(source)
        self.items.append(item)

    def clip(self, pixels: Corners, size: tuple[int, int], slack: tuple[float, float]) -> Corners:
        """A box in pixels, cut at the edges of an image of `size` (w, h) and normalised. Skipped if it lies outside.

        slack: how many pixels beyond the left or top, and beyond the right or bottom edge, are not counted as repairs.
        """
        x1, y1, x2, y2 = pixels
        width, height = size
        if 0 < max(x2, y2) <= 1:
            raise Skipped("box within the first pixel (are its numbers parts of the image? write pixels)")
        inside = (max(x1, 0) / width, max(y1, 0) / height, min(x2, width) / width, min(y2, height) / height)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise Skipped("box outside the image")
        low, high = slack
        self.repaired["box cut at the image's edge"] += min(x1, y1) < -low or max(x2 - width, y2 - height) > high
        return inside

    def require_boxes(self, flag: str, names: Sequence[str]) -> None:
        """UserError, with the reasons, if no image, no box of `names`, or none of the training, is left to convert."""
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common(MOST_REASONS) if count)
        if not self.items:
            raise UserError(f"{flag}: no usable image ({reasons or 'the lists name none'})")
        boxes = Counter({item.split: 0 for item in self.items})
        boxes.update(item.split for item in self.items for name, _ in item.boxes if name in names)
        empty = [split for split in ("train", "trainval") if boxes.get(split) == 0]
        if empty or not boxes.total():
            where = f"{empty[0]}: " if empty and boxes.total() else ""
            raise UserError(f"{flag}: {where}no box is left ({reasons or 'the annotations hold none'})")


def numbers(values: Any) -> list[float]:
    """Finite numbers. Skipped if `values` are anything else."""
    try:
        floats = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        floats = [math.nan]
    if not all(map(math.isfinite, floats)):
        raise Skipped("box missing or not numeric")
    return floats


def four_numbers(values: Any) -> Corners:
    """Four finite numbers. Skipped if `values` are anything else."""
    floats = numbers(values)
    if len(floats) != 4:
        raise Skipped("box missing or not numeric")
    return floats[0], floats[1], floats[2], floats[3]


def last_part(path: str) -> str:
    """The file name of a path, of any system."""
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def displayed_size(path: Path) -> tuple[int, int]:
    """(w, h) of an image as the training will see it, after the EXIF rotation. Skipped if it is no image."""
    if not os.path.isfile(path):
        raise Skipped("image missing")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise Skipped(f"image whose name ends in '{path.suffix}', which trainings overlook")
    try:
        return read_header(path).size
    except UNREADABLE:
        raise Skipped("image unreadable") from None


def size_of_boxes(stated: Sequence[Any], size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) that an annotation's boxes refer to, in pixels.

    It is what the annotation states if the image has only been scaled since; otherwise the `size` of the image.
    """
    try:
        width, height = (float(side) for side in stated)
    except (OverflowError, TypeError, ValueError):
        return size
    scaled = width >= 1 and height >= 1 and abs(width * size[1] / (height * size[0]) - 1) <= SAME_SHAPE
    return (int(width), int(height)) if scaled else size


# Command line ---------------------------------------------------------------------------------------------------------

def converter_parser(description: str | None, *place: str) -> argparse.ArgumentParser:
    """A parser with the flags of every converter. `place`: older names of --place."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where images/ and labels/ go")
    add("--yaml", type=Path, metavar="FILE", help="the data yaml to write (OUT/data.yaml)")
    add("--place", *place, dest="place", choices=("copy", "link", "hardlink"), default="copy",
        help="how images get into OUT (copy)")
    add("--val-share", type=_share, default=0.2, help="share of val where the input knows no splits (0.2)")
    add("--seed", type=int, default=0, help="seed of that split (0)")
    add("--exist-ok", action="store_true", help="write into a folder, and over a yaml, that no converter made")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise UserError(f"--val-share {text}: must lie between 0 and 1")
    return value


def random_split(count: int, opt: argparse.Namespace) -> set[int]:
    """Which of `count` images are val, the others being train: a pure function of count, --val-share and --seed."""
    if count < 2:
        raise UserError("one image can't be split into train and val; give a second one")
    return set(random.Random(opt.seed).sample(range(count), min(max(round(opt.val_share * count), 1), count - 1)))


def check_output(opt: argparse.Namespace, sources: Iterable[Path], flag: str) -> None:
    """Fill in --yaml. UserError where the output would overwrite the input, given by `flag`, or a user's own files."""
    opt.yaml = opt.yaml or opt.out / "data.yaml"
    out, yaml_file = opt.out, opt.yaml
    for source in sources:
        for target in (out, out / "images", out / "labels", yaml_file):
            ours, theirs = target.resolve(), source.resolve()
            if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
                own = "--yaml" if target == yaml_file else "--out"
                raise UserError(f"{own} {target}: overlaps with {flag} {source}, which stays as it is; choose another")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose another name")
    if opt.exist_ok:
        return
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"--out {out}: is not empty and not made by this program; choose another, or add --exist-ok")
    if yaml_file.is_file() and not read_bytes(yaml_file).startswith(YAML_TITLE.encode()):
        raise UserError(f"--yaml {yaml_file}: exists and is not by this program; choose another, or add --exist-ok")


# Output ---------------------------------------------------------------------------------------------------------------

def write_data_set(plan: Plan, names: Sequence[str], opt: argparse.Namespace, script: str) -> str:
    """Write images, labels and the data yaml; return the report. Boxes of classes that are not in `names` are left out.

    UserError where something can't be written.
    """
    try:
        _write_files(plan.items, names, opt.out, opt.place)
    except OSError as error:
        where = error.filename or opt.out
        raise UserError(f"{where}: can't be written ({error.strerror}); choose another --out") from None
    splits = [split for split in SPLITS if any(item.split == split for item in plan.items)]
    write_text(opt.yaml, _yaml_text(opt.out, splits, names, script))
    return f"{_report(plan, splits, names)}\nnow: {TRAIN_COMMAND.format(shlex.quote(str(opt.yaml)))}"


def _write_files(items: Sequence[Item], names: Sequence[str], out: Path, how: str) -> None:
    """Write images and labels. The files of an earlier call are removed first, and no others."""
    number = {name: i for i, name in enumerate(names)}
    _remove_earlier(out)
    # The list of files comes first, so that an interrupted call can be repeated.
    files = [path for item in items for path in (item.image, item.label)]
    write_json(out / MARKER, {"files": files})
    for folder in {(out / path).parent for path in files}:
        folder.mkdir(parents=True, exist_ok=True)
    for item in tqdm(items, "writing", delay=1.0, leave=False, disable=None):
        _place(item.source, out / item.image, how)
        rows = [_row(number[name], box) for name, box in item.boxes if name in number]
        (out / item.label).unlink(missing_ok=True)
        (out / item.label).write_bytes("".join(rows).encode())  # bytes: \n on every system


def _row(number: int, box: Corners) -> str:
    x1, y1, x2, y2 = box
    return f"{number} {(x1 + x2) / 2:.6f} {(y1 + y2) / 2:.6f} {x2 - x1:.6f} {y2 - y1:.6f}\n"


def _remove_earlier(out: Path) -> None:
    """Remove the files that MARKER lists, as far as they are in `out`."""
    if not (out / MARKER).is_file():
        return
    data = read_json(out / MARKER)
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UserError(f"{out / MARKER}: damaged; delete {out} and start again")
    for file in files:
        # A folder in it may be a link, and so is the image where --place made one: only the latter goes.
        if (out / file).parent.resolve().is_relative_to(out.resolve()) and os.path.isfile(out / file):
            (out / file).unlink()


def _place(source: Path, target: Path, how: str) -> None:
    target.unlink(missing_ok=True)  # it may be a link to the input, and a copy would write through it
    try:
        if how == "copy":
            shutil.copyfile(source, target)
        elif how == "link":
            target.symlink_to(source.resolve())
        else:
            os.link(source.resolve(), target)
    except OSError as error:
        mend = "free some space" if how == "copy" else "use --place copy"
        raise UserError(f"{target}: can't be written ({error.strerror}); {mend}") from None


def _yaml_text(out: Path, splits: Sequence[str], names: Sequence[str], script: str) -> str:
    """The data yaml. YOLOv5 and ultralytics look for a relative path elsewhere, so `out` is absolute."""
    lines = [f"{YAML_TITLE}{script}", yaml.safe_dump({"path": out.resolve().as_posix()}, allow_unicode=True).rstrip()]
    preferred = {"train": ("train", "trainval"), "val": ("val", "test", "train", "trainval"), "test": ("test",)}
    for role, candidates in preferred.items():
        split = next((s for s in candidates if s in splits), None)
        if split:
            note = f"   # there is no val split: this is {split}" if role == "val" and split != "val" else ""
            lines.append(f"{role}: images/{split}{note}")
    lines.append(yaml.safe_dump({"names": dict(enumerate(names))}, allow_unicode=True, sort_keys=False))
    return "\n".join(lines)


def _report(plan: Plan, splits: Sequence[str], names: Sequence[str]) -> str:
    """What was converted, repaired and left out, as text."""
    images = Counter(item.split for item in plan.items)
    boxes = Counter((item.split, name) for item in plan.items for name, _ in item.boxes)
    rows = [(split, images[split], sum(boxes[split, name] for name in names)) for split in splits]
    lines = [text_table(rows, ("split", "images", "boxes"))]
    lines.append("classes: " + ", ".join(f"{name} {sum(boxes[split, name] for split in splits)}" for name in names))
    for title, counter in (("repaired", plan.repaired), ("left out", plan.dropped)):
        lines += [f"{title}: {count} x {reason}" for reason, count in counter.most_common() if count]
    for reason, files in plan.files.items():
        rest = f" and {len(files) - MOST_NAMED} more" if len(files) > MOST_NAMED else ""
        lines.append(f"{reason}: {', '.join(files[:MOST_NAMED])}{rest}")
    lines += [f"note: no object of class '{name}' was found" for name in names if name not in plan.class_names]
    return "\n".join(lines)
