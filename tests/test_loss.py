"""Loss and assignment: stock's values, and properties. Autoanchor: properties."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.autoanchor import check_anchors, evolve_anchors, fit_anchors
from utils.loss import DetectionLoss, assign, scale_gains

CASES = ["nc3", "nc1", "smooth_focal", "empty"]
HYP = {"box": 0.05, "cls": 0.5, "obj": 1.0, "cls_pw": 1.0, "obj_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}


def loss_for(nc: int, anchors: torch.Tensor, hyp: dict) -> DetectionLoss:
    detect = SimpleNamespace(nl=len(anchors), na=anchors.shape[1], nc=nc, anchors=anchors, stride=torch.tensor([8.0, 16, 32]))
    return DetectionLoss(SimpleNamespace(detect=detect), hyp)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_assignment_are_stocks(golden, case):
    g = {k.split("/")[1]: v for k, v in golden.items() if k.startswith(f"loss_{case}/")}
    p = [torch.from_numpy(g[f"p{i}"]).requires_grad_() for i in range(3)]
    anchors, targets, hyp = torch.from_numpy(g["anchors"]), torch.from_numpy(g["targets"]), json.loads(str(g["hyp"]))
    for i, level in enumerate(assign(targets, anchors, [(y.shape[2], y.shape[3]) for y in p], hyp["anchor_t"])):
        for key in ("tcls", "b", "a", "gj", "gi"):
            assert np.array_equal(getattr(level, key).numpy(), g[f"{key}{i}"]), (key, i)
        for key in ("tbox", "anch"):
            assert np.allclose(getattr(level, key).numpy(), g[f"{key}{i}"], atol=1e-5), (key, i)
    total, items = loss_for(p[0].shape[-1] - 5, anchors, hyp)(p, targets)
    total.backward()
    assert np.allclose(total.detach().numpy(), g["total"], rtol=1e-4) and np.allclose(items.numpy(), g["items"], rtol=1e-4, atol=1e-8)
    for i, y in enumerate(p):
        assert float(y.grad.abs().sum()) == pytest.approx(float(g[f"grad_abs_sum{i}"]), rel=1e-4)


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    anchors = torch.tensor([[[1.2, 1.6], [2, 3.7], [4, 2.8]], [[1.9, 3.8], [3.9, 2.8], [3.7, 7.4]], [[3.6, 2.8], [4.9, 6.2], [11.6, 10.2]]])
    p = [torch.randn(2, 3, n, n, 8, generator=generator).to(dtype) for n in (16, 8, 4)]
    targets = torch.rand(9, 6, generator=generator) * 0.4 + 0.2
    targets[:, 0], targets[:, 1] = torch.arange(9) % 2, torch.arange(9) % 3
    return anchors, p, targets


def test_order_repetition_and_extremes():
    anchors, p, targets = example()
    loss = loss_for(3, anchors, scale_gains(HYP, 3, 3, 128))
    one, _ = loss(p, targets)
    assert torch.allclose(loss(p, targets.flip(0))[0], one, rtol=0.02) and float(one) > 0
    twice = torch.cat((targets, targets + torch.tensor([2.0, 0, 0, 0, 0, 0])))
    assert torch.allclose(loss([torch.cat((y, y)) for y in p], twice)[0], 2 * one, rtol=1e-4)
    wild = [(y * 200).requires_grad_() for y in p]
    loss(wild, targets)[0].backward()
    assert all(bool(torch.isfinite(y.grad).all()) for y in wild)
    assert torch.isfinite(loss(example(torch.bfloat16)[1], targets)[0])
    border = torch.tensor([[0, 0, 0.0, 0.0, 0.2, 0.2], [1, 1, 1.0, 1.0, 0.2, 0.2]])
    assert torch.isfinite(loss(p, border)[0])


def test_gains_scale_with_image_size_and_classes():
    assert scale_gains(HYP, 3, 40, 320) == pytest.approx({**HYP, "cls": 0.25, "obj": 0.25})


def test_autoanchor():
    rng = np.random.default_rng(0)
    wh = np.exp(rng.normal(3, 0.6, (500, 2)))
    far = np.full((3, 3, 2), 400.0)
    new, message = fit_anchors(wh, far, 320)
    assert new is not None and new.shape == far.shape and "->" in message
    assert (np.diff(new.reshape(-1, 2).prod(1)) >= 0).all()
    assert check_anchors(wh, new)[0] > 0.98 and fit_anchors(wh, new, 320)[0] is None
    assert np.array_equal(evolve_anchors(wh, gen=50, seed=1), evolve_anchors(wh, gen=50, seed=1))
    assert fit_anchors(wh[:5], far, 320)[0] is None
