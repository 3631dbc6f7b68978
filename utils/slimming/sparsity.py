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
    importance per cost: the same share then frees more of it. `round_to`: channels of a layer go in blocks of so many, those that
    rank next to each other, by the block's mean; what is left of the layer is a multiple, which is what fast kernels compute anyway.
    `copies` are BatchNorms of the same shape that follow these, such as a moving average's: where these are 0, they are made 0.

    All processes must rank alike, so no sum here depends on an order that a GPU may choose (atomics): tables, not scatters.
    """

    SHRINK, DEAD = 0.85, 0.02
    BEGIN, END = 0.08, 0.6    # of the run
    LAST = 0.8                # of the run: what should be 0 by then is made so, however short the run
    MEMORY = 0.98             # of the running mean, per step
    FLOOR, LEAST = 0.1, 4

    def __init__(self, norms: Sequence[nn.Module], share: float, copies: Sequence[nn.Module] = (),
                 costs: Sequence[np.ndarray] | None = None, groups: Sequence[np.ndarray] | None = None, round_to: int = 1):
        if not 0 < share < 1 or round_to < 1:
            raise ValueError(f"share must be between 0 and 1, not {share}, and round_to at least 1, not {round_to}")
        self.share = share
        kept = [i for i, m in enumerate(norms) if isinstance(m.weight, nn.Parameter) and m.weight.requires_grad]
        self.gammas: list[Tensor] = [norms[i].weight for i in kept]  # type: ignore[misc]
        self.betas: list[Tensor] = [norms[i].bias for i in kept]  # type: ignore[misc]
        self.copies: list[Tensor] = [t for i in kept if copies for t in (copies[i].weight, copies[i].bias)]  # type: ignore[misc]
        self.sizes = [len(g) for g in self.gammas]
        self.total = sum(self.sizes)  # channels
        device = self.gammas[0].device if self.gammas else None
        layers = np.repeat(np.arange(len(self.sizes)), self.sizes)
        sizes = np.asarray(self.sizes, int)
        starts, floors = sizes.cumsum() - sizes, np.maximum(np.ceil(sizes * self.FLOOR).astype(int), np.minimum(sizes, self.LEAST))
        self.layer, self.start, self.floor = (torch.as_tensor(x, device=device) for x in (layers, starts[layers], floors[layers]))
        numbers = np.arange(self.total) if groups is None else np.concatenate([groups[i] for i in kept])
        _, first, index, counts = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
        self.group, self.channels = torch.as_tensor(index, device=device), torch.as_tensor(counts, device=device)
        self.parts = torch.as_tensor(_members(index), device=device)  # (groups, most): their channels
        costly = np.ones(self.total) if costs is None else np.concatenate([costs[i] for i in kept])
        self.cost = torch.as_tensor(costly[first], dtype=torch.float32).to(device)
        # Groups form blocks with those that have channels in the same layers.
        inside = np.zeros((len(counts), len(self.sizes)), int)
        np.add.at(inside, (index, layers), 1)
        kind = np.unique(inside, axis=0, return_inverse=True)[1].reshape(-1)
        self.kind = torch.as_tensor(kind, device=device) if round_to > 1 else None
        self.slots = torch.as_tensor(_members(_blocks(kind, round_to)), device=device)  # (blocks, round_to): places in a ranking by kind
        self.most = self._most(inside, kind, floors, round_to)
        self.score = torch.zeros(len(counts), device=device)  # this and all below: one a group
        self.dead = torch.zeros(len(counts), dtype=torch.bool, device=device)

    def _most(self, inside: np.ndarray, kind: np.ndarray, floors: np.ndarray, round_to: int) -> float:
        """The share (0..1) of the channels that can go at all: what layers keep and blocks that do not fill up stay."""
        stay = 0
        for number in np.unique(kind):
            groups = inside[kind == number]  # alike: (groups, layers) channels
            floor = max(-(-floors[i] // groups[0, i]) for i in np.flatnonzero(groups[0]))
            stay += min(len(groups), -(-floor // round_to) * round_to) * groups[0].sum()
        return 1 - stay / max(self.total, 1)

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
        summed = _pad(square.nan_to_num(0, 0), 0)[self.parts].sum(1)
        self.score.lerp_(summed / self.cost, (1 - self.MEMORY) * finite)

    @torch.no_grad()
    def shrink(self, progress: float) -> None:
        """Shrink what ranks lowest now. Call it after the optimizer's step."""
        if not (wanted := self.wanted(progress)):
            return
        blocks = self._ranked_blocks()
        dead, protected = (_pad(x, False)[blocks].any(1) for x in (self.dead, self._protected()))
        mean = _pad(self.score, 0)[blocks].sum(1) / (blocks < len(self.score)).sum(1)
        channels = _pad(self.channels, 0)[blocks].sum(1)
        # The first to go: those at 0, then by importance, and never the protected.
        order = mean.masked_fill(dead, -1.0).masked_fill(protected, float("inf")).argsort(stable=True)
        chosen = torch.zeros_like(dead)
        chosen[order] = channels[order].cumsum(0) <= wanted
        chosen &= ~protected
        # A block dies as a whole, or what is left of a layer would not be a multiple.
        largest = _pad(_pad(torch.cat(self.gammas).abs().to(self.score.dtype), 0)[self.parts].amax(1), 0)[blocks].amax(1)
        self.dead |= self._of_groups(chosen if progress >= self.LAST else chosen & (largest < self.DEAD), blocks)
        shrinking = self._of_groups(chosen, blocks).to(self.score.dtype)
        alive = (~self.dead).to(self.score.dtype)[self.group]
        factors = list(((1 - (1 - self.SHRINK) * shrinking)[self.group] * alive).split(self.sizes))
        torch._foreach_mul_(self.gammas, factors)
        torch._foreach_mul_(self.betas, factors)
        if self.copies:
            torch._foreach_mul_(self.copies, [part for part in alive.split(self.sizes) for _ in range(2)])

    def _ranked_blocks(self) -> Tensor:
        """(blocks, round_to) group numbers: within each kind from the lowest block to the best; the number of groups where a block has fewer."""
        if self.kind is None:
            return self.slots
        order = self.score.masked_fill(self.dead, -1.0).argsort(stable=True)
        return _pad(order[self.kind[order].argsort(stable=True)], len(order))[self.slots]

    def _of_groups(self, flags: Tensor, blocks: Tensor) -> Tensor:
        """Flags of blocks -> flags of their groups."""
        found = _pad(torch.zeros_like(self.dead), False)
        found[blocks] = flags[:, None].expand_as(blocks)
        return found[:-1]

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


