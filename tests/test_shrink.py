"""--shrink: the zeros are cut in the run, which computes and chooses what it would have without the cut."""
from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import prune
import train_sparsity
from models import checkpoint
from models.config import MODEL_FOLDER, read_yaml
from models.yolo import Model
from tests import crash
from tests.blocks import NETWORKS, Net, randomised
from tests.test_commands import rows
from train import optimizer_step
from train_sparsity import SparsityHook
from training.distributed import World
from training.optimizer import ModelEMA, build_optimizer
from training.run import Run, Step
from utils.slimming import slim
from utils.slimming.target_sparsity import TargetSparsity

STEPS = 8


def prepared(model: nn.Module, optimizer: str, **flags: object) -> tuple[Run, SparsityHook]:
    """A run of STEPS steps, in float64, of which the hook takes half of the channels."""
    if not isinstance(model, Model):  # what a Run asks of a detector
        model.masks, model.detect, model.yaml, model.divisor = {}, None, {"ch": 3}, 32
    model = model.double().train()
    known = {"sr": 0.0, "sr_bias": None, "epochs": 1, "target_sparsity": 0.5, "target": None,
             "percent": 0.5, "round_to": 1, "per_flop": True, "shortcuts": "joint", "layers": False, "keep": [],
             "only": [], "shrink": True}
    hook = SparsityHook()
    run = Run(Namespace(**{**known, **flags}), 64, 1, World(0, 1, torch.device("cpu")), Path(), None, model, model,
              build_optimizer(model, optimizer, 0.01, 0.9, 0.001), torch.amp.GradScaler("cpu", enabled=False), None,
              ModelEMA(model), Namespace(detect=None), range(STEPS), None, [hook], None, None)
    hook.start(run)
    return run, hook


def go(run: Run, step: int, images: torch.Tensor) -> None:
    """One step of train.py's loop, with a loss that knows no detector."""
    run.iteration = step
    outputs = run.model(images)
    loss = sum(y.square().mean() for y in ([outputs] if torch.is_tensor(outputs) else outputs))
    loss = loss / 100  # below the norm to which gradients are clipped, which counts those of channels that are 0, too
    loss.backward()
    optimizer_step(run, Step(1, 1, loss.detach().view(1)), torch.zeros(3))


def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """All of them, of a model in evaluation mode, as one row; the model stays in its mode."""
    training = model.training
    with torch.no_grad():
        found = model.eval()(images)
    model.train(training)
    tensors = [found] if torch.is_tensor(found) else [found[0], *found[1]]
    return torch.cat([tensor.flatten() for tensor in tensors])


def narrow_models() -> dict[str, dict]:
    """Models of the repository at an eighth of the width, a few layers deep."""
    files = {path.stem: path for path in (*MODEL_FOLDER.glob("*.yaml"), *(MODEL_FOLDER / "hub").glob("*.yaml"))}
    names = ("yolov5n", "yolov3-tiny", "yolov5s-ghost", "yolov5-bifpn")
    return {name: read_yaml(files[name]) | {"width_multiple": 0.125, "depth_multiple": 0.1} for name in names}


