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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("flags, words", [
    (["--json", "x.json", "--images", "train=photos"], "write train=PATH"),
    (["--json", "train=none.json", "--images", "train=photos"], "no such file"),
    (["--json", "train=x.json", "--images", "val=photos"], "no such folder"),
    (["--json", "train=x.json", "train=x.json", "--images", "train=photos"], "train is given more than once"),
    (["--json", "train=x.json", "--images", "train=photos", "val=photos"], "there is no --json of this split"),
    (["--json", "train=x.json", "--json", "val=none.json", "--images", "train=photos", "val=photos"], "no such file"),
    (["--json", "train=nameless.json", "--images", "train=photos"], "category 'dog' has no id"),
    (["--json", "train=photos/a.jpg", "--images", "train=photos"], "not a text file"),
    (["--json", "train=list.json", "--images", "train=photos"], "needs the lists"),
    (["--json", "train=x.json", "--images", "train=photos", "--out", "photos"], "overlaps")])
def test_mistakes_are_one_line(coco: Path, script, flags: list[str], words: str) -> None:
    (coco / "list.json").write_text("[]")
    nameless = {**json.loads((coco / "x.json").read_text()), "categories": [{"name": "dog"}]}
    (coco / "nameless.json").write_text(json.dumps(nameless))
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


# A folder as it was exported ------------------------------------------------------------------------------------------

