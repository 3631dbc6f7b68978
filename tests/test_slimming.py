"""The heart: graph, ranking, surgery, the pruning engine. Properties on random masks, exactness in float64."""
from __future__ import annotations

import os
from copy import deepcopy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from models.common import Bottleneck, Conv
from models.yolo import Model
from tests.blocks import random_masks, randomised
from utils.slimming import SCORES, Masks, Pruner, Rules, compose_masks, masked, slim, trace
from utils.slimming.compensation import absorb, recalibrate
from utils.slimming.cost import CostModel, profile
from utils.slimming.equivalence import largest_difference
from utils.slimming.ranking import knee
from utils.slimming.result import misaligned_channels
from utils.slimming.surgery import resize_like
from utils.slimming.timing import latency, medians, on_first_core


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return randomised(Model("yolov5n.yaml", nc=3))


def cut_at_random(model: nn.Module, seed: int) -> Masks:
    """Random masks; coupled and frozen channels stay."""
    return random_masks(trace(model), seed, coupled=False)


def lowest(model: nn.Module, percent: float, rules: Rules = Rules()) -> Masks:  # noqa: B008
    """Masks that cut the channels with the smallest gammas."""
    return Pruner(model, 64).rank(rules=rules).preview(percent)[0]


def test_graph_of_a_yolov5(model):
    graph = trace(model)
    out = set(graph.norms) - set(graph.prunable_norms())
    # Coupled by the backbone's shortcuts: each such C3's cv1 and its Bottlenecks' cv2. The inner cv1 is free.
    assert out == {"model.2.cv1.bn", "model.2.m.0.cv2.bn",
                   "model.4.cv1.bn", "model.4.m.0.cv2.bn", "model.4.m.1.cv2.bn",
                   "model.6.cv1.bn", "model.6.m.0.cv2.bn", "model.6.m.1.cv2.bn", "model.6.m.2.cv2.bn",
                   "model.8.cv1.bn", "model.8.m.0.cv2.bn"}
    assert len(graph.norms) == 57 and not graph.notes
    assert model.training  # tracing left the mode alone


def test_norms_for_training_follow_shortcuts_and_what_is_left_out(model):
    graph = trace(model)
    assert len(graph.prunable_norms()) == 46 and set(graph.prunable_norms(coupled=True)) == set(graph.norms)
    # One of a group's layers left out: no other layer of the group could be cut either.
    left = graph.prunable_norms(coupled=True, leave=["model.4.m.0.cv2.bn", "model.0.bn"])
    assert set(graph.norms) - set(left) == {"model.4.cv1.bn", "model.4.m.0.cv2.bn", "model.4.m.1.cv2.bn", "model.0.bn"}


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("percent", [0.0, 0.3, 0.5, 0.8, 0.999])
def test_a_cut_takes_what_was_asked_and_no_layer_vanishes(model, percent):
    masks = lowest(model, percent, Rules(min_channels=2))
    prunable = trace(model).prunable()
    total, gone = sum(int(p.sum()) for p in prunable.values()), sum(int((~m).sum()) for m in masks.values())
    assert all(int(m.sum()) >= 2 for m in masks.values())
    assert all(bool(m[~prunable[n]].all()) for n, m in masks.items())
    if percent < 0.9:
        assert gone == round(percent * total)
    assert largest_difference(masked(model, masks), slim(model, masks)) < 1e-9
    if percent == 0.0:
        assert profile(slim(model, masks), 64) == profile(model, 64)


@pytest.mark.slow
def test_channels_are_ranked_by_order_when_all_scores_are_equal(model):
    flat = deepcopy(model)
    with torch.no_grad():
        for m in flat.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.zero_()
    total = sum(int(p.sum()) for p in trace(flat).prunable().values())
    first, second = lowest(flat, 0.5), lowest(flat, 0.5)
    assert sum(int((~m).sum()) for m in first.values()) == round(0.5 * total)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.slow
