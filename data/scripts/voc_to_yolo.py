"""Convert Pascal VOC annotations, XML beside images, to the YOLO layout, and write the data yaml.

    python data/scripts/voc_to_yolo.py --voc VOCdevkit/VOC2007 --out ../datasets/VOC2007 --splits trainval test
    python train.py --data ../datasets/VOC2007/data.yaml

--voc takes what labelImg, CVAT, Roboflow and others write: XML and images in one folder, or in Annotations and
JPEGImages, annotations and images, and so on; or --xml and --images-dir name the two. Splits are the lists in
ImageSets/Main, or the folders train, valid and test, or drawn at random. The input is only read. What is wrong in it is
repaired or left out, and counted in the report at the end.
"""
from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.scripts import yolo_layout as layout
from data.scripts.voc_folder import VocFolder, find_folders, normal
from data.scripts.yolo_layout import SPLITS, Box, Corners, Plan, Skipped, last_part
from utils.errors import UserError, run_cli
from utils.text import decoded, read_bytes

VOC_NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
             "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
DECLARATION = re.compile(rb"""\s*<\?xml[^>]{,100}?\sencoding\s*=\s*["']([\w.:-]{1,40})["']""")
COORDINATE = re.compile(r"[xy](min|max|_\w+|\d+)?$", re.IGNORECASE)  # a tag


# Annotations ----------------------------------------------------------------------------------------------------------

def read_xml(path: Path) -> ElementTree.Element:
    """The root of an annotation. Skipped if it is broken, or could make a parser read other files or grow forever."""
    try:
        data = read_bytes(path)
    except UserError:
        raise Skipped("XML unreadable") from None
    # expat knows few encodings; and some programs write UTF-8 under the words encoding="utf-16".
    declared = DECLARATION.match(data)
    encoding = declared[1].decode() if declared and not declared[1].lower().startswith(b"utf") else "utf-8"
    try:
        text = decoded(data, path, encoding)
    except UserError:
        raise Skipped("XML not in the encoding that it names, or not in UTF-8") from None
    if "<!DOCTYPE" in text.upper() or "<!ENTITY" in text.upper():
        raise Skipped("XML with a DOCTYPE or entities")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        raise Skipped("XML broken") from None


