"""Checkpoints from elsewhere: YOLOv5's own in all their kinds are read, hostile ones are refused.

Nothing in a file is ever executed.
"""
from __future__ import annotations

import argparse
import builtins
import code
import ctypes
import functools
import importlib
import io
import marshal
import operator
import os
import pathlib
import pickle
import pty
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import timeit
import webbrowser
import zipfile
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import models.common
import models.yolo
from models import checkpoint
from models.config import read_yaml
from models.formats.yolov5 import to_yolov5
from models.yolo import Model
from tests.blocks import randomised
from utils.errors import UserError

# Kinds of files that YOLOv5 v5.0 to v7.0 write ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mine() -> Model:
    torch.manual_seed(0)
    cfg = {**read_yaml("yolov5n.yaml"), "width_multiple": 0.125}
    return randomised(Model(cfg, nc=3, names={0: "a", 1: "b", 2: "c"})).half().float().eval()  # what fp16 can hold


def as_stock(model: Model, monkeypatch: pytest.MonkeyPatch, name: str = "DetectionModel") -> nn.Module:
    """The model as YOLOv5 pickles it, under a class name that this program does not have."""
    cls = type(name, (Model,), {"__module__": "models.yolo", "__qualname__": name})
    monkeypatch.setattr(models.yolo, name, cls, raising=False)
    whole = to_yolov5(model)
    whole.__class__ = cls
    return whole


def kinds(whole: nn.Module) -> dict[str, object]:
    """Name -> what torch.save is given."""
    lists = deepcopy(whole)
    lists.names = list(whole.names.values())
    old = deepcopy(whole)  # v5.0: the grid of anchors is a buffer
    head = old.model[-1]
    del head.__dict__["anchor_grid"]
    head.register_buffer("anchor_grid", head.anchors.clone().view(3, 1, -1, 1, 1, 2))
    optimizer = torch.optim.SGD(whole.parameters(), 0.1, momentum=0.9)
    sum(p.sum() for p in whole.parameters()).backward()
    optimizer.step()
    for p in whole.parameters():
        p.data += 0.1 * torch.ones_like(p)  # back to where they were: the gradient of a sum is 1
        p.grad = None
    extra = deepcopy(whole)
    extra.hyp, extra.class_weights, extra.gr = {"lr0": 0.01}, torch.ones(3), 1.0
    extra.yaml_file = "runs/train/exp/custom.yaml"
    return {
        "finished": {
            "epoch": -1, "model": deepcopy(whole).half(), "ema": None, "optimizer": None, "date": "2022-08-17"},
        "finished, names as a list": {
            "epoch": -1, "model": deepcopy(lists).half(), "ema": None, "optimizer": None},
        "in training, the average counts": {
            "epoch": 3, "best_fitness": np.array([0.5]), "model": nn.Sequential(), "ema": deepcopy(whole).half(),
            "updates": 9, "optimizer": optimizer.state_dict(), "opt": {"data": "D:\\\\set\\\\data.yaml"}},
        "options as a Namespace with paths": {
            "model": deepcopy(whole), "opt": argparse.Namespace(save_dir=pathlib.PosixPath("/home/x"), cfg="")},
        "from Windows": {
            "model": deepcopy(whole), "opt": {"save_dir": pathlib.PureWindowsPath("C:/runs")}},
        "v5.0": {
            "epoch": -1, "best_fitness": None, "training_results": "0/2 ...", "model": old.half(), "optimizer": None,
            "wandb_id": None},
        "with attributes of the training loop": {
            "model": extra, "ema": None, "git": {"branch": "main"}},
        "numpy numbers inside": {
            "model": deepcopy(whole), "best_fitness": np.float64(0.3), "epoch": np.int64(4)},
        "the bare module": deepcopy(whole)}


KINDS = ["finished", "finished, names as a list", "in training, the average counts",
         "options as a Namespace with paths", "from Windows", "v5.0", "with attributes of the training loop",
         "numpy numbers inside", "the bare module"]


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("Model", KINDS[0]), *(("DetectionModel", kind) for kind in KINDS)])
def test_every_kind_of_yolov5_file_loads(mine, tmp_path, monkeypatch, kind, name):
    whole = to_yolov5(mine) if name == "Model" else as_stock(mine, monkeypatch, name)
    torch.save(kinds(whole)[kind], tmp_path / "x.pt")
    monkeypatch.undo()
    loaded = checkpoint.load(tmp_path / "x.pt")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        a, b = loaded(x)[0], mine(x)[0]
    assert torch.allclose(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))
    assert loaded.names == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(loaded.detect.anchors, mine.detect.anchors)


