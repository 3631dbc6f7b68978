"""Turn COCO JSON annotations into the YOLO layout, and write the data yaml.

    python data/scripts/coco_to_yolo.py --json train=instances_train.json val=instances_val.json \\
        --images train=train2017 val=val2017 --out ../datasets/mine
    python train.py --data ../datasets/mine/data.yaml

The input is only read. What is wrong in it is mended or left out, and counted in the table at the end.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from data.scripts.yolo_layout import (  # noqa: E402  (the repository's root must be on the path first)
    Corners,
    Item,
    Skipped,
    Tally,
    check_output,
    displayed_size,
    free_name,
    report,
    write,
    write_yaml,
)
from utils.errors import UserError, run_cli  # noqa: E402

SPLITS = ("train", "val", "test")


def read_json(path: Path) -> dict[str, Any]:
    """An annotation file with its three lists. UserError if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"--json {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--json {path}: not readable as JSON ({str(error)[:80]})") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in ("images", "annotations", "categories")):
        raise UserError(f"--json {path}: needs the lists images, annotations and categories")
    return data


def class_names(files: dict[str, dict[str, Any]]) -> dict[Any, str]:
    """COCO's category id -> name, in the order of the ids, over all files. UserError where files disagree."""
    names: dict[Any, str] = {}
    for data in files.values():
        for category in data["categories"]:
            if names.setdefault(category.get("id"), str(category.get("name"))) != str(category.get("name")):
                raise UserError(f"--json: category {category.get('id')} is '{names[category.get('id')]}' in one file and '{category.get('name')}' in another")
    if not names or len(set(names.values())) < len(names):
        raise UserError("--json: the categories need a name each, and every name once")
    return {key: names[key] for key in sorted(names)}


def plan(split: str, data: dict[str, Any], folder: Path, names: dict[Any, str], keep_crowd: bool, taken: set[tuple[str, str]], tally: Tally) -> list[Item]:
    """The pictures of one split, with their boxes."""
    boxes: dict[Any, list[dict[str, Any]]] = {}
    for annotation in data["annotations"]:
        boxes.setdefault(annotation.get("image_id"), []).append(annotation)
    items = []
    for image in tqdm(data["images"], f"reading {split}", delay=1.0, leave=False, disable=None):
        source = folder / str(image.get("file_name", ""))
        if not source.is_file():
            source = folder / source.name
        try:
            if not source.is_file():
                raise Skipped("image missing")
            width, height = displayed_size(source)
        except Skipped as reason:
            tally.drop_file(str(reason), source)
            continue
        if (image.get("width", width), image.get("height", height)) != (width, height):
            tally.repaired["size wrong in the JSON, taken from the image"] += 1
        found = [(names[a["category_id"]], box) for a in boxes.pop(image.get("id"), []) if (box := read_box(a, names, (width, height), keep_crowd, tally))]
        unique = tuple(dict.fromkeys(found))
        tally.dropped["box given twice"] += len(found) - len(unique)
        items.append(Item(split, source, free_name(source.stem, folder, split, taken, tally), unique))
    tally.dropped["box of an image that is not listed or missing"] += sum(map(len, boxes.values()))
    return items


def read_box(annotation: dict[str, Any], names: dict[Any, str], size: tuple[int, int], keep_crowd: bool, tally: Tally) -> Corners | None:
    """x1 y1 x2 y2 in 0..1 of an annotation's bbox (x, y, width, height in pixels), or None where it was left out."""
    if annotation.get("iscrowd") and not keep_crowd:
        tally.dropped["crowd"] += 1
        return None
    if annotation.get("category_id") not in names:
        tally.dropped["box of an unknown category"] += 1
        return None
    try:
        x, y, w, h = (float(v) for v in annotation["bbox"])
        if not all(map(math.isfinite, (x, y, w, h))):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        tally.dropped["box missing or not numeric"] += 1
        return None
    width, height = size
    inside = (max(x, 0) / width, max(y, 0) / height, min(x + w, width) / width, min(y + h, height) / height)
    if w <= 0 or h <= 0 or inside[0] >= inside[2] or inside[1] >= inside[3]:
        tally.dropped["box empty or outside the image"] += 1
        return None
    if x < -0.5 or y < -0.5 or x + w > width + 0.5 or y + h > height + 0.5:  # less is rounding
        tally.repaired["box cut at the image's edge"] += 1
    return inside


def pairs(flag: str, values: Sequence[str]) -> dict[str, Path]:
    """['train=a', 'val=b'] -> {"train": a, "val": b}."""
    found = {}
    for value in values:
        split, _, path = value.partition("=")
        if split not in SPLITS or not path:
            raise UserError(f"{flag} {value}: write train=PATH, val=PATH or test=PATH")
        found[split] = Path(path)
    return found


def convert(opt: argparse.Namespace) -> str:
    """Do what the flags say; return the report. UserError for anything the user must mend first."""
    out, yaml_file = Path(opt.out), Path(opt.yaml or Path(opt.out) / "data.yaml")
    jsons, folders = pairs("--json", opt.json), pairs("--images", opt.images)
    for split in jsons:
        if split not in folders or not folders[split].is_dir():
            raise UserError(f"--images {split}={folders.get(split, '')}: no such folder; give the images of every --json")
    check_output(out, yaml_file, [folders[s].resolve() for s in jsons], opt.exist_ok, "--images")
    files, tally = {split: read_json(path) for split, path in jsons.items()}, Tally()
    names = class_names(files)
    taken: set[tuple[str, str]] = set()
    items = [item for split, data in files.items() for item in plan(split, data, folders[split], names, opt.keep_crowd, taken, tally)]
    if not items:
        raise UserError(f"--json: no usable picture ({', '.join(f'{reason}: {count}' for reason, count in tally.dropped.items() if count)})")
    splits = [s for s in SPLITS if any(item.split == s for item in items)]
    classes = list(names.values())
    try:
        write(items, classes, out, opt.place)
        write_yaml(yaml_file, out, splits, classes, "coco_to_yolo.py")
    except OSError as error:
        raise UserError(f"{error.filename or out}: can't be written ({error.strerror}); choose another --out or --yaml") from None
    found = sorted({name for item in items for name, _ in item.boxes})
    return report(items, splits, classes, found, tally) + f"\nnow: python train.py --data {yaml_file}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", nargs="+", required=True, metavar="SPLIT=FILE", help="annotation files, e.g. train=instances_train2017.json")
    add("--images", nargs="+", required=True, metavar="SPLIT=DIR", help="the folder of each split's images")
    add("--out", required=True, metavar="DIR", help="where images/ and labels/ go")
    add("--yaml", metavar="FILE", help="the data yaml to write (OUT/data.yaml)")
    add("--place", choices=("copy", "link", "hardlink"), default="copy", help="how images get into OUT (copy)")
    add("--keep-crowd", action="store_true", help="keep annotations with iscrowd, which are left out otherwise")
    add("--exist-ok", action="store_true", help="write into a folder, and over a yaml, that no converter made")
    return parser.parse_args(argv)


def main() -> None:
    """The script."""
    print(convert(parse()))


if __name__ == "__main__":
    run_cli(main)
