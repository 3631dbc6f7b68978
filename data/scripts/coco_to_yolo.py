"""Convert COCO JSON annotations to the YOLO layout, and write the data yaml.

    python data/scripts/coco_to_yolo.py --json train=instances_train.json val=instances_val.json \\
        --images train=train2017 val=val2017 --out ../datasets/mine
    python train.py --data ../datasets/mine/data.yaml

The input is only read. What is wrong in it is repaired or left out, and counted in the report at the end.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.scripts import yolo_layout as layout
from data.scripts.yolo_layout import Box, Plan, Skipped
from utils.errors import UserError, run_cli


def read_json(path: Path) -> dict[str, Any]:
    """An annotation file. UserError if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"--json {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--json {path}: not readable as JSON ({str(error)[:80]})") from None
    needed = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in needed):
        raise UserError(f"--json {path}: needs the lists images, annotations and categories")
    return data


def class_names(files: dict[str, dict[str, Any]]) -> dict[Any, str]:
    """COCO's category id -> name over all files, in the order of the ids. UserError where files disagree."""
    names: dict[Any, str] = {}
    for category in (category for data in files.values() for category in data["categories"]):
        number, name = category.get("id"), str(category.get("name"))
        if names.setdefault(number, name) != name:
            raise UserError(f"--json: category {number} is '{names[number]}' in one file and '{name}' in another")
    if not names or len(set(names.values())) < len(names):
        raise UserError("--json: the categories need a name each, and every name once")
    return {number: names[number] for number in sorted(names)}


def add_split(plan: Plan, split: str, data: dict[str, Any], folder: Path, names: dict[Any, str],
              keep_crowd: bool) -> None:
    """Add the images of one split, which are in `folder`, and their boxes to the plan."""
    annotations = defaultdict(list)
    for annotation in data["annotations"]:
        annotations[annotation.get("image_id")].append(annotation)
    for image in tqdm(data["images"], f"reading {split}", delay=1.0, leave=False, disable=None):
        source = folder / str(image.get("file_name", ""))
        if not source.is_file():
            source = folder / source.name
        with plan.skipping(source):
            size = layout.displayed_size(source)
            if (image.get("width", size[0]), image.get("height", size[1])) != size:
                plan.repaired["size wrong in the JSON, taken from the image"] += 1
            boxes = []
            for annotation in annotations.pop(image.get("id"), []):
                with plan.skipping():
                    boxes.append(read_box(plan, annotation, names, size, keep_crowd))
            plan.add(split, source, source.stem, folder.resolve().name, boxes)
    plan.dropped["box of an image that is not listed or missing"] += sum(map(len, annotations.values()))


def read_box(plan: Plan, annotation: dict[str, Any], names: dict[Any, str], size: tuple[int, int],
             keep_crowd: bool) -> Box:
    """Class name and box of an annotation, whose bbox is x, y, width, height in pixels. Skipped if it is left out."""
    if annotation.get("iscrowd") and not keep_crowd:
        raise Skipped("crowd")
    if annotation.get("category_id") not in names:
        raise Skipped("box of an unknown category")
    x, y, w, h = layout.four_numbers(annotation.get("bbox"))
    if w <= 0 or h <= 0:
        raise Skipped("box empty")
    box = plan.clip((x, y, x + w, y + h), size, slack=(0.5, 0.5))  # less than half a pixel is rounding
    return names[annotation["category_id"]], box


def split_and_path(text: str) -> tuple[str, Path]:
    """'train=a' -> ("train", Path("a")), as an argparse type."""
    split, _, path = text.partition("=")
    if split not in ("train", "val", "test") or not path:
        raise UserError(f"{text}: write train=PATH, val=PATH or test=PATH")
    return split, Path(path)


def convert(opt: argparse.Namespace) -> str:
    """Do what the flags say; return the report. UserError for anything the user must mend first."""
    jsons, folders = dict(opt.json), dict(opt.images)
    for split in jsons:
        if split not in folders or not folders[split].is_dir():
            where = folders.get(split, "")
            raise UserError(f"--images {split}={where}: no such folder; give the images of every --json")
    layout.check_output(opt, [folders[split] for split in jsons], "--images")
    files = {split: read_json(path) for split, path in jsons.items()}
    names, plan = class_names(files), Plan()
    for split, data in files.items():
        add_split(plan, split, data, folders[split], names, opt.keep_crowd)
    plan.require_items("--json")
    return layout.write(plan, list(names.values()), opt, "coco_to_yolo.py")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> options."""
    parser = layout.converter_parser(__doc__)
    add = parser.add_argument
    add("--json", type=split_and_path, nargs="+", required=True, metavar="SPLIT=FILE",
        help="annotation files, e.g. train=instances_train2017.json")
    add("--images", type=split_and_path, nargs="+", required=True, metavar="SPLIT=DIR",
        help="the folder of each split's images")
    add("--keep-crowd", action="store_true", help="keep annotations with iscrowd, which are left out otherwise")
    return parser.parse_args(argv)


def main() -> None:
    """Command line -> the converted set."""
    print(convert(parse()))


if __name__ == "__main__":
    run_cli(main)
