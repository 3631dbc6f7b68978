"""Sparsity is the same whatever is switched on beside it: accumulation, mixed precision, kinds of BatchNorm."""
from __future__ import annotations

import pytest
import torch

from tests import trajectory

METHODS = {"l1": ["--sr", "0.05"],
           "taught": ["--target-sparsity", "0.4", "--round-to", "4", "--teacher", "{teacher}"]}


def flags(tiny, cfg, folder, method, teacher="") -> list[str]:
    """SGD with a large rate, so that a difference would show; four images a step, three steps an epoch."""
    return ["--data", str(tiny), "--weights", "", "--cfg", str(cfg), "--epochs", "6", "--nbs", "4",
            "--project", str(folder), *(flag.format(teacher=teacher) for flag in METHODS[method])]


@pytest.fixture(scope="module", params=list(METHODS))
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(tiny, cfg, tmp_path_factory, method, teacher):
    """One process, no accumulation, float32."""
    return trajectory.go(flags(tiny, cfg, tmp_path_factory.mktemp("reference"), method, teacher), 4)


@pytest.mark.slow
def test_accumulation_changes_nothing(tiny, cfg, tmp_path, method, teacher, reference):
    """Of one image a step in the place of four."""
    steps, increments = trajectory.go(flags(tiny, cfg, tmp_path, method, teacher), 1)
    assert steps.shape == reference[0].shape == (18, steps.shape[1])
    assert torch.allclose(steps, reference[0], rtol=0, atol=1e-5)  # float32 sums in another order
    # The increment is exactly sr * sign(gamma), up to the rounding of a sum with the gradient.
    assert torch.allclose(increments, reference[1], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_increment_is_the_formula_in_every_precision(tiny, cfg, tmp_path):
    for i, amp in enumerate(("off", "bf16")):
        steps, increments = trajectory.go([*flags(tiny, cfg, tmp_path / str(i), "l1"), "--amp", amp], 2)
        epoch = torch.arange(1, 18) // 3
        expected = 0.05 * (1 - 0.9 * epoch / 6)[:, None] * steps[:-1].sign()  # what the gamma was before the step
        assert torch.allclose(increments[1:], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_sync_batchnorm_is_treated_alike(tiny, cfg, tmp_path, method, teacher, reference):
    steps, increments = trajectory.go(flags(tiny, cfg, tmp_path, method, teacher), 4, convert=True)
    assert torch.equal(steps, reference[0]) and torch.equal(increments, reference[1])
