"""A speed is shared out between precision, image size and channels."""
from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import read_yaml
from models.yolo import Model
from training.levers import Measured, candidate_sizes, choose, curvature, share_of_images
from training.sparsity_plan import MEASUREMENTS, SparsityPlan

positive = st.floats(1e-3, 10)


@given(positive, positive, st.floats(0.1, 2))
def test_the_split_loses_least(a, b, x):
    shares = np.linspace(0, 1, 1001)
    losses = a * (shares * x) ** 2 + b * ((1 - shares) * x) ** 2
    assert share_of_images(a, b) == pytest.approx(shares[losses.argmin()], abs=0.002)


@given(st.floats(0, 5))
def test_a_lever_without_a_cost_gives_all(cost):
    assert share_of_images(0.0, cost) == (1.0 if cost else 0.5) and share_of_images(cost, 0.0) == (0.0 if cost else 0.5)


def test_curvature_is_that_of_a_square():
    factors = {640: 1.0, 512: 1.5, 320: 3.5}
    assert curvature(factors, {size: 0.2 * np.log(f) ** 2 for size, f in factors.items()}) == pytest.approx(0.2)
    assert curvature(factors, dict.fromkeys(factors, -0.1)) == 0  # smaller images find more: they cost nothing


@pytest.mark.parametrize("imgsz, divisor", [(640, 32), (416, 32), (320, 32), (64, 32), (32, 32), (1280, 64)])
def test_sizes(imgsz, divisor):
    sizes = candidate_sizes(imgsz, divisor)
    assert len(sizes) <= 5 and all(size % divisor == 0 and imgsz / 2 <= size < imgsz for size in sizes)
    assert sizes == sorted(sizes, reverse=True) and (sizes or imgsz == divisor)


@given(st.floats(1.05, 6), st.floats(1, 3), st.floats(0, 0.3), st.floats(0, 0.3))
def test_the_levers_multiply_to_the_speed(wanted, precision, image_loss, channel_loss):
    sizes = {416: 1.0, 352: 1.4, 288: 2.1, 224: 3.4}
    losses = {size: image_loss * np.log(factor) ** 2 for size, factor in sizes.items()}
    levers = choose(wanted, Measured(precision, sizes, losses, 1.4, channel_loss))
    reached = levers.rows[-1]["times faster"]
    assert reached >= 0.97 * wanted and reached == pytest.approx(max(wanted, reached), rel=0.5)
    assert levers.imgsz in sizes and 0 < levers.latency <= 1


def test_precision_alone_may_do():
    levers = choose(1.8, Measured(1.9, {416: 1.0, 288: 2.0}, {416: 0.0, 288: 0.1}, 1.4, 0.1))
    assert levers.imgsz == 416 and not levers.cuts


@pytest.mark.parametrize("wanted", [0.8, 0.5])
def test_a_target_of_latency_is_measured_a_few_times(wanted):
    """Where time is not in proportion to the FLOPs."""
    calls = []

    def milliseconds(models):
        calls.append(len(models))
        return [sum(p.numel() ** 0.9 for p in model.parameters()) + 100_000 for model in models]

    model = Model({**read_yaml("yolov5n.yaml"), "width_multiple": 0.125}, nc=3)
    opt = Namespace(sr=0.0, sr_bias=None, epochs=1, target_sparsity=None, target=("latency", wanted), round_to=2,
                    per_flop=False, layers=False, shortcuts="skip", keep=[], only=[])
    plan = SparsityPlan(opt, 64, model, set(), milliseconds=milliseconds)
    assert plan.target is not None
    calls.clear()
    plan.aim(plan.target)
    assert len(calls) <= MEASUREMENTS
    gone = plan.target.aim(lambda gone: plan.figure_without(gone, "flops") <= plan.flops)
    assert plan.figure_without(gone) == pytest.approx(wanted, rel=0.03)
