"""Whole branches go: found in any traced model, taken out exactly, ranked beside channels, saved and read again."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import prune
from models import checkpoint, formats
from models.common import Conv
from models.formats.format import export_options
from models.yolo import Model
from tests.blocks import Net, random_masks, randomised
from utils.slimming import ChannelGraph, Masks, Pruner, Rules, compose_masks, masked, slim, trace
from utils.slimming.branches import Branch
from utils.slimming.cost import CostModel, profile
from utils.slimming.equivalence import largest_difference
from utils.slimming.graph import batch_norms
from utils.slimming.ranking import SCORES

FOUND: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "yolov5n": (lambda: Model("yolov5n.yaml"), 7), "ghost": (lambda: Model("yolov5s-ghost.yaml"), 0),
    "resnet18": (torchvision.models.resnet18, 5), "mobilenet_v2": (torchvision.models.mobilenet_v2, 10),
    "regnet": (torchvision.models.regnet_y_400mf, 12), "squeeze": (torchvision.models.mobilenet_v3_small, 6)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_branches_are_found_without_names(name):
    build, count = FOUND[name]
    with torch.device("cpu" if name == "regnet" else "meta"):
        assert len(trace(build()).branches) == count


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Block(nn.Module):
    """norm(b(a(x))) and x, put together in a way."""

    def __init__(self, way: Callable[[Block, Tensor], Tensor]):
        super().__init__()
        self.way, self.a, self.b, self.norm = way, Conv(16, 8, 3), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.skip, self.drop, self.act, self.add = nn.Identity(), StochasticDepth(0.2, "row"), nn.ReLU(True), Add()

    def end(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def in_place(block: Block, x: Tensor) -> Tensor:
    y = block.end(x)
    y += x
    return y


def before(block: Block, x: Tensor) -> Tensor:
    x = block.act(x)
    return x + block.end(x)


def twice(block: Block, x: Tensor) -> Tensor:
    x = x + block.end(x)
    return x + block.end(x)


WAYS: dict[str, tuple[Callable[[Block, Tensor], Tensor], bool]] = {
    "plain": (lambda block, x: x + block.end(x), True), "turned": (lambda block, x: block.end(x).add(x), True),
    "in place": (in_place, True), "activation behind": (lambda block, x: block.act(block.end(x) + x), True),
    "identity": (lambda block, x: block.skip(x) + block.end(x), True),
    "dropped": (lambda block, x: x + block.drop(F.relu(block.end(x))), True),
    "module": (lambda block, x: block.add(x, block.end(x)), True),
    "difference": (lambda block, x: block.end(x) - x, False), "scaled": (lambda block, x: x + 2 * block.end(x), False),
    "alpha": (lambda block, x: torch.add(x, block.end(x), alpha=2), False),
    "no norm": (lambda block, x: x + block.b(block.a(x)), False), "sigmoid": (
        lambda block, x: x + block.end(x).sigmoid(), False),
    "activation before": (before, False), "other function behind": (lambda block, x: (x + block.end(x)).exp(), False),
    "twice": (twice, False), "two ends": (lambda block, x: torch.cat((x + (y := block.end(x)), y), 1)[:, :16], False)}


@pytest.mark.parametrize("way", WAYS)
def test_a_branch_is_what_is_zero_where_its_last_norm_is(way):
    torch.manual_seed(0)
    net = randomised(Net(Block(WAYS[way][0])))
    net.after = nn.ReLU()  # type: ignore[assignment]
    graph = trace(net)
    assert list(graph.branches) == ["block.norm"] * WAYS[way][1], way
    if graph.branches:
        masks = without(graph, graph.branches)
        narrow = slim(net, masks, graph)
        assert largest_difference(masked(net, masks), narrow) < 1e-9 and not hasattr(narrow.block, "norm")
        assert largest_difference(masked(net, {"block.norm": masks["block.norm"]}), narrow) < 1e-9
        assert getattr(narrow.block, "inplace", False) is False


def without(graph: ChannelGraph, lasts: list[str] | dict[str, Branch], masks: Masks | None = None) -> Masks:
    """Masks that cut the branches which end in these BatchNorms."""
    found = dict(masks or graph.masks(np.ones(len(graph.group), bool)))
    return found | {name: torch.zeros_like(found[name]) for last in lasts for name in graph.branches[last].norms}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "yolov5n":
        return randomised(Model({**Model("yolov5n.yaml").yaml, "width_multiple": 0.125}, nc=2))
    net = torchvision.models.mobilenet_v2(width_mult=0.25) if name == "mobilenet_v2" else FOUND[name][0]()
    return randomised(net).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name, seeds", [("yolov5n", 3), ("mobilenet_v2", 1), ("resnet18", 1), ("squeeze", 1)])
def test_any_branches_and_channels_go_exactly(name, seeds):
    model = small(name)
    graph = trace(model)
    costs = CostModel(model, graph, 64)
    for seed in range(seeds):
        rng, first = np.random.default_rng(seed), random_masks(graph, seed)
        gone = [last for last in graph.branches if rng.random() < 0.5]
        masks = without(graph, gone, first)
        keep = graph.kept(masks)
        assert all(mask.equal(masks[key]) for key, mask in graph.masks(keep).items())
        assert graph.gone(keep) == [graph.branches[last] for last in gone]
        narrow = slim(model, masks, graph)
        assert largest_difference(masked(model, masks), narrow) < 1e-9
        cost = profile(narrow, 64)
        assert costs.remaining(keep) == (cost.parameters, cost.flops)
        again = trace(narrow)
        assert again.branches.keys() == graph.branches.keys() - set(gone)
        more = without(again, list(again.branches)[:1])  # a second round
        composed = compose_masks(masks, more)
        assert largest_difference(slim(narrow, more), slim(model, composed, graph)) < 1e-9
        assert not any(torch.equal(composed[key], masks[key]) for key in more if not more[key].any())


@pytest.mark.slow
def test_part_of_a_branch_is_no_branch():
    model = small("yolov5n")
    masks = without(trace(model), ["model.2.m.0.cv2.bn"])
    with pytest.raises(ValueError, match=r"nothing is left of model\.2\.m\.0\.cv1\.conv"):
        slim(model, {"model.2.m.0.cv1.bn": masks["model.2.m.0.cv1.bn"]})


@pytest.mark.slow
@pytest.mark.parametrize("score, coupled", [*zip(SCORES, (False, True, False, True), strict=True)])
def test_branches_rank_beside_channels(score, coupled):
    """The share counts every channel once; a branch goes as a whole, whatever floors its layers have."""
    model = small("yolov5n")
    with torch.no_grad():
        for last, factor in (("model.4.m.0.cv2.bn", 0.0), ("model.6.m.1.cv2.bn", 1e-6)):
            for norm in batch_norms(model, [last]).values():
                norm.weight *= factor
                norm.bias *= factor
        model.model[6].m[1].cv2.conv.weight *= 1e-6
        model.model[4].m[0].cv2.conv.weight *= 0

    def losses(candidate):
        yield sum(y.square().mean() for y in candidate(torch.rand(2, 3, 64, 64))[1])

    rules = Rules(min_share=0.25, coupled=coupled, layers=True, keep=("model.6.m.1.cv1.bn",))
    pruner = Pruner(model, 64, losses=losses).rank(score, rules, per_flop=True)
    for percent in (0.02, 0.3):
        result = pruner.cut(percent)
        # (Where the branch sends nothing on, no channel in it has a first-order effect: all are 0, as the branch is.)
        assert "model.4.m.0" in result.branches or (score == "taylor" and percent < 0.3)
        assert "model.6.m.1" not in result.branches and result.difference < 1e-9
        assert percent - 0.05 < result.achieved < percent + 1e-3
    masks = pruner.rank(score, Rules(coupled=coupled)).cut(0.3).masks
    assert all(mask.any() for mask in masks.values())


@pytest.mark.slow
def test_a_branch_of_zeros_is_free():
    """It is the first to go, no limit is below it, and its other layers tell nothing of it."""
    model = small("yolov5n")
    norm = model.get_submodule("model.4.m.0.cv2.bn")
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.zero_()
    pruner = Pruner(model, 64).rank("auto", Rules(layers=True))
    channels = sum(len(pruner.graph.norms[name]) for name in pruner.graph.branches["model.4.m.0.cv2.bn"].norms)
    result = pruner.cut(channels / pruner.ranking.total)
    assert result.branches == ["model.4.m.0"] and result.achieved == result.unused == channels / pruner.ranking.total
    assert result.gammas_separate and result.score == "gamma" and result.safe.gamma > 0 and result.threshold == 0
    assert result.report["branches"] == ["model.4.m.0"]


@pytest.fixture
def branchless(teacher, tmp_path) -> Path:
    """A checkpoint of which two branches and some channels were cut."""
    model = checkpoint.load(teacher)
    graph = trace(model)
    masks = without(graph, ["model.2.m.0.cv2.bn", "model.6.m.1.cv2.bn"], random_masks(graph, 3))
    checkpoint.save(path := tmp_path / "branchless.pt", slim(model, masks), imgsz=64)
    return path


@pytest.mark.slow
def test_a_checkpoint_knows_its_branches(branchless, tmp_path):
    """It, the files that are made of it, in stock's format too; it is cut again; a damaged one is refused."""
    saved, model = checkpoint.read(branchless), checkpoint.load(branchless)
    assert isinstance(model.model[2].m[0], nn.Identity) and isinstance(model.model[6].m[1], nn.Identity)
    assert not any(key.startswith("model.2.m.0.") for key in saved["state_dict"])
    whole = masked(Model(model.yaml, nc=2), saved["masks"])
    assert largest_difference(slim(whole, saved["masks"]), slim(whole, model.masks)) == 0
    twice = Pruner(model, 64).rank(rules=Rules(layers=True)).cut(0.3)
    checkpoint.save(tmp_path / "twice.pt", twice.slim)
    assert largest_difference(checkpoint.load(tmp_path / "twice.pt"), twice.slim) == 0
    formats.formats()["yolov5"].write(model, path := tmp_path / "x.yolov5.pt", export_options(model, (1, 3, 64, 64)))
    assert largest_difference(checkpoint.load(path), model.half().float()) < 1e-9
    del saved["state_dict"]["model.2.cv3.conv.weight"]
    torch.save(saved, path)
    with pytest.raises(prune.UserError, match=r"do not fit the yaml inside \(.*model\.2\.cv3\.conv\.weight"):
        checkpoint.load(path)


@pytest.mark.slow
def test_prune_takes_branches_out(teacher, tiny, tmp_path, monkeypatch, capsys):
    model = checkpoint.load(teacher)
    with torch.no_grad():
        for key in ("weight", "bias"):
            model.get_parameter(f"model.6.m.0.cv2.bn.{key}").zero_()
    checkpoint.save(tmp_path / "sparse.pt", model, imgsz=64)
    monkeypatch.chdir(tmp_path)
    folder = prune.main(["--weights", "sparse.pt", "--data", str(tiny), "--workers", "0", "--percent", "0.05",
                         "--score", "gamma", "--layers", "--noval"])
    said = capsys.readouterr().out
    assert "whole branches taken out: model.6.m.0\n" in said and said.count("taken out") == 3
    report = json.loads((folder / "report.json").read_text())
    assert report["branches"] == ["model.6.m.0"] and report["difference"] < 1e-9
    assert isinstance(checkpoint.load("pruned_model.pt").model[6].m[0], nn.Identity)