def check(first: nn.Module, optimizer: str, monkeypatch: pytest.MonkeyPatch, weak: str = "",
          **flags: object) -> SparsityHook:
    """A run that cuts three times, against one that never does: outputs then, weights and average in later steps.

    weak: a BatchNorm that sends next to nothing. Returns the hook of the run that cuts.
    """
    monkeypatch.setattr(TargetSparsity, "SHRINK", 0.2)  # channels die in two or three steps
    monkeypatch.setattr(train_sparsity, "ENOUGH_NEW_ZEROS", 0.0)
    state = randomised(first).state_dict()
    for key in ("weight", "bias") if weak else ():
        state[f"{weak}.{key}"] *= 1e-3
    wide, hook = prepared(first, optimizer, **flags)
    other = type(first)(first.yaml, nc=2) if isinstance(first, Model) else Net(type(first.block)())
    other.load_state_dict(state)
    narrow, shrinking = prepared(other, optimizer, **flags)
    batches = torch.rand(STEPS, 2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cuts = 0
    for step, images in enumerate(batches):
        go(wide, step, images)
        go(narrow, step, images)
        assert hook.plan.target.dead.equal(shrinking.plan.target.dead)
        if cuts:  # the step after a cut, and those after it
            for mine, theirs in ((narrow.model, wide.model), (narrow.ema.ema, wide.ema.ema)):
                expected = slim(theirs, shrinking.remaining.masks, hook.plan.pruner.graph).state_dict()
                assert all(torch.allclose(value, expected[key], rtol=1e-9, atol=1e-10)
                           for key, value in mine.state_dict().items()), step
        if step in (4, 6, STEPS - 1):
            before, model = [outputs(m, images) for m in (narrow.model, narrow.ema.ema)], narrow.model
            shrinking.shrink()
            cuts += model is not narrow.model
            after = [outputs(m, images) for m in (narrow.model, narrow.ema.ema)]
            assert all((a - b).abs().max() <= 1e-9 * a.abs().max() for a, b in zip(before, after))
    assert shrinking.settled and hook.plan.target.settled
    gone = sum(int((~mask).sum()) for mask in shrinking.remaining.masks.values())
    assert cuts > 1 and gone == sum(int(flags.sum()) for flags in hook.plan.target.gone)
    for run, one in ((wide, hook), (narrow, shrinking)):
        one.plan.update_pruner(run.ema.ema, one.remaining)
    shown = shrinking.plan.shown
    assert all(torch.equal(shown[name].weight == 0, norm.weight == 0) for name, norm in hook.plan.shown.items())
    return shrinking


@pytest.mark.parametrize("name, optimizer", [
    ("SqueezeExcite", "SGD"), ("Separable", "AdamW"), ("C2f", "SGD"), ("WeightedAdd", "AdamW"), ("Grouped", "SGD"),
    ("Multiplied", "AdamW"), ("Cropped", "SGD"), ("Twice", "AdamW"), ("Bare", "SGD")])
def test_a_block_of_ones_own_shrinks_exactly(name, optimizer, monkeypatch):
    torch.manual_seed(0)
    check(Net(NETWORKS[name]()), optimizer, monkeypatch, target_sparsity=0.4)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_branches_go_exactly(optimizer, monkeypatch):
    """One of two branches, whose last BatchNorm sends next to nothing, and channels beside it."""
    torch.manual_seed(0)
    net = Net(NETWORKS["C2f"]())
    hook = check(net, optimizer, monkeypatch, "block.m.0.cv2.bn", target_sparsity=0.4, layers=True, shortcuts="skip")
    assert [name for name, mask in hook.remaining.masks.items() if not mask.any()] == [
        "block.m.0.cv1.bn", "block.m.0.cv2.bn"]
    assert isinstance(hook.run.model.block.m[0], nn.Identity)


@pytest.mark.slow
def test_synchronised_batch_norms_are_cut(cfg):
    run, hook = prepared(nn.SyncBatchNorm.convert_sync_batchnorm(randomised(Model(str(cfg), nc=2))), "SGD")
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert hook.plan.target is not None
    hook.plan.target.share = 0.3
    hook.plan.target.shrink(1.0)
    before = outputs(run.model, images)
    hook.shrink()
    assert hook.settled and isinstance(run.model.model[0].bn, nn.SyncBatchNorm) and run.model.masks
    assert torch.allclose(outputs(run.model, images), before, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name, optimizer, flags", [
    ("yolov5n", "SGD", {"shortcuts": "skip", "round_to": 4, "layers": True}),
    ("yolov5n", "AdamW", {"target_sparsity": None, "target": ("flops", 0.5), "round_to": None}),
    ("yolov5s-ghost", "AdamW", {})])
def test_a_model_shrinks_exactly(name, optimizer, flags, monkeypatch):
    torch.manual_seed(0)
    check(Model(narrow_models()[name], nc=2), optimizer, monkeypatch, **flags)


