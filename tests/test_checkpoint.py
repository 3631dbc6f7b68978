"""Checkpoints: round trips, official files, refusals. Nothing a file says is ever executed."""
from __future__ import annotations

import os
import pickle
import resource
import sys
import types
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from models import checkpoint, formats
from models.common import BLOCKS, BlockSpec
from models.yolo import Model, fused
from tests.blocks import randomised
from training.resume import restore_optimizer
from utils.errors import NonFiniteError, UserError
from utils.slimming import Masks, Pruner, slim
from utils.slimming.equivalence import largest_difference


def small() -> Model:
    return Model({**Model("yolov5n.yaml").yaml, "width_multiple": 0.125}, nc=2, names={0: "a", 1: "ü"})


def lowest(model: Model, percent: float) -> Masks:
    return Pruner(model, 64).rank().preview(percent)[0]


@pytest.mark.slow
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


@pytest.mark.slow
def test_ema_is_preferred(tmp_path):
    model, ema = small(), small()
    checkpoint.save(tmp_path / "x.pt", model, ema)
    loaded = checkpoint.load(tmp_path / "x.pt").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in ema.state_dict().items())


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_fused_file_is_good_for_inference(tmp_path):
    model = small()
    checkpoint.save(tmp_path / "fused.pt", fused(model))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(checkpoint.load(tmp_path / "fused.pt")(x)[0], model.eval()(x)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
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


# Every entry has a form -----------------------------------------------------------------------------------------------

def put(key: str, value: object) -> Callable[[dict], None]:
    """Set a value at a path of keys."""
    def change(data: dict) -> None:
        *path, last = key.split("/")
        for part in path:
            data = data[part]
        data[last] = value

    return change


TRAINED = {"epoch": 1, "updates": 3, "optimizer": {"state": {}, "param_groups": [{"params": [0, 1]}]}, "scaler": {},
           "stopper": {"best": 0.5, "best_epoch": 0}, "rng": {"torch": torch.get_rng_state(), "cuda": []},
           "hooks": {"SparsityHook": {"history": [torch.ones(8)], "target": None, "done": False}}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict:
    model = small()
    masks = {"model.0.bn": torch.ones(len(model.model[0].bn.weight), dtype=torch.bool)}
    model.masks = masks
    path = tmp_path_factory.mktemp("saved") / "x.pt"
    checkpoint.save(path, model, small(), training=TRAINED, imgsz=64, hyp={"lr0": 0.1}, data="x.yaml", gradual=True,
                    opt={"data": "x.yaml", "imgsz": 64}, metrics={"difference": 0.0}, parent="y.pt",
                    sparsity={"round_to": 8, "shortcuts": "skip"}, shrunk={"before": masks, "done": True})
    return checkpoint.read(path)


@pytest.mark.slow
@pytest.mark.parametrize("key, value", [
    ("yaml", 5), ("names", ["a", "b"]), ("names", {0: "a"}), ("names", {0: "a", 1: 5}), ("names", {0: "a", 7: "b"}),
    ("names", {"0": "a", "1": "b"}), ("state_dict", {"a": 5}), ("ema", None), ("ema", 5), ("ema", {"a": "b"}),
    ("masks", {"model.0.bn": torch.ones(3, dtype=torch.bool)}), ("masks", {"model.0.bn": torch.ones(8)}),
    ("masks", {"x": torch.ones(8, dtype=torch.bool)}), ("masks/model.0.bn", torch.zeros(8, dtype=torch.bool)),
    ("opt", 5), ("opt", [("data", "x")]), ("opt/data", 5), ("opt/imgsz", "64"), ("opt/imgsz", 8), ("opt/imgsz", 6.4),
    ("opt/single_cls", "no"), ("opt/optimizer", "Lion"), ("opt/teacher", 5), ("opt/epochs", 10 ** 9),
    ("opt/round_to", 0), ("opt/shortcuts", "all"), ("opt/hyp", [1]), ("opt/hyp", {"lr0": "x"}), ("opt/freeze", 3),
    ("opt/x", torch.ones(1)), ("opt/target", ["x", 0.5]), ("imgsz", "x"), ("imgsz", 10 ** 9), ("imgsz", [64, 64]),
    ("hyp", {"lr0": float("nan")}), ("hyp", 5), ("data", 5), ("parent", ["x"]), ("gradual", "yes"), ("metrics", 3),
    ("metrics/difference", "x"), ("sparsity", None), ("sparsity/round_to", "x"), ("shrunk", 1), ("shrunk/before", 5),
    ("shrunk/before", {"x": torch.ones(8, dtype=torch.bool)}), ("to_cut", [1]), ("to_cut", {"a": torch.ones(8)}),
    ("to_cut", {"model.0.bn": torch.ones(3, dtype=torch.bool)}), ("training", 5), ("training", {"epoch": 1}),
    ("training/epoch", "x"), ("training/epoch", -1), ("training/optimizer", [1]), ("training/optimizer/state", 5),
    ("training/optimizer/param_groups", {}), ("training/rng", 5), ("training/rng/torch", torch.ones(5)),
    ("training/rng/cuda", 5), ("training/scaler", {"scale": "x"}), ("training/stopper", 5), ("training/mean", 3),
    ("training/hooks", 5), ("training/hooks/SparsityHook", 5), ("training/hooks/SparsityHook/history", [1]),
    ("training/hooks/SparsityHook/target", {"score": 5}), ("x", 10 ** 100), ("x", {1, 2}), ("x", b"x")])
def test_an_entry_of_another_kind_is_named(saved, tmp_path, key, value):
    data = deepcopy(saved)
    put(key, value)(data)
    torch.save(data, tmp_path / "x.pt")
    with pytest.raises(UserError) as caught:
        checkpoint.read(tmp_path / "x.pt")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'x.pt'}: damaged: '") and key.split("/")[0] in said and "\n" not in said


@pytest.mark.parametrize("inner", ["itself", "deep", "wide"])
def test_nested_entries_come_to_an_end(saved, tmp_path, inner):
    value: list = []
    for _ in range({"itself": 0, "deep": 400, "wide": 40}[inner]):
        value = [value] * (8 if inner == "wide" else 1)
    if inner == "itself":
        value.append(value)
    torch.save({**saved, "opt": {"x": value}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"'opt\.x' is nested"):
        checkpoint.read(tmp_path / "x.pt")


def first_of(name: str, value: float) -> Callable[[dict], None]:
    return lambda state: state[name].view(-1)[:1].fill_(value)


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [
    ("model.3.conv.weight", float("nan")), ("model.0.bn.running_mean", float("inf")),
    ("model.0.bn.running_var", -float("inf")), ("model.24.m.0.bias", float("inf")),
    ("model.24.anchors", float("nan"))])
def test_weights_that_are_not_finite_are_refused_with_their_name(tmp_path, name, value):
    checkpoint.save(tmp_path / "x.pt", model := small())
    first_of(name, value)(state := model.state_dict())
    checkpoint.save(tmp_path / "x.pt", model)
    for use in (checkpoint.load, lambda path: formats.load(path, torch.device("cpu")),
                lambda path: checkpoint.load_fitting(small(), path)):
        with pytest.raises((NonFiniteError, UserError), match=rf"x\.pt: .*{name}"):
            use(tmp_path / "x.pt")
    first_of(name, 1e30)(state)  # its square is infinite, it is not
    checkpoint.save(tmp_path / "x.pt", model)
    assert checkpoint.load(tmp_path / "x.pt").state_dict()[name].max() == torch.tensor(1e30)


@pytest.mark.slow
@pytest.mark.parametrize("change, words", [
    (lambda s: s.update({"model.3.conv.weight": s["model.3.conv.weight"].int()}), "is of torch.int32"),
    (lambda s: s["model.3.bn.running_var"].fill_(-1), "a variance below 0"),
    (lambda s: s.update({"model.3.bn.running_var": torch.ones(3)}), "do not fit"),
    (lambda s: s.update({"model.24.m.0.bias": s["model.24.m.0.bias"][:5]}), "do not fit"),
    (lambda s: s.update({"model.24.anchors": s["model.24.anchors"][:, :2]}), "its anchors are not 3 times 3"),
    (lambda s: s["model.24.anchors"].zero_(), "its anchors are not 3 times 3")])
def test_weights_that_build_no_whole_model_are_refused(tmp_path, change, words):
    checkpoint.save(tmp_path / "x.pt", small())
    data = torch.load(tmp_path / "x.pt", weights_only=True)
    change(data["state_dict"])
    torch.save(data, tmp_path / "x.pt")
    with pytest.raises(UserError, match=words):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("kind, words", [
    ("as it was", None), ("Adam", "another optimizer"), ("SGD of other parameters", "other parameters"),
    ("shape", "shape"), ("nan", "not finite"), ("index", "range"), ("rates", None)])
def test_an_optimizer_takes_its_own_state_only(kind, words):
    def stepped(cls: type, sizes: tuple[int, ...]) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
        made = cls(parameters, lr=0.1, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
        sum(p.sum() for p in parameters).backward()
        made.step()
        return made

    saved = stepped(torch.optim.Adam if kind == "Adam" else torch.optim.SGD,
                    (2, 3, 4) if "other" in kind else (2, 3)).state_dict()
    if kind in ("shape", "nan"):
        saved["state"][0]["momentum_buffer"] = torch.ones(1) if kind == "shape" else torch.full((2,), float("nan"))
    if kind == "index":
        saved["state"][9] = saved["state"].pop(0)
    saved["param_groups"][0] |= {"lr": "x", "fused": 7} if kind == "rates" else {}
    optimizer = stepped(torch.optim.SGD, (2, 3))
    if words is None:
        restore_optimizer(optimizer, saved)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.1
        return
    with pytest.raises((ValueError, IndexError), match=words):
        restore_optimizer(optimizer, saved)


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


@pytest.mark.slow
def test_a_width_of_99_allocates_nothing(tmp_path):
    model = randomised(small()).eval()
    path = _wide(tmp_path / "x.pt", model.state_dict())
    found: list[Model] = []
    assert _grown(lambda: found.append(checkpoint.load(path))) < 200
    assert all(map(torch.equal, found[0].state_dict().values(), model.state_dict().values()))  # a very slim model
    assert torch.equal(found[0].stride, model.stride)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
