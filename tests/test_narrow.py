"""Going on with a slimmer model in the middle of a run: what the run computes does not change."""
from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import finetune_pruned
import prune
import train
from models import checkpoint
from models.yolo import Model
from tests import crash
from tests.blocks import random_masks, randomised
from training.narrow import narrow_optimizer
from training.optimizer import ModelEMA, build_optimizer
from utils.slimming import masked, slim, trace


def step(model, optimizer, images) -> None:
    """One step, in which channels that are 0 stay 0."""
    optimizer.zero_grad()
    sum(y.square().mean() for y in model(images)).backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("coupled", [False, True], ids=["uncoupled", "coupled"])
def test_the_next_step_is_that_of_the_masked_run(cfg, name, coupled):
    """In float64, to rounding, on what is left: weights, momentum, average."""
    torch.manual_seed(0)
    wide = randomised(Model(str(cfg), nc=2)).double().train()
    graph = trace(wide)
    masks = random_masks(graph, 0, coupled)
    wide = masked(wide, masks)
    optimizer = build_optimizer(wide, name, 0.01, 0.9, 0.001)
    batches = torch.rand(4, 2, 3, 64, 64, dtype=torch.float64)
    for images in batches[:3]:
        step(wide, optimizer, images)
        with torch.no_grad():  # as the sparsity hook does
            for norm, mask in masks.items():
                wide.get_submodule(norm).weight[~mask] = 0
                wide.get_submodule(norm).bias[~mask] = 0
    average = ModelEMA(wide)
    average.update()
    narrow = slim(wide, masks, graph)
    other = build_optimizer(wide, name, 0.01, 0.9, 0.001)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    narrow_optimizer(other, wide, narrow, masks, graph)
    average.attach(narrow, slim(average.ema, masks, graph))
    step(narrow, other, batches[3])
    step(wide, optimizer, batches[3])
    expected = slim(masked(wide, masks), masks, graph).state_dict()
    for key, value in narrow.state_dict().items():
        assert torch.allclose(value, expected[key], rtol=1e-9, atol=1e-12), key
    average.update()
    assert all(a.shape == b.shape for a, b in zip(average.ema.state_dict().values(), narrow.state_dict().values()))
    assert {p.shape for p in narrow.parameters()} == {p.shape for g in other.param_groups for p in g["params"]}


def flags(tiny: Path, *more: object) -> list[str]:
    return ["--data", str(tiny), "--imgsz", "64", "--batch-size", "4", "--workers", "0", "--device", "cpu",
            "--noplots", *map(str, more)]


@pytest.fixture(scope="module")
def cut(tiny, teacher, tmp_path_factory) -> Path:
    """A folder with pruned_model.pt, which has lost channels that the model uses, and a whole branch."""
    folder = tmp_path_factory.mktemp("cut")
    model = checkpoint.load(teacher)
    with torch.no_grad():
        model.get_parameter("model.6.m.1.cv2.bn.weight").mul_(1e-4)
    checkpoint.save(folder / "wide.pt", model, imgsz=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prune.main(["--weights", "wide.pt", "--data", str(tiny), "--noval", "--workers", "0", "--percent", "0.4",
                    "--score", "gamma", "--layers"])
    assert isinstance(checkpoint.load(folder / "pruned_model.pt").model[6].m[1], nn.Identity)
    return folder


@pytest.mark.slow
def test_a_gradual_cut_ends_in_the_shape_that_was_cut(tiny, cut, monkeypatch, capsys):
    monkeypatch.chdir(cut)
    run = finetune_pruned.main(flags(tiny, "--epochs", 6, "--name", "gradual"))
    words = capsys.readouterr().out
    assert "its channels go in the first third of the run" in words and words.count("slim from here on") == 1
    wanted = checkpoint.read("pruned_model.pt")
    for name in ("best.pt", "last.pt"):
        found = checkpoint.read(run.folder / "weights" / name)
        assert {k: v.shape for k, v in found["state_dict"].items()} == {
            k: v.shape for k, v in wanted["state_dict"].items()}
        assert all(mask.equal(found["masks"][key]) for key, mask in wanted["masks"].items())
    assert run.stopper.best_epoch > 0
    finetune_pruned.main(flags(tiny, "--epochs", 1, "--no-gradual", "--teacher", "none"))
    assert "starting from" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1])
