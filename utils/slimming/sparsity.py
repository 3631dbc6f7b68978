"""Sparsity on BatchNorm scales: two ways of making channels go, how far each can get, and the gauge that tells.

Both act once per optimizer step. GammaL1 is Network Slimming's penalty (Liu et al. 2017, arXiv 1708.06519): lambda *
sum |gamma| is added to the loss, and its gradient is all there is to do, gamma.grad += lambda * sign(gamma), after
unscaling and clipping. TargetSparsity takes a share of channels instead of a strength, and reaches it.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

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

    (To be precise, as many as fill up blocks: less than `share` by less than a block, see `round_to`.)

    A channel's importance is the running mean of (gamma * dL/dgamma + beta * dL/dbeta)^2, the first-order estimate of
    what the loss would lose with it (Molchanov et al. 2019, arXiv 1906.10771, eq. 8). In every step the channels that
    rank lowest at the moment have gamma and beta multiplied by SHRINK; one that ranks higher again recovers by training,
    one whose |gamma| falls below DEAD is 0 for good. How many rank "lowest" grows with the run: fast first, when
    there is most to choose from, and all between BEGIN and END of it; the rest of the run heals. At LAST, what should be 0 is made so and
    nothing goes any more.

    Every layer keeps its best max(LEAST, FLOOR of it), so none can vanish. `groups` (one int array of channels a BatchNorm)
    number the channels: those with the same number, such as what shortcuts add up, are one channel and go at once, ranked by
    the sum of their importances. `costs` (floats of the same shapes, such as CostModel.freed gives) make it rank by
    importance per cost: the same share then frees more of it. `round_to`: channels of a layer go in blocks of so many, those that
    rank next to each other, by the block's mean; what is left of the layer is a multiple, which is what fast kernels compute anyway. (Not
    so in a layer whose channels are tied to different layers, as a concatenation and a sum may do: each part of it is a multiple.)
    `copies` are BatchNorms of the same shape that follow these, such as a moving average's: where these are 0, they are made 0.

    All processes must rank alike, so no sum here depends on an order that a GPU may choose (atomics): tables, not scatters.
    """

    SHRINK, DEAD = 0.85, 0.02
    BEGIN, END = 0.08, 0.6    # of the run
    LAST = 0.8                # of the run
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
        inside = np.zeros((len(counts), len(self.sizes)), int)  # (groups, layers) channels
        np.add.at(inside, (index, layers), 1)
        self.blocks = _Blocks(inside, round_to, device)
        self.most = 1 - self.blocks.stay(floors) / max(self.total, 1)  # the share of the channels that can go
        self.settled = False  # it is past LAST
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
        summed = _pad(square.nan_to_num(0, 0), 0)[self.parts].sum(1)
        self.score.lerp_(summed / self.cost, (1 - self.MEMORY) * finite)

    @torch.no_grad()
    def shrink(self, progress: float) -> None:
        """Shrink what ranks lowest now. Call it after the optimizer's step."""
        if not (wanted := self.wanted(progress)):
            return
        ranking = self.score.masked_fill(self.dead, -1.0).argsort(stable=True)  # groups, those at 0 first, then by importance
        blocks = self.blocks.of(ranking)
        dead, protected = (_pad(x, False)[blocks].any(1) for x in (self.dead, self._protected(ranking)))
        mean = _pad(self.score, 0)[blocks].sum(1) / (blocks < len(self.score)).sum(1)
        channels = _pad(self.channels, 0)[blocks].sum(1)
        # The first to go: those at 0, then by importance, and never the protected.
        order = mean.masked_fill(dead, -1.0).masked_fill(protected, float("inf")).argsort(stable=True)
        chosen = torch.zeros_like(dead)
        chosen[order] = channels[order].cumsum(0) <= wanted
        chosen &= dead if self.settled else ~protected
        # A block dies as a whole, or what is left of a layer would not be a multiple.
        largest = _pad(_pad(torch.cat(self.gammas).abs().to(self.score.dtype), 0)[self.parts].amax(1), 0)[blocks].amax(1)
        self.settled |= progress >= self.LAST
        self.dead |= self._of_groups(chosen if self.settled else chosen & (largest < self.DEAD), blocks)
        shrinking = self._of_groups(chosen, blocks).to(self.score.dtype)
        alive = (~self.dead).to(self.score.dtype)[self.group]
        factors = list(((1 - (1 - self.SHRINK) * shrinking)[self.group] * alive).split(self.sizes))
        torch._foreach_mul_(self.gammas, factors)
        torch._foreach_mul_(self.betas, factors)
        if self.copies:
            torch._foreach_mul_(self.copies, [part for part in alive.split(self.sizes) for _ in range(2)])

    def _of_groups(self, flags: Tensor, blocks: Tensor) -> Tensor:
        """Flags of blocks -> flags of their groups."""
        found = _pad(torch.zeros_like(self.dead), False)
        found[blocks] = flags[:, None].expand_as(blocks)
        return found[:-1]

    def _protected(self, ranking: Tensor) -> Tensor:
        """bool (groups,): among the best of a layer, which must stay."""
        place = torch.empty_like(ranking)
        place[ranking] = torch.arange(len(ranking), device=ranking.device)
        order = place[self.group].argsort(descending=True, stable=True)
        order = order[self.layer[order].argsort(stable=True)]  # channels by layer, and within a layer from best to worst
        protected = torch.zeros_like(self.dead)
        protected[self.group[order[torch.arange(self.total, device=order.device) - self.start < self.floor]]] = True
        return protected

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"score": self.score, "dead": self.dead, "settled": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take state_dict()'s values back."""
        self.settled = state.get("settled", False)
        self.score.copy_(state["score"])
        self.dead.copy_(state["dead"])


