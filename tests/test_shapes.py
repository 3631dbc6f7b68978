"""The built-in set: the same on every call, boxes tight and in the image, whole or absent."""
from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from utils import files
from utils.data import shapes
from utils.data.config import read_data
from utils.errors import UserError

COUNTS = {"train": 6, "val": 3}
ROOT = Path(__file__).resolve().parents[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def corners(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    half = labels[:, 3:] / 2
    return np.hstack((labels[:, 1:3] - half, labels[:, 1:3] + half)) * (width, height, width, height)


# ----------------------------------------------------------------------------------------------------------- pictures


def test_picture_is_a_function_of_seed_split_and_index() -> None:
    image, labels = shapes.draw(3, "train", 7)
    shapes.draw(0, "val", 0)
    again, labels_again = shapes.draw(3, "train", 7)
    assert np.array_equal(image, again)
    assert np.array_equal(labels, labels_again)
    for other in ((4, "train", 7), (3, "val", 7), (3, "train", 8)):
        picture, _ = shapes.draw(*other)
        assert picture.shape != image.shape or not np.array_equal(picture, image)


@pytest.mark.slow
def test_pictures_and_labels_are_what_they_promise() -> None:
    drawn = [shapes.draw(0, "train", i) for i in range(200)]
    for image, labels in drawn:
        height, width = image.shape[:2]
        assert image.dtype == np.uint8
        assert shapes.WIDTH[0] <= width <= shapes.WIDTH[1] and shapes.HEIGHT[0] <= height <= shapes.HEIGHT[1]
        assert labels.dtype == np.float32 and labels.shape[1] == 5 and len(labels) <= shapes.MOST_OBJECTS
        boxes = corners(labels, height, width)
        assert (boxes >= -1e-3).all() and (boxes <= (width + 1e-3, height + 1e-3, width + 1e-3, height + 1e-3)).all()
        longer = (boxes[:, 2:] - boxes[:, :2]).max(1) / min(height, width)
        assert (longer > 0.7 * shapes.SIZE[0]).all() and (longer < shapes.SIZE[1] + 0.03).all()  # cut at the edge, rim
    classes = np.concatenate([labels[:, 0] for _, labels in drawn])
    assert set(classes) == set(range(len(shapes.NAMES)))
    assert np.bincount(classes.astype(int)).min() > 0.15 * len(classes)
    assert 0.01 < np.mean([len(labels) == 0 for _, labels in drawn]) < 0.12
    assert len({image.shape for image, _ in drawn}) > 100


@pytest.mark.parametrize("kind", range(len(shapes.NAMES)), ids=shapes.NAMES)
def test_box_is_tight_around_the_paint(kind: int) -> None:
    rng = np.random.default_rng(kind)
    for _ in range(40):
        points = shapes.outline(rng, kind)
        assert np.ptp(points, axis=0).max() == pytest.approx(1)
        points = points * rng.uniform(14, 60) + rng.uniform((32, 32), (88, 68))
        mask = shapes.mask_of(points, 100, 120)
        x1, y1, x2, y2 = shapes.extent(mask)
        # Half a pixel by rounding; and a sharp tip counts from where it covers half of a pixel.
        assert np.abs(np.hstack((points.min(0), points.max(0))) - (x1, y1, x2, y2)).max() < 1.7
        image = np.zeros((100, 120, 3), np.float32)
        shapes.paint(rng, image, np.where(mask >= 128, mask, 0).astype(np.uint8), np.zeros(3))
        ys, xs = np.nonzero(image.max(2))
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x1, y1, x2, y2)


def test_box_is_exact_where_edges_are_straight_and_ends_at_the_image() -> None:
    rectangle = np.array([[3.0, 5], [13, 5], [13, 25], [3, 25]])
    assert shapes.extent(shapes.mask_of(rectangle, 30, 20)) == (3, 5, 13, 25)
    assert shapes.extent(shapes.mask_of(rectangle, 17, 9)) == (3, 5, 9, 17)
    assert shapes.extent(shapes.mask_of(rectangle - 6, 30, 20)) == (0, 0, 7, 19)
    assert shapes.extent(np.zeros((4, 4), np.uint8)) == (0, 0, 0, 0)


@pytest.mark.slow
def test_hidden_objects_have_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    few = sum(len(shapes.draw(0, "train", i)[1]) for i in range(40))
    monkeypatch.setattr(shapes, "LEAST_VISIBLE", -1.0)
    every = sum(len(shapes.draw(0, "train", i)[1]) for i in range(40))
    assert few < every < 1.3 * few


# -------------------------------------------------------------------------------------------------------------- files


def test_two_generations_are_equal_byte_for_byte(tmp_path: Path) -> None:
    shapes.generate(tmp_path / "a", COUNTS)
    shapes.generate(tmp_path / "deeper" / "b", COUNTS)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "deeper" / "b")
    assert len(first) == 2 * 9 + 1
    assert {p.name for p in tmp_path.iterdir()} == {"a", "deeper"}  # nothing unfinished is left
    image, labels = shapes.draw(0, "val", 1)
    stored = cv2.imread(str(tmp_path / "a/images/val/000002.jpg"))
    assert stored is not None
    assert stored.shape == image.shape
    assert np.abs(stored.astype(int) - image).mean() < 6  # JPEG
    rows = np.loadtxt(tmp_path / "a/labels/val/000002.txt", ndmin=2)
    assert len(rows) > 1
    assert rows == pytest.approx(labels, abs=1e-5)


