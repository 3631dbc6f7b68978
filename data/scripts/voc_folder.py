"""The files of Pascal VOC data sets: which XML, image and split belong together, however the folders are called."""
from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from data.scripts.yolo_layout import SPLIT_WORDS, SPLITS, Skipped, last_part
from utils.data.image_files import IMAGE_SUFFIXES, walk
from utils.errors import UserError
from utils.text import read_lines

XML, TXT = frozenset({".xml"}), frozenset({".txt"})
# What people call the folders, in lower case; the first that is there and holds such files counts.
ANNOTATION_FOLDERS = ("annotations", "annotation", "xml", "xmls", "labels", "label")
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")
LIST_FOLDERS = ("imagesets",)


class VocFolder:
    """The files of one VOC folder by name: their path below the folder of XML (or of images), without the suffix.

    The XML are those of `xml`, or of a folder in `root` that is called like one of ANNOTATION_FOLDERS, or all below
    `root`; and so are the images. `lists` holds the names of each split of ImageSets/Main; where there are no lists and
    `split` is given, it holds everything under that.
    """

    def __init__(self, root: Path, xml: Path | None = None, images: Path | None = None, split: str = ""):
        self.root, self.split = root, split
        annotations = xml or _child(root, ANNOTATION_FOLDERS, XML) or root
        pictures = images or _child(root, IMAGE_FOLDERS, IMAGE_SUFFIXES) or root
        self.xmls = {_name(p, annotations): p for p in sorted(_files(annotations, XML))}
        if not self.xmls:
            raise UserError(f"--voc {root}: no Annotations/*.xml, nor others; give the folder that holds the XML files")
        self._annotated = set(map(_stem, self.xmls))
        self.images: dict[str, Path] = {}
        self._like: dict[str, list[tuple[str, Path]]] = defaultdict(list)  # stem, or file name -> images
        for path in sorted(_files(pictures, IMAGE_SUFFIXES)):
            name = _name(path, pictures)
            self.images.setdefault(name, path)
            for key in {normal(path.stem), normal(path.name)}:
                self._like[key].append((name, path))
        self._stems: dict[str, set[str]] = defaultdict(set)
        for name in (*self.xmls, *self.images):
            self._stems[_stem(name)].add(name)
        self.lists = self._read_lists()
        if split and not self.lists:
            self.lists = {split: self.names()}

    def names(self) -> list[str]:
        """All annotations, and the images that certainly have none, sorted."""
        annotated, pictured = (Counter(map(_stem, names)) for names in (self.xmls, self.images))
        others = self.images.keys() - self.xmls.keys()
        return sorted([*self.xmls, *(name for name in others if pictured[_stem(name)] > annotated[_stem(name)])])

    def find_image(self, name: str, filename: str) -> Path | None:
        """The image of an annotation: that of its stem, or else the one that the XML names.

        Of several images that one counts whose folders agree most with the annotation's; of several in one folder, that
        which the XML names, or else the first. Skipped where several folders agree equally well, and where every image
        belongs to another XML.
        """
        fitting = self._like.get(_stem(name)) or self._like.get(normal(filename), [])
        if not fitting:
            return None
        candidates = [(other, path) for other, path in fitting if other == name or other not in self.xmls
                      and (_stem(other) == _stem(name) or _stem(other) not in self._annotated)]
        if not candidates:
            raise Skipped("XML without image (the one that fits belongs to another)")
        alike = [_common_tail(name, other) for other, _ in candidates]
        best = [path for (_, path), score in zip(candidates, alike) if score == max(alike)]
        if len({path.parent for path in best}) > 1:
            best = [path for path in best if normal(path.name) == normal(filename)] or best
        if len({path.parent for path in best}) > 1:
            raise Skipped("several images fit the XML")
        return next((path for path in best if normal(path.name) == normal(filename)), best[0])

    def any_file(self, name: str) -> Path:
        """A path to show in messages about this name."""
        return self.xmls.get(name) or self.images.get(name) or self.root / name

    def _read_lists(self) -> dict[str, list[str]]:
        sets = _child(self.root, LIST_FOLDERS, TXT)
        main = sets and _child(sets, ("main",), TXT)
        files = {split: main / f"{split}.txt" for split in SPLITS} if main else {}
        return {split: [self._listed(normal(line)) for line in read_lines(file)]
                for split, file in files.items() if file.is_file()}

    def _listed(self, line: str) -> str:
        """'000001', '000001 1', '000001.jpg' or 'JPEGImages/000001.jpg' -> '000001'; a known name is left as it is."""
        without_flag = line.rsplit(maxsplit=1)[0] if line.split()[-1] in ("1", "-1", "0") else line
        for text in (line, without_flag):
            for path in (text.replace("\\", "/"), last_part(text)):
                for name in (path, path.rsplit(".", 1)[0]):
                    if name in self.xmls or name in self.images:
                        return name
                    if len(self._stems.get(name, ())) == 1:
                        return next(iter(self._stems[name]))
        return last_part(without_flag)


def find_folders(root: Path) -> list[VocFolder]:
    """`root` as a VOC folder; or those that it holds: the years of a VOCdevkit, a folder for each split.

    UserError where there are no XML files.
    """
    folders = []
    for folder in _units(root, set()):
        parts = [SPLIT_WORDS.get(part.lower(), "") for part in folder.relative_to(root).parts]
        folders.append(VocFolder(folder, split=next(filter(None, parts), "")))
    return folders


def _units(root: Path, seen: set[Path]) -> list[Path]:
    """The folders at or below `root` that hold annotations and their images. `seen`, which grows: not those again."""
    seen.add(root.resolve())
    entries = _visible(root)
    if any(p.suffix.lower() in XML for p in entries) or _child(root, ANNOTATION_FOLDERS, XML):
        return [root]
    below = [p for p in entries if p.is_dir() and _holds(p, XML)]
    if not below or _child(root, LIST_FOLDERS, TXT) or not all(_holds(folder, IMAGE_SUFFIXES) for folder in below):
        return [root]
    below.sort(key=Path.is_symlink)  # a folder that links lead to as well has its own name
    return [unit for folder in below if folder.resolve() not in seen for unit in _units(folder, seen)]


def _visible(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if not _is_junk(p.name)]


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # macOS leaves '._name.xml' and that folder behind


def _files(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """The files below a folder with one of these suffixes, in no order."""
    paths = (Path(where, name) for where, names in walk(folder, skip=_is_junk) for name in names if not _is_junk(name))
    return (path for path in paths if path.suffix.lower() in suffixes and path.is_file())


def _holds(folder: Path, suffixes: Collection[str]) -> bool:
    return any(True for _ in _files(folder, suffixes))


def _child(root: Path, names: Sequence[str], suffixes: Collection[str]) -> Path | None:
    """The first folder in `root` that is called like one of `names`, in any case, and holds such files."""
    folders = [p for p in _visible(root) if p.is_dir()]
    return next((p for name in names for p in folders if p.name.lower() == name and _holds(p, suffixes)), None)


def _name(path: Path, folder: Path) -> str:
    return normal(path.relative_to(folder).with_suffix("").as_posix())


def _stem(name: str) -> str:
    return name.rpartition("/")[2]


def _common_tail(a: str, b: str) -> int:
    """How many folders two names have in common, from the end."""
    pairs = list(zip(reversed(PurePosixPath(a).parts[:-1]), reversed(PurePosixPath(b).parts[:-1])))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))


def normal(text: str) -> str:
    """One encoding of accented letters: file systems and editors differ in theirs."""
    return unicodedata.normalize("NFC", text)
