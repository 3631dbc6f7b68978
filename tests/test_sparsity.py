"""The L1 rule and the target, at the right place of the step, on the right layers."""
from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models.config import read_yaml
from models.yolo import Model
from train import complete_gradients, optimizer_step
from training.optimizer import ModelEMA
from training.run import Hook, Step
from training.sparsity_plan import SparsityPlan
from utils.errors import NonFiniteError
from utils.slimming.gamma_l1 import GammaL1, gamma_stats, l1_reach
from utils.slimming.target_sparsity import TargetSparsity


def norm(values=(0.5, -0.2, 0.0)) -> nn.BatchNorm2d:
    m = nn.BatchNorm2d(len(values))
    m.weight.data, m.bias.data = torch.tensor(values), torch.tensor(values).flip(0).clone()
    m.weight.grad, m.bias.grad = torch.ones(len(values)), torch.zeros(len(values))
    return m


def test_the_sources_rule():
    m = norm()
    GammaL1([m], sr=0.01, epochs=10).add_to_gradients(epoch=5)
    s = 0.01 * (1 - 0.9 * 0.5)
    assert torch.allclose(m.weight.grad, 1 + s * torch.tensor([1.0, -1, 0]))
    assert torch.allclose(m.bias.grad, 0.1 * torch.tensor([0.0, -1, 1]))  # 10 * sr, not decayed


def test_fraction_of_a_batch_and_frozen_layers():
    m, frozen, unused = norm(), norm(), norm()
    frozen.requires_grad_(False)
    unused.weight.grad = unused.bias.grad = None
    penalty = GammaL1([m, frozen, unused], sr=0.01, epochs=10, sr_bias=0.0)
    penalty.add_to_gradients(0, batch_fraction=0.25)
    assert torch.allclose(m.weight.grad, 1 + 0.0025 * torch.tensor([1.0, -1, 0])) and not m.bias.grad.any()
    assert torch.equal(frozen.weight.grad, torch.ones(3)) and unused.weight.grad is None


def test_statistics_of_gammas():
    shares = gamma_stats([torch.tensor([0.0, 0.005, -0.05, 0.5]), torch.tensor([1.0])])
    assert shares == pytest.approx({"zero": 0.2, "below_1e-3": 0.2, "below_1e-2": 0.4, "below_1e-1": 0.6})


class _Penalty(Hook):
    def __init__(self, m):
        self.penalty, self.skips = GammaL1([m], 0.1, 1, sr_bias=0.0), []

    def before_step(self):
        self.penalty.add_to_gradients(0)

    def after_step(self, skipped):
        self.skips.append(skipped)


def one_module_run(m: nn.Module, hook: Hook, scaler: torch.amp.GradScaler) -> SimpleNamespace:
    """What a step of the loop looks at, for one module."""
    return SimpleNamespace(scaler=scaler, optimizer=torch.optim.SGD(m.parameters(), lr=1.0), model=m, hooks=[hook],
                           ema=ModelEMA(m), nbs=1, epoch=0, folder=Path("runs/x"), skipped=0,
                           statistics_norm=lambda: m.weight.new_zeros(()))