def _members(labels: np.ndarray) -> np.ndarray:
    """Labels 0..n-1 of things -> (n, most) the things of each label in order, filled up with the number of things."""
    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    table = np.full((len(counts), counts.max(initial=1)), len(labels))
    table[labels[order], np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)] = order
    return table


def _blocks(kinds: np.ndarray, size: int) -> np.ndarray:
    """Number of the block of each place in an order by kind: `size` to a block, and the first of a kind takes what does not divide."""
    counts = np.bincount(kinds)
    counts = counts[counts > 0]
    per_kind = -(-counts // size)
    place = np.concatenate([(np.arange(n) + -n % size) // size for n in counts]) if len(counts) else np.zeros(0, int)
    return place + np.repeat(per_kind.cumsum() - per_kind, counts)


def _pad(values: Tensor, value: float) -> Tensor:
    """One more at the end, for tables that are filled up with the index behind the last."""
    return nn.functional.pad(values, (0, 1), value=value)


def gauge(gammas: Sequence[Tensor]) -> dict[str, float]:
    """Share (0..1) of gammas that are exactly 0, and of |gamma| below 1e-3, 1e-2 and 1e-1, over all channels."""
    values = torch.cat([g.detach().abs().flatten() for g in gammas])
    below = {f"below_{edge:.0e}".replace("e-0", "e-"): float((values < edge).float().mean()) for edge in EDGES}
    return {"zero": float((values == 0).float().mean()), **below}