@pytest.mark.slow
def test_fused_yolov5_files_load(mine, tmp_path, monkeypatch):
    whole = as_stock(models.yolo.fused(mine), monkeypatch)
    for module in whole.modules():
        if isinstance(module, models.common.Conv):
            del module.bn  # as stock's fuse() does
    torch.save({"model": whole}, tmp_path / "x.pt")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        a, b = checkpoint.load(tmp_path / "x.pt")(x)[0], mine(x)[0]
    assert torch.allclose(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))


@pytest.mark.slow
def test_anchors_that_autoanchor_changed_come_along(mine, tmp_path, monkeypatch):
    other = deepcopy(mine)
    other.detect.anchors *= 1.25
    torch.save({"model": as_stock(other, monkeypatch)}, tmp_path / "x.pt")
    loaded = checkpoint.load(tmp_path / "x.pt")
    assert torch.allclose(loaded.detect.anchors, mine.detect.anchors * 1.25)
    assert loaded.yaml["anchors"][0][0] == pytest.approx(12.5)


# Files of others, and damaged ones ------------------------------------------------------------------------------------

def repacked(path: pathlib.Path, change: Callable[[bytes], bytes], how: int = zipfile.ZIP_STORED) -> pathlib.Path:
    """Another archive, of whose pickle something was changed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new := path.with_name("new.pt"), "w", how) as out:
        for item in old.infolist():
            content = old.read(item)
            out.writestr(item.filename, change(content) if item.filename.endswith("data.pkl") else content)
    return new


@pytest.mark.slow
@pytest.mark.parametrize("prefix, words", [
    ("yolov5.", None), ("ultralytics.nn.", "of the ultralytics package .* start from YOLOv5's own files"),
    ("yolov6.", "refused, it names")])
def test_the_package_of_a_file_says_what_it_is(mine, tmp_path, prefix, words):
    """The yolov5 package of PyPI has YOLOv5's modules under its own name."""
    torch.save({"model": to_yolov5(mine)}, tmp_path / "x.pt")
    path = repacked(tmp_path / "x.pt", lambda pickled: pickled.replace(b"cmodels.", f"c{prefix}models.".encode()))
    if words is None:
        assert checkpoint.load(path).names == mine.names
        return
    with pytest.raises(UserError, match=words):
        checkpoint.load(path)


def bomb() -> list:
    inner: list = ["a"]
    for _ in range(40):
        inner = [inner] * 8
    return inner


def cyclic(whole: nn.Module) -> None:
    whole.model[0]._modules["again"] = whole.model[0]


def endless(whole: nn.Module) -> None:
    whole.model[0]._modules["deeper." * 100] = nn.Sequential()


