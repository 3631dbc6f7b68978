"""Loss and assignment: stock's values, and properties."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training.loss import DetectionLoss, assign, scale_gains

CASES = ["nc3", "nc1", "smooth_focal", "empty"]
HYP = {"box": 0.05, "cls": 0.5, "obj": 1.0, "cls_pw": 1.0, "obj_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}
ANCHORS = torch.tensor([[[1.2, 1.6], [2, 3.7], [4, 2.8]], [[1.9, 3.8], [3.9, 2.8], [3.7, 7.4]],
                        [[3.6, 2.8], [4.9, 6.2], [11.6, 10.2]]])
SIZES = [(16, 16), (8, 8), (4, 4)]


def loss_for(nc: int, anchors: torch.Tensor, hyp: dict) -> DetectionLoss:
    detect = SimpleNamespace(nl=len(anchors), na=anchors.shape[1], nc=nc, anchors=anchors,
                             stride=torch.tensor([8.0, 16, 32])[:len(anchors)])
    return DetectionLoss(SimpleNamespace(detect=detect), hyp)


def gradients(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    found = [t.grad for t in tensors if t.grad is not None]
    assert len(found) == len(tensors)
    return found


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
    assert np.allclose(total.detach().numpy(), g["total"], rtol=1e-4)
    assert np.allclose(items.numpy(), g["items"], rtol=1e-4, atol=1e-8) and not items.requires_grad
    for i, grad in enumerate(gradients(p)):
        assert float(grad.abs().sum()) == pytest.approx(float(g[f"grad_abs_sum{i}"]), rel=1e-4)


def example(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Outputs of two images of 128 px, three classes; nine targets."""
    generator = torch.Generator().manual_seed(seed)
    p = [torch.randn(2, 3, n, n, 8, generator=generator) for n in (16, 8, 4)]
    targets = torch.rand(9, 6, generator=generator) * 0.4 + 0.2
    targets[:, 0], targets[:, 1] = torch.arange(9) % 2, torch.arange(9) % 3
    return p, targets


def standard(**changes: float) -> DetectionLoss:
    return loss_for(3, ANCHORS, {**scale_gains(HYP, 3, 3, 128), **changes})


@pytest.mark.parametrize("seed", range(3))
def test_order_and_repetition(seed):
    p, targets = example(seed)
    one, items = standard()(p, targets)
    assert float(one) > 0 and (items >= 0).all() and float(items.sum() * 2) == pytest.approx(float(one), rel=1e-5)
    # Where several boxes share a cell, the order decides whose IoU the objectness should reach; nothing else.
    assert torch.allclose(standard()(p, targets.flip(0))[0], one, rtol=0.02)
    twice = torch.cat((targets, targets + torch.tensor([2.0, 0, 0, 0, 0, 0])))
    assert torch.allclose(standard()([torch.cat((y, y)) for y in p], twice)[0], 2 * one, rtol=1e-4)


def test_better_predictions_cost_less():
    p, targets = example()
    p = [y.requires_grad_() for y in p]
    before = standard()(p, targets)
    before[0].backward()
    with torch.no_grad():
        after = standard()([y - 5 * g for y, g in zip(p, gradients(p))], targets)
    assert after[0] < before[0] and (after[1] < before[1]).all()
    blind = [torch.full_like(y, -9.0) for y in p]
    nothing = targets[:0]
    assert standard()(blind, nothing)[0] < 1e-3 < standard()(p, nothing)[0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5])
def test_extreme_logits_have_a_finite_gradient(gamma):
    p, targets = example()
    wild = [(y * 200).requires_grad_() for y in p]
    total, _ = standard(fl_gamma=gamma)(wild, targets)
    total.backward()
    assert torch.isfinite(total) and all(bool(torch.isfinite(g).all()) for g in gradients(wild))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype):
    p, targets = example()
    half = [y.to(dtype).requires_grad_() for y in p]
    total, items = standard()(half, targets)
    total.backward()
    assert total.dtype == items.dtype == torch.float32
    assert torch.equal(total, standard()([y.detach().float() for y in half], targets)[0])
    assert all(g.dtype == dtype and bool(torch.isfinite(g).all()) for g in gradients(half))


