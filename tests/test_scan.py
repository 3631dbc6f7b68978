"""The scan of many images: columns instead of objects, processes, a cache in parts."""
from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.data import dataset as dataset_module
from utils.data import label_cache, labels
from utils.data import scan as scan_module
from utils.data.dataset import DetectionDataset
from utils.data.image_files import Record, label_path, path_order, scan_image
from utils.data.labels import parse_labels
from utils.data.ragged import Paths, Ragged
from utils.errors import UserError

COUNT = 11


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of several shapes in two folders, with 0 to 3 boxes, two of them not good; and an empty cache."""
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        for path in (file, label_path(file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), rng.integers(0, 255, (40 + i, 60 - i, 3), dtype=np.uint8))
        rows = [f"{k} {rng.uniform(.3, .6)} {rng.uniform(.3, .6)} .2 .3" for k in range(i % 4)]
        label_path(file).write_text("\n".join(rows + rows[:1] * (i == 5)))
    (tmp_path / "images" / "a" / "bad.png").write_bytes(b"nothing")
    return tmp_path / "images"


def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images are many, and there are two cores."""
    for name, value in (("MANY", 4), ("BATCH", 2), ("cores", lambda: 2)):
        monkeypatch.setattr(scan_module, name, value)


def same(a: DetectionDataset, b: DetectionDataset) -> bool:
    columns = all(np.array_equal(x, y) for x, y in ((a.shapes, b.shapes), (a.orientations, b.orientations),
                                                    (a.labels.flat(), b.labels.flat())))
    return (columns and a.images == b.images and all(map(np.array_equal, a.labels, b.labels))
            and (a.problems, a.refused, a.summary()) == (b.problems, b.refused, b.summary()))


# Columns --------------------------------------------------------------------------------------------------------------

def test_a_ragged_array_is_a_sequence_of_arrays() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        arrays = [rng.random((rng.integers(0, 4), 5)).astype(np.float32) for _ in range(rng.integers(1, 9))]
        index = rng.permutation(len(arrays))[:rng.integers(0, len(arrays) + 1)]
        ragged = Ragged.of(arrays)
        taken, wanted = ragged.take(index), [arrays[i] for i in index]
        assert len(ragged) == len(arrays) and all(map(np.array_equal, ragged, arrays))
        assert len(taken) == len(wanted) and all(map(np.array_equal, taken, wanted))
        assert np.array_equal(taken.flat(), np.concatenate([arrays[0][:0], *wanted]))
        both = Ragged.joined([taken, ragged])
        assert len(both) == len(wanted) + len(arrays) and all(map(np.array_equal, both, wanted + arrays))
        assert np.shares_memory(ragged.flat(), ragged.values) and np.array_equal(ragged[-1], arrays[-1])


def test_paths_are_what_they_were_made_of(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.png", "größe 漢.jpg", os.fsdecode(b"\xff\xfe.bmp"), "b" * 200)]
    paths = Paths(names)
    assert list(paths) == [Path(name) for name in names] == paths and paths != names and len(paths) == 4
    assert paths.take(np.array([2, 0])) == [Path(names[2]), Path(names[0])] and paths[-1] == Path(names[-1])
    assert not len(Paths([])) and Paths([]) == []


def test_names_sort_as_paths_do() -> None:
    rng = np.random.default_rng(0)
    names = ["/" + "".join(rng.choice(list("ab-/.0 é"), 8)).strip("/") for _ in range(300)]
    names = [str(Path(name)) for name in names]
    assert sorted(names, key=path_order) == [str(path) for path in sorted(map(Path, names))]


@pytest.mark.slow
def test_objects_do_not_grow_with_the_images(tmp_path: Path) -> None:
    def objects(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir()
        cv2.imwrite(str(folder / "0.png"), np.zeros((12, 12, 3), np.uint8))
        for i in range(1, count):
            os.link(folder / "0.png", folder / f"{i}.png")
        before = len(gc.get_objects())
        dataset = DetectionDataset([folder], 32, rect=True)
        gc.collect()
        assert len(dataset) == count
        return len(gc.get_objects()) - before

    objects(2)
    assert objects(300) - objects(30) < 100


# Labels ---------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_boxes_that_are_left_as_they_are_would_not_be_repaired() -> None:
    """What parse_labels() takes for good, near the edge and of hardly any size, is good in float32, too."""
    rng, kept = np.random.default_rng(0), 0
    for _ in range(1000):
        w, h = rng.uniform(0, 0.9, 2) if rng.random() < 0.7 else rng.uniform(0, 3e-5, 2)
        gap = rng.choice([-1e-6, 0, 1e-7, 1e-6, 4e-6, 6e-6, 1e-3, 1e-3, 1e-2, 1e-2], 2)
        x, y = (float(side / 2 + off if rng.random() < 0.5 else 1 - side / 2 - off) for side, off in zip((w, h), gap))
        problems: Counter[str] = Counter()
        row = np.array([[1, x, y, w, h]], np.float32)
        repaired = labels._repair(row, problems)
        found, counted = parse_labels(f"1 {x} {y} {w} {h}", Path())
        assert np.array_equal(found, repaired) and counted == +problems
        kept += labels._well_inside(x, y, w, h)
    assert 100 < kept < 900


def test_the_first_of_equal_rows_stays() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.choice([0.25, 0.3, 0.35], (rng.integers(1, 30), 5)).astype(np.float32)
        rows[:, 0] = rng.integers(0, 2, len(rows))
        first = np.sort(np.unique(rows, axis=0, return_index=True)[1])
        found, problems = parse_labels("\n".join(" ".join(map(repr, row)) for row in rows.tolist()), Path())
        assert np.array_equal(found, rows[first])
        assert problems["duplicate rows removed"] == len(rows) - len(first)


# Processes ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rect", [False, True])
def test_processes_find_what_threads_find(images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                          rect: bool) -> None:
    threads = DetectionDataset([images], 64, rect=rect, nc=4)
    assert len(threads) == COUNT and threads.problems == {"unreadable images skipped": 1, "duplicate rows removed": 1}
    assert [path.name for path, _ in threads.refused] == ["bad.png"]
    forked(monkeypatch)
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "another"))
    pids = []
    start = scan_module.ProcessPoolExecutor
    monkeypatch.setattr(scan_module, "ProcessPoolExecutor", lambda *args: pids.append(args[0]) or start(*args))
    first, again = (DetectionDataset([images], 64, rect=rect, nc=4) for _ in range(2))
    assert pids == [2] and same(first, threads) and same(again, threads)


