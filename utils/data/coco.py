"""COCO's format: annotation files, predictions as its dicts, and the figures of pycocotools."""
from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.data.dataset import DetectionDataset
from utils.errors import UserError
from utils.files import ROOT
from utils.text import read_yaml_mapping

# COCO numbers its 80 classes 1 to 90: ten of those that it was planned with have no boxes.
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


def read_annotations(path: Path, flag: str) -> dict[str, Any]:
    """An annotation file, given by `flag`. UserError if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: not readable as JSON ({str(error)[:80]})") from None
    needed = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in needed):
        raise UserError(f"{flag} {path}: needs the lists images, annotations and categories")
    return data


class CocoResults:
    """Detections in COCO's format, .rows, and what pycocotools says of them.

    Without an annotation file an image's id is its name (a number, where all `images` have one of their own; the path,
    where names repeat), a category's the class, or COCO's own
    number where the classes are COCO's; the truth is the data set's labels. With one, ids and truth are the file's:
    categories go by name, images by file name. .unknown counts images that it does not list, which are left out.
    UserError where it can't be read or lacks a class.
    """

    def __init__(self, names: dict[int, str], annotations: Path | None = None, images: Iterable[Path] = ()):
        self.names, self.rows, self.unknown = names, list[dict[str, Any]](), 0
        stems = [path.stem for path in images]
        self.numbered = all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems)
        self.repeating = len(set(stems)) < len(stems)
        self.truth = read_annotations(annotations, "--anns") if annotations else None
        self.categories = dict(zip(names, COCO_IDS if _are_cocos(names) else names))
        if self.truth is not None:
            ids = {category.get("name"): category.get("id") for category in self.truth["categories"]}
            for number, name in names.items():
                if name not in ids:
                    raise UserError(f"--anns {annotations}: has no category '{name}'; give the file of this data set")
                self.categories[number] = ids[name]
            self.images = _ids_by_name(self.truth)

    def add(self, found: Tensor, path: Path) -> None:
        """(n, 6) detections in the pixels of the image at `path`, rounded as YOLOv5 does."""
        image_id = self._image_id(path)
        if image_id is None:
            self.unknown += 1
            return
        for x1, y1, x2, y2, confidence, cls in found.tolist():
            box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
            self.rows.append({"image_id": image_id, "category_id": self.categories[int(cls)], "bbox": box,
                              "score": round(confidence, 5)})

    def figures(self, dataset: DetectionDataset) -> tuple[float, float]:
        """(mAP50-95, mAP50) of the data set's images."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO()
        truth.dataset = self.truth or self._truth_of(dataset)
        for row in truth.dataset["annotations"]:  # not every program writes them
            row.setdefault("iscrowd", 0)
            if "area" not in row:
                row["area"] = row["bbox"][2] * row["bbox"][3]
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
                                    "category_id": self.categories[int(c)]})
        categories = [{"id": self.categories[i], "name": name} for i, name in self.names.items()]
        return {"images": images, "annotations": annotations, "categories": categories}


def _are_cocos(names: dict[int, str]) -> bool:
    return list(names.values()) == list(read_yaml_mapping(ROOT / "data/coco.yaml", "--data")["names"].values())


def _ids_by_name(truth: dict[str, Any]) -> dict[str, Any]:
    """file_name -> image id; and by the name without its folders, where that is one image's."""
    full = {str(image.get("file_name")): image.get("id") for image in truth["images"]}
    count = Counter(name.rpartition("/")[2] for name in full)
    short = {name.rpartition("/")[2]: number for name, number in full.items()}
    return {**{name: number for name, number in short.items() if count[name] == 1}, **full}
