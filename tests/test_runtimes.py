"""examples/detect_*: without PyTorch, in Python and in C++, they find what detect.py finds."""
from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import detect
import export
from models.formats import formats
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"
WITHOUT_TORCH = ("import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1]); "
                 "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')")


@pytest.fixture(scope="module")
def photo(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with many objects, and official weights beside it."""
    folder = tmp_path_factory.mktemp("photo")
    shutil.copyfile(assets / "yolov5n.pt", folder / "yolov5n.pt")
    labels = sorted((assets / "coco128/labels/train2017").glob("*.txt"))
    if not labels:
        pytest.skip("coco128 is missing in the assets")
    fullest = max(labels, key=lambda path: len(path.read_text().splitlines()))
    shutil.copyfile(assets / "coco128/images/train2017" / f"{fullest.stem}.jpg", folder / "photo.jpg")
    return folder / "photo.jpg"


def exported(photo: Path, name: str) -> Path:
    """The weights in a format. Skips where its packages are missing."""
    if missing := formats()[name].missing():
        pytest.skip(f"pip install {' '.join(missing)}")
    found, = export.main(["--weights", str(photo.with_name("yolov5n.pt")), "--include", name, "--imgsz", "320"])
    return found


def of_detect(photo: Path, weights: Path, folder: Path) -> np.ndarray:
    """(n, 6) rows of detect.py: class, confidence, x1, y1, x2, y2 in pixels; most confident first."""
    run = detect.main(["--weights", str(weights), "--source", str(photo), "--save-txt", "--save-conf", "--nosave",
                       "--imgsz", "320", "--project", str(folder), "--device", "cpu"])
    rows = np.loadtxt(run / "labels" / "photo.txt", ndmin=2)
    height, width = cv2.imread(str(photo)).shape[:2]
    centre, half = rows[:, 1:3] * (width, height), rows[:, 3:5] * (width, height) / 2
    return np.column_stack((rows[:, 0], rows[:, 5], centre - half, centre + half))


def agree(printed: str, expected: np.ndarray, numbers: dict[str, int]) -> None:
    """The lines that an example prints are the rows of detect.py."""
    found = np.array([[numbers[line.split()[0]], *map(float, line.split()[1:])] for line in printed.splitlines()])
    assert found.shape == expected.shape and len(found) > 3
    assert (found[:, 0] == expected[:, 0]).all()
    assert np.abs(found[:, 1] - expected[:, 1]).max() < 0.01 and np.abs(found[:, 2:] - expected[:, 2:]).max() < 1


@pytest.mark.parametrize("name, inside", [("onnxruntime", ""), ("ncnn", "")])
def test_python(name, inside, photo, tmp_path):
    weights = exported(photo, "onnx" if name == "onnxruntime" else name)
    names = detect.formats.load(weights, detect.torch.device("cpu"))[0].names
    command = [sys.executable, "-c", WITHOUT_TORCH, EXAMPLES, EXAMPLES / f"detect_{name}.py", weights / inside, photo,
               tmp_path / "out.png"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    agree(done.stdout, of_detect(photo, weights, tmp_path), {n.replace(" ", "_"): c for c, n in names.items()})
    assert cv2.imread(str(tmp_path / "out.png")).shape == cv2.imread(str(photo)).shape


def test_cpp(photo, tmp_path):
    """Built against the headers and the library of the openvino wheel."""
    weights = exported(photo, "openvino")
    package = Path(importlib.util.find_spec("openvino").origin).parent
    library = next((package / "libs").glob("libopenvino.so.*"), None)
    if not shutil.which("g++") or library is None or not (package / "include/openvino/openvino.hpp").exists():
        pytest.skip("needs g++ and an openvino wheel with headers")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", EXAMPLES / "detect_openvino.cpp", "-o",
               tmp_path / "detect", "-isystem", package / "include", f"-L{library.parent}", f"-l:{library.name}",
               f"-Wl,-rpath,{library.parent}"]
    subprocess.run(list(map(str, command)), check=True)
    cv2.imwrite(str(tmp_path / "photo.ppm"), cv2.imread(str(photo)))

    def run(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run([str(tmp_path / "detect"), *map(str, arguments)], capture_output=True, text=True)

    done = run(weights / "model.xml", tmp_path / "photo.ppm", tmp_path / "out.ppm")
    assert done.returncode == 0, done.stderr
    agree(done.stdout, of_detect(photo, weights, tmp_path), {str(c): c for c in range(80)})
    assert cv2.imread(str(tmp_path / "out.ppm")).shape == cv2.imread(str(photo)).shape
    broken = run(weights / "model.xml", photo, tmp_path / "out.ppm")
    assert broken.returncode == 2 and "not a binary .ppm" in broken.stderr
