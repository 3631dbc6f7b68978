"""COCO JSON in YOLO layout: the boxes, what is mended and left out, and that the input stays as it was."""
from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.scripts import coco_to_yolo
from utils.data.config import read_data
from utils.data.dataset import DetectionDataset
from utils.errors import UserError


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three images of 100 x 50 and their annotations, some of them bad."""
    root = tmp_path / "in"
    (root / "photos" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "sub/c.jpg"):
        Image.fromarray(np.full((50, 100, 3), 99, np.uint8)).save(root / "photos" / name)
    images = [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 50},
              {"id": 9, "file_name": "b.png", "width": 50, "height": 100},
              {"id": 11, "file_name": "sub/c.jpg"}, {"id": 12, "file_name": "gone.jpg"}]
    rows = [(7, 3, [10, 10, 20, 20]), (7, 90, [90, 40, 20, 20]), (7, 3, [10, 10, 20, 20]), (9, 3, [0, 0, 0, 5]),
            (9, 4, [0, 0, 5, 5]), (9, 3, [200, 0, 5, 5]), (9, 3, ["x", 0, 5, 5]), (99, 3, [0, 0, 5, 5])]
    annotations = [{"id": i, "image_id": image, "category_id": c, "bbox": box, "iscrowd": 0}
                   for i, (image, c, box) in enumerate(rows)]
    annotations.append({"id": 50, "image_id": 11, "category_id": 3, "bbox": [0, 0, 50, 50], "iscrowd": 1})
    categories = [{"id": 90, "name": "späte"}, {"id": 3, "name": "dog"}]
    (root / "x.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())).hexdigest()


def test_conversion(coco: Path, tmp_path: Path, script) -> None:
    before = digest(coco)
    flags = ["--json", f"train={coco / 'x.json'}", f"val={coco / 'x.json'}",
             "--images", f"train={coco / 'photos'}", f"val={coco / 'photos'}"]
    done = script("data/scripts/coco_to_yolo.py", *flags, "--out", tmp_path / "out", cwd=tmp_path)
    config = read_data(tmp_path / "out" / "data.yaml")
    assert config.names == {0: "dog", 1: "späte"}
    data = DetectionDataset(config.train, 64, nc=config.nc)
    assert [p.name for p in data.images] == ["a.jpg", "b.png", "c.jpg"]
    assert [len(rows) for rows in data.labels] == [2, 0, 0]
    assert np.allclose(data.labels[0], [[0, 0.2, 0.4, 0.2, 0.4], [1, 0.95, 0.9, 0.1, 0.2]])
    for words in ("2 x box given twice", "2 x box cut at the image's edge", "2 x image missing", "2 x crowd",
                  "2 x box of an unknown category", "2 x box empty", "2 x box outside the image", "gone.jpg",
                  "2 x box missing or not numeric", "2 x size wrong in the JSON"):
        assert words in done.stdout, words
    assert digest(coco) == before
    script("data/scripts/coco_to_yolo.py", *flags, "--out", tmp_path / "out", "--keep-crowd", cwd=tmp_path)
    assert len(DetectionDataset(config.val, 64, nc=2).labels[2]) == 1


@pytest.mark.parametrize("flags, words", [
    (["--json", "x.json", "--images", "train=photos"], "write train=PATH"),
    (["--json", "train=none.json", "--images", "train=photos"], "no such file"),
    (["--json", "train=x.json", "--images", "val=photos"], "no such folder"),
    (["--json", "train=photos/a.jpg", "--images", "train=photos"], "not readable as JSON"),
    (["--json", "train=list.json", "--images", "train=photos"], "needs the lists"),
    (["--json", "train=x.json", "--images", "train=photos", "--out", "photos"], "overlaps")])
def test_mistakes_are_one_line(coco: Path, script, flags: list[str], words: str) -> None:
    (coco / "list.json").write_text("[]")
    if "--out" not in flags:
        flags = [*flags, "--out", "out"]
    done = script("data/scripts/coco_to_yolo.py", *flags, cwd=coco, code=2)
    assert words in done.stderr and done.stderr.count("\n") == 1 and not (coco / "out").exists()


def test_a_failed_link_names_the_right_flag(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", fail)
    flags = ["--json", f"train={coco / 'x.json'}", "--images", f"train={coco / 'photos'}"]
    flags += ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"a\.jpg: can't be written \(.*\); use --place copy$") as error:
        coco_to_yolo.convert(coco_to_yolo.parse([*flags, "--place", "hardlink"]))
    mend = str(error.value).partition("; use ")[2].split()
    coco_to_yolo.convert(coco_to_yolo.parse([*flags, *mend]))
    assert (tmp_path / "out/images/train/a.jpg").is_file()
