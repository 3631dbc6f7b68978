"""benchmarks.py: one table for all formats; what fails is a row. prune.py measures in the runtime that is asked for."""
from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmarks
import prune
from models import checkpoint, formats
from models.formats.speed import measured_in, milliseconds
from models.yolo import Model
from tests.blocks import random_masks, randomised
from utils.errors import UserError
from utils.slimming import slim, trace


@pytest.fixture(scope="module")
def pair(cfg, tmp_path_factory) -> list[Path]:
    """A dense and a slim checkpoint for the tiny set."""
    torch.manual_seed(0)
    dense = randomised(Model(str(cfg), nc=2, names={0: "square", 1: "circle"}))
    models = {"dense": dense, "slim": slim(dense, random_masks(trace(dense), 6, coupled=False))}
    folder = tmp_path_factory.mktemp("pair")
    for name, model in models.items():
        checkpoint.save(folder / f"{name}.pt", model.eval(), imgsz=64)
    return [folder / "dense.pt", folder / "slim.pt"]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "benchmarks.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def broken(monkeypatch) -> None:
    """A format whose writer fails."""
    def write(model, path, options):
        raise ValueError("no word for SiLU")

    monkeypatch.setitem(formats.formats(), "broken", formats.Format("broken", ".broken", write, lambda *_: None))


def run(pair, tiny, *flags: str) -> Path:
    return benchmarks.main(["--weights", *map(str, pair), "--data", str(tiny), "--imgsz", "64", "--workers", "0",
                            "--device", "cpu", "--runs", "2", *flags])


