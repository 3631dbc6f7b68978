"""Whole commands, as a user runs them, on a tiny data set."""
from __future__ import annotations

import csv
import hashlib
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from models import checkpoint
from models.yolo import Model, fused
from tests.blocks import randomised
from train import train
from training.start import start_options
from utils.options import training_parser

FAST = ["--imgsz", 64, "--batch-size", 4, "--workers", 0, "--device", "cpu"]


def digest(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def left_at_the_end(row: dict[str, str]) -> list[float]:
    """Parameters and GFLOPs that prune.py would leave, as the last row of results.csv has them."""
    return [float(row["sparsity/parameters_left"]), float(row["sparsity/gflops_left"])]


@pytest.mark.slow
def test_the_four_steps(script, tiny, cfg, tmp_path):
    before = digest(tiny.parent)
    script("train.py", "--data", tiny, "--weights", "", "--cfg", cfg, "--epochs", 2, *FAST, cwd=tmp_path)
    dense = tmp_path / "runs/train/exp"
    assert len(rows(dense / "results.csv")) == 2
    for name in ("weights/last.pt", "weights/best.pt", "opt.yaml", "hyp.yaml", "labels.png", "train_batch0.jpg",
                 "results.png", "PR_curve.png", "F1_curve.png", "confusion_matrix.png"):
        assert (dense / name).is_file(), name

    done = script("train_sparsity.py", "--st", "--sr", 0.01, "--data", tiny, "--weights", dense / "weights/last.pt",
                  "--epochs", 2, "--noplots", "--keep", "model.1.*", *FAST, cwd=tmp_path)
    assert "45 of 57 BatchNorms" in done.stdout
    table = rows(tmp_path / "runs/train/exp2/results.csv")
    assert [float(r["sparsity/sr"]) for r in table] == pytest.approx([0.01, 0.0055])
    assert {"sparsity/below_1e-3", "sparsity/below_1e-2", "sparsity/below_1e-1"} <= table[0].keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs/train/exp2"), {"histograms": 0}).Reload()
    histograms = events.Tags()["histograms"]
    assert {"bn_weights/hist", "bn_bias/hist", "bn_layers/model.0.bn"} <= set(histograms)
    assert len(events.Histograms("bn_weights/hist")) == 2

    done = script("prune.py", "--percent", 0.5, cwd=tmp_path)
    assert "taking the newest sparsity run, runs/train/exp2/weights/last.pt" in done.stdout
    report = json.loads((tmp_path / "runs/prune/exp/report.json").read_text())
    assert report["difference"] < 1e-9 and report["achieved"] == pytest.approx(0.5, abs=0.01)
    assert [s["stage"] for s in report["stages"]] == ["before", "masked", "slim"]
    assert report["stages"][1]["mAP50-95"] == pytest.approx(report["stages"][2]["mAP50-95"], abs=1e-3)
    figures = {c["figure"] for c in report["cost"]}
    assert {"ms an image (torch, batch 1)", "ms an image (torch, batch 16)"} <= figures and report["threads"] >= 1
    slim = checkpoint.load(tmp_path / "pruned_model.pt")
    assert slim.names == {0: "square", 1: "circle"} and slim.masks

    script("finetune_pruned.py", "--epochs", 1, "--noplots", *FAST, cwd=tmp_path)
    tuned = checkpoint.load(tmp_path / "runs/train/exp3/weights/last.pt")
    assert [p.shape for p in tuned.parameters()] == [p.shape for p in slim.parameters()]
    assert all(torch.equal(slim.masks[k], v) for k, v in tuned.masks.items())

    script("finetune_pruned.py", "--resume", "runs/train/exp3/weights/last.pt", "--epochs", 2, cwd=tmp_path)
    assert len(rows(tmp_path / "runs/train/exp3/results.csv")) == 2
    again = script("prune.py", "--weights", "runs/train/exp3/weights/last.pt", "--percent", 0.3, "--noval",
                   cwd=tmp_path)
    assert "is replaced" in again.stdout and "of the first model" in again.stdout
    twice = checkpoint.load(tmp_path / "pruned_model.pt")
    assert all(len(v) == len(slim.masks[k]) for k, v in twice.masks.items())

    script("val.py", "--weights", "pruned_model.pt", "--save-json", "--save-txt", *FAST, cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs/val/exp/metrics.json").read_text())
    assert metrics["images"] == 6 and "pycocotools" in metrics
    assert digest(tiny.parent) == before


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(script, tiny, cfg, tmp_path):
    common = ["--data", tiny, "--weights", "", "--cfg", cfg, "--epochs", 3, "--noplots", *FAST]
    script("train.py", *common, "--name", "whole", "--save-period", 1, cwd=tmp_path)
    weights = tmp_path / "runs/train/whole/weights"
    final = checkpoint.read(weights / "last.pt")
    (weights / "epoch1.pt").replace(weights / "last.pt")
    script("train.py", "--resume", weights / "last.pt", "--workers", 0, cwd=tmp_path)
    resumed = checkpoint.read(weights / "last.pt")
    for part in ("state_dict", "ema"):
        assert all(torch.equal(v, resumed[part][k]) for k, v in final[part].items())
    assert [r["epoch"] for r in rows(tmp_path / "runs/train/whole/results.csv")] == ["0", "1", "2"]
    done = script("train.py", "--resume", weights / "last.pt", cwd=tmp_path, code=2)
    assert "all 3 epochs are done" in done.stderr
    done = script("train_sparsity.py", "--resume", weights / "last.pt", cwd=tmp_path, code=2)
    assert "resume it with: python train.py" in done.stderr


@pytest.mark.slow
def test_a_target_is_reached_resumed_exactly_and_cut_without_a_trace(script, tiny, cfg, tmp_path):
    script("train_sparsity.py", "--target-sparsity", 0.5, "--round-to", 1, "--data", tiny, "--weights", "",
           "--cfg", cfg, "--epochs", 4, "--save-period", 2, "--masked-val", 2, *FAST, cwd=tmp_path)
    weights = tmp_path / "runs/train/exp/weights"
    final = checkpoint.read(weights / "last.pt")
    assert float(rows(weights.parent / "results.csv")[-1]["sparsity/zero"]) == pytest.approx(0.5, abs=0.002)
    last = rows(weights.parent / "results.csv")[-1]
    # Only zeros would be cut.
    assert float(last["sparsity/masked_mAP_0.5"]) == pytest.approx(float(last["metrics/mAP_0.5"]), abs=1e-4)
    assert (weights.parent / "gammas.png").is_file() and (weights.parent / "gamma_history.png").is_file()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "bn_weights/over_epochs" in EventAccumulator(str(weights.parent), {"images": 0}).Reload().Tags()["images"]

    done = script("prune.py", "--percent", 0.5, "--batch-size", 4, cwd=tmp_path)
    assert "threshold |gamma| 0\n" in done.stdout and "prunable gammas are exactly 0" in done.stdout
    report = json.loads((tmp_path / "runs/prune/exp/report.json").read_text())
    assert report["stages"][0]["mAP50-95"] == pytest.approx(report["stages"][2]["mAP50-95"], abs=1e-6)
    assert [c["after"] for c in report["cost"][:2]] == pytest.approx(left_at_the_end(last))

    shutil.copyfile(weights / "epoch2.pt", weights / "last.pt")
    script("train_sparsity.py", "--resume", weights / "last.pt", cwd=tmp_path)
    resumed = checkpoint.read(weights / "last.pt")
    assert all(torch.equal(v, resumed["ema"][k]) for k, v in final["ema"].items())
    assert len(resumed["training"]["hooks"]["SparsityHook"]["history"]) == 4


@pytest.mark.slow
def test_channels_of_shortcuts_take_part_as_groups(script, tiny, untrained, tmp_path):
    script("train_sparsity.py", "--sparsity", "target", "--round-to", 1, "--shortcuts", "joint",
           "--only", "model.[2-9].*", "--data", tiny, "--weights", untrained, "--epochs", 2, "--noplots", *FAST,
           cwd=tmp_path)
    # Zeros only: --shortcuts is known from the training.
    done = script("prune.py", "--percent", 0.2, "--batch-size", 4, cwd=tmp_path)
    assert "threshold |gamma| 0\n" in done.stdout
    # The figures are over the channels that may go, shortcuts' included: of all of them the target made a share zero.
    zero = float(done.stdout.split("% of the prunable gammas are exactly 0")[0].split()[-1]) / 100
    layers = json.loads((tmp_path / "runs/prune/exp/report.json").read_text())["layers"]
    trained = sum(r["original"] for r in layers if r["layer"].split(".")[1] in [*"23456789"])
    assert zero == pytest.approx(0.5 * trained / sum(r["original"] for r in layers), abs=0.002)
    left = {r["layer"]: (r["original"], r["remaining"]) for r in layers}
    coupled = [left[f"model.6.{n}.bn"] for n in ("cv1", "m.0.cv2", "m.1.cv2", "m.2.cv2")]
    assert len(set(coupled)) == 1 and coupled[0][0] > coupled[0][1] and left["model.0.bn"][0] == left["model.0.bn"][1]
    done = script("train_sparsity.py", "--sparsity", "l1", "--target-sparsity", 0.5, cwd=tmp_path, code=2)
    assert "leave one of the two out" in done.stderr


@pytest.mark.slow
def test_without_validation_nothing_stops_early(tiny, untrained, tmp_path):
    opt = training_parser("").parse_args(list(map(str, [
        "--data", tiny, "--weights", untrained, "--epochs", 3, "--noval", "--noplots", "--project", tmp_path, *FAST])))
    train(Namespace(**{**vars(start_options(opt)), "patience": 1, "script": "train.py"}))
    assert len(rows(tmp_path / "exp/results.csv")) == 3


@pytest.mark.slow
def test_further_training_flags(script, tiny, untrained, tmp_path):
    flags = ["--multi-scale", "--image-weights", "--cos-lr", "--freeze", 2, "--cache", "--single-cls", "--noplots"]
    script("train.py", "--data", tiny, "--weights", untrained, "--epochs", 2, *flags, *FAST, cwd=tmp_path)
    frozen = checkpoint.load(tmp_path / "runs/train/exp/weights/last.pt")
    before = checkpoint.load(untrained)
    assert torch.equal(frozen.model[0].conv.weight, before.model[0].conv.weight) and frozen.names == {0: "object"}
    script("val.py", "--weights", untrained, "--data", tiny, "--single-cls", "--augment", "--noplots", *FAST,
           cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs/val/exp/metrics.json").read_text())
    assert set(metrics["per_class"]) == {"object"}
    done = script("train.py", "--data", tiny, "--weights", untrained, "--sync-bn", *FAST, cwd=tmp_path, code=2)
    assert "--sync-bn" in done.stderr


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, cfg) -> Path:
    path = tmp_path_factory.mktemp("weights") / "untrained.pt"
    model = randomised(Model(str(cfg), nc=2, names={0: "square", 1: "circle"}))
    checkpoint.save(path, model.eval(), imgsz=64)
    return path


@pytest.mark.slow
def test_a_fused_model_is_validated_but_not_trained_or_cut(script, tiny, untrained, tmp_path):
    checkpoint.save(tmp_path / "fused.pt", fused(checkpoint.load(untrained)), imgsz=64)
    common = ["--weights", "fused.pt", "--data", tiny, *FAST]
    script("val.py", *common, "--noplots", cwd=tmp_path)
    for name in ("train.py", "train_sparsity.py", "finetune_pruned.py", "prune.py"):
        done = script(name, *common, cwd=tmp_path, code=2)
        assert "from before fusing" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_prune_to_targets_and_by_rules(script, tiny, untrained, tmp_path):
    common = ["prune.py", "--weights", untrained, "--data", tiny, *FAST]
    script(*common, "--target", "flops=0.6", "--shortcuts", "joint", "--round-to", 4, "--keep", "model.0.*", "--noval",
           cwd=tmp_path)
    report = json.loads((tmp_path / "runs/prune/exp/report.json").read_text())
    flops = next(c for c in report["cost"] if c["figure"] == "GFLOPs")
    assert 0.5 < flops["left"] <= 0.6 and report["requested"] == {"flops": 0.6} and report["difference"] < 1e-9
    left = {r["layer"]: (r["original"], r["remaining"]) for r in report["layers"]}
    assert len(set(left["model.0.bn"])) == 1 and all(b == a or b % 4 == 0 for a, b in left.values())
    done = script(*common, "--target", "map-drop=0.5", cwd=tmp_path)
    assert "mAP50-95 falls by" in done.stdout
    done = script(*common, "--percent", 0.3, "--score", "taylor", "--reconstruct", cwd=tmp_path)
    report = json.loads((tmp_path / "runs/prune/exp3/report.json").read_text())
    assert [s["stage"] for s in report["stages"]] == ["before", "masked", "slim", "reconstructed"]
    assert report["difference"] < 1e-9 and not checkpoint.read(tmp_path / "pruned_model.pt")["gradual"]


@pytest.mark.slow
def test_sweep_shows_and_writes_no_model(script, tiny, untrained, tmp_path):
    done = script("prune.py", "--weights", untrained, "--data", tiny, "--sweep", "0.2:0.6:0.2", *FAST, cwd=tmp_path)
    table = rows(tmp_path / "runs/prune/exp/sweep.csv")
    assert [float(r["percent"]) for r in table] == [0, 0.2, 0.4, 0.6] and "<- knee" in done.stdout
    assert float(table[-1]["parameters"]) < 0.7 * float(table[0]["parameters"])
    assert (tmp_path / "runs/prune/exp/sweep.png").is_file() and not list(tmp_path.rglob("*.pt"))
    script("prune.py", "--weights", untrained, "--data", tiny, "--sensitivity", "--shortcuts", "joint",
           "--percent", 0.6, *FAST, cwd=tmp_path)
    table = rows(tmp_path / "runs/prune/exp2/sensitivity.csv")
    # 57 BatchNorms, 11 of which carry the channels of 4 shortcuts; and the whole model.
    assert table[0]["layer"] == "(none)" and len(table) == 1 + 57 - 11 + 4
    assert "model.2.m.0.cv2.bn" not in {r["layer"] for r in table}
    assert all(float(r["GFLOPs"]) < float(table[0]["GFLOPs"]) for r in table[1:]) and not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_a_strict_cut_stays_below_the_limit(script, tiny, untrained, tmp_path):
    done = script("prune.py", "--weights", untrained, "--data", tiny, "--percent", 0.95, "--strict", *FAST,
                  cwd=tmp_path, code=2)
    assert "--strict: 0.950 of" in done.stderr and done.stderr.count("\n") == 1 and not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_official_weights_start_a_run_and_are_pruned(script, tiny, assets, tmp_path):
    script("train_sparsity.py", "--data", tiny, "--weights", assets / "yolov5n.pt", "--epochs", 1, "--noplots",
           "--amp", "bf16", *FAST, cwd=tmp_path)
    script("prune.py", "--percent", 0.3, "--cfg", "models/yolov5n.yaml", "--noval", cwd=tmp_path)
    done = script("prune.py", "--cfg", "models/yolov5s.yaml", "--noval", cwd=tmp_path, code=2)
    assert "width_multiple" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_official_weights_give_stocks_figures_on_coco128(script, assets, tmp_path):
    data = tmp_path / "coco128.yaml"
    text = (Path(__file__).parents[1] / "data/coco128.yaml").read_text()
    data.write_text(text.replace("path: ../datasets/coco128", f"path: {assets / 'coco128'}"))
    script("val.py", "--weights", assets / "yolov5n.pt", "--data", data, "--imgsz", 640, "--batch-size", 16,
           "--save-json", "--noplots", cwd=tmp_path)
    found = json.loads((tmp_path / "runs/val/exp/metrics.json").read_text())
    stock = {"precision": 0.586, "recall": 0.508, "mAP_0.5": 0.568, "mAP_0.5:0.95": 0.365}
    assert {k: found[f"metrics/{k}"] for k in stock} == pytest.approx(stock, abs=0.003)
    assert found["pycocotools"]["mAP_0.5:0.95"] == pytest.approx(found["metrics/mAP_0.5:0.95"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.py", "train_sparsity.py", "prune.py", "finetune_pruned.py", "slim.py",
                                  "val.py"])
def test_help_explains_every_flag(script, tmp_path, name):
    out = script(name, "--help", cwd=tmp_path).stdout
    assert "--weights" in out and "--imgsz" in out