def test_image_border_and_levels_without_targets():
    p, _ = example()
    border = torch.tensor([[0, 0, 0.0, 0.0, 0.2, 0.2], [1, 1, 1.0, 1.0, 0.2, 0.2], [1, 2, 1.0, 0.0, 0.02, 0.02]])
    for level, (ny, nx) in zip(assign(border, ANCHORS, SIZES, 4.0), SIZES):
        assert ((level.gi >= 0) & (level.gi < nx) & (level.gj >= 0) & (level.gj < ny)).all()
    assert torch.isfinite(standard()(p, border)[0])
    small = torch.tensor([[0, 0, 0.5, 0.5, 0.08, 0.08]])
    assert [len(level.b) > 0 for level in assign(small, ANCHORS, SIZES, 4.0)] == [True, False, False]
    assert torch.isfinite(standard()(p, small)[0])
    flat = torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.0]])  # a box without height is nobody's
    assert not any(len(level.b) for level in assign(flat, ANCHORS, SIZES, 4.0))


def test_grids_need_not_be_square():
    targets = torch.tensor([[0, 0, 0.95, 0.9, 0.2, 0.4]])
    level, = assign(targets, ANCHORS[:1], [(8, 24)], 4.0)
    assert (level.gi.max(), level.gj.max()) == (23, 7)
    centre = torch.stack((level.gi, level.gj), 1) + level.tbox[:, :2]
    assert torch.allclose(centre, torch.tensor([0.95 * 24, 0.9 * 8])) and torch.allclose(
        level.tbox[:, 2:], torch.tensor([0.2 * 24, 0.4 * 8]))


@pytest.mark.slow
def test_crowded_cells_repeat_bit_for_bit():
    # Thousands of positives, many to a cell: only then does torch share the work among threads.
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(3000, 6, generator=generator) * torch.tensor([2, 3, 1, 1, 0.4, 0.4])
    targets[:, :2] = targets[:, :2].floor()
    p = [y.requires_grad_() for y in example()[0]]
    first: list[torch.Tensor] = []
    for _ in range(6):
        for y in p:
            y.grad = None
        total, _ = standard()(p, targets)
        total.backward()
        now = [total.detach(), *gradients(p)]
        assert all(torch.equal(x, y) for x, y in zip(now, first or now))
        first = first or now


def test_the_last_box_of_a_cell_sets_its_objectness():
    # Logits 0 predict a box of the anchor's size at the cell's middle: the first box is that box, the second is wider.
    exact = torch.tensor([0, 0, 0.5 / 4 + 0.25, 0.5 / 4 + 0.25, 4 / 4, 3 / 4])
    wider = exact * torch.tensor([1, 1, 1, 1, 2, 1])
    loss = loss_for(1, torch.tensor([[[4.0, 3.0]]]), HYP)
    for boxes, iou in (([wider, exact], 1.0), ([exact, wider], 0.5)):
        logits = torch.zeros(1, 1, 4, 4, 6, requires_grad=True)
        loss([logits], torch.stack(boxes))[0].backward()
        pull = gradients([logits])[0][0, 0, 1, 1, 4] * 16 / 4  # mean over 16 cells, weight 4
        assert 0.5 - float(pull) == pytest.approx(iou, abs=0.1)


@pytest.mark.parametrize(("nl", "balance"), [(2, (4.0, 1.0)), (3, (4.0, 1.0, 0.4)), (4, (4.0, 1.0, 0.25, 0.06))])
def test_levels_are_weighted(nl, balance):
    logits = [torch.zeros(1, 3, 4, 4, 8) for _ in range(nl)]
    loss = loss_for(3, ANCHORS[:1].repeat(nl, 1, 1), HYP)
    assert float(loss(logits, torch.zeros(0, 6))[0]) == pytest.approx(np.log(2) * sum(balance), rel=1e-5)


def test_gains_scale_with_image_size_classes_and_levels():
    before = dict(HYP)
    assert scale_gains(HYP, 3, 40, 320) == pytest.approx({**HYP, "cls": 0.25, "obj": 0.25})
    assert scale_gains(HYP, 4, 80, 640) == pytest.approx({**HYP, "box": 0.0375, "cls": 0.375, "obj": 0.75})
    assert before == HYP
