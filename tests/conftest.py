"""Fixtures: the real assets (skipped where they are missing), a tiny data set, a way to run a script as a user does."""
from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.forks import forks

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often to do what is done a few times, or not at all, without these. bench/README.md says where."""
    parser.addoption("--cases", type=int, help="tests/test_graph.py: random cuts, all yamls included; makes a table")
    parser.addoption("--kills", type=int, help="tests/test_crash.py: random kills of each script; makes a table")


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing in the user's own cache, neither read nor written."""
    os.environ["YOLO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real data and reference values: $YOLO_ASSETS, or ../shared/assets beside the repository."""
    folder = Path(os.environ.get("YOLO_ASSETS") or ROOT.parent / "shared" / "assets")
    if not (folder / "golden").is_dir():
        pytest.skip(f"no assets at {folder} (set YOLO_ASSETS)")
    return folder


@pytest.fixture(scope="session")
def golden(assets: Path) -> dict[str, np.ndarray]:
    """Values that stock YOLOv5 computes."""
    with np.load(assets / "golden" / "yolov5-v7.npz") as file:
        return {k: file[k] for k in file.files}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data yaml with 12 training and 6 validation images of coloured squares and circles, 96 x 72 pixels."""
    root = tmp_path_factory.mktemp("tiny set")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(90, 160, (72, 96, 3), dtype=np.uint8)
            rows = []
            for _ in range(i % 3):
                c, x, y, r = (int(rng.integers(*limits)) for limits in ((0, 2), (20, 76), (20, 52), (8, 18)))
                if c:
                    cv2.circle(image, (x, y), r, (255, 40, 40), -1)
                else:
                    cv2.rectangle(image, (x - r, y - r), (x + r, y + r), (40, 40, 255), -1)
                rows.append(f"{c} {x / 96:.6f} {y / 72:.6f} {2 * r / 96:.6f} {2 * r / 72:.6f}")
            cv2.imwrite(str(root / "images" / split / f"{i:03d}.png"), image)
            (root / "labels" / split / f"{i:03d}.txt").write_text("\n".join(rows) + "\n" if rows else "")
    path = root / "tiny.yaml"
    path.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [square, circle]\n")
    return path


@pytest.fixture(scope="session")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A yolov5n of half its width."""
    import yaml

    from models.yolo import Model

    path = tmp_path_factory.mktemp("cfg") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**Model("yolov5n.yaml").yaml, "width_multiple": 0.125}))
    return path


@pytest.fixture(scope="session")
def site(tiny: Path) -> Iterator[str]:
    """The address of a server of the tiny set's files."""
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tiny.parent)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


Script = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def script() -> Script:
    """script("train.py", "--epochs", 1, cwd=folder, code=0) runs a command of the repository as a user would.

    With an environment of its own it is started, else forked.
    """

    def run(name: str, *args: object, cwd: Path, code: int | None = 0,
            env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        argv = [str(ROOT / name), *map(str, args)]
        if env is None:
            done = forks().run(argv, cwd, dict(os.environ))
        else:
            done = subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=600,
                                  env={"OMP_NUM_THREADS": "2", **os.environ, **env})
        if code is not None:
            assert done.returncode == code, f"{' '.join(argv)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def teacher(cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the tiny set, as if it had been trained."""
    from models import checkpoint
    from models.yolo import Model
    from tests.blocks import randomised

    model = randomised(Model(str(cfg), nc=2, names={0: "square", 1: "circle"})).eval()
    checkpoint.save(path := tmp_path_factory.mktemp("teacher") / "teacher.pt", model, imgsz=64)
    return path