def test_the_smallest_go_first_and_the_safe_threshold_leaves_every_layer_a_channel(model):
    pruner = Pruner(model, 64).rank()
    prunable = pruner.graph.prunable()
    safe = pruner.safe_threshold()
    masks = pruner.preview(safe.percent)[0]
    cut = torch.cat([pruner.norms[n].weight.detach()[~m] for n, m in masks.items()])
    kept = torch.cat([pruner.norms[n].weight.detach()[m & prunable[n]] for n, m in masks.items()])
    assert cut.max() <= kept.min() and cut.max() < safe.gamma


@pytest.mark.slow
def test_two_rounds_compose(model):
    first = lowest(model, 0.4)
    once = slim(model, first)
    second = lowest(once, 0.4)
    twice, both = slim(once, second), compose_masks(first, second)
    direct = slim(model, both)
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), direct.state_dict().values()))
    assert twice.masks.keys() == both.keys() and all(torch.equal(twice.masks[n], both[n]) for n in both)


@pytest.mark.slow
def test_shapes_rebuild_a_slim_model(model):
    narrow = slim(model, lowest(model, 0.6))
    again = Model(model.yaml)
    resize_like(again, narrow.state_dict())
    again.load_state_dict(narrow.state_dict())
    assert largest_difference(narrow, again) == 0.0
    assert profile(again, 64) == profile(narrow, 64)


def test_masks_that_contradict_each_other_or_the_graph_are_refused(model):
    with pytest.raises(ValueError, match="disagrees with that of a layer that shares its channels"):
        slim(model, {"model.2.cv1.bn": torch.arange(16) > 0, "model.2.m.0.cv2.bn": torch.ones(16).bool()})
    with pytest.raises(ValueError, match="no such BatchNorm"):
        slim(model, {"model.99.bn": torch.ones(16).bool()})
    with pytest.raises(ValueError, match="has 15 channels, the layer has 16"):
        slim(model, {"model.0.bn": torch.ones(15).bool()})
    strange = _Strange()
    with pytest.raises(ValueError, match="must stay"):
        slim(strange, {"d.bn": torch.arange(4) > 0})  # the output


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
    masks = lowest(net, 0.5)
    assert torch.equal(masks["0.bn"], masks["1.bn"])
    narrow = slim(net, masks)
    assert narrow[1].conv.groups == narrow[0].conv.out_channels == int(masks["0.bn"].sum())
    assert largest_difference(masked(net, masks), narrow) < 1e-9


@pytest.mark.slow
def test_cost_counts(model):
    cost = profile(Model("yolov5n.yaml"), 640)
    assert cost.parameters == 1_872_157 and cost.gflops == pytest.approx(4.5, abs=0.1)
    assert profile(model, 320).flops * 4 == profile(model, 640).flops
    assert all(ms > 0 for ms in latency([deepcopy(model).eval()], 64, runs=2))


def test_medians_take_few_turns_where_they_are_long():
    calls = []
    values = medians([lambda: calls.append("a"), lambda: calls.append("b")], runs=7)
    assert calls == ["a", "b"] * 10 and len(values) == 2
    calls.clear()
    medians([lambda: calls.append("a")], runs=7, seconds=0.0)
    assert len(calls) == 4  # one to warm up, three to measure


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_only_the_timed_calls_stay_on_one_core():
    cores, seen = os.sched_getaffinity(0), []
    medians([lambda: seen.append(len(os.sched_getaffinity(0)))], runs=3)
    assert seen == [len(cores)] + [1] * 5  # threads that the first call starts may run anywhere
    with pytest.raises(ZeroDivisionError):
        with on_first_core():
            raise ZeroDivisionError
    assert os.sched_getaffinity(0) == cores


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.0.bn", "model.2.m.0.cv1.bn", "model.9.cv1.bn", "model.17.cv3.bn"])
def test_freed_flops_are_what_a_cut_frees(model, name):
    graph = trace(model)
    freed = CostModel(model, graph, 64).flops_per_channel()[name]
    masks = {n: torch.ones(len(ids), dtype=torch.bool) for n, ids in graph.norms.items()}
    masks[name][3] = False
    assert profile(model, 64).flops - profile(slim(model, masks), 64).flops == freed[3] == freed[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_predicted_cost_is_the_slim_models(model, seed):
    graph, masks = trace(model), cut_at_random(model, seed)
    cost = profile(slim(model, masks), 64)
    assert CostModel(model, graph, 64).remaining(graph.kept(masks)) == (cost.parameters, cost.flops)


RULES = [Rules(), Rules(coupled=True), Rules(round_to=8), Rules(coupled=True, round_to=4, min_channels=3)]


@pytest.mark.slow
@pytest.mark.parametrize("rules, score", [*zip(RULES, SCORES), (RULES[3], "gamma"), (RULES[1], "taylor")], ids=str)
def test_every_rule_is_kept_and_every_cut_exact(model, rules, score):
    def losses(candidate):
        yield sum(y.square().mean() for y in candidate(torch.rand(2, 3, 64, 64))[1])

    pruner = Pruner(model, 64, losses=losses).rank(score, rules, per_flop=score == "l1")
    masks = pruner.preview(0.5)[0]
    prunable = pruner.graph.prunable()
    for name, mask in masks.items():
        left = int(mask.sum())
        assert left >= min(rules.min_channels, len(mask))
        assert left == len(mask) or left % rules.round_to == 0 or left < rules.round_to, name
        assert rules.coupled or bool(mask[~prunable[name]].all())
    coupled = [n for n, free in prunable.items() if not free.any()]
    assert any(not masks[n].all() for n in coupled) == rules.coupled
    assert largest_difference(masked(model, masks), slim(model, masks)) < 1e-9


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6),
                                    nn.Conv2d(6, 2, 1)))


