"""detect.py and val.py on files and formats, as whole commands."""
from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import benchmarks
import detect
import export
import val
from models import checkpoint, formats
from models.yolo import Model
from tests.conftest import ROOT
from training.settings import data_of_model
from utils.data import sources
from utils.data.sources import Frame, files, frames
from utils.errors import UserError
from utils.text import read_yaml_mapping

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """A checkpoint that finds something everywhere."""
    torch.manual_seed(0)
    model = Model("yolov5n.yaml", nc=2, names={0: "square", 1: "circle"})
    with torch.no_grad():
        for head in model.detect.m:
            head.bias.view(3, -1)[:, 4:] = 2.0
    path = tmp_path_factory.mktemp("weights") / "eager.pt"
    checkpoint.save(path, model.eval(), imgsz=64)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for i in range(6):
        writer.write(np.full((64, 96, 3), 40 * i, np.uint8))
    writer.release()
    return path


@pytest.mark.parametrize("classes", [["2"], ["0", "-1"]])
def test_a_class_that_the_model_lacks_is_refused(teacher, tiny, tmp_path, monkeypatch, classes):
    """It would find nothing, exit code 0."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^--classes {classes[-1]}: .*teacher.pt has the classes 0 to 1; give some"):
        detect.main(["--weights", str(teacher), "--source", str(tiny.parent / "images/val"), "--classes", *classes])
    assert not list(tmp_path.iterdir())


def test_images_labels_and_crops(script, eager, tiny, tmp_path):
    source = tiny.parent / "images/val"
    writing = ["--save-txt", "--save-conf", "--save-crop"]
    done = script("detect.py", "--weights", eager, "--source", source, *writing, "--max-det", 3, "--device", "cpu",
                  cwd=tmp_path)
    assert "6 pictures" in done.stdout
    folder = tmp_path / "runs/detect/exp"
    assert sorted(p.name for p in folder.glob("*.png")) == [f"{i:03d}.png" for i in range(6)]
    rows = np.loadtxt(folder / "labels/000.txt", ndmin=2)
    assert rows.shape == (3, 6) and (rows[:, 1:5] >= 0).all() and (rows[:, 1:5] <= 1).all()
    assert len(list((folder / "crops").rglob("*.jpg"))) > 0


def test_video_by_stride_and_one_class(script, eager, video, tmp_path):
    done = script("detect.py", "--weights", eager, "--source", video, "--vid-stride", 2, "--classes", 1,
                  "--device", "cpu", cwd=tmp_path)
    assert "3 pictures" in done.stdout and "square" not in done.stdout
    assert len(list(frames(str(tmp_path / "runs/detect/exp/video.mp4")))) == 3


def test_sources(tiny, video, tmp_path):
    folder = tiny.parent / "images/val"
    (tmp_path / "list.txt").write_text(f"{folder / '000.png'}\n\n{video}\n")
    assert [p.name for p in files(str(tmp_path / "list.txt"))] == ["000.png", "video.mp4"]
    assert len(files(str(folder / "00*.png"))) == 6
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    assert list(frames(str(tmp_path / "broken.jpg"))) == []
    for nothing in (tmp_path / "none", tmp_path / "none*.jpg", tmp_path / "none.txt"):
        with pytest.raises(UserError, match="--source"):
            list(frames(str(nothing)))


def test_files_of_the_same_name_keep_their_own_results(eager, tiny, tmp_path, monkeypatch):
    """The second picture and its labels used to replace the first one's, while the summary counted both."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(tiny.parent / "images/val/000.png", tmp_path / folder / "x.png")
    found = detect.main(["--weights", str(eager), "--source", "*/x.png", "--save-txt", "--device", "cpu"])
    assert sorted(path.name for path in found.glob("*.png")) == ["x.png", "x_2.png"]
    assert sorted(path.name for path in (found / "labels").iterdir()) == ["x.txt", "x_2.txt"]


def test_a_broken_video_among_others_is_skipped(video, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "b.mp4").write_bytes(b"unfinished")
    shutil.copy(video, tmp_path / "c.mp4")
    assert [frame.path.name for frame in frames(str(tmp_path), every=6)] == ["a.jpg", "c.mp4"]
    assert "skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="can't be opened"):
        list(frames(str(tmp_path / "b.mp4")))


