"""Turn Pascal VOC folders (JPEGImages, Annotations, ImageSets/Main) into the YOLO layout, and write the data yaml.

    python data/scripts/voc_to_yolo.py --voc VOCdevkit/VOC2007 --out ../datasets/VOC2007 --splits trainval test
    python train.py --data ../datasets/VOC2007/data.yaml

The input is only read. What is wrong in it is mended or left out, and counted in the table at the end.
"""
from __future__ import annotations

import argparse
import math
import random
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

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

SPLITS = ("train", "val", "trainval", "test")
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VOC_NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
             "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")



# ---------------------------------------------------------------------------------------------------- reading a folder


class VocFolder:
    """The files of one VOC folder by stem. Without Annotations or JPEGImages they are looked for in the folder."""

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
        """The stems that a split's list names, in its order."""
        lines = self.lists[split].read_text(encoding="utf-8-sig", errors="replace").splitlines()
        return [self._stem(_normal(line.strip())) for line in lines if line.strip()]

    def random_split(self, val_share: float, seed: int) -> dict[str, list[str]]:
        """All stems, sorted, as train and val: a pure function of the stems, the share and the seed."""
        stems = sorted(self.xmls.keys() | self.images.keys())
        if len(stems) < 2:
            raise UserError(f"--voc {self.root}: one picture can't be split into train and val")
        chosen = set(random.Random(seed).sample(stems, min(max(round(val_share * len(stems)), 1), len(stems) - 1)))
        return {"train": [s for s in stems if s not in chosen], "val": [s for s in stems if s in chosen]}

    def find_image(self, stem: str, filename: str) -> Path | None:
        """The image of an annotation: the one with its stem; the name in the XML decides where that leaves a choice."""
        named = self.images_by_name.get(_normal(filename))
        if named is not None and (stem not in self.images or _normal(named.stem) == stem):
            return named
        return self.images.get(stem)

    def _stem(self, line: str) -> str:
        """'000001', '000001 1', '000001.jpg' or 'JPEGImages/000001.jpg' -> '000001'; a known name as it stands."""
        without_flag = line.rsplit(maxsplit=1)[0] if line.split()[-1] in ("1", "-1", "0") else line
        for text in (line, without_flag):
            name = _last_part(text)
            bare = name.rsplit(".", 1)[0]
            for stem in (name, bare):
                if stem in self.xmls or stem in self.images:
                    return stem
        return _last_part(without_flag)


def _visible(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]  # macOS leaves '._name.xml' behind


def _normal(text: str) -> str:
    """One spelling for accented letters: file systems and editors differ in theirs."""
    return unicodedata.normalize("NFC", text)


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]


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


def read_objects(root: ElementTree.Element, size: tuple[int, int], keep_difficult: bool,
                 tally: Tally) -> Iterator[tuple[str, Corners | None]]:
    """(class name, box in 0..1) of each object; None for the box where it was left out.

    VOC counts pixels from 1 and includes the last: pixel edges run from xmin - 1 to xmax.
    """
    for item in root.findall("object"):
        name = _text(item, "name")
        if not name:
            tally.dropped["box without a class name"] += 1
        elif not keep_difficult and _text(item, "difficult").lower() in ("1", "true"):
            tally.dropped["difficult object"] += 1
            yield name, None
        else:
            yield name, _read_box(item.find("bndbox"), size, tally)


def _read_box(element: ElementTree.Element | None, size: tuple[int, int], tally: Tally) -> Corners | None:
    try:
        if element is None:
            raise ValueError
        x1, y1, x2, y2 = (float(_text(element, key)) for key in ("xmin", "ymin", "xmax", "ymax"))
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            raise ValueError
    except ValueError:
        tally.dropped["box missing or not numeric"] += 1
        return None
    if x1 == x2 or y1 == y2:  # strictly one pixel wide, in practice a stray click
        tally.dropped["box empty"] += 1
        return None
    if x1 > x2 or y1 > y2:
        tally.repaired["box with swapped corners"] += 1
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    width, height = size
    inside = (max(x1 - 1, 0) / width, max(y1 - 1, 0) / height, min(x2, width) / width, min(y2, height) / height)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        tally.dropped["box outside the image"] += 1
        return None
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:  # 0 is no offence: many tools count from 0
        tally.repaired["box cut at the image's edge"] += 1
    return inside


def _text(element: ElementTree.Element, tag: str) -> str:
    return " ".join((element.findtext(tag) or "").split())


# ------------------------------------------------------------------------------------------------------- making a plan


def choose_splits(folders: Sequence[VocFolder], asked: Sequence[str] | None) -> tuple[str, ...]:
    """The splits to convert, in SPLITS' order; () = there are no lists: at random. UserError for a bad choice."""
    available = {split for folder in folders for split in folder.lists}
    if not asked:
        only_joint = "trainval" in available and "train" not in available
        asked = [s for s in (("trainval", "test") if only_joint else ("train", "val", "test")) if s in available]
        if not asked:
            return ()
    missing = [split for split in asked if split not in available]
    if missing:
        there = ", ".join(s for s in SPLITS if s in available) or "none: leave --splits out, to split at random"
        raise UserError(f"--splits {missing[0]}: no ImageSets/Main/{missing[0]}.txt in any --voc (there: {there})")
    if "trainval" in asked and {"train", "val"} & set(asked):
        raise UserError("--splits: trainval is train and val together; ask for trainval, or for train and val")
    for folder in folders:
        if not folder.lists.keys() & set(asked):
            raise UserError(f"--voc {folder.root}: has none of the lists {', '.join(asked)} in ImageSets/Main; choose "
                            "others with --splits, or convert it alone")
    return tuple(s for s in SPLITS if s in asked)


