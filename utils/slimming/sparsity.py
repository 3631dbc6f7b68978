"""Sparsity on BatchNorm scales: the L1 subgradient of Network Slimming, and the gauge that tells how far it has come.

Network Slimming (Liu et al. 2017, arXiv 1708.06519) adds lambda * sum |gamma| to the loss. Its gradient is all there is
to do: gamma.grad += lambda * sign(gamma), once per optimizer step, after unscaling and clipping.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EDGES = (1e-3, 1e-2, 1e-1)


class GammaL1:
    """The subgradient of an L1 penalty on the scales (and shifts) of the given BatchNorms.

    The scale's coefficient falls over the run, s(epoch) = sr * (1 - 0.9 * epoch / epochs); the shift's is constant,
    sr_bias, by default 10 * sr. Layers whose parameters are frozen are left alone.
    """

    def __init__(self, norms: Sequence[nn.Module], sr: float, epochs: int, sr_bias: float | None = None):
        # Collected once: no walk over the model in a step.
        self.gammas = [m.weight for m in norms if isinstance(m.weight, nn.Parameter) and m.weight.requires_grad]
        self.betas = [m.bias for m in norms if isinstance(m.bias, nn.Parameter) and m.bias.requires_grad]
        self.sr, self.epochs = sr, epochs
        self.sr_bias = 10 * sr if sr_bias is None else sr_bias

    def coefficient(self, epoch: int) -> float:
        """s(epoch), what a gamma's gradient gains in a whole step."""
        return self.sr * (1 - 0.9 * epoch / self.epochs)

    @torch.no_grad()
    def add_to_gradients(self, epoch: int, share: float = 1.0) -> None:
        """Add the penalty's gradient. `share` = images in this step / nominal batch: the loss, too, grows with images."""
        for parameters, strength in ((self.gammas, self.coefficient(epoch)), (self.betas, self.sr_bias)):
            pairs = [(p, p.grad) for p in parameters if p.grad is not None]
            if pairs and strength:
                signs = torch._foreach_sign([p for p, _ in pairs])
                torch._foreach_add_([gradient for _, gradient in pairs], signs, alpha=strength * share)


def gauge(gammas: Sequence[Tensor]) -> dict[str, float]:
    """Share (0..1) of |gamma| below 1e-3, 1e-2 and 1e-1, over all channels of all layers."""
    values = torch.cat([g.detach().abs().flatten() for g in gammas])
    return {f"below_{edge:.0e}".replace("e-0", "e-"): float((values < edge).float().mean()) for edge in EDGES}
