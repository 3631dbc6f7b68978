"""Checkpoints: round trips, official files, refusals. Nothing a file says is ever executed."""
from __future__ import annotations

import os
import pickle
import resource
import sys
import types
import zipfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from models import checkpoint
from models.common import BLOCKS, BlockSpec
from models.yolo import Model, fused
from tests.blocks import randomised
from utils.errors import UserError
from utils.slimming import Masks, Pruner, slim
from utils.slimming.equivalence import largest_difference


def small() -> Model:
    return Model({**Model("yolov5n.yaml").yaml, "width_multiple": 0.125}, nc=2, names={0: "a", 1: "ü"})


def lowest(model: Model, percent: float) -> Masks:
    return Pruner(model, 64).rank().preview(percent)[0]


def test_slim_model_round_trip(tmp_path):
    model = small()
    masks = lowest(model, 0.5)
    narrow = slim(model, masks)
    checkpoint.save(tmp_path / "slim.pt", narrow, data="x.yaml", imgsz=64)
    again = checkpoint.load(tmp_path / "slim.pt")
    assert again.names == {0: "a", 1: "ü"} and not again.training
    assert again.state_dict().keys() == narrow.state_dict().keys()
    assert all(map(torch.equal, again.state_dict().values(), narrow.state_dict().values()))
    assert all(torch.equal(again.masks[k], masks[k]) for k in masks)
    assert torch.load(tmp_path / "slim.pt", weights_only=True)["data"] == "x.yaml"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["slim.pt"]


