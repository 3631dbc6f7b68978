"""Network Slimming's L1 penalty on BatchNorm scales, how far it can move them, and statistics of the scales.

The penalty (Liu et al. 2017, arXiv 1708.06519) adds lambda * sum |gamma| to the loss. Its gradient is all there is to
do, once per optimizer step, after unscaling and clipping: gamma.grad += lambda * sign(gamma). The other way to make
channels go is in target_sparsity.py.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

EDGES = (1e-3, 1e-2, 1e-1)


class GammaL1:
    """The subgradient of an L1 penalty on the scales (and shifts) of the given BatchNorms.

    The scale's coefficient falls over the run, s(epoch) = sr * (1 - 0.9 * epoch / epochs). The shift's is constant,
    sr_bias, by default 10 * sr. Frozen parameters are left alone.
    """

    def __init__(self, norms: Sequence[_BatchNorm], sr: float, epochs: int, sr_bias: float | None = None):
        # Collected once: no walk over the model in a step.
        self.gammas: list[Tensor] = [m.weight for m in norms if m.weight.requires_grad]
        self.betas: list[Tensor] = [m.bias for m in norms if m.bias.requires_grad]
        self.sr, self.epochs = sr, epochs
        self.sr_bias = 10 * sr if sr_bias is None else sr_bias

    def coefficient(self, epoch: int) -> float:
        """s(epoch), what a whole step adds to a gamma's gradient."""
        return self.sr * (1 - 0.9 * epoch / self.epochs)

    @torch.no_grad()
    def add_to_gradients(self, epoch: int, batch_fraction: float = 1.0) -> None:
        """Add the penalty's gradient. `batch_fraction`: images in this step / nominal batch, as the loss grows."""
        for parameters, strength in ((self.gammas, self.coefficient(epoch)), (self.betas, self.sr_bias)):
            trained = [p for p in parameters if p.grad is not None]
            if trained and strength:
                gradients = [p.grad for p in trained if p.grad is not None]
                torch._foreach_add_(gradients, torch._foreach_sign(trained), alpha=strength * batch_fraction)


def l1_reach(rates: Iterable[float], coefficients: Iterable[float], momentum: float | None) -> float:
    """How far L1 alone moves a gamma that nothing opposes, over steps with these rates and coefficients.

    SGD multiplies a constant gradient by rate / (1 - momentum). Adam and AdamW (momentum None) move by the rate at
    most, however large the coefficient. Gammas start near 1: a run whose reach is much less leaves nothing at 0.
    """
    if momentum is None:
        return sum(rate for rate, s in zip(rates, coefficients) if s)
    return sum(rate * s for rate, s in zip(rates, coefficients)) / (1 - momentum)


def gamma_stats(gammas: Sequence[Tensor]) -> dict[str, float]:
    """Share (0..1) of gammas that are exactly 0, and of |gamma| below 1e-3, 1e-2 and 1e-1, over all channels."""
    values = torch.cat([g.detach().abs().flatten() for g in gammas])
    below = {f"below_{edge:.0e}".replace("e-0", "e-"): float((values < edge).float().mean()) for edge in EDGES}
    return {"zero": float((values == 0).float().mean()), **below}
