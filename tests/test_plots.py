"""Plots: every function writes a picture of a sensible size for ordinary, empty and extreme inputs."""
from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from matplotlib import MatplotlibDeprecationWarning
from matplotlib.figure import Figure
from matplotlib.text import Text

import detect
import val
from utils.data.sources import Frame
from utils.metrics import AXIS, APResult
from utils.plots import detections, slimming, style, training
from utils.plots.detections import (
    MAX_SIDE,
    detections_to_targets,
    draw_boxes,
    plot_batch,
    plot_confusion,
    plot_metric_curve,
    plot_pr_curve,
)
from utils.plots.slimming import plot_gamma_history, plot_gammas, plot_kept, plot_sensitivity, plot_sweep
from utils.plots.style import DPI, class_colour, readable, short_number
from utils.plots.training import plot_labels, plot_results

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("epoch,train/box_loss,train/obj_loss,train/cls_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,"
           "metrics/mAP_0.5:0.95,val/box_loss,val/obj_loss,val/cls_loss,x/lr0,x/lr1,x/lr2")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A warning (a missing glyph, an empty slice, a layout without room) is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # An old matplotlib beside new packages, and what it was about to change.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib|pyparsing")
        warnings.simplefilter("ignore", MatplotlibDeprecationWarning)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, in place of their files."""
    drawn: list[Figure] = []
    for module in (detections, slimming, training):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure) or path)
    return drawn


def check(path: Path, longest: int = 3000) -> np.ndarray:
    """Check that the file is a picture of a sensible size that is not blank; return its image (H, W, 3)."""
    data = path.read_bytes()
    assert data[:4] == {".png": b"\x89PNG", ".jpg": b"\xff\xd8\xff\xe0"}[path.suffix]
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    assert min(image.shape[:2]) >= 80 and max(image.shape[:2]) <= longest
    assert image.min() < image.max()
    return np.asarray(image)


def test_colours_differ() -> None:
    colours = np.array([class_colour(i) for i in range(80)])
    assert colours.min() >= 0 and colours.max() <= 255
    gap = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(80)
    assert gap.min() > 6
    assert gap[:20, :20].min() > 30


def test_draw_boxes_copies_and_marks_the_edges() -> None:
    image = np.full((100, 120, 3), 114, np.uint8)
    out = draw_boxes(image, np.array([[20.0, 40, 80, 90]]), [""], [1])
    assert (image == 114).all()
    assert out[60, 20].tolist() == out[60, 80].tolist() == list(class_colour(1))
    assert (out[60, 40] == 114).all() and (out[:30] == 114).all()


def test_detect_draws_in_the_same_colours(tmp_path, monkeypatch) -> None:
    """Its frames are BGR, and an RGB colour drawn on one is another colour."""
    monkeypatch.chdir(tmp_path)
    opt = detect.parse(["--weights", "x.pt", "--hide-labels"])
    frame = Frame(np.full((100, 120, 3), 114, np.uint8), Path("a.png"))
    output = detect.Output({i: str(i) for i in range(3)}, opt)
    output.add(frame, torch.tensor([[20.0, 40, 80, 90, 0.5, 2]]))
    drawn = cv2.imread(str(output.folder / "a.png"))
    assert drawn[60, 20, ::-1].tolist() == list(class_colour(2))


@pytest.mark.parametrize("box", [[0, 0, 5, 5], [115, 95, 119, 99], [-50, -50, 500, 500], [60, 0, 119, 20]])
def test_captions_stay_inside(box: list[int]) -> None:
    """A caption at the edge has as many dark letter pixels as one in the middle: none is cut off."""

    def letters(at: list[int]) -> int:
        image = np.full((100, 120, 3), 250, np.uint8)
        drawn = draw_boxes(image, np.array([at]), ["label"], [5])
        return int((drawn.max(-1) < 120).sum())  # black letters on sky blue

    assert letters(box) == letters([40, 50, 60, 70]) > 20


@pytest.mark.parametrize("label", ["x" * 200, "人 0.9", "naïve", "two\nlines", "$a$"])
def test_draw_boxes_takes_any_caption(label: str) -> None:
    out = draw_boxes(np.zeros((64, 48, 3), np.uint8), np.array([[10.0, 5, 30, 40]]), [label], [200])
    assert out.any() and out.shape == (64, 48, 3)


@pytest.mark.parametrize("count,spread", [(2, 0.0), (12, 3.0), (40, 60.0), (300, 150.0)])
def test_captions_do_not_cover_each_other(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, count: int,
                                          spread: float) -> None:
    plates: list[tuple[int, int, int, int]] = []
    draw = detections._draw_caption
    monkeypatch.setattr(detections, "_draw_caption",
                        lambda *args: (draw(*args), plates.clear(), plates.extend(args[-1])))
    boxes = rng.normal((100, 100, 200, 180), spread, (count, 4))
    draw_boxes(np.zeros((300, 400, 3), np.uint8), boxes, ["cell 0.50"] * count, [0] * count)
    x1, y1, x2, y2 = np.array(plates).T
    covered = (x1[:, None] <= x2) & (x2[:, None] >= x1) & (y1[:, None] <= y2) & (y2[:, None] >= y1)
    assert len(plates) >= min(count, 10) and covered.sum() == len(plates)  # each only itself
    assert min(x1.min(), y1.min()) >= 0 and x2.max() < 400 and y2.max() < 300


def test_draw_boxes_leaves_out_what_is_not_finite() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    assert not draw_boxes(image, np.array([[np.nan, 1, 2, 3], [1, 2, np.inf, 4]]), ["a", "b"], [0, 1]).any()
    assert not draw_boxes(image, np.zeros((0, 4)), [], []).any()
    with pytest.raises(ValueError):
        draw_boxes(image, np.zeros((2, 4)), ["a"], [0])


def test_batch_mosaic(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (5, 3, 64, 96), dtype=torch.uint8)
    targets = torch.tensor([[0, 0, 0.5, 0.5, 0.4, 0.4], [4, 7, 0.9, 0.1, 0.3, 0.3]])
    names, files = {0: "red cell 红"}, ["a/é.png", *(f"{i}.png" for i in range(39))]
    mosaic = check(plot_batch(images, targets, files[:5], names, tmp_path / "é" / "b.jpg"))
    assert mosaic.shape == (2 * (213 + 2) + 2, 3 * (320 + 2) + 2, 3)  # small images are enlarged to 320 pixels
    many = torch.zeros(40, 3, 64, 640, dtype=torch.uint8)
    mosaic = check(plot_batch(many, targets, files, names, tmp_path / "c.jpg"))
    assert mosaic.shape == (4 * (48 + 2) + 2, MAX_SIDE + 4 * 2 + 2, 3)  # 16 of the 40 images


def test_batch_leaves_out_weak_detections(tmp_path: Path) -> None:
    images = torch.zeros(1, 3, 320, 320, dtype=torch.uint8)
    row = [0, 0, 0.5, 0.5, 0.4, 0.4]
    choices = torch.zeros(0, 7), torch.tensor([[*row, 0.2]]), torch.tensor([[*row, 0.9]])
    bare, weak, strong = (plot_batch(images, targets, ["a.png"], {}, tmp_path / "b.jpg").read_bytes()
                          for targets in choices)
    assert bare == weak != strong


def test_detections_to_targets_is_the_inverse_of_scaling() -> None:
    first = torch.tensor([[10.0, 20, 50, 40, 0.7, 3]])
    out = detections_to_targets([torch.zeros(0, 6), first], (100, 200))
    torch.testing.assert_close(out, torch.tensor([[1, 3, 0.15, 0.3, 0.2, 0.2, 0.7]]))
    for nothing in ([first[:0]], [first[:0]] * 3):
        assert detections_to_targets(nothing, (10, 10)).shape == (0, 7)


@pytest.mark.slow
@pytest.mark.parametrize("count,names", [
    (0, {0: "x"}), (1, {0: "红细胞"}), (3000, {i: f"$n_{i}" for i in range(80)}),
    (500, dict.fromkeys(range(300), "x" * 90))])
def test_labels(tmp_path: Path, rng: np.random.Generator, count: int, names: dict[int, str]) -> None:
    labels = np.c_[rng.integers(0, max(len(names), 1), count), rng.random((count, 4))].astype(np.float32)
    check(plot_labels(labels, names, tmp_path / "labels.png"))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 1, 9, 80])
def test_curves(tmp_path: Path, rng: np.random.Generator, classes: int) -> None:
    x = np.linspace(0, 1, 1000)
    curves = 1 - x[None] ** rng.uniform(1, 8, (classes, 1))
    names = ["_红 $x$", *(f"class {i}" for i in range(1, classes))][:classes]
    check(plot_pr_curve(x, curves, rng.random(classes), names, tmp_path / "pr.png"))
    check(plot_metric_curve(x, curves, names, tmp_path / "f1.png", "F1"))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 1, 12, 80])
def test_confusion(tmp_path: Path, rng: np.random.Generator, classes: int) -> None:
    matrix = rng.integers(0, 50, (classes + 1, classes + 1)).astype(float) * (classes != 1)  # once without counts
    check(plot_confusion(matrix, {i: f"é 红 {i}" for i in range(classes)}, tmp_path / "full.png"))


def test_confusion_has_counts_and_shares(tmp_path: Path, figures: list[Figure]) -> None:
    """False detections are a share of the row's, in a colour of their own: not of a column that has no true class."""
    plot_confusion(np.array([[90, 4, 6], [0, 16, 1000], [10, 0, 0]]), {0: "a", 1: "b"}, tmp_path / "c.png")
    ax = figures[0].axes[0]
    assert sorted(text.get_text() for text in ax.texts) == sorted(
        ["90\n0.90", "4\n0.20", "6\n0.06", "16\n0.80", "1,000\n0.98", "10\n0.10"])
    true, false = (image.get_array() for image in ax.images)
    assert true.count() == 4 and true[:, -1].mask.all()
    assert false.count() == 2 and false[:, :-1].mask.all()


