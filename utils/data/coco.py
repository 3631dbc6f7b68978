"""COCO's format: annotation files, predictions as its dicts, and the figures of pycocotools."""
from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.data.dataset import DetectionDataset
from utils.errors import UserError
from utils.files import ROOT
from utils.text import read_json, read_yaml_mapping

# COCO numbers its 80 classes 1 to 90: ten of those that it was planned with have no boxes.
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


def read_annotations(path: Path, flag: str) -> dict[str, Any]:
    """An annotation file, given by `flag`. UserError if it is none.

    Ids that say the same are the same: an annotation of image "1" belongs to the image 1.
    """
    data = read_json(path, flag)
    needed = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in needed):
        raise UserError(f"{flag} {path}: needs the lists images, annotations and categories")
    if not all(isinstance(entry, dict) for key in needed for entry in data[key]):
        raise UserError(f"{flag} {path}: images, annotations and categories must be lists of objects")
    for key, kind in (("image_id", "images"), ("category_id", "categories")):
        own = {}
        for entry in data[kind]:
            entry["id"] = _plain_id(entry.get("id"))
            own[str(entry["id"])] = entry["id"]
        for annotation in data["annotations"]:
            reference = _plain_id(annotation.get(key))
            annotation[key] = own.get(str(reference), reference)
    return data


def _plain_id(value: Any) -> int | str | None:
    """An id as a number or a text; None for what is neither."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (int, str)) else None


def outline_box(segmentation: Any) -> tuple[float, float, float, float] | None:
    """(x1, y1, x2, y2) around an annotation's polygons, or its mask in runs (RLE); None where it has no area."""
    try:
        if isinstance(segmentation, dict):
            height, width = segmentation["size"]
            return _mask_box(height, width, segmentation["counts"])
        numbers = [float(n) for part in segmentation for n in (part if isinstance(part, list) else [part])]
        xs, ys = numbers[::2], numbers[1::2]
        if len(xs) != len(ys) or not all(map(math.isfinite, numbers)):
            return None
        box = min(xs), min(ys), max(xs), max(ys)
        return box if box[0] < box[2] and box[1] < box[3] else None
    except (ArithmeticError, KeyError, TypeError, ValueError):
        return None


