"""What val.py writes for others: COCO predictions with COCO's own ids, label files that are labels."""
from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

import val
from tests.conftest import ROOT
from utils.boxes import xywh2xyxy
from utils.data.coco import CocoResults
from utils.data.dataset import DetectionDataset
from utils.data.image_files import parse_labels
from utils.data.loader import build_loader
from utils.errors import UserError

COCO = yaml.safe_load((ROOT / "data/coco.yaml").read_text())["names"]
CLASSES = {"000000000139.png": [0, 11, 79], "000000000285.png": [12, 25, 60]}   # of three objects in each image
IDS = {0: 1, 11: 13, 79: 90, 12: 14, 25: 28, 60: 67}   # as in instances_val2017.json: person 1, ..., toothbrush 90


@pytest.fixture
def dataset(tmp_path: Path) -> DetectionDataset:
    """Two images of 100 x 50 with three objects each."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for name, classes in CLASSES.items():
        cv2.imwrite(str(images / name), np.full((50, 100, 3), 99, np.uint8))
        rows = [f"{c} {0.2 + 0.3 * i} 0.5 0.2 0.4" for i, c in enumerate(classes)]
        (labels / f"{name[:-4]}.txt").write_text("\n".join(rows))
    return DetectionDataset([images], 64, nc=80)


def perfect(dataset: DetectionDataset, i: int) -> torch.Tensor:
    """(n, 6) detections that are the labels of an image, in its pixels."""
    labels = torch.from_numpy(dataset.labels[i])
    boxes = xywh2xyxy(labels[:, 1:]) * torch.tensor([100, 50, 100, 50])
    return torch.cat((boxes, torch.full((len(labels), 1), 0.9), labels[:, :1]), 1)


def collected(dataset: DetectionDataset, names: dict[int, str], anns: Path | None = None) -> CocoResults:
    results = CocoResults(names, anns, dataset.images)
    for i, path in enumerate(dataset.images):
        results.add(perfect(dataset, i), path)
    return results


@pytest.mark.parametrize("names", [("1.jpg", "cat.jpg"), ("a/1.jpg", "b/1.jpg"), ("1.jpg", "001.jpg")])
def test_every_image_has_an_id_of_its_own_and_all_are_of_one_kind(names):
    """pycocotools sorts them: numbers beside texts were a traceback after the whole evaluation."""
    images = [Path("set") / name for name in names]
    results = CocoResults(COCO, None, images)
    ids = [results._image_id(path) for path in images]
    assert len(set(ids)) == 2 and {type(each) for each in ids} == {str}


def test_cocos_classes_get_cocos_ids(dataset: DetectionDataset) -> None:
    results = collected(dataset, COCO)
    assert {(r["image_id"], r["category_id"]) for r in results.rows} == {
        (int(name[:-4]), IDS[c]) for name, classes in CLASSES.items() for c in classes}
    assert results.rows[0]["bbox"] == pytest.approx([10, 15, 20, 20]) and results.rows[0]["score"] == 0.9
    assert results.figures(dataset) == pytest.approx((1.0, 1.0))
    others = {**COCO, 5: "coach"}
    assert {r["category_id"] for r in collected(dataset, others).rows} == set(IDS)  # not COCO's: the classes' numbers
    assert collected(dataset, others).figures(dataset) == pytest.approx((1.0, 1.0))


def truth(file: Path, dataset: DetectionDataset) -> dict:
    """An annotation file with ids of its own: categories 1000 - class, images 'a', 'b', one more image and category."""
    data: dict = {"images": [{"id": "c", "file_name": "c.png"}], "annotations": [],
                  "categories": [{"id": 1000 - c, "name": name} for c, name in COCO.items()] + [{"id": 7, "name": "x"}]}
    for key, folder, path, labels in zip("ab", ("", "val/"), dataset.images, dataset.labels):
        data["images"].append({"id": key, "file_name": folder + path.name})
        for c, x, y, w, h in labels.tolist():
            box = [(x - w / 2) * 100, (y - h / 2) * 50, w * 100, h * 50]
            data["annotations"].append({"id": len(data["annotations"]) + 1, "image_id": key,
                                        "category_id": 1000 - int(c), "bbox": box})
    file.write_text(json.dumps(data))
    return data


def test_an_annotation_file_decides_on_ids_and_is_the_truth(dataset: DetectionDataset, tmp_path: Path) -> None:
    data = truth(tmp_path / "anns.json", dataset)
    results = collected(dataset, COCO, tmp_path / "anns.json")
    assert {(r["image_id"], r["category_id"]) for r in results.rows} == {
        (key, 1000 - c) for key, classes in zip("ab", CLASSES.values()) for c in classes}
    assert results.figures(dataset) == pytest.approx((1.0, 1.0))  # image c was not looked at
    for annotation in data["annotations"]:
        annotation["bbox"][0] += 40
    (tmp_path / "moved.json").write_text(json.dumps(data))
    assert collected(dataset, COCO, tmp_path / "moved.json").figures(dataset) == (0.0, 0.0)
    data["images"].pop()
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == "a"]
    (tmp_path / "one.json").write_text(json.dumps(data))
    results = collected(dataset, COCO, tmp_path / "one.json")
    assert {r["image_id"] for r in results.rows} == {"a"} and results.unknown == 1
    with pytest.raises(UserError, match="one.json: has no category 'wasp'"):
        CocoResults({0: "wasp"}, tmp_path / "one.json")
    with pytest.raises(UserError, match="--anns .*none.json: no such file"):
        CocoResults(COCO, tmp_path / "none.json")


def test_the_truth_may_lack_what_pycocotools_needs(dataset: DetectionDataset, tmp_path: Path) -> None:
    """Polygons without bbox, no area, no ids, ids that are texts here and numbers there: mAP 0, or a KeyError."""
    data = truth(tmp_path / "anns.json", dataset)
    for i, row in enumerate(data["annotations"]):
        x, y, w, h = row["bbox"]
        row |= {"area": None, "iscrowd": "0", "id": 0, "category_id": str(row["category_id"])}
        if i % 2:
            row |= {"bbox": [], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
    (tmp_path / "odd.json").write_text(json.dumps(data), encoding="utf-16")
    assert collected(dataset, COCO, tmp_path / "odd.json").figures(dataset) == pytest.approx((1.0, 1.0))
    del data["annotations"][1]["segmentation"]
    (tmp_path / "odd.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="annotation 2 has no bbox"):
        collected(dataset, COCO, tmp_path / "odd.json")


def outputs(dataset: DetectionDataset, folder: Path, *flags: str) -> val.Outputs:
    opt = val.parse(["--save-txt", "--noplots", *flags])
    written = val.Outputs(folder, dataset, COCO, opt)
    batch = next(iter(build_loader(dataset, 2, 0, shuffle=False)))
    found = []
    for i, shapes in enumerate(batch.shapes):
        boxes = perfect(dataset, i)
        boxes[:, :4] = boxes[:, :4] * shapes[1][0][0] + torch.tensor([*shapes[1][1]] * 2)
        found.append(boxes)
    written.add(0, batch, found)
    return written


def test_label_files_are_labels(dataset: DetectionDataset, tmp_path: Path) -> None:
    outputs(dataset, tmp_path / "plain")
    for i, path in enumerate(dataset.images):
        text = (tmp_path / "plain/labels" / f"{path.stem}.txt").read_text()
        labels, problems = parse_labels(text, path, 80)
        assert not problems and np.allclose(labels, dataset.labels[i], atol=0.01)
    outputs(dataset, tmp_path / "confident", "--save-conf")
    rows = np.loadtxt(tmp_path / "confident/labels" / f"{dataset.images[0].stem}.txt", ndmin=2)
    assert rows.shape == (3, 6) and np.allclose(rows[:, 5], 0.9)


def test_anns_alone_asks_for_json(dataset: DetectionDataset, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = truth(tmp_path / "anns.json", dataset)
    data["images"].pop()
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == "a"]
    (tmp_path / "one.json").write_text(json.dumps(data))
    written = outputs(dataset, tmp_path / "run", "--anns", str(tmp_path / "one.json"))
    figures = written.finish(Namespace())
    assert figures["pycocotools"]["mAP_0.5"] == pytest.approx(1.0)
    assert len(json.loads((tmp_path / "run/predictions.json").read_text())) == 3
    assert "1 images are not in" in capsys.readouterr().out