def step(run: SimpleNamespace) -> None:
    """What the loop does once a step's gradients are there."""
    weight = run.model.weight
    optimizer_step(run, Step(1, 1, weight.new_zeros(1), ["a.jpg"]), weight.new_zeros(3))


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_loss_scaling_and_clipping_do_not_touch_the_penalty(scale):
    """Under AMP the gradients are scaled and the clip is hit: gamma must still move by lr * sr, all of it."""
    m = nn.BatchNorm2d(2, affine=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    hook = _Penalty(m)
    scaler.scale((m.weight * 0).sum() + (m.bias * 1e6).sum()).backward()
    step(one_module_run(m, hook, scaler))
    assert torch.allclose(m.weight, torch.full((2,), 0.9)) and hook.skips == [False]


def test_a_step_with_an_infinity_is_skipped_whole():
    m = nn.BatchNorm2d(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    hook = _Penalty(m)
    scaler.scale((m.weight * float("inf")).sum()).backward()
    step(run := one_module_run(m, hook, scaler))
    assert torch.equal(m.weight, torch.ones(2)) and hook.skips == [True] and run.ema.updates == 0


def test_the_reach_of_l1_is_what_the_optimizers_do():
    """A gamma that nothing holds, under SGD with momentum and under AdamW, against the formula."""
    for name, sr, steps in (("SGD", 0.01, 400), ("AdamW", 0.3, 400)):
        m = norm((5.0, 5.0))
        parameters = [m.weight, m.bias]
        optimizer = torch.optim.AdamW(parameters, 0.01, weight_decay=0)
        if name == "SGD":
            optimizer = torch.optim.SGD(parameters, 0.01, 0.9)
        penalty = GammaL1([m], sr, epochs=4, sr_bias=0.0)
        for step in range(steps):
            m.weight.grad, m.bias.grad = torch.zeros(2), torch.zeros(2)
            penalty.add_to_gradients(step // 100)
            optimizer.step()
        coefficients = [penalty.coefficient(i // 100) for i in range(steps)]
        most = l1_reach([0.01] * steps, coefficients, 0.9 if name == "SGD" else None)
        moved = 5 - float(m.weight.detach()[0])
        assert (0.94 if name == "SGD" else 0.7) * most < moved <= most  # Adam: while sr falls, sqrt(v) lags


Norms = list[nn.BatchNorm2d]


def importance_run(share=0.5, steps=200, sizes=(10, 30, 3), seed=0) -> tuple[Norms, Norms, TargetSparsity, list[int]]:
    """BatchNorms whose odd channels matter a hundred times more than the even ones, trained to a target."""
    norms, copies = [nn.BatchNorm2d(n) for n in sizes], [nn.BatchNorm2d(n) for n in sizes]
    target, counts = TargetSparsity(norms, share, copies), []
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for m in norms:
            matters = torch.where(torch.arange(m.num_features) % 2 == 1, 1.0, 0.01)
            m.weight.grad = matters * torch.randn(m.num_features, generator=generator)
            m.bias.grad = torch.zeros(m.num_features)
        target.observe()
        target.shrink((step + 1) / steps)
        counts.append(sum(int((m.weight == 0).sum()) for m in norms))
    return norms, copies, target, counts


def test_target_is_reached_exactly_in_time_by_the_least_important_channels():
    norms, copies, target, counts = importance_run(share=0.4)
    assert counts[-1] == round(0.4 * 43) and counts[140] == counts[-1] and counts == sorted(counts) and counts[10] == 0
    for m, copy in zip(norms[:2], copies):
        assert not (m.weight[1::2] == 0).any()  # what matters is alive
        assert torch.equal(m.weight == 0, m.bias == 0) or not m.bias.any()
        assert torch.equal(copy.weight == 0, m.weight == 0)  # and the copy shows it
    assert not (norms[2].weight == 0).any()  # three channels: fewer than every layer keeps


def test_every_layer_keeps_its_floor_however_high_the_target():
    norms, _, target, counts = importance_run(share=0.99)
    assert [int((m.weight != 0).sum()) for m in norms] == [4, 4, 3]


@pytest.mark.slow
def test_target_resumes_exactly():
    whole = importance_run()[2]
    half = importance_run(steps=100)[2]
    other = TargetSparsity([nn.BatchNorm2d(n) for n in (10, 30, 3)], 0.5)
    other.load_state_dict(half.state_dict())
    assert torch.equal(other.score, half.score) and torch.equal(other.dead, half.dead)
    assert not torch.equal(whole.score, half.score)


def test_an_infinite_gradient_does_not_poison_the_importances():
    m = norm()
    target = TargetSparsity([m], 0.5)
    target.observe()
    before = target.score.clone()
    m.weight.grad[0] = float("inf")
    target.observe()
    assert torch.equal(target.score, before) and before.any()


def test_target_leaves_frozen_layers_alone():
    m, frozen = norm((0.01,) * 20), norm((0.01,) * 20)
    frozen.requires_grad_(False)
    target = TargetSparsity([frozen, m], 0.5, [nn.BatchNorm2d(20), nn.BatchNorm2d(20)])
    target.shrink(1.0)
    assert int((m.weight == 0).sum()) == 10 and not (frozen.weight == 0).any()


def test_costs_make_the_expensive_go_first():
    cheap, dear = norm((0.01,) * 20), norm((0.01,) * 20)
    cheap.weight.grad, dear.weight.grad = torch.rand(20) + 1, torch.rand(20) + 2  # the dear ones matter a little more
    target = TargetSparsity([cheap, dear], 0.4, costs=[np.ones(20), np.full(20, 100.0)])
    target.observe()
    target.shrink(1.0)
    assert int((dear.weight == 0).sum()) == 16 and not (cheap.weight == 0).any()


def test_channels_that_are_one_go_at_once_and_count_each():
    a, b, c = norm((0.01,) * 20), norm((0.01,) * 20), norm((0.01,) * 20)
    for m, size in ((a, 1.0), (b, 1.0), (c, 1.5)):
        m.weight.grad, m.bias.grad = size * (torch.arange(20) + 1.0), torch.zeros(20)
    groups = [np.arange(20), np.arange(20), np.arange(20, 40)]  # a and b are the same channels
    target = TargetSparsity([a, b, c], 0.5, groups=groups)
    target.observe()
    target.shrink(1.0)
    zero = [m.weight == 0 for m in (a, b, c)]
    assert torch.equal(zero[0], zero[1]) and sum(int(z.sum()) for z in zero) in (29, 30)
    # Importances add up over a group: 2 g^2 for a and b together, 2.25 g^2 for c.
    assert int(zero[0].sum()) >= int(zero[2].sum()) and bool(zero[0][:9].all()) and not zero[0][16:].any()


def block_run(norms, target, steps=300, seed=0, first=0, last=None):
    """Steps first..last of a run; the weights follow the gradients a little.

    Gradients are random, but those of a channel are always of its own size.
    """
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(norms))]
    sizes = [10 ** (2 * torch.rand(m.num_features, generator=g) - 2) for m, g in zip(norms, generators)]
    for step in range(first, steps if last is None else last):
        generator = torch.Generator().manual_seed(1000 + step)
        for m, size in zip(norms, sizes):
            m.weight.grad = size * torch.randn(m.num_features, generator=generator)
            m.bias.grad = size * torch.randn(m.num_features, generator=generator)
            m.weight.data -= 0.02 * m.weight.grad
        target.observe()
        target.shrink((step + 1) / steps)


@pytest.mark.slow
@pytest.mark.parametrize("round_to", [2, 8, 16])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.99])
def test_blocks_leave_multiples_and_reach_the_share_but_for_a_block(round_to, share):
    norms = [nn.BatchNorm2d(n) for n in (64, 5, 16, 40, 128, 33, 64)]
    groups = [np.arange(n) + 1000 * i for i, n in enumerate((64, 5, 16, 40, 128, 33))]
    groups.append(np.arange(64))  # first and last are one
    target = TargetSparsity(norms, share, groups=groups, round_to=round_to)
    block_run(norms, target)
    left = [int((m.weight != 0).sum()) for m in norms]
    assert all(n % round_to == 0 or n == m.num_features for n, m in zip(left, norms)), left
    assert torch.equal(norms[0].weight != 0, norms[-1].weight != 0)
    zeros, most = sum(m.num_features for m in norms) - sum(left), round(min(share, target.most) * target.total)
    # The lowest block that no longer fits ends the list; the largest are two layers' at once.
    assert most - 2 * round_to < zeros <= most


@pytest.mark.slow
def test_blocks_resume_exactly():
    norms, half = ([nn.BatchNorm2d(n) for n in (64, 40)] for _ in range(2))
    block_run(norms, TargetSparsity(norms, 0.5, round_to=8))
    block_run(half, before := TargetSparsity(half, 0.5, round_to=8), last=250)
    again = TargetSparsity(half, 0.5, round_to=8)
    again.load_state_dict(before.state_dict())
    assert before.settled and again.settled
    block_run(half, again, first=250)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(norms, half))