def _mask_box(height: int, width: int, counts: list[int] | str) -> tuple[float, float, float, float] | None:
    """Corners around a mask of (height, width), whose columns are cut into runs: outside, inside, outside ...

    counts: the lengths of the runs; or COCO's text of them.
    """
    counts = _run_lengths(counts) if isinstance(counts, str) else counts
    ends = list(itertools.accumulate(counts))
    if min(counts) < 0 or ends[-1] != height * width:
        return None
    inside = [(start, end - 1) for start, end in zip(ends[::2], ends[1::2]) if end > start]  # first and last pixel
    if not inside:
        return None
    spans = [(start % height, last % height) if start // height == last // height else (0, height - 1)
             for start, last in inside]  # of rows: a run over several columns reaches from top to bottom
    return (inside[0][0] // height, min(top for top, _ in spans),
            inside[-1][1] // height + 1, max(bottom for _, bottom in spans) + 1)


def _run_lengths(text: str) -> list[int]:
    """COCO's text of run lengths: 5 bits a character, a 6th where more follow; from the third on, what is added to the
    length of two before. ValueError where it is none."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(character)
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits >> 4 & 1) << shift  # the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


class CocoResults:
    """Detections in COCO's format, .rows, and what pycocotools says of them.

    With an annotation file, ids and labels are the file's: categories are found by name, images by file name. .unknown
    counts images that it does not list; they are left out. UserError where it can't be read or lacks a class.
    Without one, the labels are the data set's. The id of an image is its name (as a number where all `images` have
    different numbers, as a path where names repeat); that of a category is the class, or COCO's own number for COCO's
    classes.
    """

    def __init__(self, names: dict[int, str], annotations: Path | None = None, images: Iterable[Path] = ()):
        self.names, self.rows, self.unknown = names, list[dict[str, Any]](), 0
        stems = [path.stem for path in images]
        self.numbered = all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems)
        self.repeating = len(set(stems)) < len(stems)
        self.truth = read_annotations(annotations, "--anns") if annotations else None
        self.categories = dict(zip(names, COCO_IDS if _are_cocos(names) else names))
        if self.truth is not None:
            ids = {str(category.get("name")): category["id"] for category in self.truth["categories"]}
            for number, name in names.items():
                if name not in ids:
                    raise UserError(f"--anns {annotations}: has no category '{name}'; give the file of this data set")
                self.categories[number] = ids[name]
            self.images = _ids_by_name(self.truth)
            for number, row in enumerate(self.truth["annotations"], 1):
                _complete(row, number, f"--anns {annotations}")

    def add(self, detections: Tensor, path: Path) -> None:
        """(n, 6) detections in the pixels of the image at `path`, rounded as YOLOv5 does."""
        image_id = self._image_id(path)
        if image_id is None:
            self.unknown += 1
            return
        for x1, y1, x2, y2, confidence, cls in detections.tolist():
            box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
            self.rows.append({"image_id": image_id, "category_id": self.categories[int(cls)], "bbox": box,
                              "score": round(confidence, 5)})

    def figures(self, dataset: DetectionDataset) -> tuple[float, float]:
        """(mAP50-95, mAP50) of the data set's images."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO()
        truth.dataset = self.truth or self._truth_of(dataset)
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            if not self.rows:
                return 0.0, 0.0
            run = COCOeval(truth, truth.loadRes(json.loads(json.dumps(self.rows))), "bbox")
            run.params.imgIds = [i for i in map(self._image_id, dataset.images) if i is not None]
            run.evaluate()
            run.accumulate()
            run.summarize()
        return float(run.stats[0]), float(run.stats[1])

    def _image_id(self, path: Path) -> Any:
        """COCO's image id; None where the annotation file does not list the image."""
        if self.truth is None:
            if self.numbered and path.stem.isdecimal():
                return int(path.stem)
            return path.as_posix() if self.repeating else path.stem
        names = ("/".join(path.parts[i:]) for i in range(len(path.parts)))
        return next((self.images[name] for name in names if name in self.images), None)

    def _truth_of(self, dataset: DetectionDataset) -> dict[str, Any]:
        """The data set's labels as an annotation file."""
        images: list[dict] = []
        annotations: list[dict] = []
        for path, labels, (width, height) in zip(dataset.images, dataset.labels, dataset.shapes.tolist()):
            images.append({"id": self._image_id(path), "width": width, "height": height})
            for c, x, y, w, h in labels.tolist():
                box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
                annotations.append({"id": len(annotations) + 1, "image_id": images[-1]["id"], "bbox": box,
                                    "category_id": self.categories[int(c)], "iscrowd": 0, "area": box[2] * box[3]})
        categories = [{"id": self.categories[i], "name": name} for i, name in self.names.items()]
        return {"images": images, "annotations": annotations, "categories": categories}


def _are_cocos(names: dict[int, str]) -> bool:
    return list(names.values()) == list(read_yaml_mapping(ROOT / "data/coco.yaml", "--data")["names"].values())


def _ids_by_name(truth: dict[str, Any]) -> dict[str, Any]:
    """file_name -> image id; and by the name without its folders, where that is one image's."""
    full = {str(image.get("file_name")).replace("\\", "/"): image["id"] for image in truth["images"]}
    count = Counter(name.rpartition("/")[2] for name in full)
    short = {name.rpartition("/")[2]: number for name, number in full.items()}
    return {**{name: number for name, number in short.items() if count[name] == 1}, **full}


def _complete(row: dict[str, Any], number: int, where: str) -> None:
    """Give the annotation `number` of a file what pycocotools needs and not every program writes.

    Its id, too: pycocotools takes a match with the annotation 0 for none. UserError where it has no box.
    """
    try:
        x, y, w, h = map(float, row.get("bbox") or ())
        usable = all(map(math.isfinite, (x, y, w, h)))
    except (ArithmeticError, TypeError, ValueError):
        usable = False
    if not usable:
        box = outline_box(row.get("segmentation"))
        if box is None:
            raise UserError(f"{where}: annotation {number} has no bbox of four numbers; mend it")
        x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
    row["bbox"] = [x, y, w, h]
    if not isinstance(row.get("area"), (int, float)):
        row["area"] = w * h
    row["id"], row["iscrowd"] = number, int(is_crowd(row))


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether `iscrowd` is set, also where it is a text."""
    return str(annotation.get("iscrowd") or 0).lower() not in ("0", "0.0", "false")
