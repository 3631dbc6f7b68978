"""The recipe rule: what of the settings a model that was trained here keeps, and what holds for others."""
from __future__ import annotations

import importlib
import itertools
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import slim
from models import checkpoint
from models.formats.yolov5 import to_yolov5
from models.yolo import Model
from tests.blocks import random_masks, randomised
from training import start
from training.distributed import World
from training.settings import read_hyp
from utils.errors import UserError
from utils.options import training_parser
from utils.slimming import slim as cut
from utils.slimming import trace

EARLIER = {"imgsz": 96, "optimizer": "AdamW", "hyp": {"lr0": 0.002}}


class _Resolved(Exception):
    """Carries the settings of a script out of it."""


def settled(name: str, *flags: object) -> Namespace:
    """What a script's resolve() makes of its flags."""
    module = {"train": start, "train_sparsity": start}.get(name) or importlib.import_module(name)
    true_resolve = module.resolve

    def stop(*args):
        raise _Resolved(true_resolve(*args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "resolve", stop)
        with pytest.raises(_Resolved) as found:
            importlib.import_module(name).main(list(map(str, flags)))
    return found.value.args[0]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mine(tiny, cfg, here) -> str:
    """Weights that were trained here, on other settings than YOLOv5's."""
    model = randomised(Model(str(cfg), nc=2, names={0: "square", 1: "circle"}))
    checkpoint.save(here / "mine.pt", model.eval(), imgsz=96, opt={"data": str(tiny), **EARLIER})
    return "mine.pt"


@pytest.mark.slow
@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("name", ["train", "train_sparsity", "finetune_pruned", "slim", "val", "prune", "benchmarks"])
def test_a_model_that_was_trained_here_keeps_its_recipe(name, data, mine, tiny, capsys):
    """With --data the trainings went back to 640 px and SGD, at whose rates such a model is lost."""
    flags = ["--weights", mine, *(["--data", tiny] if data else [])]
    opt = settled(name, *flags)
    assert (opt.data, opt.imgsz, getattr(opt, "optimizer", "AdamW")) == (str(tiny), 96, "AdamW")
    assert getattr(opt, "hyp", {"lr0": 0.002})["lr0"] == 0.002
    said = capsys.readouterr().out
    taken = ([] if data else [f"--data {tiny}"]) + ["--imgsz 96"]
    taken += ["--optimizer AdamW", "--hyp (lr0 0.002, ...)"] if hasattr(opt, "hyp") else []
    assert said.count(f"from {mine}: {', '.join(taken)}\n") == 1 and "by default" not in said
    assert settled(name, *flags, "--imgsz", 64).imgsz == 64 and "--imgsz" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flags, optimizer, lr0", [
    ([], "AdamW", 0.002), (["--adam"], "AdamW", 0.002), (["--optimizer", "AdamW"], "AdamW", 0.002),
    (["--optimizer", "SGD"], "SGD", 0.01), (["--optimizer", "Adam"], "Adam", 0.001),
    (["--hyp", "hyp.VOC.yaml"], "AdamW", 0.00334), (["--hyp", "hyp.VOC.yaml", "--optimizer", "SGD"], "SGD", 0.00334)])
@pytest.mark.parametrize("name", ["train", "finetune_pruned", "slim"])
def test_a_flag_beats_the_recipe_and_rates_go_with_their_optimizer(name, mine, tiny, flags, optimizer, lr0):
    opt = settled(name, "--weights", mine, "--data", tiny, *flags)
    assert (opt.imgsz, opt.optimizer, opt.hyp["lr0"]) == (96, optimizer, lr0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "train_sparsity", "slim"])
def test_weights_of_others_start_with_yolov5s_defaults(name, tiny, cfg, here, capsys):
    model = Model(str(cfg), nc=2, names={0: "square", 1: "circle"})
    torch.save({"model": to_yolov5(model), "opt": {"imgsz": 96, "optimizer": "AdamW"}}, here / "foreign.pt")
    checkpoint.save(here / "bare.pt", model)
    for file in ("foreign.pt", "bare.pt", "yolov5n.pt" if name == "train" else "foreign.pt"):
        opt = settled(name, "--weights", file, "--data", tiny)
        assert (opt.imgsz, opt.optimizer, opt.hyp["lr0"]) == (640, "SGD", 0.01)
        assert capsys.readouterr().out == (
            "by default: --imgsz 640, --optimizer SGD, --hyp data/hyps/hyp.scratch-low.yaml\n")
    opt = settled(name, "--weights", "foreign.pt")
    said = capsys.readouterr().out
    assert opt.imgsz == 160 and "from shapes.yaml: --imgsz 160, --optimizer AdamW\n" in said
    assert "by default: --data data/shapes.yaml, --hyp data/hyps/hyp.adamw.yaml" in said