def test_the_taylor_score_is_what_a_loss_loses_to_first_order(net):
    """A loss that is linear in gamma and beta loses exactly gamma * dL/dgamma + beta * dL/dbeta where both become 0."""
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)

    def losses(model):
        yield model.double()(images).sum()

    pruner = Pruner(net, 32, losses=losses)
    scores = pruner.rank("taylor").ranking.scores
    name = list(pruner.norms)[-1]
    before = float(next(losses(deepcopy(net))).detach())
    for channel, group in enumerate(pruner.graph.group[pruner.graph.norms[name]]):
        mask = torch.ones(len(pruner.norms[name].weight), dtype=torch.bool)
        mask[channel] = False
        lost = before - float(next(losses(masked(net, {name: mask}))).detach())
        assert scores[group] == pytest.approx(lost ** 2, rel=1e-6)
    assert all(p.grad is None for p in net.parameters())


def test_auto_ranks_by_gamma_only_where_gammas_tell(net):
    def losses(model):
        yield model(torch.rand(2, 3, 32, 32)).square().mean()

    pruner = Pruner(net, 32, losses=losses)
    for norm in pruner.norms.values():
        norm.weight.data.fill_(1.0)
    assert pruner.rank("auto").cut(0.4).score == "taylor"
    for norm in pruner.norms.values():
        norm.weight.data[::2] = 0.05
    result = pruner.rank("auto").cut(0.4)
    assert result.score == "gamma" and result.gammas_separate


def test_a_sweep_shows_the_cuts_that_auto_would_make(net):
    """It used to rank by gamma throughout."""
    pruner = Pruner(net, 32, losses=lambda model: [model(torch.rand(2, 3, 32, 32)).square().mean()],
                    evaluate=lambda model: {"mAP50-95": 0.5}, milliseconds=lambda models: [1.0] * len(models))
    for norm in pruner.norms.values():
        norm.weight.data.fill_(1.0)
        norm.weight.data[::4] = 0.05
    assert [row["score"] for row in pruner.rank("auto").sweep([0.0, 0.2, 0.6])] == ["gamma", "gamma", "taylor"]
    assert [pruner.rank("auto").cut(percent).score for percent in (0.2, 0.6)] == ["gamma", "taylor"]
    assert [pruner.score_for(percent) for percent in (0.6, 0.2)] == ["taylor", "gamma"]
    assert {row["score"] for row in pruner.rank("gamma").sweep([0.0, 0.6])} == {"gamma"}