def test_nothing_goes_after_the_last_moment():
    """37 channels may go: a block of 32, and the next of 32 ends the list.

    A block of 4 that later ranks before it comes too late to heal.
    """
    norms = [norm((1.0,) * 36), norm((1.0,) * 64), norm((1.0,) * 64)]
    target = TargetSparsity(norms, 37 / 164, round_to=32)
    scores = [torch.arange(n) + 0.0 for n in (36, 64, 64)]
    target.score = torch.cat((scores[0] + 200, scores[1], scores[2] + 100))
    target.shrink(0.81)
    alive = [int((m.weight != 0).sum()) for m in norms]
    assert alive == [36, 32, 64]
    target.score = torch.cat((scores[0], scores[1], scores[2] + 100))
    target.shrink(0.9)
    assert [int((m.weight != 0).sum()) for m in norms] == alive and float(norms[0].weight.detach().min()) == 1.0


@pytest.mark.parametrize("score", [torch.ones(40), torch.cat((torch.zeros(36), torch.ones(4)))],
                         ids=["all equal", "nearly all 0"])
def test_ties_leave_multiples(score):
    m = norm((0.01,) * 40)
    target = TargetSparsity([m], 0.9, round_to=16)
    target.score = score
    target.shrink(1.0)
    assert int((m.weight != 0).sum()) == 16 == round((1 - target.most) * 40)


