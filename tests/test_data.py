"""From files to batches: what is read, what is repaired, what never changes."""
from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from training.image_weights import image_weights
from utils.boxes import xywh2xyxy
from utils.data import config as config_module
from utils.data import dataset as dataset_module
from utils.data import loader as loader_module
from utils.data.config import read_data
from utils.data.dataset import DetectionDataset, rect_shapes
from utils.data.image_files import Record, decode, label_path
from utils.data.labels import MALFORMED, NO_AREA, OUTSIDE, POLYGONS, parse_labels
from utils.data.loader import Batch, EpochBatchSampler, build_loader
from utils.errors import UserError

HYP = {"mosaic": 0.7, "mixup": 0.5, "degrees": 5.0, "translate": 0.1, "scale": 0.5, "shear": 2.0, "perspective": 0.0,
       "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "flipud": 0.5, "fliplr": 0.5}
SIZES = ((60, 80), (80, 60), (64, 64), (40, 90), (90, 40), (50, 70), (70, 50))  # h, w


def write_set(root: Path, sizes: tuple[tuple[int, int], ...] = SIZES, suffix: str = "png") -> Path:
    """Images with one red rectangle each, and its label; returns the folder of images."""
    images, labels = root / "images" / "train", root / "labels" / "train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for i, (h, w) in enumerate(sizes):
        image = np.full((h, w, 3), 40 + 10 * i, np.uint8)
        x1, y1, x2, y2 = w // 4, h // 4, w // 4 + w // 3, h // 4 + h // 2
        image[y1:y2, x1:x2] = (0, 0, 255)
        cv2.imwrite(str(images / f"{i}.{suffix}"), image)
        row = i % 2, (x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h
        (labels / f"{i}.txt").write_text(" ".join(map(str, row)) + "\n")
    return images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def tree_hash(folder: Path) -> str:
    """One hash of all names, times and contents under a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path}{path.stat().st_mtime_ns}".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def samples(loader, epoch: int) -> dict[str, tuple[bytes, bytes]]:
    """path -> pixels and targets, of one epoch."""
    loader.batch_sampler.set_epoch(epoch)
    found = {}
    for batch in loader:
        for i, path in enumerate(batch.paths):
            targets = batch.targets[batch.targets[:, 0] == i, 1:]
            found[path] = batch.images[i].numpy().tobytes(), targets.numpy().tobytes()
    return found


# ------------------------------------------------------------------------------------------------------- determinism


def test_sample_is_a_function_of_seed_epoch_and_index(images: Path) -> None:
    def dataset(seed: int) -> DetectionDataset:
        return DetectionDataset([images], 64, HYP, augment=True, seed=seed)

    one, two, three = dataset(1), dataset(1), dataset(2)
    keys = [(e, i) for e in (0, 1) for i in range(len(one))]
    forth = {k: one[k] for k in keys}
    back = {k: two[k] for k in reversed(keys)}
    assert all(torch.equal(forth[k].image, back[k].image) for k in keys)
    assert all(torch.equal(forth[k].targets, back[k].targets) for k in keys)
    assert all(not torch.equal(forth[0, i].image, forth[1, i].image) for i in range(len(one)))
    assert any(not torch.equal(forth[k].image, three[k].image) for k in keys)


@pytest.mark.parametrize("context", ["fork"])
def test_workers_change_nothing(images: Path, monkeypatch: pytest.MonkeyPatch, context: str) -> None:
    monkeypatch.setattr(loader_module, "usable_workers", lambda wanted, *_: wanted)
    dataset = DetectionDataset([images], 64, HYP, augment=True, cache="ram")
    alone, two = (build_loader(dataset, 2, n, shuffle=True) for n in (0, 2))
    two.multiprocessing_context = context
    state = torch.get_rng_state()
    for epoch in (0, 3):
        assert samples(alone, epoch) == samples(two, epoch)
    assert samples(alone, 3) != samples(alone, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("cache", ["ram", "disk", "auto"])
@pytest.mark.parametrize("augment", [True, False])
def test_cache_changes_nothing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str,
                               augment: bool) -> None:
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "cache"))
    before = tree_hash(images.parents[1])
    plain = DetectionDataset([images], 48, HYP, augment=augment)
    cached = DetectionDataset([images], 48, HYP, augment=augment, cache=cache)
    for _ in range(2):
        assert all(torch.equal(plain[e, i].image, cached[e, i].image) for e in (0, 1) for i in range(len(plain)))
    assert not cached.notes and tree_hash(images.parents[1]) == before


def test_only_few_images_stay_in_memory_unasked(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> bool:
        dataset = DetectionDataset([images], 48, cache="auto")
        assert not dataset.notes
        return dataset._ram is not None

    need = sum(math.prod(dataset.load(i).shape) for dataset in [DetectionDataset([images], 48)]
               for i in range(len(dataset)))
    assert kept()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's processes here have a copy each
    monkeypatch.setattr(dataset_module, "FEW_BYTES", 2 * need)
    assert kept()
    monkeypatch.setattr(dataset_module, "FEW_BYTES", 2 * need - 1)
    assert not kept()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(dataset_module, "available_memory", lambda: 9 * need)
    assert not kept()


def test_disk_cache_is_remade_when_cut_off_or_outdated(images: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "cache"))
    plain = DetectionDataset([images], 64)
    cached = DetectionDataset([images], 64, cache="disk")
    files = sorted((tmp_path / "cache" / "images").iterdir())
    assert len(files) == len(plain) and all(f.suffix == ".npy" for f in files)
    files[0].write_bytes(files[0].read_bytes()[:200])
    files[1].write_bytes(b"")
    files[2].unlink()
    assert all(torch.equal(plain[0, i].image, cached[0, i].image) for i in range(len(plain)))
    assert all(np.load(f).dtype == np.uint8 for f in files)
    cv2.imwrite(str(plain.images[0]), np.zeros((60, 80, 3), np.uint8))
    assert cached[0, 0].image[:, 32, 32].tolist() == [0, 0, 0]


def test_too_little_memory_or_disk_is_noted_and_survived(images: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "available_memory", lambda: 1000)
    dataset = DetectionDataset([images], 64, cache="ram")
    assert "going on without" in dataset.notes[0] and dataset[0, 0].image.shape == (3, 64, 64)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "file"))
    dataset = DetectionDataset([images], 64, cache="disk")
    assert "YOLO_CACHE" in dataset.summary() and dataset[0, 0].image.shape == (3, 64, 64)


# ------------------------------------------------------------------------------------------------------------ labels


def test_label_rows_are_repaired_and_counted() -> None:
    text = "\n".join(["0 0.5 0.5 0.2 0.2",
                      "0 0.5 0.5 0.2 0.2",                     # twice
                      "1 0.95 0.5 0.2 0.2",                    # over the edge: .85 to 1.05
                      "1 0.1 0.1 0.8 0.1 0.8 0.3 0.1 0.3",     # polygon
                      "",
                      "0 1.05 0.5 0.05 0.2", "0 0.5 0.5 0 0.2", "0 0.5 0.5 -0.1 0.2",         # no area
                      "0 1.5 0.5 0.2 0.2", "1 40 40 100 100",                                 # far outside
                      "0 nan 0.5 0.2 0.2", "0 0.5 0.5 0.2", "a b c d e", "-1 .5 .5 .1 .1", "0.5 .5 .5 .1 .1",
                      "0 .5 .5 .1 .1 .9"])                     # malformed
    labels, problems = parse_labels(text, Path("x.txt"), nc=2)
    assert np.allclose(labels, [[0, .5, .5, .2, .2], [1, .925, .5, .15, .2], [1, .45, .2, .7, .2]])
    assert labels.dtype == np.float32
    assert problems == Counter({MALFORMED: 6, NO_AREA: 3, OUTSIDE: 2, POLYGONS: 1,
                                "duplicate rows removed": 1, "boxes cut at the edge": 1})


def test_good_labels_are_kept_to_the_bit_in_their_order() -> None:
    rows = np.random.default_rng(0).uniform(0.2, 0.4, (20, 5)).astype(np.float32)
    rows[:, 0] = np.arange(20)[::-1]
    text = "\n".join(" ".join(map(str, row)) for row in rows.tolist())
    labels, problems = parse_labels(text, Path("x.txt"), nc=20)
    assert (labels == rows).all() and not problems


def test_unknown_class_names_file_and_line(images: Path) -> None:
    file = images.parents[1] / "labels" / "train" / "3.txt"
    file.write_text("0 .5 .5 .1 .1\n\n7 .5 .5 .1 .1\n")
    with pytest.raises(UserError, match=r"3\.txt: line 3: class 7.*names 2"):
        DetectionDataset([images], 64, nc=2)
    assert set(np.concatenate(DetectionDataset([images], 64, nc=2, single_cls=True).labels)[:, 0]) == {0}


def test_label_path_rule() -> None:
    assert label_path(Path("/a/images/b/images/c/d.e.jpg")) == Path("/a/images/b/labels/c/d.e.txt")
    assert label_path(Path("/a/images2/d.jpg")) == Path("/a/images2/d.txt")


def test_missing_and_empty_labels_are_background(images: Path) -> None:
    folder = images.parents[1] / "labels" / "train"
    (folder / "0.txt").unlink()
    (folder / "1.txt").write_text("")
    dataset = DetectionDataset([images], 64, HYP, augment=True)
    assert [len(x) for x in dataset.labels] == [0, 0, 1, 1, 1, 1, 1] and not dataset.problems
    assert "7 images, 5 boxes, 2 images without any" in dataset.summary()
    assert dataset[0, 0].targets.shape[1] == 6
    batch = next(iter(build_loader(DetectionDataset([images], 64), 2, 0, shuffle=False)))
    assert batch.targets.shape == (0, 6)


# ------------------------------------------------------------------------------------------------------------ images


def test_unusable_images_are_listed_once_and_skipped(images: Path) -> None:
    (images / "broken.jpg").write_bytes(b"no picture")
    (images / "empty.png").write_bytes(b"")
    cv2.imwrite(str(images / "small.png"), np.zeros((9, 40, 3), np.uint8))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        cv2.imwrite(str(images / name), noise)
        (images / name).write_bytes((images / name).read_bytes()[:2000])
    before = tree_hash(images.parents[1])
    dataset = DetectionDataset([images], 64, prefix="train")
    assert len(dataset) == len(SIZES)
    assert dataset.problems == {"unreadable images skipped": 4, "images under 10 px skipped": 1}
    assert all(name in dataset.summary() for name in ("broken.jpg", "empty.png", "small.png", "cut.jpg", "cut.png"))
    assert tree_hash(images.parents[1]) == before


def test_nothing_usable_is_an_error_that_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        DetectionDataset([tmp_path / "nowhere"], 64)
    with pytest.raises(UserError, match=f"{tmp_path}: no images"):
        DetectionDataset([tmp_path], 64)
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"none of the 1 images.*a\.jpg"):
        DetectionDataset([tmp_path], 64)


def test_image_that_vanishes_is_named(images: Path) -> None:
    dataset = DetectionDataset([images], 64)
    dataset.images[0].unlink()
    with pytest.raises(UserError, match=r"0\.png"):
        dataset[0, 0]


def test_sources_folder_list_file(images: Path) -> None:
    root = images.parents[1]
    (root / "deep.txt").write_text(f"./images/train/1.png\n{images / '0.png'}\n\nimages/train/2.png\n")
    (images / "sub").mkdir()
    (images / "0.png").rename(images / "sub" / "7.PNG")
    assert [p.name for p in DetectionDataset([images], 64).images] == [*(f"{i}.png" for i in range(1, 7)), "7.PNG"]
    (images / "sub" / "7.PNG").rename(images / "0.png")
    dataset = DetectionDataset([root / "deep.txt", images / "5.png"], 64)
    assert dataset.images == [images / f"{i}.png" for i in (0, 1, 2, 5)] and all(map(len, dataset.labels))


def test_grey_alpha_and_16_bit_become_three_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "a.png"), rng.integers(0, 255, (20, 30), dtype=np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), rng.integers(0, 255, (20, 30, 4), dtype=np.uint8))
    cv2.imwrite(str(tmp_path / "c.png"), np.full((20, 30), 128 * 256, np.uint16))
    cv2.imwrite(str(tmp_path / "d.png"), np.full((20, 30, 3), 128 * 256, np.uint16))
    Image.new("P", (30, 20)).save(tmp_path / "e.png")
    Image.new("CMYK", (30, 20)).save(tmp_path / "f.jpg")
    dataset = DetectionDataset([tmp_path], 32)
    assert len(dataset) == 6
    for i in range(6):
        image = dataset[0, i].image
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and image.is_contiguous()
    assert dataset[0, 2].image[:, 16, 16].tolist() == dataset[0, 3].image[:, 16, 16].tolist() == [128] * 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_sizes_and_pixels_alike(tmp_path: Path, suffix: str, orientation: int) -> None:
    quarters = np.zeros((40, 60, 3), np.uint8)
    for i, (y, x) in enumerate(((0, 0), (0, 30), (20, 0), (20, 30))):
        quarters[y:y + 20, x:x + 30] = 60 * i
    stored = Image.fromarray(quarters)
    exif = stored.getexif()
    exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif)
    dataset = DetectionDataset([tmp_path], 60)
    expected = {1: [0, 60, 120, 180], 2: [60, 0, 180, 120], 3: [180, 120, 60, 0], 4: [120, 180, 0, 60],
                5: [0, 120, 60, 180], 6: [120, 0, 180, 60], 7: [180, 60, 120, 0], 8: [60, 180, 0, 120]}[orientation]
    assert dataset.shapes.tolist() == [[60, 40] if orientation < 5 else [40, 60]]
    image = decode(path, int(dataset.orientations[0]))
    h, w = image.shape[:2]
    assert (w, h) == tuple(dataset.shapes[0])
    corners = [image[y, x, 0] for y, x in ((5, 5), (5, w - 6), (h - 6, 5), (h - 6, w - 6))]
    assert np.abs(np.array(corners, int) - expected).max() <= 6


def test_longest_side_is_scaled_and_the_other_rounded_up(tmp_path: Path) -> None:
    images = write_set(tmp_path, ((427, 640), (333, 500), (49, 49), (100, 10)))
    dataset = DetectionDataset([images], 320)
    assert [dataset.load(i).shape[:2] for i in range(4)] == [(214, 320), (214, 320), (320, 320), (320, 32)]


# ------------------------------------------------------------------------------------------- shapes, boxes and batches


def test_rect_shapes_are_the_least_that_hold_a_batch() -> None:
    square = np.array([[640, 640]] * 3)
    assert rect_shapes(square, 2, 640, 32, 0.5).tolist() == [[672, 672], [672, 672]]
    wide = np.array([[640, 320], [640, 480], [480, 640]])
    assert rect_shapes(wide, 2, 640, 32, 0.0).tolist() == [[480, 640], [640, 480]]
    assert rect_shapes(wide, 3, 640, 32, 0.0).tolist() == [[640, 640]]


def test_rect_is_sorted_and_every_batch_has_one_shape(images: Path) -> None:
    dataset = DetectionDataset([images], 64, rect=True, batch_size=3, pad=0.5)
    ratios = dataset.shapes[:, 1] / dataset.shapes[:, 0]
    assert (np.diff(ratios) >= 0).all()
    batches = list(build_loader(dataset, 3, 0, shuffle=False))
    assert [len(b.images) for b in batches] == [3, 3, 1]
    assert dataset.batch_shapes is not None
    assert [list(b.images.shape[2:]) for b in batches] == dataset.batch_shapes.tolist()
    assert [p for b in batches for p in b.paths] == list(map(str, dataset.images))
    with pytest.raises(ValueError):
        build_loader(dataset, 2, 0, shuffle=False)


def red_extent(image: torch.Tensor) -> np.ndarray:
    """xyxy of the red pixels of a (3, h, w) RGB image."""
    ys, xs = np.nonzero((image[0] > 200).numpy() & (image[1] < 100).numpy())
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.mark.parametrize("options", [{}, {"rect": True, "batch_size": 2, "pad": 0.5},
                                     {"augment": True, "hyp": {"translate": 0.1, "scale": 0.2, "flipud": 0.5}},
                                     {"augment": True, "rect": True, "hyp": {"mosaic": 1.0, "fliplr": 0.5}}])
def test_boxes_stay_on_their_objects(images: Path, options: dict) -> None:
    dataset = DetectionDataset([images], 96, **options)
    for key in ((e, i) for e in range(4) for i in range(len(dataset))):
        sample = dataset[key]
        h, w = sample.image.shape[1:]
        box = xywh2xyxy(sample.targets[:, 2:]).numpy()[0] * [w, h, w, h]
        assert np.abs(box - red_extent(sample.image)).max() <= 2, key


def test_geometry_leads_back_to_the_file(images: Path) -> None:
    dataset = DetectionDataset([images], 96, rect=True, batch_size=2, pad=0.5)
    for i in range(len(dataset)):
        _, targets, path, ((h0, w0), (gain, pad)) = dataset[0, i]
        h, w = dataset[0, i].image.shape[1:]
        assert (w0, h0) == Image.open(path).size
        there = (targets[0, 2:4].numpy() * [w, h] - pad) / (gain[1], gain[0]) / (w0, h0)
        assert np.abs(there - dataset.labels[i][0, 1:3]).max() < 1e-5


def test_mosaic_targets_are_inside_and_numbered(images: Path) -> None:
    dataset = DetectionDataset([images], 64, {**HYP, "mosaic": 1.0, "mixup": 1.0, "copy_paste": 0.1}, augment=True)
    assert any("copy_paste" in note for note in dataset.notes)
    loader = build_loader(dataset, 4, 0, shuffle=True)
    for batch in loader:
        assert isinstance(batch, Batch) and batch.images.shape[1:] == (3, 64, 64) and batch.images.dtype == torch.uint8
        corners = xywh2xyxy(batch.targets[:, 2:])
        assert batch.targets.dtype == torch.float32 and (corners > -1e-6).all() and (corners < 1 + 1e-6).all()
        assert set(batch.targets[:, 0].tolist()) <= set(range(len(batch.images)))
        assert len(batch.paths) == len(batch.images)


# ----------------------------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize("size, batch, world", [(10, 3, 1), (10, 3, 2), (7, 4, 3), (2, 4, 3), (12, 4, 3)])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("even", [True, False])
def test_sampler_covers_everything(size: int, batch: int, world: int, shuffle: bool, even: bool) -> None:
    ranks = [EpochBatchSampler(size, batch, shuffle, 5, r, world, even) for r in range(world)]
    lists = [list(s) for s in ranks]
    assert [len(s) for s in ranks] == [len(x) for x in lists]
    seen = [i for rank in lists for b in rank for _, i in b]
    assert set(seen) == set(range(size))
    if shuffle:
        assert len({sum(map(len, rank)) for rank in lists}) == 1
    elif even:
        assert len({len(rank) for rank in lists}) == 1
    else:
        assert len(seen) == len(set(seen)) and all(b[0][1] % batch == 0 for rank in lists for b in rank)


def test_shuffle_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = EpochBatchSampler(50, 8, True, seed)
        sampler.set_epoch(epoch)
        return [key for b in sampler for key in b]

    assert order(1, 2) == order(1, 2) and {e for e, _ in order(1, 2)} == {2}
    orders = {tuple(i for _, i in order(s, e)) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


# --------------------------------------------------------------------------------------------------------- data yaml


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "set.yaml"
    path.write_text(text)
    return path


def test_read_data(images: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "path: set\ntrain: [images/train]\nval: images\nnames: {1: b, 0: a}\nnc: 2\n"
                                "defaults: {imgsz: 64}\n")
    config = read_data(path)
    assert (config.train, config.val, config.test) == ((images,), (images.parent,), ())
    assert list(config.names.items()) == [(0, "a"), (1, "b")] and config.nc == 2 and config.defaults == {"imgsz": 64}
    assert config.file == path


def test_a_folder_means_the_data_yaml_in_it(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "my" / "data.yaml"
    file.parent.mkdir()
    file.write_text(f"path: {images}\ntrain: .\nval: .\nnames: [a]\n")
    assert read_data(tmp_path / "my") == read_data(file)
    file.rename(file.with_name("other.yaml"))
    with pytest.raises(UserError, match="--data .*my: is a folder without a data.yaml; give the data yaml itself"):
        read_data(tmp_path / "my")


def test_a_set_that_was_moved_is_found_beside_its_yaml(images: Path, tmp_path: Path) -> None:
    gone = tmp_path / "on another machine" / "set"
    text = f"path: {gone}\nval: images/train\nnames: [a, b]\n"
    (images.parents[1] / "inside.yaml").write_text(text)
    for yaml in (images.parents[1] / "inside.yaml", write_yaml(tmp_path, text)):
        assert read_data(yaml).val == (images,)
    (tmp_path / "set.yaml").write_text(text.replace("images/train", "images/other"))
    with pytest.raises(UserError, match=f"{gone}/images/other does not exist"):
        read_data(tmp_path / "set.yaml")
    (gone / "images/train").mkdir(parents=True)
    assert read_data(images.parents[1] / "inside.yaml").val == (gone / "images/train",)


def test_a_yaml_without_a_path_may_name_folders_of_the_repository(images: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """As in YOLOv5. The yaml's own folder always exists, and used to be the only one that was tried."""
    monkeypatch.setattr(config_module, "ROOT", images.parents[1])
    (tmp_path / "elsewhere").mkdir()
    yaml = write_yaml(tmp_path / "elsewhere", "train: images/train\nval: images/train\nnames: [a, b]\n")
    assert read_data(yaml).train == (images,)


def test_who_only_validates_needs_no_training_images(images: Path, tmp_path: Path) -> None:
    yaml = write_yaml(tmp_path, "path: set\ntrain: images/gone\nval: images/train\nnames: [a, b]\n")
    assert read_data(yaml, needed=("val",)).val == (images,)
    with pytest.raises(UserError, match="train: .* does not exist"):
        read_data(yaml)


def test_missing_labels_of_the_val_images_are_said(images: Path, tmp_path: Path, capsys) -> None:
    """mAP 0.000 without a word is what one saw."""
    shutil.copytree(images, tmp_path / "JPEGImages")
    config = read_data(write_yaml(tmp_path, "train: JPEGImages\nval: JPEGImages\nnames: [a, b]\n"))
    with pytest.raises(UserError, match="JPEGImages: no image has a usable label: there are no label files"):
        loader_module.validation_loader(config, "val", 64, 2, 32, workers=0)
    capsys.readouterr()
    loader_module.validation_loader(config, "val", 64, 2, 32, workers=0, labelled=False)
    assert "no image has a usable label" in capsys.readouterr().out


def test_a_linked_folder_keeps_its_labels(images: Path, tmp_path: Path) -> None:
    root = images.parents[1]
    images.parent.rename(tmp_path / "pictures")
    (root / "images").symlink_to(tmp_path / "pictures")
    config = read_data(write_yaml(tmp_path, "path: set\nval: images\nnames: [a, b]\n"))
    assert all(map(len, DetectionDataset(config.val, 64, nc=config.nc).labels))


def test_a_download_address_is_told_and_code_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train: .*none does not exist; fetch https://x\.org/a\.zip"):
        read_data(write_yaml(tmp_path, "train: none\nnames: [a]\ndownload: https://x.org/a.zip\n"))
    with pytest.raises(UserError, match="not run"):
        read_data(write_yaml(tmp_path, "train: none\nnames: [a]\ndownload: |\n  open('evil', 'w')\n"))
    assert [p.name for p in tmp_path.iterdir()] == ["set.yaml"]


@pytest.mark.parametrize("text, message", [
    ("- a\n", "mapping"), ("train: .\n", "names"), ("names: []\ntrain: .\n", "names"),
    ("names: [a]\n", "neither 'train:' nor"), ("names: [a, b]\nnc: 3\ntrain: .\n", "nc: 3"),
    ("names: {0: a, 2: b}\ntrain: .\n", "without a gap"), ("names: [a]\ntrain: {b: c}\n", "folder"),
    ("names: [a]\ntrain: .\nval: gone\n", "gone does not exist"), ("a: [", "yaml"),
    ("names: [a]\ntrain: .\nbuiltin: circles\n", "circles"), ("names: [a]\ntrain: .\ndefaults: 3\n", "defaults"),
    ("names: [a]\ntrain: .\npath: [x]\n", "path")])
def test_bad_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_data(write_yaml(tmp_path, text))
    assert "\n" not in str(error.value) and "set.yaml" in str(error.value)


@pytest.mark.parametrize("text, names", [
    ("[on, off, 010, 12:30, null, 2024-01-01, 1.50]", ["on", "off", "010", "12:30", "null", "2024-01-01", "1.50"]),
    ("{0: yes, 1: no}", ["yes", "no"]), ("{'1': b, '0': a}", ["a", "b"]), ("{00: a, 01: b}", ["a", "b"]),
    ("[鱼, ' x ']", ["鱼", " x "])])
@pytest.mark.parametrize("nc", ["{}", "'{}'"])
def test_names_are_texts_as_they_are_written(images: Path, tmp_path: Path, text: str, names: list[str],
                                             nc: str) -> None:
    """They used to become True, False, 8, 750, None and a date."""
    path = tmp_path / "set.yaml"
    path.write_text(f"path: set\ntrain: images\nval: images\nnames: {text}\nnc: {nc.format(len(names))}\n", "utf-8")
    assert list(read_data(path).names.values()) == names


@pytest.mark.parametrize("text, message", [
    ("names: {0: a, 0: b}", "line 1: '0' is given twice"), ("names: {0: a, '0': b}", "line 1: '0' is given twice"),
    ("names: {0: a, 00: b}", "without a gap"), ("names: {0: a, x: b}", "without a gap"),
    ("names: {0: a, " + "1" * 900 + ": b}", "without a gap"), ("names: [a, [b]]", "class 1 must be a name"),
    ("names: [a, ]\nnames: [b]", "line 2: 'names' is given twice"), ("names: [a, '']", "class 1 must be a name"),
    ("names: [a, ~]", "class 1 must be a name"), ("names: [a]\nnc: two", "says nc: two"),
    ("names: [a]\npath: ~nosuchuser/set", "~nosuchuser/set/images does not exist"),
    ("names: [a]\npath: " + "x" * 5000, "does not exist"), ('names: [a]\npath: "a\\0b"', "is no str"),
    ("names: [a]\npath: loop", "does not exist")])
def test_more_bad_yamls_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=message) as error:
        read_data(write_yaml(tmp_path, f"{text}\ntrain: images\nval: images\n"))
    assert "\n" not in str(error.value) and "set.yaml" in str(error.value)


@pytest.mark.parametrize("encoding", ["gbk", "latin-1"])
def test_a_yaml_in_another_encoding_names_file_line_and_encoding(tmp_path: Path, encoding: str) -> None:
    name = "鱼" if encoding == "gbk" else "é"
    (tmp_path / "set.yaml").write_bytes(f"train: .\nnames: [{name}]\n".encode(encoding))
    with pytest.raises(UserError, match=r"set.yaml: line 2 is not UTF-8 \(byte 0x..\); save the file as UTF-8"):
        read_data(tmp_path / "set.yaml")


@pytest.mark.parametrize("text", [
    "path: set\nval: images\\train", "path: .\\set\nval: .\\images\\train", "val: set\\images\\train",
    "path: C:\\Users\\me\\set\nval: images/train", "path: set\nval: D:\\data\\set\\images\\train",
    "path: set\nval: ..\\images\\train", "path: set\nval: images\\list.txt", "path: 2024\nval: 1"])
def test_paths_of_windows_and_numbers_are_found(images: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024/1").symlink_to(images)
    lines = [f"train\\{p.name}" if i % 2 else f"C:\\me\\train\\{p.name}" for i, p in enumerate(images.iterdir())]
    (images.parent / "list.txt").write_text("\r\n".join(lines), encoding="utf-16")
    config = read_data(write_yaml(tmp_path, f"names: [a, b]\n{text}\n"), needed=("val",))
    assert len(DetectionDataset(config.val, 64, nc=2)) == 7


def test_backslashes_that_lead_nowhere_are_named(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images\\gone does not exist; its backslashes are of Windows"):
        read_data(write_yaml(tmp_path, "path: set\nval: images\\gone\nnames: [a]\n"), needed=("val",))
    (tmp_path / "list.txt").write_text(f"{next(images.iterdir())}\nC:\\gone\\a.png\n")
    refused = DetectionDataset([tmp_path / "list.txt"], 64).refused
    assert [reason for _, reason in refused] == ["no such file, its backslashes are of Windows"]


def test_missing_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_data(tmp_path / "none.yaml")


def test_builtin_set_of_an_older_program_is_noticed(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "path: made\nbuiltin: shapes\ntrain: images\nnames: [a]\n")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "complete").write_text("0\n")
    with pytest.raises(UserError, match="another version"):
        read_data(path)


def test_image_weights_prefer_rare_and_badly_detected_classes() -> None:
    labels = [np.array([[0.0, 0, 0, 0, 0]] * 4), np.array([[1.0, 0, 0, 0, 0]]), np.zeros((0, 5))]
    even = image_weights(labels, np.zeros(2))
    assert np.allclose(even, [1, 1, 1])  # four of four boxes, one of one
    assert np.allclose(image_weights(labels, np.array([0.0, 0.5])), [1, 0.25, 0.25])
    sampler = EpochBatchSampler(3, 3, shuffle=True)
    sampler.weights = np.array([0.0, 1.0, 0.0])
    assert [i for batch in sampler for _, i, *_ in batch] == [1, 1, 1]


def test_label_cache_is_used_and_notices_changes(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "cache"))
    scanned: list[Path] = []
    plain = dataset_module.scan_image

    def scan_image(path: Path, **options: Any) -> Record:
        scanned.append(path)
        return plain(path, **options)

    monkeypatch.setattr(dataset_module, "scan_image", scan_image)
    before = tree_hash(images.parent.parent)
    first = DetectionDataset([images], 64, nc=2)
    again = DetectionDataset([images], 64, nc=2)
    assert len(scanned) == 7 and tree_hash(images.parent.parent) == before
    assert again.images == first.images and np.array_equal(again.shapes, first.shapes)
    assert all(a.dtype == np.float32 and np.array_equal(a, b) for a, b in zip(first.labels, again.labels))
    label_path(first.images[3]).write_text("1 0.5 0.5 0.25 0.25\n0 0.1 0.1 .9 .9\n")
    label_path(first.images[4]).unlink()
    changed = DetectionDataset([images], 64, nc=2)
    assert len(scanned) == 9 and len(changed.labels[3]) == 2 and not len(changed.labels[4]) and changed.problems
    assert DetectionDataset([images], 64, nc=2).problems == changed.problems and len(scanned) == 9
    with pytest.raises(UserError, match="class 1"):  # the number of classes belongs to it
        DetectionDataset([images], 64, nc=1)


def text_of(*notes: object) -> np.ndarray:
    return np.frombuffer(json.dumps(notes).encode(), np.uint8)


# Column -> values for the whole of it, or for its first row, that no scan gives.
FORGED: dict[str, list[Any]] = {
    "stamps": [np.zeros(3, np.int64)], "sizes": [0, -5, np.zeros((6, 2))], "orientations": [0, 9],
    "boxes": [-1, 2**62, 10**9, np.ones(6)], "lengths": [-1, 2**62],
    "labels": [np.nan, np.inf, -1, 1.5, [99, 0.5, 0.5, 0.1, 0.1], [0.5, 0.5, 0.5, 0.1, 0.1], [0, 0.5, 0.5, 0, 0.1],
               np.zeros((0, 5), np.float32), np.array([["a"] * 5])],
    "notes": [text_of(1), text_of({}, 1), text_of({}, ["x"]), text_of({"x": "y"}, ""), text_of({"x": [1]}, ""),
              np.frombuffer(b"[" * 5000, np.uint8), np.frombuffer(b"\xff", np.uint8)]}


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x93NUMPY\x01\x00", *(
    (column, value) for column, values in FORGED.items() for value in values)])