@pytest.mark.slow
def test_a_cut_depends_on_its_arguments_only(net):
    """A cut for which gammas do not tell used to make taylor the score of all later cuts."""
    def pruner() -> Pruner:
        torch.manual_seed(1)
        images = torch.rand(2, 3, 32, 32)
        return Pruner(net, 32, losses=lambda model: [model(images).square().mean()]).rank("auto")

    with torch.no_grad():
        net[1].weight.fill_(1.0)
        net[3].weight.copy_(torch.tensor([1.0, 0.9, 0.05, 0.04, 1.0, 1.0]))
    asked = [{"percent": 0.6}, {"percent": 0.14}, {"target": ("params", 0.5)}, {"percent": 0.0}, {"percent": 0.6}]
    together, alone = pruner(), [pruner().cut(**how) for how in asked]
    for how, expected in zip(asked, alone):
        result = together.cut(**how)
        assert result.score == expected.score and result.report == expected.report
        assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())
    assert [result.score for result in alone] == ["taylor", "gamma", "taylor", "gamma", "taylor"]
    assert all(map(torch.equal, together.preview(0.6)[0].values(), alone[0].masks.values()))


SHARES = [Rules(), Rules(keep=("0.bn",)), Rules(keep=("1.cv2.bn",), coupled=True), Rules(coupled=True),
          Rules(min_share=0.5), Rules(min_share=0.25, round_to=4), Rules(min_channels=9, keep=("3.*",))]


@pytest.mark.slow
@pytest.mark.parametrize("score, empty", [("gamma", False), ("gamma", True), ("l1", False)])
@pytest.mark.parametrize("rules", SHARES, ids=str)
def test_every_share_is_one_of_the_channels_that_may_go(rules, score, empty):
    """Kept layers and those that share channels with them used to count for --percent, and not for the hints."""
    torch.manual_seed(0)
    net = randomised(nn.Sequential(Conv(3, 16, 3), Bottleneck(16, 16), Conv(16, 24, 3, 2), Conv(24, 12, 1),
                                   nn.Conv2d(12, 2, 1)))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            zeros = norm.num_features // 3 if norm is not norms[-1] or not empty else norm.num_features
            norm.weight[:zeros] = norm.bias[:zeros] = 0.0
    pruner = Pruner(net, 32).rank(score, rules)
    first = pruner.cut(0.4)
    held = {"0.bn": "0.bn" in rules.keep or not rules.coupled or "1.cv2.bn" in rules.keep,
            "1.cv2.bn": not rules.coupled or "1.cv2.bn" in rules.keep, "3.bn": "3.*" in rules.keep}
    assert all(bool(first.prunable[name].any()) != stays for name, stays in held.items())
    total = sum(int(mask.sum()) for mask in first.prunable.values())
    gone = sum(int((~mask).sum()) for mask in first.masks.values())
    assert len(first.gammas) == total == pruner.ranking.total
    assert first.achieved == gone / total and gone <= round(0.4 * total)
    unused, below = pruner.cut(first.unused), pruner.rank("gamma", rules).cut(first.safe.percent)
    assert Pruner(net, 32).rank(score, rules, per_flop=True).safe_threshold() == first.safe
    for name, norm in pruner.norms.items():
        cut = ~unused.masks[name]
        assert bool((norm.weight[cut] == 0).all() and (norm.bias[cut] == 0).all())
    assert below.threshold < first.safe.gamma or not first.safe.percent
    assert first.unused > 0 or score == "l1" or rules.round_to > 1


@pytest.mark.parametrize("change", [{"min_channels": 0}, {"round_to": 0}, {"min_share": 1.1}, {"min_share": -0.1}])
def test_rules_that_can_not_be_are_refused(change):
    with pytest.raises(ValueError, match="at least 1 and min_share between 0 and 1"):
        Rules(**change)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_target_is_met_by_the_smallest_cut(model, share):
    pruner = Pruner(model, 64).rank(rules=Rules(coupled=True))
    costs, ranking = pruner.costs, pruner.ranking
    full = profile(model, 64).flops
    groups, reached = ranking.smallest_cut(lambda n: costs.remaining(ranking.keep_groups(n))[1] <= share * full)
    before, at = (pruner.graph.masks(ranking.keep_groups(n)) for n in (groups - 1, groups))
    left = [profile(slim(model, masks), 64).flops / full for masks in (before, at)]
    assert reached and left[0] > share >= left[1] > share - 0.01
    result = pruner.cut(target=("flops", share))
    assert all(torch.equal(result.masks[name], at[name]) for name in at)
    assert result.target.reached and result.target.value == pytest.approx(left[1])
    assert ranking.smallest_cut(lambda n: False) == (len(ranking.groups), False)
    assert ranking.smallest_cut(lambda n: True) == (0, True)