def read_box(plan: Plan, element: ElementTree.Element, size: tuple[int, int], keep_difficult: bool) -> Box:
    """Class name and box of an object. Skipped if it is left out; even so its class counts as found.

    Without a usable bndbox the box is that of the outline.
    """
    name = _text(element, "name")
    if not name:
        raise Skipped("box without a class name")
    plan.class_names.add(name)
    if not keep_difficult and _text(element, "difficult").lower() in ("1", "true"):
        raise Skipped("difficult object, kept with --keep-difficult")
    try:
        x1, y1, x2, y2 = layout.four_numbers(_text(element, f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax"))
        if x1 == x2 or y1 == y2:  # in theory one pixel wide, in practice a stray click
            raise Skipped("box empty")
    except Skipped:
        corners = _rotated_box(plan, element) or _outline_box(plan, element)
        if not corners:
            raise
        return name, plan.clip(corners, size, slack=(1, 1))
    if x1 > x2 or y1 > y2:
        plan.repaired["box with swapped corners"] += 1
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    # VOC counts pixels from 1 and includes the last: pixel edges run from xmin - 1 to xmax. Many tools count from 0.
    return name, plan.clip((x1 - 1, y1 - 1, x2, y2), size, slack=(1, 0))


def _rotated_box(plan: Plan, element: ElementTree.Element) -> Corners | None:
    """The corners around roLabelImg's robndbox: centre, sides, and the angle in radians, or in degrees above 2 pi."""
    try:
        cx, cy, w, h = layout.four_numbers(_text(element, f"robndbox/{key}") for key in ("cx", "cy", "w", "h"))
        angle, = layout.numbers([_text(element, "robndbox/angle") or 0])
    except Skipped:
        return None
    angle = math.radians(angle) if abs(angle) > 2 * math.pi else angle
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    half_width, half_height = (w * cosine + h * sine) / 2, (w * sine + h * cosine) / 2
    if min(w, h) <= 0:
        return None
    plan.repaired["box rotated, made upright around it"] += 1
    return cx - half_width, cy - half_height, cx + half_width, cy + half_height


def _outline_box(plan: Plan, element: ElementTree.Element) -> Corners | None:
    """The corners around all points of an object, however its polygon calls them: x1, y1, x2 ...; or x, y, x, y ..."""
    leaves = [leaf for child in element if child.tag != "part" for leaf in child.iter() if COORDINATE.match(leaf.tag)]
    try:
        xs, ys = (layout.numbers(leaf.text for leaf in leaves if leaf.tag[0].lower() == axis) for axis in "xy")
    except Skipped:
        return None
    if len(xs) != len(ys) or len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    plan.repaired["box missing, made from the polygon"] += 1
    return min(xs), min(ys), max(xs), max(ys)


def _text(element: ElementTree.Element, tag: str) -> str:
    return " ".join((element.findtext(tag) or "").split())


# Plan -----------------------------------------------------------------------------------------------------------------

def choose_splits(folders: Sequence[VocFolder], splits: Sequence[str] | None) -> list[str]:
    """The splits to convert, in the order of SPLITS; [] = there are no lists. UserError for a bad choice."""
    available = [split for split in SPLITS if any(split in folder.lists for folder in folders)]
    if not splits:
        only_joint = "trainval" in available and "train" not in available
        default = ("trainval", "test") if only_joint else ("train", "val", "test")
        splits = [split for split in default if split in available]
        if not splits:
            return []
    missing = [split for split in splits if split not in available]
    if missing:
        there = ", ".join(available) or "none: leave --splits out, to split at random"
        raise UserError(f"--splits {missing[0]}: no ImageSets/Main/{missing[0]}.txt, and no folder of that name, in "
                        f"any --voc (there: {there})")
    if "trainval" in splits and {"train", "val"} & set(splits):
        raise UserError("--splits: trainval is train and val together; ask for trainval, or for train and val")
    for folder in folders:
        if not folder.split and not folder.lists.keys() & set(splits):
            raise UserError(f"--voc {folder.root}: has none of the lists {', '.join(splits)} in ImageSets/Main; choose "
                            "others with --splits, or convert it alone")
    return [s for s in SPLITS if s in splits]


def read_annotations(folders: Sequence[VocFolder], splits: Sequence[str], opt: argparse.Namespace) -> Plan:
    """The plan of all images and their boxes."""
    plan, jobs = Plan(), []
    for folder in folders:
        split_of: dict[str, str] = {}
        for split in splits:
            for name in folder.lists.get(split, []):
                plan.dropped["name listed twice"] += name in split_of
                split_of.setdefault(name, split)
        jobs += [(folder, split, name) for name, split in split_of.items()]
    if not splits:
        names = [(folder, name) for folder in folders for name in folder.names()]
        chosen = layout.random_split(len(names), opt)
        jobs = [(folder, "val" if i in chosen else "train", name) for i, (folder, name) in enumerate(names)]
    for folder, split, name in tqdm(jobs, "reading annotations", delay=1.0, leave=False, disable=None):
        with plan.skipping(folder.any_file(name)):
            _add_image(plan, folder, split, name, opt.keep_difficult)
    return plan


def _add_image(plan: Plan, folder: VocFolder, split: str, name: str, keep_difficult: bool) -> None:
    """Read an image's annotation and add both to the plan. Skipped if one is missing or broken."""
    if name not in folder.xmls:
        raise Skipped("image without XML" if name in folder.images else "name without image and XML")
    root = read_xml(folder.xmls[name])
    filename = last_part(_text(root, "filename"))
    source = folder.find_image(name, filename)
    if source is None:
        raise Skipped("XML without image")
    if source in plan.sources:
        raise Skipped("XML of an image that has another")
    size = layout.displayed_size(source)
    if filename and normal(filename) != normal(source.name):
        plan.repaired["file name in the XML is another"] += 1
    stated = tuple(_text(root, f"size/{key}").removesuffix(".0") for key in ("width", "height"))
    if stated != tuple(map(str, size)):
        missing = not all(text.strip("0") for text in stated)
        counted = layout.size_of_boxes(stated, size)
        plan.repaired[f"size {'missing' if missing else 'wrong'} in the XML, taken from the image"
                      if counted == size else "image scaled after the XML was written, boxes with it"] += 1
        size = counted
    boxes = []
    for element in root.findall("object"):
        with plan.skipping():
            boxes.append(read_box(plan, element, size, keep_difficult))
    *parents, stem = name.split("/")
    plan.add(split, source, stem, "_".join(parents) or folder.root.name, boxes)


def choose_classes(names: Sequence[str], order: Sequence[str] | None) -> list[str]:
    """The class names in the order of their numbers."""
    if order:
        if len(set(order)) < len(order):
            raise UserError("--classes: a name is given twice")
        return list(order)
    return list(VOC_NAMES) if set(names) == set(VOC_NAMES) else list(names)


def choose_folders(opt: argparse.Namespace) -> list[VocFolder]:
    """The folders that the flags name. UserError where one is missing or without XML."""
    by_flag = {"--voc": opt.voc, "--xml": [opt.xml], "--images-dir": [opt.images_dir]}
    for flag, folders in by_flag.items():
        for folder in filter(None, folders):
            if not folder.is_dir():
                raise UserError(f"{flag} {folder}: no such folder")
        layout.check_output(opt, filter(None, folders), flag)
    if not (opt.voc or opt.xml or opt.images_dir):
        raise UserError("give --voc DIR; or --xml DIR and --images-dir DIR")
    if not (opt.xml or opt.images_dir):
        roots = dict.fromkeys(path.resolve() for path in opt.voc)
        return [folder for root in roots for folder in find_folders(root)]
    if len(opt.voc) > 1:
        raise UserError("--xml, --images-dir: go with one --voc at most; convert the others alone")
    root = (opt.voc or [opt.xml or opt.images_dir])[0].resolve()
    return [VocFolder(root, opt.xml, opt.images_dir)]


# Command line ---------------------------------------------------------------------------------------------------------

def convert(opt: argparse.Namespace) -> str:
    """Do what the flags say; return the report. UserError for anything the user must mend first."""
    folders = choose_folders(opt)
    plan = read_annotations(folders, choose_splits(folders, opt.splits), opt)
    names = choose_classes(sorted(plan.class_names), opt.classes)
    classes = (name for item in plan.items for name, _ in item.boxes)
    plan.dropped.update(f"object of class '{name}', not in --classes" for name in classes if name not in names)
    plan.require_boxes("--voc", names)
    return layout.write_data_set(plan, names, opt, "voc_to_yolo.py")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> options."""
    parser = layout.converter_parser(__doc__, "--images")
    add = parser.add_argument
    add("--voc", type=Path, nargs="+", default=[], metavar="DIR",
        help="folders with XML and images in them, e.g. VOCdevkit/VOC2007")
    add("--xml", type=Path, metavar="DIR", help="where the XML files are, if --voc does not find them")
    add("--images-dir", type=Path, metavar="DIR", help="and where the images are")
    add("--splits", nargs="+", choices=SPLITS, help="lists or folders to convert (train, val and test if there)")
    add("--classes", nargs="+", metavar="NAME", help="classes by their numbers (all found, sorted; VOC's as usual)")
    add("--keep-difficult", action="store_true", help="keep objects marked difficult, which are left out otherwise")
    return parser.parse_args(argv)


def main() -> None:
    """Command line -> the converted set."""
    print(convert(parse()))


if __name__ == "__main__":
    run_cli(main)