def nothing_at(folder, kind):
    """A --source that has nothing to look at, and the reason."""
    (folder / "bad").mkdir()
    for i in range(3):
        (folder / "bad" / f"{i}.jpg").write_bytes(b"nothing")
    (folder / "bad/z.mp4").write_bytes(b"nothing")
    if kind == "pipe":
        os.mkfifo(folder / "pipe.jpg")
    lists = {"missing.txt": "a.jpg\nb.jpg\nbad/0.jpg\n", "empty.txt": "\n", "empty.streams": "",
             "bad.streams": "bad/z.mp4", "utf16.txt": "a.jpg\n"}
    for name, text in lists.items():
        (folder / name).write_text(text, encoding="utf-16" if name == "utf16.txt" else "utf-8")
    return {"folder": ("bad", r"not an image \(3 of 4\)"), "image": ("bad/0.jpg", "not an image"),
            "list": ("missing.txt", r"No such file or directory \(2 of 3\)"), "video": ("bad/z.mp4", "can't be opened"),
            "empty list": ("empty.txt", "is empty"), "empty streams": ("empty.streams", "is empty"),
            "streams": ("bad.streams", "can't be opened"), "pipe": ("pipe.jpg", "not a file"),
            "none": ("none", "no such"),
            "camera": ("99", "can't be opened"), "digits": ("9" * 30, "no such"), "superscript": ("²", "no such"),
            "UTF-16": ("utf16.txt", "No such file")}[kind]


@pytest.mark.parametrize("kind", ["folder", "list", "image", "video", "empty list", "empty streams", "streams", "pipe",
                                  "none", "camera", "digits", "superscript", "UTF-16"])
def test_where_nothing_is_looked_at_detect_says_why_and_leaves_no_folder(teacher, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    source, reason = nothing_at(tmp_path, kind)
    with pytest.raises(UserError, match=reason) as caught:
        detect.main(["--weights", str(teacher), "--source", source, "--device", "cpu"])
    assert "\n" not in str(caught.value) and f"--source {source}" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_digits_is_a_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.parent / "images/val", tmp_path / "2024")
    assert len(list(frames("2024"))) == 6


def test_streams_are_read_in_turns_videos_whole_and_cameras_by_their_newest_frame(video, tmp_path, monkeypatch):
    """One was read to its end before the next, which for cameras is never."""
    grab, read = sources._video_frames, []

    def camera(line, every, name):
        if "://" not in line:
            yield from grab(line, every, name)
            return
        for number in range(200):
            read.append(name)
            yield Frame(np.zeros((8, 8, 3), np.uint8), Path(name), number)
            time.sleep(0.001)

    monkeypatch.setattr(sources, "_video_frames", camera)
    shutil.copy(video, tmp_path / "v.mp4")
    (tmp_path / "all.streams").write_text("rtsp://one\nv.mp4\nrtsp://two\nnone.mp4\n")
    seen, skipped = [], Counter()
    for frame in frames(str(tmp_path / "all.streams"), skipped=skipped):
        seen.append((frame.path.name, frame.number))
        time.sleep(0.02)
    by_name = {name: [number for n, number in seen if n == name] for name, _ in seen}
    assert by_name["v.mp4"] == list(range(6)) and skipped.total() == 1
    for name in ("stream1.mp4", "stream3.mp4"):
        assert by_name[name] == sorted(set(by_name[name])) and read.count(name) == 200 > len(by_name[name]) > 2
    assert {name for name, _ in seen[:9]} == {"v.mp4", "stream1.mp4", "stream3.mp4"}