def test_a_damaged_label_cache_is_made_anew(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture, content: bytes | tuple[str, Any]) -> None:
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "cache"))
    first = DetectionDataset([images], 64, nc=3)
    file, = (tmp_path / "cache" / "labels").iterdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        with np.load(file) as known:
            columns = dict(known)
        column, value = content
        if column == "notes":
            columns["lengths"][0] = len(value)
        if isinstance(value, np.ndarray):
            columns[column] = value
        else:
            columns[column][0] = value
        np.savez(file, **columns)
    again = DetectionDataset([images], 64, nc=3)
    assert all(map(np.array_equal, first.labels, again.labels)) and np.array_equal(first.shapes, again.shapes)
    assert capsys.readouterr().err.count("the labels are read again") == 1 and first.problems == again.problems
    DetectionDataset([images], 64, nc=3)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 no zip", b"\x93NUMPY\x01\x00 \x00" + b"[" * 32,
                                     b"\x93NUMPY\x01\x00F\x00{'descr': '|u1', 'fortran_order': False, "
                                     b"'shape': (99999999999999, 3)}  "])
def test_a_damaged_image_cache_is_made_anew(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            content: bytes) -> None:
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "cache"))
    first = DetectionDataset([images], 64, cache="disk").load(0)
    for file in (tmp_path / "cache" / "images").iterdir():
        file.write_bytes(content)
    again = DetectionDataset([images], 64, cache="disk")
    assert np.array_equal(again.load(0), first) and not again.notes


@pytest.mark.parametrize("suffix", ["bmp", "webp", "tiff", "jpeg"])
def test_names_with_spaces_and_foreign_letters(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "Fotos größer 漢" / "images"
    folder.mkdir(parents=True)
    (folder.parent / "labels").mkdir()
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(folder / f"ein Bild ä.{suffix}")
    label_path(folder / f"ein Bild ä.{suffix}").write_text("0 0.5 0.5 0.5 0.5\n")
    data = DetectionDataset([folder, folder], 64, nc=1)  # the same root twice: every image twice, as it was asked for
    assert len(data) == 2 and all(len(rows) == 1 for rows in data.labels)
    assert data[0, 0].image.shape == (3, 64, 64) and int(data[0, 0].image[:, 32, 32].min()) > 190
