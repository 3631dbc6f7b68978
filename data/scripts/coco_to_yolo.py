"""Convert COCO JSON annotations to the YOLO layout, and write the data yaml.

    python data/scripts/coco_to_yolo.py --coco exported --out ../datasets/mine
    python train.py --data ../datasets/mine/data.yaml

--coco takes what Roboflow, CVAT and others export, and COCO's own folders: a JSON for each split beside its images, or
one JSON, which is split at random. Or name them:

    python data/scripts/coco_to_yolo.py --json train=instances_train.json val=instances_val.json \\
        --images train=train2017 val=val2017 --out ../datasets/mine

The input is only read. What is wrong in it is repaired or left out, and counted in the report at the end.
"""
from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.scripts import yolo_layout as layout
from data.scripts.coco_folder import Annotations, find_image, find_splits
from data.scripts.yolo_layout import Box, Plan, Skipped
from utils.data.coco import is_crowd, outline_box, read_annotations
from utils.errors import UserError, run_cli


def class_names(files: Sequence[Annotations], plan: Plan, flag: str = "--json") -> dict[Any, str]:
    """COCO's category id -> name over all files, in the order of the ids. UserError where files disagree.

    A category without boxes that is another's supercategory (Roboflow writes one) is left out.
    """
    categories = [category for data in files for category in data["categories"]]
    ids = {annotation["category_id"] for data in files for annotation in data["annotations"]}
    groups = {str(c.get("supercategory")) for c in categories if c.get("supercategory") != c.get("name")}
    names: dict[Any, str] = {}
    for category in categories:
        number, name = category["id"], str(category.get("name") or "")
        if number is None or not name:
            raise UserError(f"{flag}: category '{name or number}' has no {'id' if name else 'name'}")
        if number not in ids and name in groups:
            plan.dropped[f"category '{name}', which only groups others"] = 1
        elif names.setdefault(number, name) != name:
            raise UserError(f"{flag}: category {number} is called '{names[number]}' and '{name}'; "
                            "give each an id of its own")
    if not names or len(set(names.values())) < len(names):
        raise UserError(f"{flag}: the categories need a name each, and every name once")
    return {number: names[number] for number in sorted(names, key=lambda n: (isinstance(n, str), n))}


def each_image_once(data: Annotations, plan: Plan) -> Annotations:
    """The annotations with one entry for each image. Of a file that is listed again the boxes go to the first entry.

    Else a random split would put the one into train and the other into val, each with a part of the boxes.
    """
    first: dict[str, Any] = {}  # file name -> id
    same: dict[Any, Any] = {}   # id -> the one that it becomes
    images = []
    for image in data["images"]:
        name = str(image.get("file_name", ""))
        with plan.skipping(Path(name)):
            if name in first:
                same.setdefault(image["id"], first[name])
                raise Skipped("image listed again, its boxes are with the first")
            if image["id"] in same:
                raise Skipped("image with the id of another")
            first[name] = same[image["id"]] = image["id"]
            images.append(image)
    for annotation in data["annotations"]:
        annotation["image_id"] = same.get(annotation["image_id"], annotation["image_id"])
    return {**data, "images": images}


