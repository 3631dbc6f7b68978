"""COCO's format: predictions as its dicts, and the figures of pycocotools."""
from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from torch import Tensor

from utils.data.dataset import DetectionDataset


def image_id(path: Path) -> int | str:
    """COCO's image id: a numeric file name is a number."""
    return int(path.stem) if path.stem.isnumeric() else path.stem


def coco_predictions(found: Tensor, path: Path) -> list[dict]:
    """(n, 6) detections in image pixels -> COCO's list of dicts, rounded as YOLOv5 does."""
    rows = []
    for x1, y1, x2, y2, confidence, cls in found.tolist():
        box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
        rows.append({"image_id": image_id(path), "category_id": int(cls), "bbox": box, "score": round(confidence, 5)})
    return rows


def pycocotools_map(dataset: DetectionDataset, predictions: list[dict], names: dict[int, str]) -> tuple[float, float]:
    """(mAP50-95, mAP50) by pycocotools, with ground truth made from the data set's own labels."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images: list[dict] = []
    annotations: list[dict] = []
    for path, labels, (width, height) in zip(dataset.images, dataset.labels, dataset.shapes.tolist()):
        images.append({"id": image_id(Path(path)), "width": width, "height": height})
        for c, x, y, w, h in labels.tolist():
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            annotations.append({"id": len(annotations) + 1, "image_id": images[-1]["id"], "category_id": int(c),
                                "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    truth = COCO()
    truth.dataset = {"images": images, "annotations": annotations,
                     "categories": [{"id": i, "name": name} for i, name in names.items()]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        if not predictions:
            return 0.0, 0.0
        run = COCOeval(truth, truth.loadRes(json.loads(json.dumps(predictions))), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0]), float(run.stats[1])
