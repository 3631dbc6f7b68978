"""Convert Pascal VOC folders (JPEGImages, Annotations, ImageSets/Main) to the YOLO layout, and write the data yaml.

    python data/scripts/voc_to_yolo.py --voc VOCdevkit/VOC2007 --out ../datasets/VOC2007 --splits trainval test
    python train.py --data ../datasets/VOC2007/data.yaml

The input is only read. What is wrong in it is repaired or left out, and counted in the report at the end.
"""
from __future__ import annotations

import argparse
import random
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.scripts import yolo_layout as layout
from data.scripts.yolo_layout import SPLITS, Box, Plan, Skipped
from utils.data.image_files import IMAGE_SUFFIXES
from utils.errors import UserError, run_cli

VOC_NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
             "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")


class VocFolder:
    """The files of one VOC folder by stem. Without Annotations or JPEGImages they are expected in the folder itself."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"--voc {root}: no such folder")
        self.root = root
        annotations, images = (d if d.is_dir() else root for d in (root / "Annotations", root / "JPEGImages"))
        self.xmls = {_normal(p.stem): p for p in _visible(annotations) if p.suffix.lower() == ".xml"}
        found = [p for p in _visible(images) if p.suffix.lower() in IMAGE_SUFFIXES]
        self.images = {_normal(p.stem): p for p in reversed(found)}
        self.images_by_name = {_normal(p.name): p for p in found}
        if not self.xmls:
            raise UserError(f"--voc {root}: no Annotations/*.xml; give the folder that holds Annotations")
        main = root / "ImageSets" / "Main"
        self.lists = {split: main / f"{split}.txt" for split in SPLITS if (main / f"{split}.txt").is_file()}

    def members(self, split: str) -> list[str]:
        """The stems in a split's list, in its order."""
        lines = self.lists[split].read_text(encoding="utf-8-sig", errors="replace").splitlines()
        return [self._stem(_normal(line.strip())) for line in lines if line.strip()]

    def random_split(self, val_share: float, seed: int) -> dict[str, list[str]]:
        """All stems, sorted, as train and val: a pure function of the stems, the share and the seed."""
        stems = sorted(self.xmls.keys() | self.images.keys())
        if len(stems) < 2:
            raise UserError(f"--voc {self.root}: one image can't be split into train and val")
        chosen = set(random.Random(seed).sample(stems, min(max(round(val_share * len(stems)), 1), len(stems) - 1)))
        return {"train": [s for s in stems if s not in chosen], "val": [s for s in stems if s in chosen]}

    def find_image(self, stem: str, filename: str) -> Path | None:
        """The image of an annotation: that of its stem. The name in the XML decides if there are several or none."""
        named = self.images_by_name.get(_normal(filename))
        if named is not None and (stem not in self.images or _normal(named.stem) == stem):
            return named
        return self.images.get(stem)

    def any_file(self, stem: str) -> Path:
        """A path to name in messages about this stem."""
        return self.xmls.get(stem) or self.images.get(stem) or self.root / stem

    def _stem(self, line: str) -> str:
        """'000001', '000001 1', '000001.jpg' or 'JPEGImages/000001.jpg' -> '000001'; a known stem is left as it is."""
        without_flag = line.rsplit(maxsplit=1)[0] if line.split()[-1] in ("1", "-1", "0") else line
        for text in (line, without_flag):
            name = _last_part(text)
            for stem in (name, name.rsplit(".", 1)[0]):
                if stem in self.xmls or stem in self.images:
                    return stem
        return _last_part(without_flag)


def _visible(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]  # macOS leaves '._name.xml' behind


def _normal(text: str) -> str:
    """One encoding of accented letters: file systems and editors differ in theirs."""
    return unicodedata.normalize("NFC", text)


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]


# Annotations ----------------------------------------------------------------------------------------------------------

def read_xml(path: Path) -> ElementTree.Element:
    """The root of an annotation. Skipped if it is broken, or could make a parser read other files or grow forever."""
    try:
        data = path.read_bytes()
    except OSError:
        raise Skipped("XML unreadable") from None
    plain = data.replace(b"\0", b"").upper()  # UTF-16 has zeros between its letters
    if b"<!DOCTYPE" in plain or b"<!ENTITY" in plain:
        raise Skipped("XML with a DOCTYPE or entities")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        raise Skipped("XML broken") from None


