"""--teacher: what is learnt from another model's outputs, and who the teacher is."""
from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import finetune_pruned
import prune
import train
from models import checkpoint
from models.yolo import Model
from training.distillation import distillation_loss
from training.optimizer import suited_nbs
from utils.errors import UserError

GAINS = {"box": 0.05, "obj": 1.0, "cls": 0.5}
BALANCE = (4.0, 1.0, 0.4)


def head(factor: float = 1.0, nc: int = 3) -> Namespace:
    """What distillation_loss() asks of a Detect: anchors (nl, na, 2) and the number of classes."""
    anchors = torch.tensor([[1.25, 1.5], [2.0, 3.5], [4.0, 2.5]])
    return Namespace(nc=nc, anchors=torch.stack([anchors, anchors * 1.5, anchors * 2]) * factor)


def outputs(seed: int, nc: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n, n, nc + 5, generator=generator) for n in (8, 4, 2)]


@pytest.mark.parametrize("nc", [1, 3])
def test_the_loss_is_least_where_the_student_says_what_the_teacher_says(nc):
    wanted = outputs(0, nc)
    mine = [y.clone().requires_grad_() for y in wanted]
    same = distillation_loss(mine, wanted, head(nc=nc), head(nc=nc), BALANCE, GAINS)
    assert same.shape == (1,)
    for gradient in torch.autograd.grad(same.sum(), mine):
        assert float(gradient.abs().max()) < 1e-6
    other = distillation_loss(outputs(1, nc), wanted, head(nc=nc), head(nc=nc), BALANCE, GAINS)
    assert float(other) > float(same.detach())


def test_boxes_are_compared_in_the_image_whatever_the_anchors():
    wanted = outputs(0)
    mine = [y.clone() for y in wanted]
    for y in mine:  # anchors half as large want (2 sigmoid)^2 twice as large
        y[..., 2:4] = ((wanted_sigmoid := y[..., 2:4].clamp(max=0).sigmoid()) * 2 ** 0.5).logit()
    for y in wanted:
        y[..., 2:4] = y[..., 2:4].clamp(max=0)
    only_box = {"box": 1.0, "obj": 0.0, "cls": 0.0}
    assert float(wanted_sigmoid.max()) * 2 ** 0.5 < 1
    assert float(distillation_loss(mine, wanted, head(0.5), head(1.0), BALANCE, only_box)) < 1e-9
    assert float(distillation_loss(mine, wanted, head(1.0), head(1.0), BALANCE, only_box)) > 1e-3


def test_places_without_an_object_teach_no_class():
    wanted, mine = outputs(0), outputs(0)
    for y, target in zip(mine, wanted):
        target[..., 4] = torch.where(torch.rand(target.shape[:-1]) < 0.5, 5.0, -20.0)
        y[..., 4] = target[..., 4]
        y[..., 5:] = torch.where(target[..., 4:5] > 0, target[..., 5:], -target[..., 5:])
    only_class = {"box": 0.0, "obj": 0.0, "cls": 1.0}
    nothing_wrong = distillation_loss(wanted, wanted, head(), head(), BALANCE, only_class)
    assert torch.allclose(distillation_loss(mine, wanted, head(), head(), BALANCE, only_class), nothing_wrong)


def flags(tiny: Path, *more: object) -> list[str]:
    return ["--data", str(tiny), "--imgsz", "64", "--batch-size", "4", "--workers", "0", "--device", "cpu",
            "--noplots", "--noval", "--epochs", "2", *map(str, more)]


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher(tiny, cfg, teacher, tmp_path):
    """Everything that changes what the model sees or does is on: the teacher sees the same."""
    start = ["--weights", "", "--cfg", cfg, "--project", tmp_path, "--adam", "--epochs", 6, "--image-weights",
             "--multi-scale", "--amp", "bf16", "--freeze", 1, "--nbs", 8]
    alone = train.main(flags(tiny, *start))
    taught = train.main(flags(tiny, *start, "--teacher", teacher, "--teacher-weight", 5))
    model = checkpoint.load(teacher)
    images = torch.rand(4, 3, 64, 64)
    apart = []
    for run in (alone, taught):
        with torch.no_grad():
            mine, theirs = run.ema.ema(images)[1], model(images)[1]
        apart.append(float(distillation_loss(mine, theirs, run.model.detect, model.detect, BALANCE, GAINS)))
    assert apart[1] < apart[0]
    assert checkpoint.read(taught.folder / "weights/last.pt")["opt"]["teacher"] == str(teacher)