def plan(folders: Sequence[VocFolder], splits: Sequence[str], val_share: float, seed: int, keep_difficult: bool,
         tally: Tally) -> tuple[list[Item], list[str]]:
    """Read all annotations: the pictures to convert, and the sorted names of all classes met."""
    jobs = []
    for folder in folders:
        lists = {s: folder.members(s) for s in splits if s in folder.lists} or folder.random_split(val_share, seed)
        seen: set[str] = set()
        for split, stems in lists.items():
            for stem in stems:
                if stem in seen:
                    tally.dropped["name listed twice"] += 1
                else:
                    seen.add(stem)
                    jobs.append((folder, split, stem))
    items: list[Item] = []
    names: set[str] = set()
    taken: set[tuple[str, str]] = set()
    for folder, split, stem in tqdm(jobs, "reading annotations", delay=1.0, leave=False, disable=None):
        try:
            source, found = _read_pair(folder, stem, keep_difficult, tally)
        except Skipped as reason:
            tally.drop_file(str(reason), folder.xmls.get(stem) or folder.images.get(stem) or folder.root / stem)
            continue
        names.update(name for name, _ in found)
        boxes = [(name, box) for name, box in found if box is not None]
        unique = tuple(dict.fromkeys(boxes))
        tally.dropped["box given twice"] += len(boxes) - len(unique)
        items.append(Item(split, source, free_name(stem, folder.root, split, taken, tally), unique))
    return items, sorted(names)


def _read_pair(folder: VocFolder, stem: str, keep_difficult: bool,
               tally: Tally) -> tuple[Path, list[tuple[str, Corners | None]]]:
    if stem not in folder.xmls:
        raise Skipped("image without XML" if stem in folder.images else "name without image and XML")
    root = read_xml(folder.xmls[stem])
    filename = _last_part(_text(root, "filename"))
    source = folder.find_image(stem, filename)
    if source is None:
        raise Skipped("XML without image")
    size = displayed_size(source)
    if filename and _normal(filename) != _normal(source.name):
        tally.repaired["file name in the XML is another"] += 1
    stated = tuple(_text(root, f"size/{key}").removesuffix(".0") for key in ("width", "height"))
    if stated != tuple(map(str, size)):
        missing = not all(text.strip("0") for text in stated)
        tally.repaired[f"size {'missing' if missing else 'wrong'} in the XML, taken from the image"] += 1
    return source, list(read_objects(root, size, keep_difficult, tally))


def choose_classes(found: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """The class names in the order of their numbers. UserError if there are none."""
    if asked:
        if len(set(asked)) < len(asked):
            raise UserError("--classes: a name stands there twice")
        return list(asked)
    if not found:
        raise UserError("--voc: no object in any annotation, so the classes are unknown; give them with --classes")
    return list(VOC_NAMES) if set(found) == set(VOC_NAMES) else list(found)


# -------------------------------------------------------------------------------------------------------- command line


def convert(opt: argparse.Namespace) -> str:
    """Do what the flags say; return the report. UserError for anything the user must mend first."""
    out, yaml_file = Path(opt.out), Path(opt.yaml or Path(opt.out) / "data.yaml")
    if not 0 < opt.val_share < 1:
        raise UserError(f"--val-share {opt.val_share}: must lie between 0 and 1")
    sources = list(dict.fromkeys(Path(v).resolve() for v in opt.voc))
    check_output(out, yaml_file, sources, opt.exist_ok, "--voc")
    folders, tally = [VocFolder(source) for source in sources], Tally()
    splits = choose_splits(folders, opt.splits)
    items, found = plan(folders, splits, opt.val_share, opt.seed, opt.keep_difficult, tally)
    splits = tuple(s for s in SPLITS if any(item.split == s for item in items))
    if not items:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in tally.dropped.items() if count)
        raise UserError(f"--voc {' '.join(opt.voc)}: no usable picture ({reasons})")
    names = choose_classes(found, opt.classes)
    for name in (name for item in items for name, _ in item.boxes if name not in names):
        tally.dropped[f"object of class '{name}', not in --classes"] += 1
    try:
        write(items, names, out, opt.images)
        write_yaml(yaml_file, out, splits, names, "voc_to_yolo.py")
    except OSError as error:
        where = error.filename or out
        raise UserError(f"{where}: can't be written ({error.strerror}); choose another --out or --yaml") from None
    return report(items, splits, names, found, tally) + f"\nnow: python train.py --data {yaml_file}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--voc", nargs="+", required=True, metavar="DIR", help="VOC folders, e.g. VOCdevkit/VOC2007 VOCdevkit/VOC2012")
    add("--out", required=True, metavar="DIR", help="where images/ and labels/ go")
    add("--yaml", metavar="FILE", help="the data yaml to write (OUT/data.yaml)")
    add("--splits", nargs="+", choices=SPLITS, help="lists of ImageSets/Main to convert (train, val and test if there)")
    add("--val-share", type=float, default=0.2, help="share of val where there are no lists (0.2)")
    add("--seed", type=int, default=0, help="seed of that split (0)")
    add("--images", choices=("copy", "link", "hardlink"), default="copy", help="how images get into OUT (copy)")
    add("--classes", nargs="+", metavar="NAME", help="classes by their numbers (all found, sorted; VOC's as usual)")
    add("--keep-difficult", action="store_true", help="keep objects marked difficult, which are left out otherwise")
    add("--exist-ok", action="store_true", help="write into a folder, and over a yaml, that this program did not make")
    return parser.parse_args(argv)


def main() -> None:
    """The script."""
    print(convert(parse()))


if __name__ == "__main__":
    run_cli(main)
