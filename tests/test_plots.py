"""Pictures: every function writes a readable PNG of sane size for ordinary, empty and extreme inputs."""
from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils import plots
from utils.errors import UserError
from utils.slimming import pictures

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("epoch,train/box_loss,train/obj_loss,train/cls_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,"
           "metrics/mAP_0.5:0.95,val/box_loss,val/obj_loss,val/cls_loss,x/lr0,x/lr1,x/lr2")
STAGES = [{"stage": "dense", "map50": 0.86, "map": 0.61, "parameters": 1872157, "flops": 4.2e9, "ms": 31.4},
          {"stage": "cut", "map50": 0.31, "map": 0.13, "parameters": 572157, "flops": 1.9e9, "ms": None}]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A picture that warns (missing glyphs, empty slices, a squeezed layout) is not a good one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def check(path: Path, longest: int = 3000) -> np.ndarray:
    """The picture (H, W, 3), once it is known to be a PNG of sane size that isn't blank."""
    data = path.read_bytes()
    assert data[:4] == b"\x89PNG"
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    assert min(image.shape[:2]) >= 80 and max(image.shape[:2]) <= longest
    assert image.min() < image.max()
    return np.asarray(image)


def test_colours_differ() -> None:
    colours = np.array([plots.colour(i) for i in range(80)])
    assert colours.min() >= 0 and colours.max() <= 255
    gap = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(80)
    assert gap.min() > 6
    assert gap[:20, :20].min() > 30


def test_draw_boxes_copies_and_marks_the_edges() -> None:
    image = np.full((100, 120, 3), 114, np.uint8)
    out = plots.draw_boxes(image, np.array([[20.0, 40, 80, 90]]), [""], [1])
    assert (image == 114).all()
    assert out[60, 20].tolist() == out[60, 80].tolist() == list(plots.colour(1))
    assert (out[60, 40] == 114).all() and (out[:30] == 114).all()


@pytest.mark.parametrize("box", [[0, 0, 5, 5], [115, 95, 119, 99], [-50, -50, 500, 500], [60, 0, 119, 20]])
def test_captions_stay_inside(box: list[int]) -> None:
    """The caption of a box at the edge has as many dark letter pixels as one in the middle: none was cut off."""

    def letters(at: list[int]) -> int:
        image = np.full((100, 120, 3), 250, np.uint8)
        return int((plots.draw_boxes(image, np.array([at]), ["label"], [5]).max(-1) < 120).sum())  # black on sky blue

    assert letters(box) == letters([40, 50, 60, 70]) > 20


@pytest.mark.parametrize("label", ["x" * 200, "人 0.9", "naïve", "two\nlines", "$a$"])
def test_draw_boxes_takes_any_caption(label: str) -> None:
    out = plots.draw_boxes(np.zeros((64, 48, 3), np.uint8), np.array([[10.0, 5, 30, 40]]), [label], [200])
    assert out.any() and out.shape == (64, 48, 3)


def test_draw_boxes_leaves_out_what_is_not_finite() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    assert not plots.draw_boxes(image, np.array([[np.nan, 1, 2, 3], [1, 2, np.inf, 4]]), ["a", "b"], [0, 1]).any()
    assert not plots.draw_boxes(image, np.zeros((0, 4)), [], []).any()
    with pytest.raises(ValueError):
        plots.draw_boxes(image, np.zeros((2, 4)), ["a"], [0])


def test_batch_mosaic(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (5, 3, 64, 96), dtype=torch.uint8)
    targets = torch.tensor([[0, 0, 0.5, 0.5, 0.4, 0.4], [4, 7, 0.9, 0.1, 0.3, 0.3]])
    names = {0: "red cell 红"}
    shape = check(plots.plot_batch(images, targets, ["a/é.png", "b.png"], names, tmp_path / "é" / "b.png")).shape
    assert shape == (2 * 213, 3 * 320, 3)  # small images are enlarged to 320 pixels
    many = torch.zeros(40, 3, 64, 640, dtype=torch.uint8)
    assert max(check(plots.plot_batch(many, targets, [], names, tmp_path / "c.png", max_side=800)).shape) <= 800
    check(plots.plot_batch(images[:0], targets[:0], [], names, tmp_path / "none.png"))