def test_precision_and_recall_are_written_alike(tmp_path: Path, figures: list[Figure],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.csv").write_text(f"{COLUMNS}\n0{',0.5' * 13}\n")
    plot_results(tmp_path / "results.csv", tmp_path / "r.png")
    nothing = APResult(*np.zeros((2, 0)), np.zeros((0, 10)), np.zeros(0, int), AXIS, *np.zeros((4, 0, 1000)))
    val.plot_curves(val.Evaluation(nothing, np.zeros(3), {}, 0, np.zeros(0)), {}, tmp_path)
    assert len(figures) == 5
    texts = [text.get_text() for figure in figures for text in figure.findobj(Text)]
    assert {"precision", "recall", "precision and recall"} <= set(texts)
    assert not any(re.search(r"Precision|Recall|\b[PR]\b", text) for text in texts)


def test_results_of_one_class(tmp_path: Path, figures: list[Figure]) -> None:
    """No chart of a class loss that is 0; equal learning rates as one line; the first epoch is 1."""
    rows = [f"{i},0.1,0.2,0,0,0,0,0,0.1,0.2,0,{lr},{lr},0.01" for i, lr in enumerate((0.1, 0.2, 0.3))]
    (tmp_path / "results.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    plot_results(tmp_path / "results.csv", tmp_path / "r.png")
    charts = {ax.get_title(loc="left"): ax for ax in figures[0].axes if ax.lines}
    assert list(charts) == ["box loss", "obj loss", "precision and recall", "mAP", "learning rate"]
    assert [line.get_label() for line in charts["learning rate"].lines] == ["lr0, lr1", "lr2"]
    assert all(line.get_xdata().tolist() == [1, 2, 3] for ax in charts.values() for line in ax.lines)


@pytest.mark.slow
@pytest.mark.parametrize("header,rows,charts", [
    (COLUMNS, ["0" + ",0.5" * 13], 6),
    (COLUMNS, ["0,1,,,,nan,inf,,,,,,,"], 6),
    (COLUMNS + ",sparsity/sr,sparsity/below_1e-3,sparsity/below_1e-2",
     [f"{i}{',0.5' * 3}{',' * 7}{',0.1' * 6}" for i in range(40)], 8)])
def test_results(tmp_path: Path, header: str, rows: list[str], charts: int) -> None:
    (tmp_path / "results.csv").write_text("\n".join([header, *rows]) + "\n")
    height = check(plot_results(tmp_path / "results.csv", tmp_path / "r.png")).shape[0]
    assert height == round(2.7 * DPI) * -(-charts // 3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 5000])
def test_gammas(tmp_path: Path, rng: np.random.Generator, size: int) -> None:
    gammas = np.abs(np.r_[np.zeros(size // 2), rng.normal(1, 0.1, size - size // 2)])
    check(plot_gammas(gammas, tmp_path / "g.png", title="title $"))
    for cut in (gammas == 0, gammas < 2, rng.random(size) < 0.5):
        check(plot_gammas(gammas, tmp_path / "g.png", cut))


@pytest.mark.slow
@pytest.mark.parametrize("cut,expected", [
    ([True, True, False, False], ["threshold 0.2", "kept: 2 channels (50.0%)", "cut: 2 channels (50.0%)"]),
    ([True, False, True, False], ["kept: 2 channels (50.0%)", "cut: 2 channels (50.0%)"]),
    ([False] * 4, ["kept: 4 channels", "cut: 0 channels (0.0%)"])])
def test_a_threshold_is_marked_only_where_it_separates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       cut: list[bool], expected: list[str]) -> None:
    """Channels that are ranked by something else than gamma have none: most that are kept may be below it."""
    shown: list[str] = []
    monkeypatch.setattr(slimming, "save_figure", lambda figure, path: shown.extend(
        text.get_text() for text in figure.axes[0].get_legend().get_texts()) or path)
    plot_gammas(np.array([0.1, 0.2, 0.3, 0.4]), tmp_path / "g.png", np.array(cut))
    assert shown == expected


@pytest.mark.slow
def test_gammas_with_strays(tmp_path: Path) -> None:
    check(plot_gammas(np.r_[np.ones(3000), 1e6], tmp_path / "g.png"))


@pytest.mark.slow
@pytest.mark.parametrize("runs", [
    {"a": [np.ones(3)], "红": [np.zeros(4)] * 2},
    {f"run {i}": [np.linspace(0, 1 + i, 200)] * 50 for i in range(5)}])
def test_gamma_history(tmp_path: Path, runs: dict[str, list[np.ndarray]]) -> None:
    check(plot_gamma_history(runs, tmp_path / "h.png"))


def test_gamma_history_starts_at_epoch_1(tmp_path: Path, figures: list[Figure]) -> None:
    plot_gamma_history({"a": [np.ones(3)] * 4}, tmp_path / "h.png")
    ax = figures[0].axes[0]
    assert ax.lines[0].get_ydata().tolist() == [1, 2, 3, 4] and ax.get_ylim() == (0.5, 4.5)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 90])
def test_kept_grows_with_the_layers(tmp_path: Path, rng: np.random.Generator, layers: int) -> None:
    original = rng.integers(1, 1024, layers)
    kept = (original * rng.random(layers)).astype(int)
    names = [f"model.{i}.cv1.bn" for i in range(layers)]
    prunable = [i % 5 > 0 for i in range(layers)]
    rows = [{"layer": n, "original": a, "remaining": b, "prunable": p}
            for n, a, b, p in zip(names, original.tolist(), kept.tolist(), prunable)]
    image = check(plot_kept(rows, tmp_path / "k.png"), 4000)
    assert image.shape[0] >= 20 * layers
    assert check(style.narrow_form(tmp_path / "k.png"), 4000).shape[1] < image.shape[1] / 2


@pytest.mark.slow
def test_sweep_and_sensitivity(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"layer": f"红 {i}", "percent": i / 10, "mAP50": 0.8 - i / 20, "mAP50-95": 0.5 - i / 20,
         "parameters": 1000 - 90 * i, "GFLOPs": 4.2 - 0.3 * i, "ms": 30 - i} for i in range(8)]
    check(plot_sweep(rows, tmp_path / "sweep.png", 3))
    check(plot_sensitivity(rows, tmp_path / "sensitivity.png", 0.5))


def test_short_numbers() -> None:
    numbers = [short_number(v) for v in (0, 31.42, 1872157, 4.2e9, 999.9e3)]
    assert numbers == ["0", "31.4", "1.87 M", "4.2 G", "1000 k"]


def test_texts_are_shown_as_they_are() -> None:
    assert readable("a\n b") == "a b"
    assert readable("$x$") == r"\$x\$"
    assert readable("红细胞 é", "#3") == "#3 é"
    assert len(readable("x" * 99)) == 28


@pytest.mark.slow
def test_no_global_state(tmp_path: Path) -> None:
    """Importing the modules does not load matplotlib. Plotting does not load pyplot and changes no setting."""
    code = f"""
import sys, numpy as np
from pathlib import Path
from utils.plots import detections, slimming, style, training
assert not any(m.split(".")[0] == "matplotlib" for m in sys.modules), "the import loads matplotlib"
import matplotlib
def settings():  # asking for the backend would import pyplot
    return {{k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}}
before = settings()
folder, names = Path(r"{tmp_path}"), {{0: "a", 1: "b"}}
training.plot_labels(np.full((4, 5), 0.5), names, folder / "a.png")
detections.plot_confusion(np.eye(3), names, folder / "b.png")
detections.plot_metric_curve(np.linspace(0, 1, 9), np.ones((2, 9)), ["a", "b"], folder / "c.png", "F1")
slimming.plot_gammas(np.ones(9), folder / "d.png", np.ones(9, bool))
slimming.plot_gamma_history({{"a": [np.ones(9)]}}, folder / "e.png")
slimming.plot_kept([{{"layer": "a", "original": 4, "remaining": 2, "prunable": True}}], folder / "f.png")
assert "matplotlib.pyplot" not in sys.modules
assert before == settings()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