def test_a_killed_gradual_cut_ends_bit_identical(tiny, cut, tmp_path, epoch):
    mine = flags(tiny, "--weights", cut / "pruned_model.pt", "--epochs", 6, "--nbs", 4)
    crash.finish("finetune_pruned.py", mine, tmp_path / "whole")
    assert crash.kill("finetune_pruned.py", mine, tmp_path / "killed", crash.when_logged(f"    {epoch}/6 "))
    crash.finish("finetune_pruned.py", crash.going_on(mine, tmp_path / "killed"), tmp_path / "killed")
    assert crash.differences(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 23])
def test_frozen_layers_are_cut_at_once(tiny, cut, monkeypatch, capsys, layers):
    """A frozen gamma can't shrink: channels that the model used were cut out, or the run ended in a traceback."""
    monkeypatch.chdir(cut)
    finetune_pruned.main(flags(tiny, "--epochs", 2, "--freeze", layers, "--noval"))
    said = capsys.readouterr().out
    assert "can't go step by step; starting with the slim model" in said and "slim from here on" not in said


@pytest.mark.slow
def test_a_repair_is_where_fine_tuning_starts(tiny, teacher, tmp_path, monkeypatch):
    """A start from the model before, to take the channels again, would undo what --absorb and --recalibrate did."""
    monkeypatch.chdir(tmp_path)
    common = ["--weights", str(teacher), "--data", str(tiny), "--noval", "--workers", "0", "--percent", "0.4"]
    gradual = {flag: checkpoint.read(prune.main([*common, *flag.split()]) / "pruned_model.pt")["gradual"]
               for flag in ("", "--absorb", "--recalibrate 8")}
    assert gradual == {"": True, "--absorb": False, "--recalibrate 8": False}


@pytest.mark.slow
def test_a_parent_of_another_architecture_is_not_cut_again(tiny, cut, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "wide.pt", Model("yolov5n.yaml", nc=2, names={0: "square", 1: "circle"}))
    data = checkpoint.read(cut / "pruned_model.pt")
    torch.save({**data, "parent": str(tmp_path / "wide.pt")}, "pruned_model.pt")
    finetune_pruned.main(flags(tiny, "--epochs", 1, "--noval"))
    assert "is no longer the model that was cut; starting with the slim one" in capsys.readouterr().out


@pytest.mark.slow
def test_fine_tuning_goes_on_with_the_data_that_prune_was_given(tiny, cfg, tmp_path, monkeypatch):
    """Weights from elsewhere know no data: finetune_pruned.py took the built-in set, of other classes."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "stock.pt", Model(str(cfg), nc=2, names={0: "square", 1: "circle"}))
    prune.main(["--weights", "stock.pt", "--data", str(tiny), "--imgsz", "64", "--noval", "--workers", "0"])
    run = finetune_pruned.main(["--epochs", "1", "--noval", "--noplots", "--workers", "0", "--device", "cpu"])
    assert (run.opt.data, run.opt.imgsz) == (str(tiny), 64)


@pytest.mark.slow
def test_a_parent_that_has_changed_is_not_cut_again(tiny, cfg, cut, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = checkpoint.read(cut / "pruned_model.pt")
    other = train.main(flags(tiny, "--weights", data["parent"], "--epochs", 1, "--noval")).folder / "weights/last.pt"
    torch.save({**data, "parent": str(other.resolve())}, "pruned_model.pt")
    finetune_pruned.main(flags(tiny, "--epochs", 1, "--noval"))
    assert "is no longer the model that was cut; starting with the slim one" in capsys.readouterr().out