def test_batch_leaves_out_weak_detections(tmp_path: Path) -> None:
    images = torch.zeros(1, 3, 320, 320, dtype=torch.uint8)
    row = [0, 0, 0.5, 0.5, 0.4, 0.4]
    bare, weak, strong = (plots.plot_batch(images, targets, [], {}, tmp_path / "b.png").read_bytes() for targets in
                          (torch.zeros(0, 7), torch.tensor([[*row, 0.2]]), torch.tensor([[*row, 0.9]])))
    assert bare == weak != strong


def test_detections_to_targets_is_the_inverse_of_scaling() -> None:
    first = torch.tensor([[10.0, 20, 50, 40, 0.7, 3]])
    out = plots.detections_to_targets([torch.zeros(0, 6), first], (100, 200))
    torch.testing.assert_close(out, torch.tensor([[1, 3, 0.15, 0.3, 0.2, 0.2, 0.7]]))
    for nothing in ([], [first[:0]], [first[:0]] * 3):
        assert plots.detections_to_targets(nothing, (10, 10)).shape == (0, 7)


@pytest.mark.parametrize("count,names", [(0, {}), (0, {0: "x"}), (1, {0: "红细胞"}),
                                         (3000, {i: f"$n_{i}" for i in range(80)}),
                                         (500, dict.fromkeys(range(300), "x" * 90))])
def test_labels(tmp_path: Path, rng: np.random.Generator, count: int, names: dict[int, str]) -> None:
    labels = np.c_[rng.integers(0, max(len(names), 1), count), rng.random((count, 4))].astype(np.float32)
    check(plots.plot_labels(labels, names, tmp_path / "labels.png"))


@pytest.mark.parametrize("classes", [0, 1, 9, 80])
def test_curves(tmp_path: Path, rng: np.random.Generator, classes: int) -> None:
    x = np.linspace(0, 1, 1000)
    curves = 1 - x[None] ** rng.uniform(1, 8, (classes, 1))
    names = ["_红 $x$", *(f"class {i}" for i in range(1, classes))][:classes]
    check(plots.plot_pr_curve(x, curves, rng.random(classes), names, tmp_path / "pr.png"))
    check(plots.plot_metric_curve(x, curves, names, tmp_path / "f1.png", "F1"))


@pytest.mark.parametrize("classes", [0, 1, 12, 80])
def test_confusion(tmp_path: Path, rng: np.random.Generator, classes: int) -> None:
    matrix = rng.integers(0, 50, (classes + 1, classes + 1)).astype(float) * (classes != 1)  # once without counts
    check(plots.plot_confusion(matrix, {i: f"é 红 {i}" for i in range(classes)}, tmp_path / "full.png"))


@pytest.mark.parametrize("text,panels", [("", 1), (COLUMNS + "\n", 6), (COLUMNS + "\n0" + ",0.5" * 13 + "\n", 6),
                                         (COLUMNS + "\n0,1,,,,nan,inf,x\n1,2\n", 6),
                                         (COLUMNS + ",sparsity/sr,sparsity/below_1e-3,sparsity/below_1e-2\n"
                                          + "".join(f"{i}{',0.5' * 3}{',' * 7}{',0.1' * 6}\n" for i in range(40)), 8)])
def test_results(tmp_path: Path, text: str, panels: int) -> None:
    (tmp_path / "results.csv").write_text(text)
    height = check(plots.plot_results(tmp_path / "results.csv", tmp_path / "r.png")).shape[0]
    assert height == round(2.7 * pictures.DPI) * -(-panels // 3)


def test_results_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="results.csv"):
        plots.plot_results(tmp_path / "results.csv", tmp_path / "r.png")