@pytest.fixture(scope="module")
def flags(tiny, cfg, teacher, tmp_path_factory) -> list[str]:
    """Six epochs of three batches; half of the FLOPs go, a branch that sends next to nothing first; with a teacher."""
    model = Model(str(cfg), nc=2, names=checkpoint.load(teacher).names)
    with torch.no_grad():
        for key in ("weight", "bias"):
            model.get_parameter(f"model.6.m.1.cv2.bn.{key}").mul_(1e-3)
    checkpoint.save(start := tmp_path_factory.mktemp("start") / "start.pt", model)
    return ["--data", str(tiny), "--weights", str(start), "--epochs", "6", "--imgsz", "64",
            "--batch-size", "4", "--nbs", "4", "--workers", "0", "--device", "cpu", "--noplots", "--adam",
            "--target", "flops=0.6", "--round-to", "2", "--shrink", "--layers", "--teacher", str(teacher)]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    crash.finish("train_sparsity.py", flags, folder)
    return folder


@pytest.mark.slow
def test_a_run_ends_slim_and_prune_cuts_nothing_more(whole, tmp_path, monkeypatch):
    folder = crash.last(whole).parents[1]
    log = (whole / "log.txt").read_text()
    assert "slim from here on" in log and "target flops=0.6 in blocks of 2" in log
    last, best = (checkpoint.read(folder / "weights" / name) for name in ("last.pt", "best.pt"))
    shapes = [{key: value.shape for key, value in data["state_dict"].items()} for data in (last, best)]
    assert not any(key.startswith("model.6.m.1.") for key in last["state_dict"])
    assert isinstance(checkpoint.build(last).model[6].m[1], nn.Identity)
    assert shapes[0] == shapes[1] and all(last["masks"][k].equal(v) for k, v in best["masks"].items())
    table = rows(folder / "results.csv")
    gammas = np.load(folder / "gammas.npy")  # of all channels that there were at the start
    trained = sum(len(v) for k, v in last["masks"].items())
    assert gammas.shape[0] == 6 and gammas.shape[1] <= trained
    assert (gammas[-1] == 0).mean() == pytest.approx(float(table[-1]["sparsity/zero"]), abs=1e-4)
    assert (np.diff((gammas == 0).sum(1)) >= 0).all() and (gammas[-1] == 0).any()
    wide = Model(last["yaml"])
    left = float(table[-1]["sparsity/gflops_left"])
    whole_cost = train_sparsity.profile(wide, 64).gflops
    assert 0.5 < left / whole_cost <= 0.6
    assert left == pytest.approx(train_sparsity.profile(checkpoint.build(last), 64).gflops, rel=1e-5)
    monkeypatch.chdir(tmp_path)
    cut = prune.main(["--weights", str(folder / "weights/last.pt"), "--workers", "0"])
    report = json.loads((cut / "report.json").read_text())
    assert report["achieved"] == 0 and [row["left"] for row in report["cost"][:3]] == [1, 1, 1]
    assert all(checkpoint.load("pruned_model.pt").masks[k].equal(v) for k, v in last["masks"].items())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["slim from here on"])
def test_killed_at_any_time_it_ends_bit_identical(flags, whole, tmp_path, when):
    assert crash.kill("train_sparsity.py", flags, tmp_path, crash.when_logged(when))
    crash.finish("train_sparsity.py", crash.going_on(flags, tmp_path), tmp_path)
    assert crash.differences(whole, tmp_path) == []
    arrays = [np.load(crash.last(folder).parents[1] / "gammas.npy") for folder in (whole, tmp_path)]
    assert np.array_equal(*arrays)


@pytest.mark.slow
def test_flags_that_contradict_each_other_are_refused(monkeypatch, tmp_path, tiny, cfg):
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(tiny), "--weights", "", "--cfg", str(cfg), "--epochs", "1", "--imgsz", "64"]
    for flags, words in ((["--layers"], "has no effect without --target-sparsity or --target"),
                         (["--layers", "--target", "flops=0.5", "--shortcuts", "joint"], "leave one of the two out"),
                         (["--shrink"], "has no effect without --target-sparsity or --target"),
                         (["--target", "flops=0.5", "--target-sparsity", "0.5"], "leave one of the two out"),
                         (["--target", "flops=0.01"], "of the flops can go; every layer keeps some; give more")):
        with pytest.raises(train_sparsity.UserError, match=words):
            train_sparsity.main([*common, *flags])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