def add_split(plan: Plan, split: str, data: Annotations, folder: Path, names: dict[Any, str],
              keep_crowd: bool) -> None:
    """Add the images of one split, which are in `folder`, and their boxes to the plan."""
    annotations = defaultdict(list)
    for annotation in data["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    for image in tqdm(data["images"], f"reading {split}", delay=1.0, leave=False, disable=None):
        source = find_image(folder, str(image.get("file_name", "")))
        with plan.skipping(source):
            size = layout.displayed_size(source)
            stated = image.get("width", size[0]), image.get("height", size[1])
            if stated != size:
                counted = layout.size_of_boxes(stated, size)
                plan.repaired["size wrong in the JSON, taken from the image" if counted == size else
                              "image scaled after the JSON was written, boxes with it"] += 1
                size = counted
            boxes = []
            for annotation in annotations.pop(image["id"], []):
                with plan.skipping():
                    boxes.append(read_box(plan, annotation, names, size, keep_crowd))
            plan.add(split, source, source.stem, folder.resolve().name, boxes)
    plan.dropped["box of an image that is not listed or missing"] += sum(map(len, annotations.values()))


def read_box(plan: Plan, annotation: dict[str, Any], names: dict[Any, str], size: tuple[int, int],
             keep_crowd: bool) -> Box:
    """Class name and box of an annotation, whose bbox is x, y, width, height in pixels. Skipped if it is left out.

    Without a usable bbox the box is that of the outline.
    """
    if is_crowd(annotation) and not keep_crowd:
        raise Skipped("crowd, kept with --keep-crowd")
    if annotation["category_id"] not in names:
        raise Skipped("box of an unknown category")
    try:
        x, y, w, h = layout.four_numbers(annotation.get("bbox"))
        if w <= 0 or h <= 0:
            raise Skipped("box empty")
        corners = (x, y, x + w, y + h)
    except Skipped:
        outline = outline_box(annotation.get("segmentation"))
        if outline is None:
            raise
        plan.repaired["box missing, made from the polygon or mask"] += 1
        corners = outline
    return names[annotation["category_id"]], plan.clip(corners, size, slack=(0.5, 0.5))  # half a pixel is rounding


def split_and_path(text: str) -> tuple[str, Path]:
    """'train=a' -> ("train", Path("a")), as an argparse type."""
    split, _, path = text.partition("=")
    if split not in ("train", "val", "test") or not path:
        raise UserError(f"{text}: write train=PATH, val=PATH or test=PATH")
    return split, Path(path)


def once_each(flag: str, pairs: list[tuple[str, Path]]) -> dict[str, Path]:
    """Split -> path. UserError for a split that is given twice."""
    for split, path in pairs:
        if sum(split == other for other, _ in pairs) > 1:
            raise UserError(f"{flag} {split}={path}: {split} is given more than once; merge its files first")
    return dict(pairs)


def read_splits(opt: argparse.Namespace, plan: Plan) -> dict[str, tuple[Annotations, Path]]:
    """Split -> its annotations and the folder of its images, as the flags say. UserError where they don't fit."""
    jsons, folders = once_each("--json", opt.json), once_each("--images", opt.images)
    if bool(opt.coco) == bool(jsons or folders) or bool(jsons) != bool(folders):
        raise UserError("give --coco DIR; or --json SPLIT=FILE and --images SPLIT=DIR")
    if opt.coco:
        layout.check_output(opt, [opt.coco], "--coco")
        splits = {split: (each_image_once(data, plan), folder)
                  for split, (data, folder) in find_splits(opt.coco).items()}
        if "" not in splits:
            return splits
        data, folder = splits[""]
        return {split: (part, folder) for split, part in split_at_random(data, opt).items()}
    for split in jsons:
        if split not in folders or not folders[split].is_dir():
            where = folders.get(split, "")
            raise UserError(f"--images {split}={where}: no such folder; give the images of every --json")
    for split in folders.keys() - jsons.keys():
        raise UserError(f"--images {split}={folders[split]}: there is no --json of this split")
    layout.check_output(opt, [folders[split] for split in jsons], "--images")
    return {split: (each_image_once(read_annotations(path, "--json"), plan), folders[split])
            for split, path in jsons.items()}


def split_at_random(data: Annotations, opt: argparse.Namespace) -> dict[str, Annotations]:
    """The images of one file with their annotations as train and val."""
    chosen = layout.random_split(len(data["images"]), opt)
    images = {"train": [image for i, image in enumerate(data["images"]) if i not in chosen],
              "val": [image for i, image in enumerate(data["images"]) if i in chosen]}
    ids = {image["id"] for image in images["train"]}
    parts: dict[str, Annotations] = {split: {**data, "images": images[split], "annotations": []} for split in images}
    for annotation in data["annotations"]:
        parts["train" if annotation["image_id"] in ids else "val"]["annotations"].append(annotation)
    return parts


def convert(opt: argparse.Namespace) -> str:
    """Do what the flags say; return the report. UserError for anything the user must mend first."""
    plan, flag = Plan(), "--json" if opt.json else "--coco"
    splits = read_splits(opt, plan)
    names = class_names([data for data, _ in splits.values()], plan, flag)
    for split, (data, folder) in splits.items():
        add_split(plan, split, data, folder, names, opt.keep_crowd)
    plan.require_boxes(flag, list(names.values()))
    return layout.write_data_set(plan, list(names.values()), opt, "coco_to_yolo.py")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> options."""
    parser = layout.converter_parser(__doc__)
    add = parser.add_argument
    add("--coco", type=Path, metavar="DIR", help="a folder with JSON files and their images")
    add("--json", type=split_and_path, nargs="+", action="extend", default=[], metavar="SPLIT=FILE",
        help="annotation files, e.g. train=instances_train2017.json")
    add("--images", type=split_and_path, nargs="+", action="extend", default=[], metavar="SPLIT=DIR",
        help="the folder of each split's images")
    add("--keep-crowd", action="store_true", help="keep annotations with iscrowd, which are left out otherwise")
    return parser.parse_args(argv)


def main() -> None:
    """Command line -> the converted set."""
    print(convert(parse()))


if __name__ == "__main__":
    run_cli(main)