def test_the_recipe_of_weights_that_the_data_yaml_names(mine, tiny, here):
    text = tiny.read_text().replace("path: .", f"path: '{tiny.parent}'")
    (here / "my.yaml").write_text(f"{text}defaults: {{weights: mine.pt, imgsz: 320, optimizer: Adam}}\n")
    opt = settled("train", "--data", "my.yaml")
    assert (opt.weights, opt.imgsz, opt.optimizer) == (str(here / mine), 96, "AdamW")
    opt = settled("train", "--data", "my.yaml", "--weights", "", "--cfg", "yolov5n.yaml")
    assert (opt.imgsz, opt.optimizer) == (320, "Adam")


@pytest.mark.slow
def test_slim_weights_start_other_classes_in_their_own_shape(cfg, here):
    """As docs/faq.md says: the head's last layers begin anew, nothing else does."""
    dense = randomised(Model(str(cfg), nc=3))
    narrow = cut(dense, random_masks(trace(dense), 6, coupled=False)).eval()
    checkpoint.save("slim.pt", narrow, imgsz=64)
    model = start.start_model(Namespace(weights="slim.pt", cfg=""), {0: "only"}, {}, World(1, 2, torch.device("cpu")))
    old, new = narrow.state_dict(), model.state_dict()
    assert model.masks.keys() == narrow.masks.keys() and model.names == {0: "only"} and old.keys() == new.keys()
    assert {key.rpartition(".")[0] for key in old if not old[key].equal(new[key])} == {
        f"model.24.m.{level}" for level in range(3)}


@pytest.mark.slow
def test_one_class_stays_one_unless_a_flag_says_otherwise(tiny, cfg, here):
    model = Model(str(cfg), nc=1, names={0: "object"})
    checkpoint.save(here / "one.pt", model, imgsz=96, opt={"data": str(tiny), **EARLIER, "single_cls": True})
    for flags in ([], ["--data", tiny]):
        for name in ("train", "val", "slim"):
            assert settled(name, "--weights", "one.pt", *flags).single_cls is True
        assert settled("train", "--weights", "one.pt", *flags, "--no-single-cls").single_cls is False
    pipeline = slim.begin(slim.pipeline_parser().parse_args([
        "--weights", "one.pt", "--no-single-cls", "--epochs", "9", "--batch-size", "4", "--workers", "0"]))
    settings = pipeline.settings
    assert not settings.trained and "--no-single-cls" in slim.stage_flags(pipeline, settings.stages[0], "")


@pytest.mark.slow
def test_slim_says_the_recipe_once_and_nothing_false(mine, tiny, capsys):
    pipeline = slim.begin(slim.pipeline_parser().parse_args(["--weights", mine, "--data", str(tiny), "--workers", "0"]))
    said = capsys.readouterr().out
    assert said == f"from {mine}: --imgsz 96, --optimizer AdamW, --hyp (lr0 0.002, ...)\n"
    assert pipeline.settings.trained and pipeline.settings.training == {}
    opt = settled("train_sparsity", *slim.stage_flags(pipeline, pipeline.settings.stages[0], mine))
    assert (opt.imgsz, opt.optimizer, opt.hyp["lr0"]) == (96, "AdamW", 0.002)


@pytest.mark.parametrize("key, value", [
    *itertools.product(("weights", "cfg", "imgsz", "epochs", "batch_size", "nbs", "optimizer", "cache", "hyp"),
                       ("0", "true", "1.5", ".nan", "[]", "[1]", "{a: 1}", "null", "2020-01-01", "9999999999999")),
    ("cache", "always"), ("optimizer", "sgd"), ("1", "2"), ("1", "2, a: 3"), ("null", "1"), ("project", "/tmp/x")])
def test_the_defaults_of_a_data_yaml_are_refused_in_one_line_whatever_they_are(key, value, tiny, here):
    text = tiny.read_text().replace("path: .", f"path: {tiny.parent}")
    (here / "my.yaml").write_text(f"{text}defaults: {{{key}: {value}}}\n")
    with pytest.raises(UserError, match="my.yaml: defaults") as refused:
        start.start_options(training_parser("").parse_args(["--data", "my.yaml", "--device", "cpu"]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name, total", [
    ("VOC", 13.40517), ("Objects365", 12.62716), ("no-augmentation", 11.9975), ("scratch-low", 15.6225),
    ("scratch-med", 15.7125), ("scratch-high", 15.8125)])
def test_the_hyps_of_yolov5_are_there_by_name(name, total):
    """total: of the numbers in YOLOv5's file, but for iou_t and anchors."""
    hyp = read_hyp(f"hyp.{name}.yaml")
    assert sum(hyp.values()) == pytest.approx(total, abs=1e-9)
    assert hyp == read_hyp(Path("data/hyps") / f"hyp.{name}.yaml") == read_hyp(name)