def test_channels_of_a_layer_that_are_coupled_to_others_or_among_themselves():
    """c is a sum with the concatenation of a and b.

    d is read by a grouped convolution, four of its channels are one.
    """
    norms = [norm((0.01,) * n) for n in (24, 24, 48, 128)]
    groups = [np.arange(24), np.arange(24, 48), np.arange(48), np.tile(np.arange(100, 132), 4)]
    target = TargetSparsity(norms, 0.7, groups=groups, round_to=16)
    target.score = torch.arange(80.0)
    target.shrink(1.0)
    a, b, c, d = (int((m.weight != 0).sum()) for m in norms)
    assert (a, b, c) == (16, 16, 32) and d % 16 == 0 and 16 <= d < 128
    many = [nn.BatchNorm2d(24) for _ in range(20)]
    sum_of_all = [np.arange(24) + 24 * i for i in range(20)] + [np.arange(480)]
    target = TargetSparsity([*many, nn.BatchNorm2d(480)], 0.5, groups=sum_of_all)
    assert target.most == pytest.approx(1 - 4 / 24)  # each of the 20 keeps 4


@pytest.mark.slow
@pytest.mark.parametrize("width, share, expected", [
    (0.25, 0.5, 16), (0.25, 0.75, 8), (0.125, 0.6, 8), (0.0625, 0.5, 8)])
def test_blocks_are_as_large_as_leaves_a_choice(width, share, expected):
    model = Model({**read_yaml("yolov5n.yaml"), "width_multiple": width}, nc=3)
    opt = Namespace(sr=0.0, sr_bias=None, epochs=1, target_sparsity=share, target=None, round_to=None,
                    per_flop=False, shortcuts="skip", layers=False, keep=[], only=[])
    plan = SparsityPlan(opt, 64, model, set())
    assert plan.target is not None
    assert plan.round_to == expected and share <= 0.9 * plan.target.most


def test_a_block_of_one_kind_goes_in_the_order_of_its_channels():
    """The least important 16 of 32, whatever their places: not the 16 that lie side by side."""
    m = norm((0.01,) * 32)
    m.weight.grad = torch.randperm(32, generator=torch.Generator().manual_seed(1)) + 1.0
    m.bias.grad = torch.zeros(32)
    target = TargetSparsity([m], 0.5, round_to=16)
    target.observe()
    target.shrink(1.0)
    assert torch.equal(m.weight == 0, m.weight.grad <= 16)


@pytest.mark.parametrize("loss, gradient, statistics, scaling, word", [
    (float("nan"), 1.0, 0.0, True, "loss"),
    (1.0, float("inf"), 0.0, False, "gradient"),
    (1.0, 1.0, float("inf"), True, "running statistic of a BatchNorm"),
    (1.0, float("inf"), 0.0, True, None)])  # the scaler will skip the step
def test_what_is_not_finite_stops_the_step_and_is_named(loss, gradient, statistics, scaling, word):
    m = nn.BatchNorm2d(2)
    run = one_module_run(m, _Penalty(m), torch.amp.GradScaler("cpu", enabled=scaling))
    run.epoch, run.folder, run.statistics_norm = 4, Path("runs/x"), lambda: torch.tensor(statistics)
    run.scaler.scale((m.weight * gradient).sum()).backward()
    arguments = run, Step(1, 1, torch.tensor([loss]), ["d/a.jpg"]), torch.tensor([0.1, 0.2, 0.3])
    if word is None:
        losses, skipped = complete_gradients(*arguments)
        assert losses == pytest.approx([0.1, 0.2, 0.3]) and skipped
        return
    with pytest.raises(NonFiniteError, match=rf"a {word} is not finite in epoch 5, batch of a.jpg .*last.pt is whole"):
        complete_gradients(*arguments)
