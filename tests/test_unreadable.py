"""Images that can't be decoded are found before the first step, and a cache that does not fit is not made."""
from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.data import dataset as dataset_module
from utils.data import label_cache
from utils.data.dataset import DetectionDataset
from utils.data.sources import frames

NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def cut(path: Path) -> None:
    cv2.imwrite(str(path), NOISE)
    path.write_bytes(path.read_bytes()[:2000])


def bomb(path: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
                     + chunk(b"IEND", b""))


BAD: dict[str, Callable[[Path], None]] = {
    "float.tif": lambda path: Image.fromarray(NOISE[..., 0].astype(np.float32)).save(path),
    "int32.tiff": lambda path: Image.fromarray(NOISE[..., 0].astype(np.int32)).save(path),
    "cut.bmp": cut, "cut.tif": cut, "cut.webp": cut, "cut.png": cut, "cut.jpg": cut, "bomb.png": bomb}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good image, and one of every bad kind."""
    folder = tmp_path / "images"
    folder.mkdir()
    for suffix in ("bmp", "jpg", "png", "tif", "webp"):
        cv2.imwrite(str(folder / f"good.{suffix}"), NOISE)
    for name, make in BAD.items():
        make(folder / name)
    return folder


def test_what_cannot_be_decoded_is_left_out_by_the_scan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DetectionDataset([folder], 64)
    assert {path.name for path in dataset.images} == {f"good.{s}" for s in ("bmp", "jpg", "png", "tif", "webp")}
    assert all(dataset.load(i).shape == (43, 64, 3) for i in range(len(dataset)))
    assert dataset.problems == {"unreadable images skipped": len(BAD)}
    assert {path.name for path, _ in dataset.refused} == set(BAD)
    reasons = dict(dataset.refused)
    assert "can't be decoded" in reasons[folder / "float.tif"] and str(folder) not in reasons[folder / "float.tif"]
    monkeypatch.setattr(dataset_module, "scan_image", lambda *_, **__: pytest.fail("decoded again"))
    assert DetectionDataset([folder], 64).problems == dataset.problems  # from the cache


def test_a_cache_of_a_scan_that_decoded_nothing_is_not_trusted() -> None:
    assert label_cache.VERSION >= 2


def test_detection_goes_on_after_an_unreadable_image(folder: Path, capsys: pytest.CaptureFixture) -> None:
    found = [frame.path.name for frame in frames(str(folder))]
    assert sorted(found) == [f"good.{s}" for s in ("bmp", "jpg", "png", "tif", "webp")]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(BAD) and all(line.startswith("skipped: ") for line in said)
    assert any("bomb.png" in line and "limit" in line for line in said)


# --cache disk ---------------------------------------------------------------------------------------------------------

def test_a_disk_cache_that_does_not_fit_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), NOISE)
    cache = tmp_path / "cache"
    monkeypatch.setenv("YOLO_CACHE", str(cache))
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    free = 20_000
    dataset = DetectionDataset([tmp_path], 64, cache="disk")
    assert asked == [cache] and not (cache / "images").exists()
    assert len(dataset.notes) == 2 and "going on without" in dataset.summary()  # the other: there are no labels
    assert dataset[0, 0].image.shape == (3, 64, 64)
    free = 40_000
    assert len(DetectionDataset([tmp_path], 64, cache="disk").notes) == 1
    assert len(list((cache / "images").iterdir())) == 3
    free = 0  # what is there already needs no space
    assert len(DetectionDataset([tmp_path], 64, cache="disk").notes) == 1
