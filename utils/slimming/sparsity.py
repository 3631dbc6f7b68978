"""Sparsity on BatchNorm scales: two ways of making channels go, how far each can get, and the gauge that tells.

Both act once per optimizer step. GammaL1 is Network Slimming's penalty (Liu et al. 2017, arXiv 1708.06519): lambda *
sum |gamma| is added to the loss, and its gradient is all there is to do, gamma.grad += lambda * sign(gamma), after
unscaling and clipping. TargetSparsity takes a share of channels instead of a strength, and reaches it.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
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


def travel(rates: Iterable[float], coefficients: Iterable[float], momentum: float | None) -> float:
    """How far L1 alone moves a gamma that nothing opposes, over steps with these rates and coefficients.

    SGD multiplies a constant gradient by rate / (1 - momentum). Adam and AdamW (momentum None) move by the rate at
    most, however large the coefficient. Gammas start near 1: a run that travels much less leaves nothing at 0.
    """
    if momentum is None:
        return sum(rate for rate, s in zip(rates, coefficients) if s)
    return sum(rate * s for rate, s in zip(rates, coefficients)) / (1 - momentum)


class TargetSparsity:
    """Takes `share` (0..1) of the channels of the given BatchNorms to exactly 0, the least important ones, in good time.

    A channel's importance is the running mean of (gamma * dL/dgamma + beta * dL/dbeta)^2, the first-order estimate of
    what the loss would lose with it (Molchanov et al. 2019, arXiv 1906.10771, eq. 8). In every step the channels that
    rank lowest at the moment have gamma and beta multiplied by SHRINK; one that ranks higher again recovers by training,
    one whose |gamma| falls below DEAD is 0 for good. How many rank "lowest" grows with the run: fast first, when
    there is most to choose from, and all between BEGIN and END of it; the rest of the run heals.

    Every layer keeps its best max(LEAST, FLOOR of it), so none can vanish. `groups` (one int array of channels a BatchNorm)
    number the channels: those with the same number, such as what shortcuts add up, are one channel and go at once, ranked by
    the sum of their importances. `costs` (floats of the same shapes, such as CostModel.freed gives) make it rank by
    importance per cost: the same share then frees more of it. `copies` are BatchNorms of the same shape that follow
    these, such as a moving average's: where these are 0, they are made 0.
    """

    SHRINK, DEAD = 0.85, 0.02
    BEGIN, END = 0.08, 0.6    # of the run
    LAST = 0.8                # of the run: what should be 0 by then is made so, however short the run
    MEMORY = 0.98             # of the running mean, per step
    FLOOR, LEAST = 0.1, 4

    def __init__(self, norms: Sequence[nn.Module], share: float, copies: Sequence[nn.Module] = (),
                 costs: Sequence[np.ndarray] | None = None, groups: Sequence[np.ndarray] | None = None):
        if not 0 < share < 1:
            raise ValueError(f"share must be between 0 and 1, not {share}")
        self.share = share
        kept = [i for i, m in enumerate(norms) if isinstance(m.weight, nn.Parameter) and m.weight.requires_grad]
        self.gammas: list[Tensor] = [norms[i].weight for i in kept]  # type: ignore[misc]
        self.betas: list[Tensor] = [norms[i].bias for i in kept]  # type: ignore[misc]
        self.copies: list[Tensor] = [t for i in kept if copies for t in (copies[i].weight, copies[i].bias)]  # type: ignore[misc]
        self.sizes = [len(g) for g in self.gammas]
        self.total = sum(self.sizes)  # channels
        device = self.gammas[0].device if self.gammas else None
        sizes = torch.tensor(self.sizes, device=device, dtype=torch.long)
        self.layer = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        self.start = (sizes.cumsum(0) - sizes)[self.layer]
        self.floor = torch.maximum((sizes * self.FLOOR).ceil(), sizes.clamp(max=self.LEAST)).long()[self.layer]
        numbers = np.arange(self.total) if groups is None else np.concatenate([groups[i] for i in kept])
        _, first, index, counts = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
        self.group, self.channels = torch.as_tensor(index, device=device), torch.as_tensor(counts, device=device)
        costly = np.ones(self.total) if costs is None else np.concatenate([costs[i] for i in kept])
        self.cost = torch.as_tensor(costly[first], dtype=torch.float32).to(device)
        self.score = torch.zeros(len(counts), device=device)  # this and all below: one a group
        self.dead = torch.zeros(len(counts), dtype=torch.bool, device=device)

    def wanted(self, progress: float) -> int:
        """Channels that should be on their way to 0, or there, at this point (0..1) of the run."""
        u = min(max((progress - self.BEGIN) / (self.END - self.BEGIN), 0.0), 1.0)
        return round(self.share * (1 - (1 - u) ** 3) * self.total)

    @torch.no_grad()
    def observe(self) -> None:
        """Update the importances from complete, unscaled gradients. Call it before the optimizer's step."""
        products = [torch._foreach_mul(p, [torch.zeros_like(t) if t.grad is None else t.grad for t in p]) for p in (self.gammas, self.betas)]
        square = (torch.cat(products[0]) + torch.cat(products[1])).float().square()
        finite = square.isfinite().all()  # not so in a step that the loss scaler is about to skip: leave it out
        summed = torch.zeros_like(self.score).index_add_(0, self.group, square.nan_to_num(0, 0))
        self.score.lerp_(summed / self.cost, (1 - self.MEMORY) * finite)

    @torch.no_grad()
    def shrink(self, progress: float) -> None:
        """Shrink what ranks lowest now. Call it after the optimizer's step."""
        if not (wanted := self.wanted(progress)):
            return
        protected = self._protected()
        # The first to go: those at 0, then by importance, and never the protected.
        order = self.score.masked_fill(self.dead, -1.0).masked_fill(protected, float("inf")).argsort(stable=True)
        chosen = torch.zeros_like(self.dead)
        chosen[order] = self.channels[order].cumsum(0) <= wanted
        chosen &= ~protected
        largest = torch.zeros_like(self.score).scatter_reduce_(0, self.group, torch.cat(self.gammas).abs().to(self.score.dtype), "amax")
        self.dead |= chosen if progress >= self.LAST else chosen & (largest < self.DEAD)
        alive = (~self.dead).to(self.score.dtype)[self.group]
        factors = list(((1 - (1 - self.SHRINK) * chosen.to(self.score.dtype))[self.group] * alive).split(self.sizes))
        torch._foreach_mul_(self.gammas, factors)
        torch._foreach_mul_(self.betas, factors)
        if self.copies:
            torch._foreach_mul_(self.copies, [part for part in alive.split(self.sizes) for _ in range(2)])

    def _protected(self) -> Tensor:
        """bool (groups,): among the best of a layer, which must stay."""
        score = self.score.masked_fill(self.dead, -1.0)[self.group]
        order = score.argsort(descending=True, stable=True)
        order = order[self.layer[order].argsort(stable=True)]  # by layer, and within a layer from best to worst
        protected = torch.zeros_like(self.dead)
        protected[self.group[order[torch.arange(self.total, device=order.device) - self.start < self.floor]]] = True
        return protected

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"score": self.score, "dead": self.dead}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take state_dict()'s tensors back."""
        self.score.copy_(state["score"])
        self.dead.copy_(state["dead"])


def gauge(gammas: Sequence[Tensor]) -> dict[str, float]:
    """Share (0..1) of gammas that are exactly 0, and of |gamma| below 1e-3, 1e-2 and 1e-1, over all channels."""
    values = torch.cat([g.detach().abs().flatten() for g in gammas])
    below = {f"below_{edge:.0e}".replace("e-0", "e-"): float((values < edge).float().mean()) for edge in EDGES}
    return {"zero": float((values == 0).float().mean()), **below}
