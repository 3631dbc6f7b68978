"""The L1 rule at the right place of the step, on the right layers."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train import Hook, optimizer_step
from utils.optim import ModelEMA
from utils.slimming.sparsity import GammaL1, gauge


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


def test_share_of_a_step_and_frozen_layers():
    m, frozen, unused = norm(), norm(), norm()
    frozen.requires_grad_(False)
    unused.weight.grad = unused.bias.grad = None
    penalty = GammaL1([m, frozen, unused], sr=0.01, epochs=10, sr_bias=0.0)
    penalty.add_to_gradients(0, share=0.25)
    assert torch.allclose(m.weight.grad, 1 + 0.0025 * torch.tensor([1.0, -1, 0])) and not m.bias.grad.any()
    assert torch.equal(frozen.weight.grad, torch.ones(3)) and unused.weight.grad is None


def test_gauge():
    shares = gauge([torch.tensor([0.0, 0.005, -0.05, 0.5]), torch.tensor([1.0])])
    assert shares == pytest.approx({"below_1e-3": 0.2, "below_1e-2": 0.4, "below_1e-1": 0.6})


class _Penalty(Hook):
    def __init__(self, m):
        self.penalty, self.skips = GammaL1([m], 0.1, 1, sr_bias=0.0), []

    def before_step(self):
        self.penalty.add_to_gradients(0)

    def after_step(self, skipped):
        self.skips.append(skipped)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_loss_scaling_and_clipping_do_not_touch_the_penalty(scale):
    """Under AMP the gradients are scaled and the clip is hit: gamma must still move by lr * sr, all of it."""
    m = nn.BatchNorm2d(2, affine=True)
    optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    hook = _Penalty(m)
    scaler.scale((m.weight * 0).sum() + (m.bias * 1e6).sum()).backward()
    run = SimpleNamespace(scaler=scaler, optimizer=optimizer, model=m, hooks=[hook], ema=ModelEMA(m))
    optimizer_step(run)
    assert torch.allclose(m.weight, torch.full((2,), 0.9)) and hook.skips == [False]


def test_a_step_with_an_infinity_is_skipped_whole():
    m = nn.BatchNorm2d(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    hook = _Penalty(m)
    scaler.scale((m.weight * float("inf")).sum()).backward()
    run = SimpleNamespace(scaler=scaler, optimizer=torch.optim.SGD(m.parameters(), lr=1.0), model=m, hooks=[hook], ema=ModelEMA(m))
    optimizer_step(run)
    assert torch.equal(m.weight, torch.ones(2)) and hook.skips == [True] and run.ema.updates == 0
