"""The heart: graph, selection, surgery. Properties on random masks, exactness in float64."""
from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from models.common import Conv
from models.yolo import Model
from tests.blocks import random_masks, randomised
from utils.slimming.cost import CostModel, latency, profile
from utils.slimming.graph import trace
from utils.slimming.report import misaligned_channels
from utils.slimming.ranking import SCORES, Rules, Selection, knee, limit, select
from utils.slimming.surgery import absorb, compose_masks, keep_ids, largest_difference, masked, recalibrate, resize_like, slim


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return randomised(Model("yolov5n.yaml", nc=3))


def cut_at_random(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random masks; tied and frozen channels stay."""
    return random_masks(trace(model), seed, joint=False)


def test_graph_of_a_yolov5(model):
    graph = trace(model)
    out = set(graph.norms) - set(graph.prunable_norms())
    # Tied by the backbone's shortcuts: each such C3's cv1 and its Bottlenecks' cv2. The inner cv1 is free.
    assert out == {"model.2.cv1.bn", "model.2.m.0.cv2.bn", "model.4.cv1.bn", "model.4.m.0.cv2.bn", "model.4.m.1.cv2.bn", "model.6.cv1.bn",
                   "model.6.m.0.cv2.bn", "model.6.m.1.cv2.bn", "model.6.m.2.cv2.bn", "model.8.cv1.bn", "model.8.m.0.cv2.bn"}
    assert len(graph.norms) == 57 and not graph.notes
    assert model.training  # tracing left the mode alone


def test_norms_for_training_follow_shortcuts_and_what_is_left_out(model):
    graph = trace(model)
    assert len(graph.prunable_norms()) == 46 and set(graph.prunable_norms(joint=True)) == set(graph.norms)
    # One of a group's layers left out: no other layer of the group could be cut either.
    left = graph.prunable_norms(joint=True, leave=["model.4.m.0.cv2.bn", "model.0.bn"])
    assert set(graph.norms) - set(left) == {"model.4.cv1.bn", "model.4.m.0.cv2.bn", "model.4.m.1.cv2.bn", "model.0.bn"}


@pytest.mark.parametrize("seed", range(6))
def test_slim_equals_masked_for_random_masks(model, seed):
    masks = cut_at_random(model, seed)
    before = deepcopy(model.state_dict())
    narrow = slim(model, masks)
    assert largest_difference(masked(model, masks), narrow) < 1e-9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name, m in narrow.named_modules():
        if name in masks:
            assert m.num_features == int(masks[name].sum())


@pytest.mark.parametrize("percent", [0.0, 0.3, 0.5, 0.8, 0.999])
def test_selection_cuts_what_was_asked_and_no_layer_vanishes(model, percent):
    graph = trace(model)
    masks = select(graph, model, percent, min_channels=2)
    prunable = graph.prunable()
    total, gone = sum(int(p.sum()) for p in prunable.values()), sum(int((~m).sum()) for m in masks.values())
    assert all(int(m.sum()) >= 2 for m in masks.values())
    assert all(bool(m[~prunable[n]].all()) for n, m in masks.items())
    if percent < 0.9:
        assert gone == round(percent * total)
    assert largest_difference(masked(model, masks), slim(model, masks)) < 1e-9
    if percent == 0.0:
        assert profile(slim(model, masks), 64) == profile(model, 64)


def test_selection_ranks_by_order_when_all_scores_are_equal(model):
    flat = deepcopy(model)
    with torch.no_grad():
        for m in flat.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.zero_()
    graph = trace(flat)
    total = sum(int(p.sum()) for p in graph.prunable().values())
    first, second = select(graph, flat, 0.5), select(graph, flat, 0.5)
    assert sum(int((~m).sum()) for m in first.values()) == round(0.5 * total)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_selection_cuts_the_smallest(model):
    graph = trace(model)
    bound = limit(graph, model)
    masks = select(graph, model, bound.percent)
    modules, prunable = dict(model.named_modules()), graph.prunable()
    cut = torch.cat([modules[n].weight.detach()[~m] for n, m in masks.items()])
    kept = torch.cat([modules[n].weight.detach()[m & prunable[n]] for n, m in masks.items()])
    assert cut.max() <= kept.min() and cut.max() < bound.gamma


def test_two_rounds_compose(model):
    first = select(trace(model), model, 0.4)
    once = slim(model, first)
    second = select(trace(once), once, 0.4)
    twice, both = slim(once, second), compose_masks(first, second)
    direct = slim(model, both)
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), direct.state_dict().values()))


def test_shapes_rebuild_a_slim_model(model):
    narrow = slim(model, select(trace(model), model, 0.6))
    again = Model(model.yaml)
    resize_like(again, narrow.state_dict())
    again.load_state_dict(narrow.state_dict())
    assert largest_difference(narrow, again) == 0.0
    assert profile(again, 64) == profile(narrow, 64)


def test_masks_that_cut_a_tied_or_frozen_channel_alone_are_refused(model):
    masks = {"model.2.cv1.bn": torch.tensor([False] + [True] * 15), "model.2.m.0.cv2.bn": torch.ones(16, dtype=torch.bool)}
    with pytest.raises(ValueError, match="same ones"):
        slim(model, masks)


class _Strange(nn.Module):
    """A shortcut, an unknown operation, a grouped and a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.dw = Conv(3, 8, 3), Conv(8, 8, 3), Conv(8, 8, 3, g=8)
        self.c, self.grouped, self.d = Conv(8, 8, 1), Conv(8, 8, 3, g=2), Conv(8, 4, 1)

    def forward(self, x):
        x = self.b(self.a(x))
        x = x + self.dw(x)
        x = torch.flip(self.c(x), dims=(3,))
        return self.d(self.grouped(x)).mean((2, 3))


def test_unknown_operations_freeze_and_say_so():
    strange = randomised(_Strange())
    graph = trace(strange)
    free = {n: bool(p.all()) for n, p in graph.prunable().items()}
    assert free == {"a.bn": True, "b.bn": False, "dw.bn": False, "c.bn": False, "grouped.bn": True, "d.bn": False}
    assert any("flip" in note for note in graph.notes)
    masks = cut_at_random(strange, 3)
    assert largest_difference(masked(strange, masks), slim(strange, masks)) < 1e-9


def test_depthwise_channels_go_with_the_convolution_before():
    net = randomised(nn.Sequential(Conv(3, 8, 3), Conv(8, 8, 3, g=8), Conv(8, 6, 1), nn.Conv2d(6, 2, 1)))
    masks = select(trace(net), net, 0.5)
    assert torch.equal(masks["0.bn"], masks["1.bn"])
    narrow = slim(net, masks)
    assert narrow[1].conv.groups == narrow[0].conv.out_channels == int(masks["0.bn"].sum())
    assert largest_difference(masked(net, masks), narrow) < 1e-9


def test_cost_counts(model):
    cost = profile(Model("yolov5n.yaml"), 640)
    assert cost.parameters == 1_872_157 and cost.gflops == pytest.approx(4.5, abs=0.1)
    assert profile(model, 320).flops * 4 == profile(model, 640).flops
    assert all(ms > 0 for ms in latency([deepcopy(model).eval()], 64, runs=2))


def test_medians_take_few_turns_where_they_are_long():
    from utils.slimming.cost import medians

    calls = []
    values = medians([lambda: calls.append("a"), lambda: calls.append("b")], runs=7)
    assert calls == ["a", "b"] * 10 and len(values) == 2
    calls.clear()
    medians([lambda: calls.append("a")], runs=7, seconds=0.0)
    assert len(calls) == 4  # one to warm up, three to measure


@pytest.mark.parametrize("name", ["model.0.bn", "model.2.m.0.cv1.bn", "model.9.cv1.bn", "model.17.cv3.bn"])
def test_freed_flops_are_what_a_cut_frees(model, name):
    graph = trace(model)
    freed = CostModel(model, graph, 64).flops_per_channel()[name]
    masks = {n: torch.ones(len(ids), dtype=torch.bool) for n, ids in graph.norms.items()}
    masks[name][3] = False
    assert profile(model, 64).flops - profile(slim(model, masks), 64).flops == freed[3] == freed[0]


@pytest.mark.parametrize("seed", range(3))
def test_predicted_cost_is_the_slim_models(model, seed):
    graph, masks = trace(model), cut_at_random(model, seed)
    keep = keep_ids(graph, masks)
    cost = profile(slim(model, masks), 64)
    assert CostModel(model, graph, 64).remaining(keep) == (cost.parameters, cost.flops)


@pytest.mark.parametrize("rules", [Rules(), Rules(joint=True), Rules(round_to=8), Rules(joint=True, round_to=4, min_channels=3)], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_every_rule_is_kept_and_every_cut_exact(model, rules, score):
    graph = trace(model)
    ranked = Selection(graph, model, rules, score, CostModel(model, graph, 64).flops_per_channel() if score == "l1" else None)
    masks = ranked.percent(0.5)
    for name, mask in masks.items():
        left = int(mask.sum())
        assert left >= min(rules.min_channels, len(mask))
        assert left == len(mask) or left % rules.round_to == 0 or left < rules.round_to, name
        assert rules.joint or bool(mask[~graph.prunable()[name]].all())
    tied = [n for n, free in graph.prunable().items() if not free.any()]
    assert any(not masks[n].all() for n in tied) == rules.joint
    assert largest_difference(masked(model, masks), slim(model, masks)) < 1e-9


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_target_is_met_by_the_smallest_cut(model, share):
    graph = trace(model)
    costs, ranked = CostModel(model, graph, 64), Selection(graph, model, Rules(joint=True))
    full = profile(model, 64).flops
    groups, reached = ranked.smallest_cut(lambda n: costs.remaining(keep_ids(graph, ranked.cut(n)))[1] <= share * full)
    left = [profile(slim(model, ranked.cut(n)), 64).flops / full for n in (groups - 1, groups)]
    assert reached and left[0] > share >= left[1] > share - 0.01
    assert ranked.smallest_cut(lambda n: False) == (len(ranked.roots), False) and ranked.smallest_cut(lambda n: True) == (0, True)


def test_layers_by_pattern_stay_whole(model):
    graph = trace(model)
    masks = Selection(graph, model, Rules(keep=("model.0.*", "model.2[03].*"))).percent(0.7)
    assert all(bool(m.all()) for n, m in masks.items() if n.startswith(("model.0.", "model.20.", "model.23.")))
    with pytest.raises(ValueError, match="no BatchNorm is called nothing"):
        Selection(graph, model, Rules(keep=("nothing.*",)))


def test_knee():
    x = np.linspace(0, 0.8, 9)
    assert knee(x, np.array([0.58, 0.58, 0.58, 0.57, 0.57, 0.56, 0.30, 0.05, 0.0])) == 5
    assert knee(x, np.zeros(9)) == 0


def constant_channels(model, masks):
    """The model with gamma 0, but beta not, on the cut channels: they are constants."""
    new = deepcopy(model)
    modules = dict(new.named_modules())
    with torch.no_grad():
        for name, mask in masks.items():
            modules[name].weight[~mask] = 0.0
    return new


def test_absorbed_constants_of_1x1_readers_are_exact():
    torch.manual_seed(0)
    net = nn.Sequential(Conv(3, 8, 3), nn.MaxPool2d(3, 1, 1), Conv(8, 8, 1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 1))
    randomised(net).double().eval()
    masks = {"0.bn": torch.arange(8) % 2 == 0, "2.bn": torch.arange(8) > 2}
    dense = constant_channels(net, masks)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    small = slim(absorb(dense, masks, [x]), masks)
    with torch.no_grad():
        assert torch.allclose(small(x), dense(x), rtol=0, atol=1e-12)
        assert not torch.allclose(slim(dense, masks)(x), dense(x), atol=1e-3)


def test_absorption_comes_nearer_on_a_whole_yolov5(model):
    graph = trace(model)
    masks = select(graph, model, 0.3)
    dense = constant_channels(model, masks).eval()
    images = [torch.rand(4, 3, 96, 96)]
    with torch.no_grad():
        truth = dense(images[0])[0]
        errors = [float((m.eval()(images[0])[0] - truth).abs().mean()) for m in (slim(dense, masks), slim(absorb(dense, masks, images), masks))]
    assert errors[1] < 0.3 * errors[0]


def test_recalibration_gives_the_images_statistics():
    net = randomised(nn.Sequential(Conv(3, 8, 3), Conv(8, 4, 1)))
    x = torch.rand(8, 3, 16, 16) * 3
    new = recalibrate(net, [x, x])
    with torch.no_grad():
        first = net[0].conv(x)
    assert torch.allclose(new[0].bn.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(new[0].bn.running_var, first.var((0, 2, 3)), rtol=1e-3) and new[0].bn.momentum == net[0].bn.momentum
    assert not new.training and not torch.equal(new[0].bn.running_mean, net[0].bn.running_mean)


def test_a_layer_keeps_its_share_but_no_zeros(model):
    zeros = deepcopy(model)
    with torch.no_grad():
        zeros.model[7].bn.weight[:200] = 0.0  # of 256
        zeros.model[5].bn.weight.mul_(1e-3)   # 128 small ones
    ranked = Selection(trace(zeros), zeros, Rules(min_share=0.25))
    masks = ranked.percent(0.3)
    assert int(masks["model.7.bn"].sum()) <= 56 and int(masks["model.5.bn"].sum()) == 32
    assert int(ranked.cut(len(ranked.roots))["model.7.bn"].sum()) == 56


def test_convolutions_that_fall_out_of_blocked_kernels_are_counted():
    network = nn.Sequential(nn.Conv2d(3, 37, 1), nn.Conv2d(37, 40, 1), nn.Conv2d(40, 13, 1), nn.Conv2d(13, 18, 1), nn.Conv2d(18, 18, 1, groups=18))
    assert misaligned_channels(network)[0].startswith("1 of 4 convolutions read")  # 40 divides, 3 and 13 are less than a block, the last is depthwise
    assert misaligned_channels(network[2:]) == []