@pytest.mark.slow
def test_a_target_out_of_reach_is_said_and_a_limit_is_not_exceeded(model):
    rules = Rules(min_share=0.5)
    result = Pruner(model, 64).rank(rules=rules).cut(target=("params", 0.01))
    assert not result.target.reached and result.target.value > 0.01
    # Accuracy that falls in proportion to the channels that are masked: the largest cut that loses at most 0.1.
    total = sum(len(ids) for ids in trace(model).norms.values())

    def accuracy(candidate: nn.Module) -> dict[str, float]:
        norms = [m for m in candidate.modules() if isinstance(m, nn.BatchNorm2d)]
        return {"mAP50-95": 1 - sum(int(((m.weight == 0) & (m.bias == 0)).sum()) for m in norms) / total}

    result = Pruner(model, 64, evaluate=accuracy).rank().cut(target=("map-drop", 0.1))
    gone = sum(int((~mask).sum()) for mask in result.masks.values())
    assert gone == int(0.1 * total) and result.target.reached and 0.099 < -result.target.value <= 0.1


@pytest.mark.slow
def test_what_the_engine_is_not_given_is_asked_for(model):
    pruner = Pruner(model, 64).rank()
    for question in (lambda: pruner.cut(target=("map-drop", 0.1)), lambda: pruner.sweep([0.5])):
        with pytest.raises(ValueError, match=r"give Pruner\(..., evaluate=\)"):
            question()
    for asked in ({}, {"percent": 0.5, "target": ("flops", 0.5)}):
        with pytest.raises(ValueError, match="either percent or target"):
            pruner.cut(**asked)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        pruner.cut(percent=1.0)
    with pytest.raises(ValueError, match="no BatchNorm channel"):
        Pruner(nn.Conv2d(3, 8, 1))


@pytest.mark.slow
def test_a_result_tells_of_its_cut(model):
    result = Pruner(model, 64).rank().cut(percent=0.4)
    prunable = trace(model).prunable()
    total, gone = sum(int(p.sum()) for p in prunable.values()), sum(int((~m).sum()) for m in result.masks.values())
    assert result.achieved == gone / total == pytest.approx(0.4, abs=1e-3) and len(result.gammas) == total
    assert result.threshold == float(result.gammas.sort().values[gone - 1]) and result.difference < 1e-9
    assert result.model is model and all(torch.equal(result.slim.masks[n], m) for n, m in result.masks.items())
    rows = {row["layer"]: row for row in result.report["layers"]}
    assert {n: (row["original"], row["remaining"]) for n, row in rows.items()} == {
        n: (len(m), int(m.sum())) for n, m in result.masks.items()}
    assert {n for n, row in rows.items() if not row["prunable"]} == {n for n, p in prunable.items() if not p.any()}


@pytest.mark.slow
def test_layers_by_pattern_stay_whole(model):
    masks = lowest(model, 0.7, Rules(keep=("model.0.*", "model.2[03].*")))
    assert all(bool(m.all()) for n, m in masks.items() if n.startswith(("model.0.", "model.20.", "model.23.")))
    with pytest.raises(ValueError, match="no BatchNorm is called nothing"):
        Pruner(model, 64).rank(rules=Rules(keep=("nothing.*",)))


