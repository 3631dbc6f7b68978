"""Images that can't be decoded are left out or replaced, odd files and folders read once; a cache that does not fit."""
from __future__ import annotations

import os
import shutil
import socket
import struct
import zlib
from collections import Counter
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
from utils.data.image_files import UNREADABLE, decode, find_images, read_header, walk
from utils.data.loader import build_loader
from utils.data.sources import files, frames
from utils.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def cut(path: Path) -> None:
    cv2.imwrite(str(path), NOISE)
    path.write_bytes(path.read_bytes()[:2000])


def png(width: int, height: int, *data: bytes) -> Callable[[Path], None]:
    """A PNG whose header says a size, and that holds these chunks of compressed rows, with good checksums."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
              *(chunk(b"IDAT", each) for each in data), chunk(b"IEND", b"")]
    return lambda path: None if path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)) else None


def head_only(path: Path) -> None:
    """A JPEG's header and its end."""
    content = cv2.imencode(".jpg", NOISE)[1].tobytes()
    path.write_bytes(content[:content.index(b"\xff\xda")] + b"\xff\xd9")


ROWS = b"".join(b"\0" + row.tobytes() for row in NOISE)
BAD: dict[str, Callable[[Path], None]] = {
    "float.tif": lambda path: Image.fromarray(NOISE[..., 0].astype(np.float32)).save(path),
    "int32.tiff": lambda path: Image.fromarray(NOISE[..., 0].astype(np.int32)).save(path),
    "cut.bmp": cut, "cut.tif": cut, "cut.webp": cut, "cut.png": cut, "cut.jpg": cut,
    "bomb.png": png(60_000, 60_000, zlib.compress(bytes(1000))), "large.png": png(13_000, 13_000, zlib.compress(ROWS)),
    "rows.png": png(60, 40, zlib.compress(ROWS[:3000])), "zlib.png": png(60, 40, b"\x78\x9c" + b"abc" * 50),
    "filter.png": png(60, 40, zlib.compress(ROWS.replace(b"\0", b"\x09"))), "no data.png": png(60, 40),
    "head.jpg": head_only}