def annotated(file: Path, names: list[str], categories: list[dict] | None = None) -> None:
    """A JSON with one box of category 1 an image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": i, "file_name": name, "width": 100, "height": 50} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 20, 20]} for i in range(len(names))]
    categories = categories or [{"id": 1, "name": "dog"}]
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 50)).save(folder / name)


def convert(root: Path, out: Path, *flags: object) -> tuple[dict[str, str], str]:
    """Label files (split/name -> text) and report of --coco root."""
    report = coco_to_yolo.convert(coco_to_yolo.parse(["--coco", str(root), "--out", str(out), *map(str, flags)]))
    labels = out / "labels"
    files = {p.relative_to(labels).with_suffix("").as_posix(): p.read_text() for p in labels.rglob("*.txt")}
    return files, report


@pytest.mark.parametrize("size, label, words", [
    ((200, 100), "0 0.2 0.4 0.2 0.4\n", "image scaled after the JSON was written, boxes with it"),
    ((50, 25), "0 0.2 0.4 0.2 0.4\n", "image scaled after the JSON was written, boxes with it"),
    ((100, 80), "0 0.2 0.25 0.2 0.25\n", "size wrong in the JSON, taken from the image")])
def test_boxes_of_images_that_were_scaled_since(tmp_path: Path, size: tuple[int, int], label: str, words: str) -> None:
    """They used to be divided by the size of the scaled image: every box was in the wrong place."""
    annotated(tmp_path / "in/train/_annotations.coco.json", ["a.jpg"])
    Image.new("RGB", size).save(tmp_path / "in/train/a.jpg")
    files, report = convert(tmp_path / "in", tmp_path / "out")
    found, = files.values()
    assert [float(x) for x in found.split()] == pytest.approx([float(x) for x in label.split()]) and words in report


def test_roboflow_has_a_json_beside_the_images_of_each_split(tmp_path: Path) -> None:
    groups = [{"id": 0, "name": "animals", "supercategory": "none"},
              {"id": 1, "name": "dog", "supercategory": "animals"},
              {"id": 2, "name": "cat", "supercategory": "animals"}]
    for split in ("train", "valid", "test"):
        annotated(tmp_path / "in" / split / "_annotations.coco.json", [f"{split}.rf.1.jpg"], groups)
        pictures(tmp_path / "in" / split, f"{split}.rf.1.jpg")
    files, report = convert(tmp_path / "in", tmp_path / "out")
    assert set(files) == {"train/train.rf.1", "val/valid.rf.1", "test/test.rf.1"}
    assert set(files.values()) == {"0 0.200000 0.400000 0.200000 0.400000\n"}
    # A category that only groups others is no class; one that happens to have no box is.
    assert read_data(tmp_path / "out/data.yaml").names == {0: "dog", 1: "cat"}
    assert "category 'animals'" in report


@pytest.mark.parametrize(("json_file", "images"), [
    ("annotations/instances_default.json", "images/default"), ("annotations/instances_default.json", "images"),
    ("annotations/instances_default.json", "."), ("result.json", "images"), ("result.json", ".")])
def test_one_json_without_a_split_is_split_at_random(tmp_path: Path, json_file: str, images: str) -> None:
    names = [f"{i}.png" for i in range(10)]
    annotated(tmp_path / "in" / json_file, names)
    pictures(tmp_path / "in" / images, *names)
    files, report = convert(tmp_path / "in", tmp_path / "out")
    assert len(files) == 10 and all(files.values()) and "left out" not in report
    assert [sum(name.startswith(split) for name in files) for split in ("train", "val")] == [8, 2]
    assert convert(tmp_path / "in", tmp_path / "again")[0] == files
    assert convert(tmp_path / "in", tmp_path / "other", "--seed", 1)[0] != files
    assert len([n for n in convert(tmp_path / "in", tmp_path / "half", "--val-share", 0.5)[0] if n[:3] == "val"]) == 5


@pytest.mark.parametrize("images", ["train2017", "images/train2017", "images"])
def test_cocos_own_folders(tmp_path: Path, images: str) -> None:
    for year, name in (("train2017", "000001.jpg"), ("val2017", "000002.jpg")):
        for kind in ("instances", "captions", "person_keypoints"):
            annotated(tmp_path / "in/annotations" / f"{kind}_{year}.json", [name])
        pictures(tmp_path / "in" / images.replace("train2017", year), name)
    files, _ = convert(tmp_path / "in", tmp_path / "out")
    assert set(files) == {"train/000001", "val/000002"}


@pytest.mark.parametrize(("make", "words"), [
    (lambda root: root.mkdir(), "no JSON"),
    (lambda root: annotated(root / "train/a.json", ["a.jpg"]), r"train/a\.json: its images \(a\.jpg .*are not found"),
    (lambda root: [annotated(root / f"{n}/train.json", []) for n in "ab"], "two files for train.*--json"),
    (lambda root: [annotated(root / f"{n}.json", []) for n in ("a", "train")], "a.json: which split.*--json"),
    (lambda root: None, "no such folder")])
def test_a_folder_that_is_not_clear_is_said(tmp_path: Path, make, words: str) -> None:
    make(tmp_path / "in")
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "in", tmp_path / "out")


def test_what_to_convert_must_be_given(tmp_path: Path) -> None:
    for flags in ([], ["--json", "train=a.json"], ["--coco", "a", "--json", "train=a.json"]):
        with pytest.raises(UserError, match="--coco"):
            coco_to_yolo.convert(coco_to_yolo.parse([*flags, "--out", str(tmp_path / "out")]))


# What CVAT, Label Studio and others write ----------------------------------------------------------------------------

def one_image(folder: Path, *annotations: dict, **changes: list) -> Path:
    """A JSON for a.jpg, of 100 x 50, with these annotations; `changes` to its other lists."""
    pictures(folder, "a.jpg")
    rows = [{"id": 0, "image_id": 1, "category_id": 1, **row} for row in annotations]
    data = {"images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}], "annotations": rows,
            "categories": [{"id": 1, "name": "dog"}], **changes}
    (folder / "train.json").write_text(json.dumps(data))
    return folder


POLYGON = [[10, 10, 30, 10, 30, 30]]
MASK = {"size": [50, 100], "counts": [10 * 50 + 10, *[20, 30] * 19, 20, 50 * 70 + 20]}


@pytest.mark.parametrize("row", [
    {"segmentation": POLYGON}, {"segmentation": POLYGON[0]}, {"segmentation": POLYGON, "bbox": []},
    {"segmentation": POLYGON, "bbox": [0, 0, 0, 0]}, {"segmentation": POLYGON, "bbox": None},
    {"segmentation": MASK}, {"segmentation": {"size": [50, 100], "counts": "lPUd0NRQNNRQN"}},
    {"bbox": [10, 10, 20, 20], "iscrowd": "0"}, {"bbox": [10, 10, 20, 20], "image_id": "1", "category_id": 1.0}])
def test_boxes_are_made_from_outlines_and_ids_are_texts(tmp_path: Path, row: dict) -> None:
    """All of these used to be left out: nothing but background."""
    if row.get("segmentation") == {"size": [50, 100], "counts": "lPUd0NRQNNRQN"}:
        mask = pytest.importorskip("pycocotools.mask")
        encoded = mask.frPyObjects(MASK, 50, 100)
        row = {"segmentation": {"size": [50, 100], "counts": encoded["counts"].decode()}}
    files, report = convert(one_image(tmp_path / "in", row), tmp_path / "out")
    assert files == {"train/a": "0 0.200000 0.400000 0.200000 0.400000\n"}
    assert ("box missing, made from the polygon or mask" in report) == ("segmentation" in row)


@pytest.mark.parametrize("segmentation", [
    [], [[]], [[1]], [[1, 1, 1, 1]], [["x", 1]], [[float("nan"), 1, 2, 3]], {}, 7, "text", [[10**400, 1, 2, 3]],
    {"size": [50, 100], "counts": []}, {"size": [50, 100], "counts": [5000]}, {"size": [1], "counts": [1]},
    {"size": [50, 100], "counts": [-1, 5001]}, {"size": [50, 100], "counts": "o" * 100_000},
    {"size": [50, 100], "counts": "\U0001f415"}, {"size": ["a", None], "counts": ["b"]}])
def test_outlines_without_an_area_are_left_out(tmp_path: Path, segmentation: object) -> None:
    good = {"bbox": [10, 10, 20, 20]}
    files, report = convert(one_image(tmp_path / "in", {"segmentation": segmentation}, good), tmp_path / "out")
    assert files == {"train/a": "0 0.200000 0.400000 0.200000 0.400000\n"}
    assert "left out: 1 x box missing or not numeric" in report


@pytest.mark.parametrize(("rows", "words"), [
    ([{"bbox": [1, 1, 9, 9], "iscrowd": 1}] * 3, r"no box is left \(crowd, kept with --keep-crowd: 3\)"),
    ([{"bbox": [1, 1, 9, 9], "category_id": 7}], r"no box is left \(box of an unknown category: 1\)"),
    ([{"bbox": [1, 1, 9, 9], "image_id": "2"}], r"no box is left \(box of an image that is not listed or missing: 1\)"),
    ([], r"no box is left \(the annotations hold none\)")])
def test_where_no_box_is_left_nothing_is_written(tmp_path: Path, rows: list[dict], words: str) -> None:
    root = one_image(tmp_path / "in", *rows)
    with pytest.raises(UserError, match=words):
        convert(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_of_all_kinds(tmp_path: Path) -> None:
    """Categories sort by their ids: numbers, then texts."""
    rows = [{"bbox": [10, 10, 20, 20], "category_id": c} for c in ("10", 2.0, "b")]
    rows += [{"bbox": [1, 1, 9, 9], "category_id": [3], "image_id": {}}]
    categories = [{"id": "b", "name": "pig"}, {"id": 10, "name": "cow"}, {"id": "2", "name": "ape"}]
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": "1", "file_name": "a.jpg"}, {"id": [1], "file_name": "a.jpg"}]
    _, report = convert(one_image(tmp_path / "in", *rows, categories=categories, images=images), tmp_path / "out")
    assert list(read_data(tmp_path / "out/data.yaml").names.values()) == ["cow", "ape", "pig"]
    assert "1 x box of an unknown category" in report


@pytest.mark.parametrize(("changes", "words"), [
    ({"images": [3]}, "lists of objects"), ({"categories": [{"id": 1}]}, "has no name"),
    ({"categories": [{"id": [1], "name": "dog"}]}, "has no id"), ({"categories": []}, "need a name each")])
def test_other_structures_are_one_line(tmp_path: Path, changes: dict, words: str) -> None:
    root = one_image(tmp_path / "in", {"bbox": [1, 1, 9, 9]}, **changes)
    flags = ["--json", f"train={root / 'train.json'}", "--images", f"train={root}", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=words):
        coco_to_yolo.convert(coco_to_yolo.parse(flags))


@pytest.mark.parametrize("name", ["sub\\a.jpg", "C:\\me\\set\\sub\\a.jpg", "..\\other\\a.jpg", "sub/a.jpg",
                                  "/gone/a.jpg", "../gone/a.jpg"])
def test_file_names_with_folders_of_any_system(tmp_path: Path, name: str) -> None:
    annotated(tmp_path / "in/train.json", [name])
    pictures(tmp_path / "in", "sub/a.jpg" if "sub" in name else "a.jpg")
    assert set(convert(tmp_path / "in", tmp_path / "out")[0]) == {"train/a"}


@pytest.mark.parametrize("name", ["../../evil.jpg", "x\0.jpg", "n" * 5000 + ".jpg", "\ud800.jpg", "..", "", "a.txt",
                                  None])
def test_file_names_that_lead_elsewhere_write_nothing_there(tmp_path: Path, name: str) -> None:
    root = tmp_path / "deep/in"
    annotated(root / "train.json", ["a.jpg", name])
    pictures(root, "a.jpg")
    pictures(tmp_path, "evil.jpg")
    (root / "a.jpg").with_suffix(".txt").write_bytes((root / "a.jpg").read_bytes())
    before = set(tmp_path.rglob("*"))
    convert(root, tmp_path / "deep/out")
    made = set(tmp_path.rglob("*")) - before
    assert all(p.is_relative_to(tmp_path / "deep/out") for p in made)
    assert not list((tmp_path / "deep/out/images").rglob("*.txt"))


def test_a_json_in_utf16(tmp_path: Path) -> None:
    root = one_image(tmp_path / "in", {"bbox": [10, 10, 20, 20]})
    (root / "train.json").write_text((root / "train.json").read_text(), encoding="utf-16")
    assert convert(root, tmp_path / "out")[0] == {"train/a": "0 0.200000 0.400000 0.200000 0.400000\n"}


def one_json(root: Path, images: list[tuple[int, str]], rows: list[tuple[int, list[float]]]) -> Path:
    """A folder of one JSON and its images, 100 x 50 pixels: (id, file name) and (image id, box)."""
    root.mkdir()
    for name in {name for _, name in images}:
        Image.fromarray(np.full((50, 100, 3), 99, np.uint8)).save(root / name)
    data = {"images": [{"id": number, "file_name": name} for number, name in images], "categories": [
        {"id": 1, "name": "cat"}], "annotations": [{"image_id": i, "category_id": 1, "bbox": box} for i, box in rows]}
    (root / "a.json").write_text(json.dumps(data))
    return root


@pytest.mark.parametrize("second", [1, 9])
@pytest.mark.parametrize("seed", range(3))
def test_a_file_that_is_listed_twice_is_one_image_with_all_boxes(tmp_path: Path, second: int, seed: int) -> None:
    """Else a random split puts it into train and val, each time with a part of its boxes."""
    root = one_json(tmp_path / "in", [(1, "a.jpg"), (2, "b.jpg"), (second, "a.jpg")],
                    [(1, [10, 10, 20, 20]), (second, [40, 10, 20, 20]), (2, [10, 10, 20, 20])])
    report = coco_to_yolo.convert(coco_to_yolo.parse(["--coco", str(root), "--out", str(tmp_path / "out"), "--seed",
                                                      str(seed)]))
    files = {path.name: path.read_text() for path in (tmp_path / "out").rglob("labels/*/*.txt")}
    assert {name: len(text.splitlines()) for name, text in files.items()} == {"a.txt": 2, "b.txt": 1}
    assert "1 x image listed again, its boxes are with the first" in report


def test_boxes_in_parts_of_the_image_are_refused_not_read_as_pixels(tmp_path: Path) -> None:
    root = one_json(tmp_path / "in", [(1, "a.jpg"), (2, "b.jpg")], [(1, [.1, .1, .2, .2]), (2, [.4, .4, .5, .6])])
    with pytest.raises(UserError, match="no box is left .*write pixels.*: 2"):
        coco_to_yolo.convert(coco_to_yolo.parse(["--coco", str(root), "--out", str(tmp_path / "out")]))


def test_a_broken_json_is_named(tmp_path: Path) -> None:
    root = one_json(tmp_path / "in", [(1, "a.jpg")], [])
    (root / "a.json").write_text('{"images": [')
    with pytest.raises(UserError, match="a.json: not readable as JSON"):
        coco_to_yolo.convert(coco_to_yolo.parse(["--coco", str(root), "--out", str(tmp_path / "out")]))