def test_ema_is_preferred(tmp_path):
    model, ema = small(), small()
    checkpoint.save(tmp_path / "x.pt", model, ema)
    loaded = checkpoint.load(tmp_path / "x.pt").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in ema.state_dict().items())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "x.pt", small())
    before = (tmp_path / "x.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(tmp_path / "x.pt", small())
    assert (tmp_path / "x.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


class _Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


class _Eval:
    def __reduce__(self):
        return eval, ("open('executed', 'w')",)


@pytest.mark.parametrize("content", [_Evil(), {"model": _Eval()}, {"model": [1, {"x": _Evil()}]}])
def test_hostile_files_are_refused_and_not_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "evil.pt")
    with pytest.raises(UserError, match="refused, it names"):
        checkpoint.load("evil.pt")
    assert not Path("executed").exists()


def _write(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("hello")
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut":
        torch.save({"x": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:1500])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a", "b")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "newer":
        torch.save({"format": "yolov5-slimming/99"}, path)


@pytest.mark.parametrize("kind", ["missing", "text", "folder", "cut", "zip", "pickle", "tensor", "newer"])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "x.pt"
    _write(path, kind)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def _official(module: str, name: str) -> nn.Module:
    """A module whose pickle names a class as official files do."""
    cls = type(name, (nn.Module,), {"__module__": module, "__qualname__": name})
    sys.modules.setdefault(module, types.ModuleType(module))
    setattr(sys.modules[module], name, cls)
    return cls()


@pytest.mark.parametrize("name, task", [
    ("SegmentationModel", "segmentation"), ("ClassificationModel", "classification")])
def test_other_tasks_are_refused_by_name(tmp_path, monkeypatch, name, task):
    import models.yolo

    whole = _official("models.yolo", name)
    torch.save({"model": whole}, tmp_path / "x.pt")
    monkeypatch.delattr(models.yolo, name)
    with pytest.raises(UserError, match=f"a {task} checkpoint"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_fused_file_is_good_for_inference(tmp_path):
    model = small()
    checkpoint.save(tmp_path / "fused.pt", fused(model))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(checkpoint.load(tmp_path / "fused.pt")(x)[0], model.eval()(x)[0], rtol=1e-4, atol=1e-3)


def test_what_a_model_is_survives_the_cut_and_the_file(tmp_path):
    """Anchors, names, strides, BatchNorm's settings, activation, hyper-parameters; masks over the first channels."""
    anchors = [[5, 7, 9, 11, 13, 17], [20, 30, 40, 50, 60, 70], [80, 90, 100, 120, 140, 160]]
    cfg = {**Model("yolov5n.yaml").yaml, "activation": "nn.LeakyReLU(0.2)"}
    first = Model(cfg, nc=2, anchors=anchors, names={0: "a b", 1: "ü"})
    model = randomised(first)
    for round_ in range(3):
        path = tmp_path / f"{round_}.pt"
        checkpoint.save(path, slim(model, lowest(model, 0.3)), hyp={"lr0": 0.02}, imgsz=96, data="x.yaml")
        model = checkpoint.load(path)
    data = checkpoint.read(tmp_path / "2.pt")
    assert data["hyp"] == {"lr0": 0.02} and (data["imgsz"], data["data"]) == (96, "x.yaml")
    assert model.names == {0: "a b", 1: "ü"}
    assert torch.equal(model.detect.anchors, first.detect.anchors) and torch.equal(model.stride, first.stride)
    norms, before = ([m for m in n.modules() if isinstance(m, nn.BatchNorm2d)] for n in (model, first))
    assert {(m.eps, m.momentum) for m in norms} == {(m.eps, m.momentum) for m in before}
    slopes = {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.2}
    assert all(len(m) == dict(first.named_modules())[n].num_features for n, m in model.masks.items())
    assert sum(int(m.sum()) for m in model.masks.values()) == sum(m.num_features for m in norms)
    assert largest_difference(slim(first, model.masks), model) < 1e-6  # the file holds fp32, and the rounds compose


# The yaml in a file asks for what it likes ----------------------------------------------------------------------------

def _grown(work) -> float:
    """Megabytes by which the process's peak grew in a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _wide(path: Path, state: dict) -> Path:
    """A file whose yaml describes hundreds of gigabytes."""
    yaml = {**small().yaml, "width_multiple": 99.0}
    torch.save({"format": checkpoint.FORMAT, "yaml": yaml, "names": {0: "a", 1: "b"}, "masks": {}, "state_dict": state,
                "ema": None}, path)
    return path


def test_a_width_of_99_allocates_nothing(tmp_path):
    model = randomised(small()).eval()
    path = _wide(tmp_path / "x.pt", model.state_dict())
    found: list[Model] = []
    assert _grown(lambda: found.append(checkpoint.load(path))) < 200
    assert all(map(torch.equal, found[0].state_dict().values(), model.state_dict().values()))  # a very slim model
    assert torch.equal(found[0].stride, model.stride)


@pytest.mark.parametrize("kind", ["one number", "one of them", "none"])
def test_a_shape_without_its_numbers_is_refused(tmp_path, kind):
    with torch.device("meta"):
        huge = Model({**small().yaml, "width_multiple": 99.0}).state_dict()
    expanded = {name: torch.tensor(1.0).expand(value.shape) for name, value in huge.items()}
    first = "model.0.conv.weight"
    state = {"one number": expanded, "none": huge,
             "one of them": {**small().state_dict(), first: expanded[first]}}[kind]
    path = _wide(tmp_path / "x.pt", state)

    def load() -> None:
        with pytest.raises(UserError, match=r"x\.pt: .*fewer numbers than its shape"):
            checkpoint.load(path)

    assert _grown(load) < 200


def test_loading_keeps_one_copy_of_the_weights_and_draws_no_random_number(tmp_path):
    checkpoint.save(tmp_path / "x.pt", small())
    state = torch.get_rng_state()
    data = checkpoint.read(tmp_path / "x.pt")
    model = checkpoint.build(data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():  # what was read stays as it was
        model.model[0].conv.weight.zero_()
    assert data["state_dict"]["model.0.conv.weight"].any()


class _Table(nn.Module):
    """Keeps values that its file does not hold."""

    def __init__(self, c1: int):
        super().__init__()
        self.register_buffer("table", torch.linspace(1, 2, c1).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.table


class _Computed(nn.Module):
    """Computes with tensors while it is built."""

    def __init__(self, c1: int):
        super().__init__()
        self.factor = torch.linspace(0, 1, 3)[1].item()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.mark.parametrize("cls", [_Table, _Computed])
def test_a_block_that_needs_values_has_them(tmp_path, monkeypatch, cls):
    monkeypatch.setitem(BLOCKS, "Own", BlockSpec(cls, "input", False))
    cfg = deepcopy(small().yaml)
    cfg["backbone"][9] = [-1, 1, "Own", []]
    model = randomised(Model(cfg, nc=2)).eval()
    checkpoint.save(tmp_path / "x.pt", model)
    again, x = checkpoint.load(tmp_path / "x.pt"), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x)[0], model(x)[0])