NO_FILES: dict[str, Callable[[Path], None]] = {
    "pipe.jpg": os.mkfifo, "pipe.png": os.mkfifo, "itself.jpg": lambda path: path.symlink_to(path),
    "gone.png": lambda path: path.symlink_to("nowhere.png"),
    "socket.png": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good image, and one of every bad kind."""
    folder = tmp_path / "images"
    folder.mkdir()
    for suffix in ("bmp", "jpg", "png", "tif", "webp"):
        cv2.imwrite(str(folder / f"good.{suffix}"), NOISE)
    for name, make in (BAD | NO_FILES).items():
        make(folder / name)
    return folder


def test_what_cannot_be_decoded_is_left_out_by_the_scan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DetectionDataset([folder], 64)
    assert {path.name for path in dataset.images} == {f"good.{s}" for s in ("bmp", "jpg", "png", "tif", "webp")}
    assert all(dataset.load(i).shape == (43, 64, 3) for i in range(len(dataset)))
    assert dataset.problems == {"unreadable images skipped": len(BAD | NO_FILES)}
    assert {path.name for path, _ in dataset.refused} == set(BAD | NO_FILES)
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


@pytest.mark.slow
def test_damaged_headers_raise_nothing_else(tmp_path: Path) -> None:
    """Random bytes changed in the first 700 of every format: an image, or one of the errors that are expected."""
    rng, read = np.random.default_rng(0), 0
    for suffix in ("jpg", "png", "bmp", "tif", "webp"):
        whole = cv2.imencode(f".{suffix}", NOISE)[1]
        for i in range(60):
            content, path = whole.copy(), tmp_path / f"{i}.{suffix}"
            content[rng.integers(4, min(len(whole), 700), 1 + i % 8)] = rng.integers(0, 256, 1 + i % 8)
            path.write_bytes(content.tobytes())
            try:
                image = decode(path, read_header(path).orientation)
                read += image.dtype == np.uint8 and image.ndim == 3
            except UNREADABLE:
                continue
    dataset = DetectionDataset([tmp_path], 64)
    assert len(dataset.refused) + len(dataset) == 300 and read > 50
    assert all(dataset[0, i].image.shape == (3, 64, 64) for i in range(len(dataset))) and not dataset.broken


@pytest.fixture
def many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """So many images, with a box each, that the scan decodes none of them."""
    monkeypatch.setattr(dataset_module, "MANY", 0)
    for path in (*folder.iterdir(),):
        if path.suffix not in (".jpg", ".png"):
            path.unlink()
        (folder.parent / "labels").mkdir(exist_ok=True)
        (folder.parent / "labels" / f"{path.stem}.txt").write_text("0 .5 .5 .4 .4\n")
    return folder


LATE = {"large.png", "rows.png", "zlib.png", "filter.png", "head.jpg"}


@pytest.mark.parametrize("cache", [None, "ram", "disk"])
def test_a_broken_image_is_replaced_where_it_is_used(many: Path, cache: str | None, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        dataset = DetectionDataset([many], 64, cache=cache)
        late = {i for i, path in enumerate(dataset.images) if path.name in LATE}
        assert len(late) == len(LATE) and len(dataset) == len(LATE) + 2
        for _ in range(2):  # each is named once, although it is used twice
            for batch in build_loader(dataset, 3, 0, shuffle=False):
                for image, (i, path) in zip(batch.images, enumerate(batch.paths)):
                    boxes = int((batch.targets[:, 0] == i).sum())
                    assert (bool((image == 114).all()), boxes) == ((True, 0) if Path(path).name in LATE else (False, 1))
        said = capsys.readouterr().err.splitlines()
        named = [line for line in said if "stands in for it" in line]
        assert dataset.broken == late and len(named) == len(LATE)
        assert all(any(name in line for line in named) for name in LATE)
        assert named[-1].endswith("(5 so far)")


@pytest.mark.slow
def test_workers_tell_what_is_broken_and_change_nothing(many: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("utils.data.loader.usable_workers", lambda wanted, *_: wanted)
    batches = []
    for workers in (0, 2):
        dataset = DetectionDataset([many], 64, {"mosaic": 1.0, "mixup": 1.0}, augment=True)
        loader = build_loader(dataset, 3, workers, shuffle=True)
        loader.batch_sampler.set_epoch(1)
        batches.append([(batch.images.tolist(), batch.targets.tolist()) for batch in loader])
        assert sum("stands in for it" in line for line in capfd.readouterr().err.splitlines()) == len(LATE)
    assert batches[0] == batches[1]


def test_nothing_but_broken_images_ends_the_run(many: Path) -> None:
    for path in many.glob("good.*"):
        path.unlink()
    with pytest.raises(UserError, match="none of the 5 images can be decoded"):
        list(build_loader(DetectionDataset([many], 64), 2, 0, shuffle=False))


# Bits -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_fewer_bits_in_files_of_16_are_not_dark(tmp_path: Path, suffix: str, bits: int) -> None:
    ramp = np.tile(np.linspace(0, 2 ** bits - 1, 60).astype(np.uint16), (40, 1))
    for name, image in (("grey", ramp), ("colours", np.dstack([ramp] * 3))):
        cv2.imwrite(str(tmp_path / f"{name}.{suffix}"), image)
    dataset = DetectionDataset([tmp_path], 60)
    for i in range(2):
        assert np.array_equal(dataset.load(i)[0, :, 1], (ramp[0] >> (bits - 8)).astype(np.uint8))
    assert ("2 images of fewer than 16 bits" in dataset.summary()) == (bits < 16)


MODES = {"png": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], "tif": ["1", "L", "RGB", "RGBA"], "bmp": ["1", "L", "P"],
         "webp": ["RGB", "RGBA"], "jpg": ["L", "RGB", "CMYK"]}


@pytest.mark.parametrize("suffix, mode", [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_all_other_images_are_as_opencv_reads_them(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if mode == "I;16":
        Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(NOISE).convert("L" if mode == "LA" else "RGB").convert(mode).save(path)
    assert np.array_equal(decode(path), cv2.imread(str(path), cv2.IMREAD_COLOR))


# Folders and names ----------------------------------------------------------------------------------------------------

@pytest.fixture
def looped(tmp_path: Path) -> Path:
    """Two real images below a, one in hidden; loops, a link to a folder beside it and to one elsewhere."""
    root, other = tmp_path / "set", tmp_path / "other"
    for folder in (root / "a" / "b", root / ".hidden", other):
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / f"{folder.name}.png"), NOISE)
    cv2.imwrite(str(root / "a" / "1.png"), NOISE)
    links = {"loop": ".", "a/up": "..", "a/b/self": "self", "0": "a", "far": other, "gone": "no"}
    for link, target in links.items():
        (root / link).symlink_to(target)
    return root


def test_every_folder_is_visited_once(looped: Path) -> None:
    names = sorted(os.path.relpath(image, looped) for image in find_images(looped))
    assert names == [".hidden/.hidden.png", "a/1.png", "a/b/b.png", "far/other.png"]
    assert sorted(os.path.relpath(folder, looped) for folder, _ in walk(looped, skip=lambda name: name == "a")) == [
        ".", ".hidden", "0", "0/b", "far"]
    for pattern in ("**/*.png", "*/**/*.png"):
        found = [os.path.relpath(path, looped) for path in files(f"{looped}/{pattern}")]
        assert set(found) >= {"a/1.png", "a/b/b.png", "far/other.png"} and len(found) <= 6
    assert len(files(f"{looped}/**")) == 3 and len(files(f"{looped}/a/**/1.png")) == 1


def test_names_need_not_be_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / os.fsdecode(b"im\xe4ges")
    folder.mkdir()
    for name in (b"\xff.png", b"b\xe9.jpg", b"c\xfc.tif"):
        (folder / os.fsdecode(name)).write_bytes(cv2.imencode(Path(os.fsdecode(name)).suffix, NOISE)[1].tobytes())
        (folder / os.fsdecode(name)).with_suffix(".txt").write_text("0 .5 .5 .4 .4\n")
    for _ in range(2):
        dataset = DetectionDataset([folder], 64, cache="disk")
        assert len(dataset) == 3 and not dataset.refused and not dataset.notes and dataset.labels.counts.all()
        assert next(iter(build_loader(dataset, 3, 0, shuffle=False))).paths[0].startswith(str(folder))
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 3


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_that_is_called_a_video_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "zero.avi").symlink_to("/dev/zero")
    (tmp_path / "a.txt").write_text("a.mp4\nzero.avi\n")
    (tmp_path / "a.streams").write_text("a.mp4\n")
    with pytest.raises(UserError, match="not a file"):
        list(frames(str(tmp_path / "*.mp4")))
    for source, skipped in (("a.txt", 2), ("a.streams", 1)):
        assert not list(frames(str(tmp_path / source)))
        assert capsys.readouterr().out.count("skipped: ") == skipped


def test_each_line_of_a_list_is_an_image_or_is_told_about(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = ["a b.jpg", "c.jpg", "#d.jpg", "e'.jpg", "f.jpg"]
    for name in good:
        cv2.imwrite(str(tmp_path / name), NOISE)
    (tmp_path / "notes.pdf").write_text("x")
    bad = ["c.jpg 0 .5 .5 .1 .1", "f.jpg 10,20,30,40,0", "http://localhost:9/c.jpg", "notes.pdf", "gone", '"', "."]
    lines = ['"a b.jpg"', "'c.jpg'", "#d.jpg", "# c.jpg", "#", "e'.jpg", "", f"'{tmp_path / 'f.jpg'}'", '""', *bad]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    dataset = DetectionDataset([tmp_path / "list.txt"], 64)
    assert sorted(path.name for path in dataset.images) == sorted(good)
    skipped: Counter[str] = Counter()
    found = [frame.path.name for frame in frames(str(tmp_path / "list.txt"), skipped=skipped)]
    said = capsys.readouterr().out
    assert sorted(found) == sorted(good) and skipped.total() == said.count("skipped: ") == len(bad) + 1
    assert dataset.problems == {"unreadable images skipped": len(bad) + 1}
    assert skipped["an address, not a file: fetch it first"] == 1 == said.count("f.jpg 10,20,30,40,0 (No such file")


def test_an_address_that_is_none_is_one_line() -> None:
    with pytest.raises(UserError, match=r"http://\[: is no address"):
        list(frames("http://["))