@pytest.fixture
def one_thread():
    """float64 convolutions of one channel each, a thousand of them: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("coupled", [False, True], ids=["uncoupled", "coupled"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_networks_of_others_are_cut_without_any_yolo(one_thread, name, coupled):
    torch.manual_seed(0)
    network = randomised(getattr(torchvision.models, name)(weights=None))
    pruner = Pruner(network, 64).rank(rules=Rules(coupled=coupled))
    assert not pruner.graph.notes  # what the classifier reads goes, too
    whole = profile(network, 64)

    first = pruner.cut(percent=0.3)
    assert first.achieved == pytest.approx(0.3, abs=0.002) and first.difference < 1e-9
    assert largest_difference(network, first.masked) > 0.01  # the check compares models that differ from the first
    cost = profile(first.slim, 64)
    assert pruner.preview(0.3)[1:] == (cost.parameters, cost.flops) and cost.flops < 0.9 * whole.flops

    result = pruner.cut(target=("flops", 0.6))
    cost = profile(result.slim, 64)
    assert result.target.reached and result.difference < 1e-9
    assert result.target.value == cost.flops / whole.flops and 0.59 < result.target.value <= 0.6

    second = Pruner(first.slim, 64).rank(rules=Rules(coupled=coupled)).cut(percent=0.3)
    both = compose_masks(first.masks, second.masks)
    direct = slim(network, both)
    assert all(map(torch.equal, second.slim.state_dict().values(), direct.state_dict().values()))
    assert largest_difference(masked(network, both), second.slim) < 1e-9


def test_knee():
    x = np.linspace(0, 0.8, 9).tolist()
    assert knee(x, [0.58, 0.58, 0.58, 0.57, 0.57, 0.56, 0.30, 0.05, 0.0]) == 5
    assert knee(x, [0.0] * 9) == 0


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
    net = nn.Sequential(Conv(3, 8, 3), nn.MaxPool2d(3, 1, 1), Conv(8, 8, 1), nn.Upsample(scale_factor=2),
                        nn.Conv2d(8, 4, 1))
    randomised(net).double().eval()
    masks = {"0.bn": torch.arange(8) % 2 == 0, "2.bn": torch.arange(8) > 2}
    dense = constant_channels(net, masks)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    small = slim(absorb(dense, trace(dense), masks, [x]), masks)
    with torch.no_grad():
        assert torch.allclose(small(x), dense(x), rtol=0, atol=1e-12)
        assert not torch.allclose(slim(dense, masks)(x), dense(x), atol=1e-3)


@pytest.mark.slow
def test_absorption_comes_nearer_on_a_whole_yolov5(model):
    masks = lowest(model, 0.3)
    dense = constant_channels(model, masks).eval()
    images = [torch.rand(4, 3, 96, 96)]
    repaired = slim(absorb(dense, trace(dense), masks, images), masks)
    with torch.no_grad():
        truth = dense(images[0])[0]
        errors = [float((m.eval()(images[0])[0] - truth).abs().mean()) for m in (slim(dense, masks), repaired)]
    assert errors[1] < 0.3 * errors[0]


def test_recalibration_gives_the_images_statistics():
    net = randomised(nn.Sequential(Conv(3, 8, 3), Conv(8, 4, 1)))
    x = torch.rand(8, 3, 16, 16) * 3
    new = recalibrate(net, [x, x])
    with torch.no_grad():
        first = net[0].conv(x)
    assert torch.allclose(new[0].bn.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(new[0].bn.running_var, first.var((0, 2, 3)), rtol=1e-3)
    assert new[0].bn.momentum == net[0].bn.momentum
    assert not new.training and not torch.equal(new[0].bn.running_mean, net[0].bn.running_mean)


@pytest.mark.slow
def test_a_layer_keeps_its_share_but_no_zeros(model):
    zeros = deepcopy(model)
    with torch.no_grad():
        zeros.model[7].bn.weight[:200] = 0.0  # of 256
        zeros.model[5].bn.weight.mul_(1e-3)   # 128 small ones
    pruner = Pruner(zeros, 64).rank(rules=Rules(min_share=0.25))
    masks = pruner.preview(0.3)[0]
    assert int(masks["model.7.bn"].sum()) <= 56 and int(masks["model.5.bn"].sum()) == 32
    everything = pruner.ranking.keep_groups(len(pruner.ranking.groups))
    assert int(pruner.graph.masks(everything)["model.7.bn"].sum()) == 56


def test_convolutions_that_fall_out_of_blocked_kernels_are_counted():
    network = nn.Sequential(nn.Conv2d(3, 37, 1), nn.Conv2d(37, 40, 1), nn.Conv2d(40, 13, 1), nn.Conv2d(13, 18, 1),
                            nn.Conv2d(18, 18, 1, groups=18))
    # 40 divides, 3 and 13 are less than a block, the last is depthwise.
    assert misaligned_channels(network)[0].startswith("1 of 4 convolutions read")
    assert misaligned_channels(network[2:]) == []