def attribute(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda whole: whole.__dict__.__setitem__(name, value)


def weight(value: torch.Tensor) -> Callable[[nn.Module], None]:
    return lambda whole: whole.model[3].conv._parameters.__setitem__("weight", value)


@pytest.mark.slow
@pytest.mark.parametrize("change, words", [
    (cyclic, None), (attribute("stride", [8, 16, 32]), None), (endless, "nested without end"),
    (attribute("stride", ["a"]), "not of YOLOv5"), (attribute("stride", None), "not of YOLOv5"),
    (attribute("names", 5), "'names' must be a mapping, not 5"), (attribute("names", [["a"], "b", "c"]), None),
    (attribute("names", {0: "a", 7: "b"}), "numbered from 0"), (attribute("names", bomb()), "without end"),
    (attribute("yaml", {"backbone": bomb()}), "without end"), (attribute("yaml", {}), "needs the keys"),
    (attribute("yaml", 5), "holds no YOLOv5 model"), (attribute("_modules", 5), "not of YOLOv5"),
    (attribute("_modules", {"model": 5}), "do not fit"),
    (weight(torch.zeros(1).half().expand(10 ** 10)), "fewer numbers"),
    (weight(torch.ones(3).to_sparse()), "unusual kind"), (weight(torch.ones(3)), "do not fit")])
def test_a_damaged_yolov5_file_is_read_or_refused(mine, tmp_path, change, words):
    change(whole := to_yolov5(mine))
    torch.save({"model": whole}, tmp_path / "x.pt")
    if words is None:
        checkpoint.load(tmp_path / "x.pt")
        return
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.load(tmp_path / "x.pt")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("format", [[], {}, 5, "deep"])
def test_a_format_that_is_no_text(tmp_path, format):
    deep: list = []
    for _ in range(400):
        deep = [deep]
    torch.save({"format": deep if format == "deep" else format}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds no YOLOv5 model"):
        checkpoint.load(tmp_path / "x.pt")


# Hostile files --------------------------------------------------------------------------------------------------------

class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class State(Call):
    """Pickles as a harmless object whose state is a call."""

    def __reduce__(self):
        return dict, (), {"x": Call(*[self.call[0], *self.call[1]])}


MARK = "executed"
# Name -> a function and its arguments.
CALLS = {
    # the system
    "os.system": (os.system, f"touch {MARK}"),
    "os.popen": (os.popen, f"touch {MARK}"),
    "os.remove": (os.remove, "victim"),
    "os.mkdir": (os.mkdir, MARK),
    "subprocess.Popen": (subprocess.Popen, ["touch", MARK]),
    "subprocess.check_output": (subprocess.check_output, ["touch", MARK]),
    "pty.spawn": (pty.spawn, "sh"),
    "ctypes": (ctypes.CDLL, "libc.so.6"),
    "sys.exit": (sys.exit, 1),
    # code
    "eval": (builtins.eval, f"open('{MARK}', 'w')"),
    "exec": (builtins.exec, f"open('{MARK}', 'w')"),
    "compile": (builtins.compile, "1", "x", "eval"),
    "__import__": (builtins.__import__, "this"),
    "importlib": (importlib.import_module, "this"),
    "runpy": (runpy.run_path, "victim"),
    "code.interact": (code.interact,),
    "timeit": (timeit.timeit, f"open('{MARK}', 'w')"),
    "getattr": (builtins.getattr, "x", "upper"),
    "attrgetter": (operator.attrgetter, "system"),
    "partial": (functools.partial, os.system),
    # files
    "open": (builtins.open, MARK, "w"),
    "io.open": (io.open, MARK, "w"),
    "shutil.rmtree": (shutil.rmtree, "."),
    "Path.touch": (pathlib.Path.touch, pathlib.PurePosixPath(MARK)),
    "tempfile": (tempfile.mkdtemp,),
    # the network
    "socket": (socket.create_connection, ("127.0.0.1", 9)),
    "webbrowser": (webbrowser.open, "http://127.0.0.1"),
    "torch.hub": (torch.hub.load_state_dict_from_url, "http://127.0.0.1"),
    # other readers
    "marshal": (marshal.loads, b"0"),
    "pickle.loads": (pickle.loads, b"."),
    "torch.load": (torch.load, "victim"),
    "numpy.load": (np.load, "victim", None, True),
    # names that look as if they belonged there
    "nn.Module": (nn.Module.register_forward_hook, None),
    "checkpoint.save": (checkpoint.save, "victim", None)}


@pytest.mark.parametrize("place", ["top", "deep", "state", "key"])
@pytest.mark.parametrize("name", CALLS)
def test_no_call_is_ever_made(tmp_path, monkeypatch, name, place):
    (tmp_path / "victim").write_text("precious")
    monkeypatch.chdir(tmp_path)
    bomb = Call(*CALLS[name])
    contents = {"top": bomb, "deep": {"model": [1, {"x": (bomb,)}], "ema": None},
                "state": {"model": State(*CALLS[name])}, "key": {"opt": {"a": bomb}}}
    torch.save(contents[place], "evil.pt")
    with pytest.raises(UserError) as caught:
        checkpoint.load("evil.pt")
    assert "\n" not in str(caught.value) and "evil.pt" in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"evil.pt", "victim"}
    assert (tmp_path / "victim").read_text() == "precious"


def test_tuples_as_a_key_do_not_end_the_interpreter(tmp_path):
    torch.save({"a": 1}, tmp_path / "x.pt")
    path = repacked(tmp_path / "x.pt", lambda _: b"\x80\x02}()" + b"\x85" * 10 ** 6 + b"K\x01u.")
    with pytest.raises(UserError, match="nested without end"):
        checkpoint.read(path)


def test_a_compressed_file_is_refused_before_it_takes_memory(tmp_path):
    torch.save({"a": torch.zeros(10 ** 6)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="larger than the file"):
        checkpoint.read(repacked(tmp_path / "x.pt", bytes, zipfile.ZIP_DEFLATED))


def test_a_huge_declared_tensor_allocates_nothing(mine, tmp_path):
    checkpoint.save(tmp_path / "x.pt", mine)
    data = torch.load(tmp_path / "x.pt", weights_only=True)
    data["state_dict"]["model.0.conv.weight"] = torch.zeros(1).expand(10 ** 12, 3, 6, 6)
    torch.save(data, tmp_path / "x.pt")
    with pytest.raises(UserError, match="fewer numbers"):
        checkpoint.load(tmp_path / "x.pt")