@pytest.mark.slow
def test_every_model_in_every_format(pair, tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    broken(monkeypatch)
    folder = run(pair, tiny, "--include", "torch", "onnxruntime", "broken", "--precisions", "fp32", "int8",
                 "--calibration-images", "2")
    rows, said = rows_of(folder), capsys.readouterr().out
    keys = [("torch", "fp32"), ("broken", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")]
    expected = {(model, *key) for model in ("dense", "slim") for key in keys}
    assert {(row["model"], row["format"], row["precision"]) for row in rows} == expected and len(rows) == 8
    for row in rows:
        if row["format"] == "broken":
            assert row["reason"] == "no word for SiLU" and row["ms"] == row["mAP50-95"] == ""
            continue
        assert row["reason"] == "" and float(row["ms"]) > 0 and 0 <= float(row["mAP50-95"]) <= 1
        assert float(row["faster"]) == pytest.approx(float(rows[0]["ms"]) / float(row["ms"]), rel=1e-3)
    sizes = {(row["model"], row["format"], row["precision"]): float(row["MB"]) for row in rows if row["MB"]}
    assert sizes["slim", "onnxruntime", "fp32"] < sizes["dense", "onnxruntime", "fp32"]
    assert sizes["dense", "onnxruntime", "int8"] < sizes["dense", "onnxruntime", "fp32"]
    assert rows[0]["mAP50-95"] == next(row for row in rows if row["format"] == "onnxruntime")["mAP50-95"]
    assert all(f"{model}, onnxruntime int8: 0." in said for model in ("dense", "slim"))  # before the timing
    assert "no word for SiLU" in said and "1.00x" in said and (folder / "benchmarks.png").is_file()


@pytest.mark.slow
def test_hard_fail_ends_at_the_first(pair, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken(monkeypatch)
    with pytest.raises(UserError, match="dense, broken fp32: no word for SiLU"):
        run(pair, tiny, "--include", "broken", "--hard-fail", "--noval")


@pytest.mark.slow
def test_rows_are_said_one_by_one_and_a_bad_choice_leaves_no_folder(pair, tiny, tmp_path, monkeypatch, capsys):
    """Before the timing, which waits for all of them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="none of these formats has one of these precisions"):
        run(pair, tiny, "--include", "torchscript", "--precisions", "int8")
    assert not (tmp_path / "runs").exists()
    broken(monkeypatch)
    monkeypatch.setattr(benchmarks, "evaluate", lambda *_, **__: SimpleNamespace(ap=SimpleNamespace(map=0.285)))
    monkeypatch.setattr(benchmarks, "time_in_turns", lambda entries, opt: print(len(entries), "rows are timed"))
    run(pair, tiny, "--include", "torch", "broken", "--noplots")
    lines = [line for line in capsys.readouterr().out.splitlines() if ": " in line or "timed" in line]
    dense = next(i for i, line in enumerate(lines) if line.startswith("dense, torch fp32: "))
    assert lines[dense].endswith(" MB, mAP50-95 0.285") and lines[dense + 1] == "dense, broken fp32: no word for SiLU"
    assert lines[dense + 2].startswith("slim, torch fp32: ") and lines[dense + 4] == "4 rows are timed"


@pytest.mark.slow
def test_hard_fail_with_a_number_is_about_accuracy(pair, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--include", "torch", "--hard-fail"]
    monkeypatch.setattr(benchmarks, "evaluate", lambda *_, **__: SimpleNamespace(ap=SimpleNamespace(map=0.285)))
    with pytest.raises(UserError, match=r"dense, torch fp32: mAP50-95 is 0\.285, not above --hard-fail 0\.29"):
        run(pair, tiny, *flags, "0.29")
    assert float(rows_of(run(pair, tiny, *flags, "0.28", "--noplots"))[0]["mAP50-95"]) == 0.285


def test_titles_tell_checkpoints_apart():
    assert benchmarks.titles(["a/dense.pt", "b/slim.pt"]) == ["dense", "slim"]
    assert benchmarks.titles(["x/a/weights/best.pt", "x/b/weights/best.pt"]) == ["a/weights/best", "b/weights/best"]
    with pytest.raises(UserError, match="the same file twice"):
        benchmarks.titles(["a.pt", "a.pt"])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--runtime", "onnxruntime", "--int8"]])
def test_a_latency_target_is_measured_in_the_runtime(pair, tiny, tmp_path, monkeypatch, capsys, flags):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, str]] = []

    def measured(models, name, imgsz, batch=1, runs=20, precision="fp32"):
        asked.append((name, precision))
        return [float(sum(p.numel() for p in model.parameters())) for model in models]

    monkeypatch.setattr("models.formats.speed.runtime_latency", measured)
    folder = prune.main(["--weights", str(pair[0]), "--data", str(tiny), "--target", "latency=0.8", "--noval",
                         "--device", "cpu", "--score", "gamma", *flags])
    assert set(asked) == {("onnx", "int8" if "--int8" in flags else "fp32")} and len(asked) > 3
    cost = {row["figure"]: row["left"] for row in json.loads((folder / "report.json").read_text())["cost"]}
    assert 0.7 < cost["parameters"] <= 0.8
    assert "target latency=0.8" in capsys.readouterr().out


def test_times_in_the_runtime_that_was_asked_for(monkeypatch):
    monkeypatch.setattr("models.formats.speed.torch_latency", lambda models, *_, **__: [1.0])
    monkeypatch.setattr("models.formats.speed.runtime_latency", lambda models, name, *_, precision="fp32", **__: [2.0])
    always = [f"{name}, batch {batch}" for name in ("torch", "onnxruntime on the CPU") for batch in (1, 16)]
    monkeypatch.setattr(formats.Format, "missing", lambda self, precision="fp32": [])
    for asked, more in ((("torch",), []), (("onnxruntime",), []), (("openvino", "int8"), ["openvino int8, batch 1"])):
        found = milliseconds([Model("yolov5n.yaml")], 64, torch.device("cpu"), *asked)
        assert list(found) == [*always, *more] and f"{measured_in(*asked)}, batch 1" in found


@pytest.mark.parametrize("flags, said", [
    (["--int8"], "--runtime torch has none; give --runtime onnxruntime or openvino"),
    (["--runtime", "torchscript", "--int8"], "--runtime torchscript has none here")])
def test_a_runtime_without_int8(pair, tiny, flags, said):
    with pytest.raises(UserError, match=said):
        prune.main(["--weights", str(pair[0]), "--data", str(tiny), "--target", "latency=0.8", "--noval", *flags])