@pytest.mark.parametrize("size,threshold", [(0, None), (0, 0.1), (1, 0.0), (5000, 0.1), (50, 30.0), (50, float("nan"))])
def test_gammas(tmp_path: Path, rng: np.random.Generator, size: int, threshold: float | None) -> None:
    gammas = np.abs(np.r_[np.zeros(size // 2), rng.normal(1, 0.1, size - size // 2)])
    compare = 0 * gammas if size > 50 else None
    check(pictures.plot_gammas(gammas, tmp_path / "g.png", threshold, 0.5, "title $", compare, ("dense", "sr 红")))


def test_gammas_with_strays(tmp_path: Path) -> None:
    check(pictures.plot_gammas(np.r_[np.ones(3000), 1e6, np.nan, np.inf], tmp_path / "g.png"))


@pytest.mark.parametrize("runs", [{}, {"a": []}, {"a": [np.ones(3)], "红": [np.zeros(0)] * 2},
                                  {f"run {i}": [np.linspace(0, 1 + i, 200)] * 50 for i in range(5)}])
def test_gamma_history(tmp_path: Path, runs: dict[str, list[np.ndarray]]) -> None:
    check(pictures.plot_gamma_history(runs, tmp_path / "h.png"))


@pytest.mark.parametrize("layers", [0, 1, 90])
def test_kept_grows_with_the_layers(tmp_path: Path, rng: np.random.Generator, layers: int) -> None:
    original = rng.integers(1, 1024, layers)
    kept = (original * rng.random(layers)).astype(int)
    names = [f"model.{i}.cv1.bn" for i in range(layers)]
    image = check(pictures.plot_kept(names, original.tolist(), kept.tolist(), tmp_path / "k.png",
                                     [i % 5 > 0 for i in range(layers)]), 4000)
    assert image.shape[0] >= 20 * layers


@pytest.mark.parametrize("rows", [[], STAGES, STAGES[:1], STAGES * 6, [{"stage": "红 $"}], [{"map": 0.0, "ms": 0}]])
def test_stages(tmp_path: Path, rows: list[dict]) -> None:
    check(pictures.plot_stages(rows, tmp_path / "s.png"))


def test_short_numbers() -> None:
    numbers = [pictures.short_number(v) for v in (0, 31.42, 1872157, 4.2e9, 999.9e3)]
    assert numbers == ["0", "31.4", "1.87 M", "4.2 G", "1000 k"]


def test_texts_are_shown_as_they_are() -> None:
    assert pictures.readable("a\n b") == "a b"
    assert pictures.readable("$x$") == r"\$x\$"
    assert pictures.readable("红细胞 é", "#3") == "#3 é"
    assert len(pictures.readable("x" * 99)) == 28


def test_no_global_state(tmp_path: Path) -> None:
    """Neither pyplot nor a changed setting of matplotlib is left behind."""
    code = f"""
import sys, numpy as np
from utils import plots
from utils.slimming import pictures
assert not any(m.split(".")[0] == "matplotlib" for m in sys.modules), "import draws matplotlib in"
import matplotlib
def settings():  # asking for the backend would import pyplot
    return {{k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}}
before = settings()
plots.plot_labels(np.full((4, 5), 0.5), {{0: "a"}}, r"{tmp_path / 'a.png'}")
plots.plot_confusion(np.eye(3), ["a", "b"], r"{tmp_path / 'b.png'}")
plots.plot_metric_curve(np.linspace(0, 1, 9), np.ones((2, 9)), ["a", "b"], r"{tmp_path / 'c.png'}", "F1")
pictures.plot_gammas(np.ones(9), r"{tmp_path / 'd.png'}", 0.5, 0.5)
pictures.plot_gamma_history({{"a": [np.ones(9)]}}, r"{tmp_path / 'e.png'}")
pictures.plot_kept(["a"], [4], [2], r"{tmp_path / 'f.png'}", [True])
pictures.plot_stages([], r"{tmp_path / 'g.png'}")
assert "matplotlib.pyplot" not in sys.modules
assert before == settings()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
