"""What detect.py, val.py and AutoShape write, and under which names: whole, inside their folder, each of its own."""
from __future__ import annotations

import os
import resource
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import detect
import val
from models.autoshape import Detections
from utils.data.dataset import DetectionDataset
from utils.data.image_files import read_header
from utils.data.loader import build_loader
from utils.data.sources import Frame, frames
from utils.errors import UserError
from utils.files import UniqueNames, safe_name
from utils.plots.detections import draw_boxes, plot_batch

IMAGE = np.zeros((40, 60, 3), np.uint8)
BOX = torch.tensor([[5.0, 5, 30, 30, 0.9, 0]])
NOT_UTF8 = os.fsdecode(b"caf\xe9")
HOSTILE = ["..", ".", "", "...", "a/b", "../../up", "/etc/x", "a\\b", "C:\\x", "a\0b", "x" * 300, "日" * 200, "con",
           "NUL.txt", "com1", "a. ", " ", "\n", NOT_UTF8, "\ud800", "<>:|?*", "~", "-rf"]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file gets larger than `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Names ----------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@given(texts=st.lists(st.text(st.characters(), max_size=300) | st.sampled_from(HOSTILE), min_size=1, max_size=20))
def test_any_text_becomes_a_name_of_one_file_of_its_own(texts):
    unique = UniqueNames()
    names = {text: unique(text, safe_name(text)) for text in texts}
    assert len(set(names.values())) == len(names)
    for text, name in names.items():
        assert unique(text, "else") == name and 0 < len(name.encode()) <= 240 and Path("f", name).parent == Path("f")
        assert name not in (".", "..") and not set(name) & set('/\\\0<>:"|?*') and not name.endswith((".", " "))
        assert name.partition(".")[0].lower() not in ("con", "nul", "com1")


def test_an_ordinary_name_stays():
    assert [safe_name(name) for name in ("person", "traffic light", "Ampel (rot)", "人", ".x")] == [
        "person", "traffic light", "Ampel (rot)", "人", ".x"]
    assert safe_name("circle/ring") == "circle_ring"


def output(folder: Path, names: dict[int, str], *flags: str) -> detect.Output:
    opt = detect.parse(["--weights", "x.pt", "--source", "x", "--project", str(folder), "--name", "exp", *flags])
    return detect.Output(names, opt)


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", HOSTILE)
def test_crops_stay_in_their_folder_whatever_a_class_is_called(tmp_path, name):
    found = torch.cat((BOX, BOX + torch.tensor([0, 0, 0, 0, 0, 1])))
    names = {0: name, 1: safe_name(name)}
    output(tmp_path / "d", names, "--save-crop", "--nosave").add(Frame(IMAGE, Path("a.jpg")), found)
    results = Detections([IMAGE], [found], ["a.jpg"], names, (1, 3, 64, 64), ())
    results.crop(save_dir=tmp_path / "a" / "exp")
    results.save(save_dir=tmp_path / "a" / "exp", exist_ok=True)
    written = files_below(tmp_path)
    assert len(written) == 5 and written[0] == "a/exp/a.jpg"
    assert all(len(Path(file).parts) == 5 and file[1:11] == "/exp/crops" for file in written[1:])
    assert len({Path(file).parent for file in written}) == (3 if names[0] == names[1] else 5)


def test_long_and_equal_names_of_images(tmp_path):
    long = "i" * 240
    written = output(tmp_path, {0: "x"}, "--save-txt", "--save-crop")
    for path in (f"{long}.png", f"a/{long}.png", f"{'j' * 251}.jpg", "a/x.png", "b/x.png", f"{NOT_UTF8}.png"):
        written.add(Frame(IMAGE, Path(path)), BOX)
    assert files_below(tmp_path / "exp/labels") == sorted(
        f"{stem}.txt" for stem in (long, f"{'i' * 232}_2", "j" * 240, "x", "x_2", NOT_UTF8))
    assert len(files_below(tmp_path)) == 18


@pytest.mark.parametrize("order", [["clip.mp4", "clip_1.jpg"], ["clip_1.jpg", "clip.mp4"]])
def test_an_image_that_is_called_like_a_frame_keeps_its_own_labels(tmp_path, order):
    written = output(tmp_path, {0: "x"}, "--save-txt", "--nosave")
    (tmp_path / "clip.mp4").touch()
    for name in order:
        for number in range(3) if name == "clip.mp4" else [None]:
            written.add(Frame(IMAGE, tmp_path / name, number), BOX)
    assert len(files_below(tmp_path / "exp/labels")) == 4


def test_val_writes_a_label_file_for_each_image(tmp_path):
    for folder in ("b", "a"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for name in ("x.png", f"{'i' * 240}.png", f"{NOT_UTF8}.png"):
            cv2.imwrite(path := str(tmp_path / "x.png"), IMAGE)
            os.replace(path, tmp_path / "images" / folder / name)
    dataset = DetectionDataset([tmp_path / "images"], 64)
    written = val.Outputs(tmp_path / "run", dataset, {0: "thing"}, val.parse(["--save-txt"]))
    for i, batch in enumerate(build_loader(dataset, 2, 0, shuffle=False)):
        written.add(i, batch, [BOX] * len(batch.paths))
    stems = ("x", "i" * 240, NOT_UTF8)
    assert files_below(tmp_path / "run/labels") == sorted(
        f"{s}.txt" for s in (*stems, "x_2", f"{'i' * 232}_2", f"{NOT_UTF8}_2"))
    assert (tmp_path / "run/val_batch0_labels.jpg").is_file()


@pytest.mark.parametrize("names, files", [(["a_2", "a", "a"], ["a_2", "a", "a_3"]),
                                          (["a", "a", "a_1"], ["a", "a_1", "a_1_2"]),
                                          (["..", "%00/x\0y", "con"], ["_", "x_y", "_con"])])
def test_autoshape_names_a_picture_for_each_image(names, files, monkeypatch):
    from models import autoshape

    found = Namespace(boxes=[], seconds=np.zeros(3), shape=(1, 3, 64, 64))
    monkeypatch.setattr(autoshape, "detect", lambda *_: Namespace(**{**vars(found), "boxes": [BOX] * len(names)}))
    model = Namespace(yaml={"ch": 3}, names={0: "x"}, input_shape=(0, 3, 0, 0))
    shaped = autoshape.AutoShape(model, torch.device("cpu"))
    assert shaped._detect(model, [(IMAGE, name) for name in names], 64).files == [f"{file}.jpg" for file in files]


# Names that are not UTF-8: OpenCV ended the process ------------------------------------------------------------------

@pytest.mark.parametrize("text", [NOT_UTF8, "\ud800", "a\0b", "\x07", "\U0001f600", "\u202e"])
def test_any_name_can_be_drawn(tmp_path, text):
    assert draw_boxes(IMAGE, np.array([[5, 5, 30, 30]]), [text], [0]).shape == IMAGE.shape
    plot_batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]]),
               [f"{text}.jpg"], {0: text}, tmp_path / "batch.jpg")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_images_whose_names_are_not_utf8_are_read(tmp_path, suffix):
    cv2.imwrite(plain := str(tmp_path / f"x.{suffix}"), IMAGE)
    os.replace(plain, path := tmp_path / f"{NOT_UTF8}.{suffix}")
    assert read_header(path).size == (60, 40) and len(list(frames(str(path)))) == 1


def test_a_video_whose_name_is_not_utf8_is_named(tmp_path):
    (tmp_path / f"{NOT_UTF8}.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match="rename it"):
        list(frames(str(tmp_path / f"{NOT_UTF8}.mp4")))


# A full disk ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [None, 0])
def test_a_full_disk_ends_a_picture_or_a_video_in_one_line_and_leaves_nothing_half(tmp_path, number):
    written = output(tmp_path, {0: "x"})
    noise = np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8)
    with full_disk(5000), pytest.raises(UserError, match="can't be written"):
        for i in range(10):
            written.add(Frame(noise, Path("a.png"), None if number is None else i), BOX)
        written.close()
    assert files_below(tmp_path) == []


def test_videos_have_all_their_frames_also_where_those_change_their_size(tmp_path):
    written = output(tmp_path, {0: "x"})
    for i in range(7):
        written.add(Frame(IMAGE if i < 4 else IMAGE[:30], Path("a.mp4"), i, 29.97), BOX)
    written.close()
    assert files_below(tmp_path) == ["exp/a.mp4"] and len(list(frames(str(tmp_path / "exp/a.mp4")))) == 7


def test_pictures_that_no_file_of_the_kind_holds_are_named(tmp_path):
    with pytest.raises(UserError, match="70000 pixels don't fit"):
        detect._write_image(tmp_path / "a.jpg", np.zeros((70000, 1, 3), np.uint8))