@pytest.mark.slow
@pytest.mark.parametrize("names, words", [
    ({0: "a"}, r"has 1 classes, the model has 2; give a teacher with as many"),
    ({0: "circle", 1: "square"}, r"its classes are circle, square; give one trained on the same")])
def test_a_teacher_of_other_classes_is_refused(tiny, cfg, tmp_path, names, words):
    checkpoint.save(tmp_path / "other.pt", Model(str(cfg), nc=len(names), names=names))
    with pytest.raises(UserError, match=words):
        train.main(flags(tiny, "--weights", "", "--cfg", cfg, "--project", tmp_path,
                         "--teacher", tmp_path / "other.pt"))


@pytest.mark.slow
def test_fine_tuning_learns_from_the_model_that_was_cut_while_it_is_there(tiny, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parent = tmp_path / "parent.pt"
    parent.write_bytes(teacher.read_bytes())
    common = ["--data", str(tiny), "--workers", "0", "--device", "cpu"]
    prune.main(["--weights", "parent.pt", "--score", "gamma", "--noval", *common])
    assert checkpoint.read("pruned_model.pt")["parent"] == str(parent)

    def teachers(*more: str) -> list[str]:
        capsys.readouterr()
        finetune_pruned.main(flags(tiny, *more))
        return re.findall(r"^teacher: (.*), weight 1$|^note: (no teacher, .*)$", capsys.readouterr().out, re.M)

    assert teachers() == [(str(parent), "")]
    assert teachers("--teacher", str(teacher)) == [(str(teacher), "")]
    assert teachers("--teacher", "none") == []
    parent.unlink()
    assert teachers() == [("", f"no teacher, {parent} is not there any more; --teacher names one")]


def test_short_runs_get_more_steps():
    assert suited_nbs(100_000, 16) == 64 and suited_nbs(500, 16) == 16
    for iterations in (200, 2_000, 5_000, 50_000):
        for batch_size in (4, 16, 128):
            assert suited_nbs(iterations, batch_size) <= suited_nbs(2 * iterations, batch_size)


NAMES = {0: "square", 1: "circle"}


@pytest.mark.slow
@pytest.mark.parametrize("maps, other, chosen, words", [
    # mAP50-95 in the files of the sparsity training's teacher, the model that was cut, the weights it started from;
    # None: there is no such file, "": it holds none
    ((None, 0.115, 0.649), {}, "start", "0.649; not taken: cut.pt (0.115)"),
    ((0.7, 0.115, 0.649), {}, "taught", "0.700; not taken: cut.pt (0.115), start.pt (0.649)"),
    ((0.1, 0.5, None), {}, "cut", "0.500; not taken: taught.pt (0.100)"),
    ((None, 0.6, 0.5), {}, "cut", "0.600; not taken: start.pt (0.500)"),
    (("", 0.115, 0.649), {}, "taught", None), ((None, "", ""), {}, "cut", None), ((None, None, ""), {}, None, None),
    ((None, "", 0.3), {}, "start", None), ((None, 0.1, float("nan")), {}, "cut", None),
    ((None, 0.1, 0.9), {"names": {0: "dog", 1: "circle"}}, "cut", None),
    ((None, 0.1, 0.9), {"cfg": "yolov5s.yaml"}, "cut", None), ((None, 0.1, "broken"), {}, "cut", None),
    ((None, None, None), {}, None, "")])
def test_the_teacher_is_the_best_of_those_that_it_comes_from(cfg, tmp_path, monkeypatch, capsys, maps, other, chosen,
                                                             words):
    """A sparse model of .115 taught the slim one, although the training had started from one of .649."""
    monkeypatch.chdir(tmp_path)
    files = {name: f"{name}.pt" for name in ("taught", "cut", "start")}
    for (name, file), value in zip(files.items(), maps):
        names = other.get("names", NAMES) if name == "start" else NAMES
        if value == "broken":
            (tmp_path / file).write_bytes(b"no checkpoint")
        elif value is not None:
            metrics = {} if value == "" else {"metrics/mAP_0.5:0.95": value}
            checkpoint.save(file, Model(str(cfg), nc=2, names=names), metrics=metrics)
    opt = {"teacher": None if maps[0] is None else files["taught"], "weights": files["start"], "cfg": other.get("cfg")}
    found = finetune_pruned.known_teacher({"opt": opt, "parent": files["cut"], "names": NAMES})
    assert found == (chosen and files[chosen])
    said = capsys.readouterr().out
    assert (f"mAP50-95 of the model to learn from: {words}\n" in said) if words else "not taken" not in said
    assert ("no teacher, cut.pt is not there any more" in said) == (chosen is None)