def test_a_mistake_in_a_process_is_the_same_line(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked(monkeypatch)
    with pytest.raises(UserError, match=r"03\.txt: line 3: class 2.*names 2"):
        DetectionDataset([images], 64, nc=2)


def _die(path: Path, **_: object) -> Record:
    os._exit(1)


def test_a_process_that_dies_is_told(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked(monkeypatch)
    monkeypatch.setattr(dataset_module, "scan_image", _die)
    with pytest.raises(UserError, match="process that read images was killed"):
        DetectionDataset([images], 64)


def test_a_handler_that_ignores_signals_does_not_keep_processes_alive(images: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    forked(monkeypatch)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert len(DetectionDataset([images], 64)) == COUNT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The cache ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were read. Three of them are a part."""
    names: list[str] = []

    def one(path: Path, **_: object) -> Record:
        names.append(path.name)
        return scan_image(path)

    monkeypatch.setattr(dataset_module, "scan_image", one)
    monkeypatch.setattr(label_cache, "PART", 3)
    return names


def test_an_interrupted_scan_goes_on_where_it_was(images: Path, scanned: list[str], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, **_: object) -> Record:
        if path.name == "bad.png":
            raise KeyboardInterrupt
        return scan_image(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset_module, "scan_image", interrupted)
        DetectionDataset([images], 64)
    cache = tmp_path / "cache" / "labels"
    assert len(list(cache.iterdir())) == 2  # the first two parts, six images
    resumed = DetectionDataset([images], 64)
    assert sorted(scanned) == ["01.png", "03.png", "05.png", "07.png", "09.png", "bad.png"]
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "another"))
    assert len(list(cache.iterdir())) == 4 and same(resumed, DetectionDataset([images], 64))


def test_only_what_changed_is_read_again(images: Path, scanned: list[str]) -> None:
    DetectionDataset([images], 64)
    scanned.clear()
    label_path(images / "a" / "04.png").write_text("1 .5 .5 .1 .1\n")
    label_path(images / "b" / "07.png").unlink()
    (images / "b" / "09.png").write_bytes(b"")
    changed = DetectionDataset([images], 64)
    assert sorted(scanned) == ["04.png", "07.png", "09.png"] and len(changed) == COUNT - 1
    named = {path.name: labels for path, labels in zip(changed.images, changed.labels)}
    assert len(named["04.png"]) == 1 and not len(named["07.png"]) and len(named["03.png"]) == 3
    assert [path.name for path, _ in changed.refused] == ["bad.png", "09.png"]


def test_a_file_is_looked_at_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DetectionDataset([images], 64)
    looked: list[str] = []
    stat = os.stat

    def counted(path, *args, **options):
        looked.append(str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", counted)
    again = DetectionDataset([images], 64)
    monkeypatch.undo()
    files = Counter(path for path in looked if path.endswith((".png", ".txt")))
    assert len(files) == 2 * (COUNT + 1) and set(files.values()) == {1} and same(again, first)


@pytest.mark.slow
def test_a_cache_that_contradicts_itself_is_made_anew(images: Path, tmp_path: Path) -> None:
    first = DetectionDataset([images], 64)
    file, = (tmp_path / "cache" / "labels").iterdir()
    whole = file.read_bytes()
    with np.load(file) as arrays:
        good = dict(arrays)
    boxes = good["boxes"].copy()
    boxes[:2] += (-5, 5)
    bad = [{"labels": good["labels"][1:]}, {"boxes": boxes}, {"boxes": good["boxes"].astype(float)},
           {"boxes": good["boxes"][:, None]}, {"boxes": np.int64(3)}, {"sizes": good["sizes"][1:]},
           {"labels": good["labels"].astype(object)}, {"stamps": good["stamps"][:, 0]}, {"boxes": np.array("a")}]
    for change in bad:
        np.savez(file, **{**good, **change})
        assert same(DetectionDataset([images], 64), first) and file.read_bytes() == whole, change
    for content in (whole[:100], whole[:-30], whole.replace(b"stamps", b"stumps"), b"PK\x03\x04" + bytes(99)):
        file.write_bytes(content)
        assert same(DetectionDataset([images], 64), first) and file.read_bytes() == whole