def read_box(plan: Plan, element: ElementTree.Element, size: tuple[int, int], keep_difficult: bool) -> Box:
    """Class name and box of an object. Skipped if it is left out; even so its class counts as found."""
    name = _text(element, "name")
    if not name:
        raise Skipped("box without a class name")
    plan.found.add(name)
    if not keep_difficult and _text(element, "difficult").lower() in ("1", "true"):
        raise Skipped("difficult object")
    x1, y1, x2, y2 = layout.four_numbers(_text(element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
    if x1 == x2 or y1 == y2:  # in theory one pixel wide, in practice a stray click
        raise Skipped("box empty")
    if x1 > x2 or y1 > y2:
        plan.repaired["box with swapped corners"] += 1
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    # VOC counts pixels from 1 and includes the last: pixel edges run from xmin - 1 to xmax. Many tools count from 0.
    return name, plan.clip((x1 - 1, y1 - 1, x2, y2), size, slack=(1, 0))


def _text(element: ElementTree.Element, tag: str) -> str:
    return " ".join((element.findtext(tag) or "").split())


# Plan -----------------------------------------------------------------------------------------------------------------

def choose_splits(folders: Sequence[VocFolder], asked: Sequence[str] | None) -> list[str]:
    """The splits to convert, in the order of SPLITS; [] = there are no lists. UserError for a bad choice."""
    available = [split for split in SPLITS if any(split in folder.lists for folder in folders)]
    if not asked:
        only_joint = "trainval" in available and "train" not in available
        default = ("trainval", "test") if only_joint else ("train", "val", "test")
        asked = [split for split in default if split in available]
        if not asked:
            return []
    missing = [split for split in asked if split not in available]
    if missing:
        there = ", ".join(available) or "none: leave --splits out, to split at random"
        raise UserError(f"--splits {missing[0]}: no ImageSets/Main/{missing[0]}.txt in any --voc (there: {there})")
    if "trainval" in asked and {"train", "val"} & set(asked):
        raise UserError("--splits: trainval is train and val together; ask for trainval, or for train and val")
    for folder in folders:
        if not folder.lists.keys() & set(asked):
            raise UserError(f"--voc {folder.root}: has none of the lists {', '.join(asked)} in ImageSets/Main; choose "
                            "others with --splits, or convert it alone")
    return [s for s in SPLITS if s in asked]


def read_annotations(folders: Sequence[VocFolder], splits: Sequence[str], opt: argparse.Namespace) -> Plan:
    """The plan of all images and their boxes."""
    plan, jobs = Plan(), []
    for folder in folders:
        lists = {split: folder.members(split) for split in splits if split in folder.lists}
        lists = lists or folder.random_split(opt.val_share, opt.seed)
        split_of: dict[str, str] = {}
        for split, stems in lists.items():
            for stem in stems:
                plan.dropped["name listed twice"] += stem in split_of
                split_of.setdefault(stem, split)
        jobs += [(folder, split, stem) for stem, split in split_of.items()]
    for folder, split, stem in tqdm(jobs, "reading annotations", delay=1.0, leave=False, disable=None):
        with plan.skipping(folder.any_file(stem)):
            _add_image(plan, folder, split, stem, opt.keep_difficult)
    return plan


def _add_image(plan: Plan, folder: VocFolder, split: str, stem: str, keep_difficult: bool) -> None:
    """Read an image's annotation and add both to the plan. Skipped if one is missing or broken."""
    if stem not in folder.xmls:
        raise Skipped("image without XML" if stem in folder.images else "name without image and XML")
    root = read_xml(folder.xmls[stem])
    filename = _last_part(_text(root, "filename"))
    source = folder.find_image(stem, filename)
    if source is None:
        raise Skipped("XML without image")
    size = layout.displayed_size(source)
    if filename and _normal(filename) != _normal(source.name):
        plan.repaired["file name in the XML is another"] += 1
    stated = tuple(_text(root, f"size/{key}").removesuffix(".0") for key in ("width", "height"))
    if stated != tuple(map(str, size)):
        missing = not all(text.strip("0") for text in stated)
        plan.repaired[f"size {'missing' if missing else 'wrong'} in the XML, taken from the image"] += 1
    boxes = []
    for element in root.findall("object"):
        with plan.skipping():
            boxes.append(read_box(plan, element, size, keep_difficult))
    plan.add(split, source, stem, folder.root.name, boxes)


def choose_classes(found: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """The class names in the order of their numbers. UserError if there are none."""
    if asked:
        if len(set(asked)) < len(asked):
            raise UserError("--classes: a name is given twice")
        return list(asked)
    if not found:
        raise UserError("--voc: no object in any annotation, so the classes are unknown; give them with --classes")
    return list(VOC_NAMES) if set(found) == set(VOC_NAMES) else list(found)


# Command line ---------------------------------------------------------------------------------------------------------

def convert(opt: argparse.Namespace) -> str:
    """Do what the flags say; return the report. UserError for anything the user must mend first."""
    if not 0 < opt.val_share < 1:
        raise UserError(f"--val-share {opt.val_share}: must lie between 0 and 1")
    sources = list(dict.fromkeys(path.resolve() for path in opt.voc))
    layout.check_output(opt, sources, "--voc")
    folders = [VocFolder(source) for source in sources]
    plan = read_annotations(folders, choose_splits(folders, opt.splits), opt)
    plan.require_items("--voc")
    names = choose_classes(sorted(plan.found), opt.classes)
    classes = (name for item in plan.items for name, _ in item.boxes)
    plan.dropped.update(f"object of class '{name}', not in --classes" for name in classes if name not in names)
    return layout.write(plan, names, opt, "voc_to_yolo.py")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> options."""
    parser = layout.converter_parser(__doc__, "--images")
    add = parser.add_argument
    add("--voc", type=Path, nargs="+", required=True, metavar="DIR", help="VOC folders, e.g. VOCdevkit/VOC2007")
    add("--splits", nargs="+", choices=SPLITS, help="lists of ImageSets/Main to convert (train, val and test if there)")
    add("--val-share", type=float, default=0.2, help="share of val where there are no lists (0.2)")
    add("--seed", type=int, default=0, help="seed of that split (0)")
    add("--classes", nargs="+", metavar="NAME", help="classes by their numbers (all found, sorted; VOC's as usual)")
    add("--keep-difficult", action="store_true", help="keep objects marked difficult, which are left out otherwise")
    return parser.parse_args(argv)


def main() -> None:
    """Command line -> the converted set."""
    print(convert(parse()))


if __name__ == "__main__":
    run_cli(main)
