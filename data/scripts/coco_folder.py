"""COCO JSON files: which of a folder belong to which split, and where their images are."""
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from data.scripts.yolo_layout import SPLIT_WORDS, last_part
from utils.data.coco import read_annotations
from utils.data.image_files import find_below
from utils.errors import UserError

Annotations = dict[str, Any]
LOOKED_AT = 50   # images of a JSON that are looked for in a folder


def find_splits(root: Path) -> dict[str, tuple[Annotations, Path]]:
    """Split -> its annotations and the folder of its images; a single JSON that names no split has "".

    Roboflow: train/_annotations.coco.json beside the images. CVAT: annotations/instances_default.json and images/, with
    or without default/. COCO: annotations/instances_train2017.json and train2017/. UserError where it is not clear.
    """
    if not root.is_dir():
        raise UserError(f"--coco {root}: no such folder")
    files: dict[str, Path] = {}
    splits: dict[str, tuple[Annotations, Path]] = {}
    for file, data in _annotation_files(root):
        split = _split_of(file.relative_to(root))
        if split in files:
            which = f"two files for {split}" if split else "which split is it, and which is the other"
            raise UserError(f"--coco: {files[split]}, {file}: {which}? Give --json and --images")
        files[split], splits[split] = file, (data, _image_folder(file, data))
    if not files:
        raise UserError(f"--coco {root}: no JSON with images, annotations and categories there")
    if "" in files and len(files) > 1:
        raise UserError(f"--coco: {files['']}: which split is it? Give --json and --images")
    return splits


def _annotation_files(root: Path) -> list[tuple[Path, Annotations]]:
    """The JSON files below `root` that hold annotations of boxes."""
    files = [p for p in sorted(root.rglob("*.json")) if not p.name.startswith(".")]
    # COCO has captions and key points beside them, for the same images.
    boxes = {p.parent for p in files if p.name.startswith("instances")}
    pairs, refused = [], []
    for file in files:
        if file.parent in boxes and not file.name.startswith("instances"):
            continue
        try:
            pairs.append((file, read_annotations(file, "--coco")))
        except UserError as error:
            refused.append(error)  # it may belong to something else
    if refused and not pairs:
        raise refused[0]
    return pairs


def _split_of(path: Path) -> str:
    """'annotations/instances_val2017.json' or 'valid/_annotations.coco.json' -> 'val'; "" if no part names a split."""
    words = (word for part in (path.stem, *reversed(path.parent.parts)) for word in re.findall("[a-z]+", part.lower()))
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _image_folder(file: Path, data: Annotations) -> Path:
    """Where most of the first images of an annotation file are. UserError if they are nowhere around it."""
    base = file.parent.parent if file.parent.name.lower().startswith("annotation") else file.parent
    subset = file.stem.removeprefix("instances_")
    folders = (base / "images" / subset, base / subset, base / "images", file.parent, base)
    names = [str(image.get("file_name", "")) for image in data["images"][:LOOKED_AT]]
    counts = [sum(os.path.isfile(find_image(folder, name)) for name in names) for folder in folders]
    if names and not max(counts):
        raise UserError(f"--coco: {file}: its images ({names[0]} ...) are not found; give --json and --images")
    return folders[counts.index(max(counts))]


def find_image(folder: Path, name: str) -> Path:
    """Where an image with this file_name should be: below `folder`, or in it without the name's own folders."""
    path = find_below(folder, name)
    return path if os.path.isfile(path) else folder / last_part(name)