@pytest.mark.slow
def test_picture_without_objects_has_an_empty_label_file(tmp_path: Path) -> None:
    index = next(i for i in range(200) if not len(shapes.draw(0, "test", i)[1]))
    shapes.generate(tmp_path / "set", {"test": index + 1})
    assert (tmp_path / f"set/labels/test/{index + 1:06d}.txt").read_bytes() == b""


def test_finished_set_is_left_alone(tmp_path: Path) -> None:
    shapes.generate(tmp_path / "set", COUNTS)
    (tmp_path / "set/labels/train/000001.txt").write_text("mine")
    before = contents(tmp_path / "set")
    shapes.generate(tmp_path / "set", {"train": 1})
    assert contents(tmp_path / "set") == before


def test_empty_folder_is_filled_and_a_foreign_one_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shapes.generate(tmp_path / "empty", {"train": 1})
    assert (tmp_path / "empty" / shapes.MARKER).is_file()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "holiday.jpg").write_bytes(b"1")
    (tmp_path / "file").write_text("1")
    for name in ("foreign", "file"):
        before = contents(tmp_path / "foreign")
        with pytest.raises(UserError, match=name):
            shapes.generate(tmp_path / name, {"train": 1})
        assert contents(tmp_path / "foreign") == before


def test_set_of_another_version_is_named(tmp_path: Path) -> None:
    shapes.generate(tmp_path / "set", {"train": 1})
    (tmp_path / "set" / shapes.MARKER).write_text("0\n")
    with pytest.raises(UserError, match="set.*another version"):
        shapes.generate(tmp_path / "set", {"train": 1})


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seed: int, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shapes.generate(tmp_path / "set", COUNTS)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_processes_go_and_those_at_work_stay(tmp_path: Path) -> None:
    old, new = tmp_path / ".set.1.tmp", tmp_path / ".set.2.tmp"
    for folder in (old, new):
        (folder / "images").mkdir(parents=True)
    os.utime(old, (time.time() - 2 * files.STALE,) * 2)
    shapes.generate(tmp_path / "set", {"train": 1})
    assert not old.exists()
    assert new.exists()


def test_generations_at_the_same_time_end_with_one_set(tmp_path: Path) -> None:
    barrier, failures = threading.Barrier(4), []

    def work() -> None:
        barrier.wait()
        try:
            shapes.generate(tmp_path / "set", COUNTS)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert len(contents(tmp_path / "set")) == 2 * 9 + 1


# --------------------------------------------------------------------------------------------------------- data yamls


def test_data_yaml_names_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = yaml.safe_load((ROOT / "data/shapes.yaml").read_text())
    assert tuple(raw["names"].values()) == shapes.NAMES
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump({**raw, "path": "drawn here"}))
    monkeypatch.setattr(shapes.generate, "__defaults__", ({"train": 1, "val": 1, "test": 1}, 0))
    data = read_data(tmp_path / "shapes.yaml")
    assert data.train == (tmp_path / "drawn here/images/train",)
    assert data.defaults["imgsz"] == 160
    assert all(list(folder.iterdir()) for folder in (*data.train, *data.val, *data.test))


@pytest.mark.parametrize(("name", "classes"), [("coco", 80), ("coco128", 80), ("VOC", 20), ("shapes", 4)])
def test_data_yamls_number_their_classes(name: str, classes: int) -> None:
    raw = yaml.safe_load((ROOT / f"data/{name}.yaml").read_text())
    assert list(raw["names"]) == list(range(classes))
    assert len(set(raw["names"].values())) == classes
    assert raw["train"] and raw["val"]
