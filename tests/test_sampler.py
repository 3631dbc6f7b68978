"""Which images a batch is made of: weights, single images, several processes; and how a loader is set up."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from utils.data import loader as loader_module
from utils.data.config import read_data
from utils.data.dataset import DetectionDataset
from utils.data.loader import EpochBatchSampler, build_loader, usable_workers, validation_loader


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five grey images, each of another shade: 20, 60, 100, 140, 180."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((40, 40, 3), 20 + 40 * i, np.uint8))
    return folder


# The loader -----------------------------------------------------------------------------------------------------------

def test_memory_is_pinned_only_on_demand(images: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU may train on its CPU, and page-locked memory needs a context on the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dataset = DetectionDataset([images], 32)
    assert not build_loader(dataset, 2, 0, shuffle=False).pin_memory
    assert build_loader(dataset, 2, 0, shuffle=False, pin_memory=True).pin_memory
    config = read_data(tiny)
    assert not validation_loader(config, "val", 64, 2, 32, 0).pin_memory
    assert validation_loader(config, "val", 64, 2, 32, 0, pin_memory=True).pin_memory


def test_workers_share_the_cores_of_their_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert usable_workers(8, 4, 99) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two machines of two processes
    assert usable_workers(8, 4, 99) == 8
    assert usable_workers(16, 1, 99) == 16       # alone, while the others wait


# Batches of one image -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, batch, world", [(9, 4, 1), (9, 4, 2), (1, 4, 1), (1, 1, 3), (5, 1, 1), (13, 4, 3)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_batch_is_smaller_than_the_least(size: int, batch: int, world: int, shuffle: bool) -> None:
    def all_batches(least: int) -> list[list[list[tuple[int, ...]]]]:
        return [list(EpochBatchSampler(size, batch, shuffle, 5, r, world, even=True, least=least))
                for r in range(world)]

    plain, filled = all_batches(1), all_batches(2)
    assert len({len(batches) for batches in filled}) == 1
    for before, after in zip(plain, filled):
        assert len(before) == len(after) and min(map(len, after)) >= 2
        for a, b in zip(before, after):
            assert b == a if len(a) > 1 else b[:1] == a and len(b) == 2


def test_a_single_image_at_a_map_of_one_pixel_is_not_trained_on_alone(images: Path) -> None:
    norm = nn.BatchNorm2d(3).train()
    dataset = DetectionDataset([images], 32, {"mosaic": 1.0}, augment=True, stride=32)
    for rect in (False, True):
        dataset = DetectionDataset([images], 32, {"mosaic": 1.0}, augment=True, rect=rect, batch_size=2, stride=32)
        batches = list(build_loader(dataset, 2, 0, shuffle=not rect))
        assert [len(b.images) for b in batches] == [2, 2, 2]
        for batch in batches:
            norm(nn.functional.avg_pool2d(batch.images.float(), 32))  # ValueError for a single value a channel
    larger = DetectionDataset([images], 64, {"mosaic": 1.0}, augment=True, stride=32)
    plain = DetectionDataset([images], 32, stride=32)
    for other in (larger, plain):
        assert [len(b.images) for b in build_loader(other, 2, 0, shuffle=True)] == [2, 2, 1]


# Weights --------------------------------------------------------------------------------------------------------------

def test_weights_decide_on_all_four_images_of_a_mosaic(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DetectionDataset([images], 32, {"mosaic": 1.0, "mixup": 1.0}, augment=True, stride=16)
    loader = build_loader(dataset, 2, 0, shuffle=True)
    loader.batch_sampler.weights = np.array([0.0, 1.0, 0.0, 3.0, 0.0])
    used: list[int] = []
    load = dataset.load
    monkeypatch.setattr(dataset, "load", lambda i: used.append(i) or load(i))
    for epoch in range(4):
        loader.batch_sampler.set_epoch(epoch)
        list(loader)
    assert len(used) == 4 * 5 * 8 and set(used) == {1, 3}  # the mosaic that is mixed in, too
    assert used.count(3) > 1.5 * used.count(1)


def test_weighted_samples_are_a_function_of_seed_epoch_and_position() -> None:
    def keys(seed: int, epoch: int, rank: int = 0, world: int = 1, skip: int = 0) -> list[tuple[int, ...]]:
        sampler = EpochBatchSampler(9, 2, True, seed, rank, world)
        sampler.weights = np.arange(9) + 1.0
        sampler.set_epoch(epoch, skip)
        return [key for batch in sampler for key in batch]

    alone = keys(1, 2)
    assert alone == keys(1, 2) and alone != keys(1, 3) and alone != keys(2, 2)
    assert keys(1, 2, skip=2) == alone[4:]
    shared = [keys(1, 2, rank, 2) for rank in range(2)]
    assert [key for pair in zip(*shared) for key in pair][:9] == alone


def test_without_weights_a_sample_is_what_it_was(images: Path) -> None:
    """What it was before weights reached a mosaic's other images."""
    dataset = DetectionDataset([images], 32, {"mosaic": 1.0, "mixup": 0.5, "scale": 0.5}, augment=True, stride=16)
    loader = build_loader(dataset, 2, 0, shuffle=True, seed=3)
    loader.batch_sampler.set_epoch(2)
    assert list(loader.batch_sampler) == [[(2, 4), (2, 0)], [(2, 1), (2, 2)], [(2, 3)]]
    sums = [int(image.long().sum()) for batch in loader for image in batch.images]
    assert sums == pytest.approx([336876, 269556, 401766, 80814, 366771], rel=2e-3)  # other OpenCVs round differently