class _Blocks:
    """Groups of channels, dealt into blocks in the order of any ranking.

    `inside`, (groups, layers), counts a group's channels in each layer. Groups that are alike in that, a kind, form blocks: as many as make a
    multiple of `round_to` channels in every layer; the lowest block of a kind takes what does not divide.
    """

    def __init__(self, inside: np.ndarray, round_to: int, device: torch.device | None):
        self.inside, kind = np.unique(inside, axis=0, return_inverse=True)  # of a group of each kind
        kind = kind.reshape(-1)
        self.counts = np.bincount(kind)
        self.sizes = [max(round_to // math.gcd(round_to, int(c)) for c in row[row > 0]) for row in self.inside]  # groups a block
        numbers, blocks = [np.zeros(0, int)], 0
        for size, count in zip(self.sizes, self.counts):
            numbers.append(blocks + (np.arange(count) + -count % size) // size)
            blocks += -(-count // size)
        self.kind = torch.as_tensor(kind, device=device) if max(self.sizes, default=1) > 1 else None
        self.table = torch.as_tensor(_members(np.concatenate(numbers)), device=device)  # (blocks, most groups): places in a ranking by kind

    def of(self, ranking: Tensor) -> Tensor:
        """(blocks, most groups) numbers of groups, from the lowest block of a kind to its best; filled up with the number of groups."""
        if self.kind is None:
            return self.table
        return _pad(ranking[self.kind[ranking].argsort(stable=True)], len(ranking))[self.table]

    def stay(self, floors: np.ndarray) -> int:
        """Channels that stay in any case, since every layer keeps `floors`, (layers,), of its own: at least so many."""
        alone = (self.inside > 0).sum(0) == 1  # layers of one kind; where there are several, any of them may stay
        channels = 0
        for row, size, count in zip(self.inside, self.sizes, self.counts):
            floor = max((-(-int(floors[i]) // int(row[i])) for i in np.flatnonzero((row > 0) & alone)), default=0)
            channels += min(int(count), -(-floor // size) * size) * int(row.sum())
        return channels


def _members(labels: np.ndarray) -> np.ndarray:
    """Labels 0..n-1 of things -> (n, most) the things of each label in order, filled up with the number of things."""
    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    table = np.full((len(counts), counts.max(initial=1)), len(labels))
    table[labels[order], np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)] = order
    return table


def _pad(values: Tensor, value: float) -> Tensor:
    """One more at the end, for tables that are filled up with the index behind the last."""
    return nn.functional.pad(values, (0, 1), value=value)


def gauge(gammas: Sequence[Tensor]) -> dict[str, float]:
    """Share (0..1) of gammas that are exactly 0, and of |gamma| below 1e-3, 1e-2 and 1e-1, over all channels."""
    values = torch.cat([g.detach().abs().flatten() for g in gammas])
    below = {f"below_{edge:.0e}".replace("e-0", "e-"): float((values < edge).float().mean()) for edge in EDGES}
    return {"zero": float((values == 0).float().mean()), **below}