def test_the_results_of_streams_in_turns_are_whole(teacher, video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(video, tmp_path / name)
    (tmp_path / "all.streams").write_text("a.mp4\nb.mp4\n")
    folder = detect.main(["--weights", str(teacher), "--source", "all.streams", "--device", "cpu"])
    assert sorted(p.name for p in folder.iterdir()) == ["a.mp4", "b.mp4"]
    assert [len(list(frames(str(folder / name)))) for name in ("a.mp4", "b.mp4")] == [6, 6]


def test_every_stream_of_a_list_has_its_own_name(monkeypatch, tmp_path):
    (tmp_path / "cameras.streams").write_text("rtsp://one\nrtsp://two\n")
    names = []
    monkeypatch.setattr(sources, "_video_frames", lambda line, every, name: names.append((line, name)) or [])
    assert list(frames(str(tmp_path / "cameras.streams"))) == []
    assert names == [("rtsp://one", "stream1.mp4"), ("rtsp://two", "stream2.mp4")]


def test_onnx_in_val_and_detect(script, eager, tiny, tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")
    script("export.py", "--weights", eager, "--include", "onnx", "--batch-size", 4, cwd=tmp_path)
    onnx = eager.with_suffix(".onnx")
    common = ["--data", tiny, "--imgsz", 64, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--noplots"]
    script("val.py", "--weights", onnx, *common, "--name", "onnx", cwd=tmp_path)  # 6 images: the last batch is not full
    script("val.py", "--weights", eager, *common, "--name", "torch", cwd=tmp_path)
    a, b = (json.loads((tmp_path / f"runs/val/{name}/metrics.json").read_text()) for name in ("onnx", "torch"))
    assert a["images"] == b["images"] == 6
    script("export.py", "--weights", eager, "--include", "onnx", "--dynamic", cwd=tmp_path)
    script("val.py", "--weights", onnx, *common, "--name", "dynamic", cwd=tmp_path)
    c = json.loads((tmp_path / "runs/val/dynamic/metrics.json").read_text())
    assert c["metrics/mAP_0.5"] == pytest.approx(b["metrics/mAP_0.5"], abs=0.01)  # a random model: ties
    done = script("detect.py", "--weights", onnx, "--source", tiny.parent / "images/val/000.png", cwd=tmp_path)
    assert "1 pictures" in done.stdout


def test_augmented_inference_is_three_views(assets):
    """Stock YOLOv5 has 9399 boxes here, too; without augmentation there are 5040."""
    x = torch.rand(1, 3, 256, 320)
    plain, augmented = (formats.load(assets / "yolov5n.pt", torch.device("cpu"), augment=a)[0] for a in (False, True))
    assert type(augmented).__name__ == "TestTimeAugmentation"
    with torch.no_grad():
        one, three = plain(x)[0], augmented(x)[0]
    assert one.shape[1] == 5040 and three.shape[1] == 9399
    assert torch.allclose(three[:, :4800], one[:, :4800])  # the first view without its coarsest level
    assert not torch.allclose(three[:, -1:], one[:, -1:])


def test_a_picture_at_an_address_is_a_picture(eager, tiny, site, tmp_path, monkeypatch):
    """It became a video, stream.mp4."""
    monkeypatch.chdir(tmp_path)
    expected = cv2.imread(str(tiny.parent / "images/val/001.png"))
    frame, = frames(f"{site}/images/val/001.png?width=96")
    assert np.array_equal(frame.image, expected) and frame.path == Path("001.png") and frame.number is None
    folder = detect.main(["--weights", str(eager), "--source", f"{site}/images/val/001.png", "--device", "cpu"])
    assert [path.name for path in folder.iterdir()] == ["001.png"]
    with pytest.raises(UserError, match="none.jpg: can't be fetched"):
        list(frames(f"{site}/none.jpg"))
    (tiny.parent / "text.jpg").write_text("no picture")
    with pytest.raises(UserError, match=f"{site}/text.jpg: can't be read as an image"):
        list(frames(f"{site}/text.jpg"))
    (tiny.parent / "text.jpg").unlink()


def test_a_video_at_an_address_keeps_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "_video_frames", lambda *args: asked.append(args) or [])
    for url in ("http://a/b/film%201.MP4?x=1", "rtsp://a/live", "https://a/b/watch?v=1.jpg", "0"):
        list(frames(url))
    assert [name for _, _, name in asked] == ["film 1.MP4", "stream.mp4", "stream.mp4", "stream.mp4"]


def test_boxes_in_pixels_as_csv_and_with_thick_lines(eager, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tiny.parent / "images/val/001.png"
    common = ["--weights", str(eager), "--source", str(source), "--device", "cpu", "--max-det", "4", "--save-txt",
              "--save-conf", "--save-csv", "--hide-labels"]
    shares, pixels = (detect.main([*common, *more]) for more in ([], ["--save-format", "1", "--line-thickness", "9"]))
    a, b = (np.loadtxt(folder / "labels/001.txt", ndmin=2) for folder in (shares, pixels))
    centre, half = a[:, 1:3] * (96, 72), a[:, 3:5] * (96, 72) / 2
    assert np.abs(b[:, 1:5] - np.hstack((centre - half, centre + half))).max() < 1e-3 and (b[:, 5] == a[:, 5]).all()
    rows = list(csv.DictReader((pixels / "predictions.csv").open()))
    assert [(row["Image Name"], row["Prediction"]) for row in rows] == [
        ("001.png", ("square", "circle")[int(cls)]) for cls in b[:, 0]]
    assert [float(row["Confidence"]) for row in rows] == pytest.approx(b[:, 5].tolist(), abs=0.006)
    before = cv2.imread(str(source))
    thin, thick = ((cv2.imread(str(folder / "001.png")) != before).any(2).sum() for folder in (shares, pixels))
    assert thick > 2 * thin


def test_height_and_width(eager, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    detect.main(["--weights", str(eager), "--source", str(tiny.parent / "images/val/001.png"), "--img", "64", "128",
                 "--device", "cpu"])
    assert "at 64 x 128 px" in capsys.readouterr().out
    model = formats.load(eager, torch.device("cpu"))[0]
    image, seen = np.zeros((100, 100, 3), np.uint8), {}
    for size in (64, (64, 128), (128, 64), (100, 64)):
        pixels = detect.image_size(model, size, None)
        found = detect.detect(model, [image], pixels, torch.device("cpu"), lambda decoded: [decoded[0]])
        seen[size] = tuple(found.shape[2:])  # with as little grey as can be, as in YOLOv5
    assert seen == {64: (64, 64), (64, 128): (64, 64), (128, 64): (64, 64), (100, 64): (64, 64)}


def test_without_flags_the_newest_model_looks_at_the_images_it_was_validated_on(eager, tiny, tmp_path, monkeypatch,
                                                                              capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLO_WEIGHTS_URL", "http://127.0.0.1:9")
    for main in (detect.main, val.main, benchmarks.main, export.main):  # as in YOLOv5
        with pytest.raises(UserError, match=r"yolov5s\.pt: can't be fetched .* put the file at yolov5s.pt yourself"):
            main(["--device", "cpu"])
        assert "--weights not given: taking yolov5s.pt" in capsys.readouterr().out
    data = checkpoint.read(eager)
    for place in ("runs/train/exp/weights/best.pt", "runs/prune/exp/pruned_model.pt", "runs/slim/exp/slim.pt"):
        Path(place).parent.mkdir(parents=True)
        torch.save({**data, "opt": {"data": str(tiny), "imgsz": 64}}, place)
        os.utime(place, (time.time() + 9, time.time() + 9 + len(place)))
    found = detect.main(["--device", "cpu", "--max-det", "1"])
    said = capsys.readouterr().out
    assert f"taking the val images of {tiny}" in said and len(list(found.glob("*.png"))) == 6
    newest = max(Path("runs").rglob("*.pt"), key=lambda path: path.stat().st_mtime)
    assert f"--weights not given: taking the newest, {newest}" in said
    assert val.main(["--device", "cpu", "--noplots", "--workers", "0"])["data"] == str(tiny)


@pytest.mark.parametrize("name", ["data/shapes.yaml", "data/coco128.yaml"])
def test_a_model_that_does_not_say_its_data_takes_a_set_of_its_classes(name):
    names = read_yaml_mapping(ROOT / name, "")["names"]
    assert data_of_model({}, "x.pt", dict(names)) == str(ROOT / name)
    with pytest.raises(UserError, match=r"--data: x.pt does not say .* of its 1 classes: --data my.yaml"):
        data_of_model({"opt": {"imgsz": 64}}, "x.pt", {0: "nobody's"})
