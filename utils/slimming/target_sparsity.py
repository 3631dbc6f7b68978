"""--target-sparsity: take a share of the channels to exactly 0 while the network trains."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from utils.slimming.blocks import ChannelBlocks, ChannelGroups, append


class TargetSparsity:
    """Takes `share` (0..1) of the channels of the given BatchNorms to exactly 0, the least important ones.

    (As many as fill up blocks, to be precise: less than `share` by less than a block, see `round_to`.) Without a share
    none goes until aim() has chosen one.

    A channel's importance is the running mean of (gamma * dL/dgamma + beta * dL/dbeta)^2, the first-order estimate of
    what the loss would lose with it (Molchanov et al. 2019, arXiv 1906.10771, eq. 8). Every step multiplies gamma and
    beta of the channels that rank lowest at the moment by SHRINK. A channel that ranks higher again recovers by
    training; one whose |gamma| falls below DEAD is 0 for good. The number of channels that shrink grows between BEGIN
    and END of the run, fast first, when there is most to choose from; the rest of the run heals. At LAST the channels
    that still shrink are set to 0, and no channel is given up after that.

    Every layer keeps its best max(LEAST, FLOOR of it) channels.

    copies: BatchNorms of the same shape that follow these, such as a moving average's. They are 0 where these are.
    costs: float (channels,) per BatchNorm, such as CostModel.flops_per_channel gives. Channels then rank by importance
        per cost, and the same share frees more of it.
    groups: int (channels,) per BatchNorm. Channels of one number, such as those that a shortcut adds up, are one
        channel: they go at once, ranked by the sum of their importances.
    branches: number of a BatchNorm that goes as one, whatever its size -> those that go with it. It ends a branch, and
        its channels are of one group (see ChannelGraph.groups).
    allowed: bool (channels,) per BatchNorm. Only these channels go, whatever is left of their layer.
    round_to: channels of a layer go in blocks of so many, those that rank next to each other, by the block's mean.
        What is left of the layer is a multiple, which is what fast kernels compute anyway. (In a layer whose channels
        are coupled to different layers, as by a concatenation and a sum, each part of it is a multiple.)

    All processes must rank alike, so no sum here depends on an order that a GPU may choose (atomics): tables, not
    scatters.
    """

    SHRINK, DEAD = 0.85, 0.02
    BEGIN, END, LAST = 0.08, 0.6, 0.8  # of the run
    MEMORY = 0.98                      # of the running mean, per step
    FLOOR, LEAST = 0.1, 4

    def __init__(self, norms: Sequence[_BatchNorm], share: float | None, copies: Sequence[_BatchNorm] = (),
                 costs: Sequence[np.ndarray] | None = None, groups: Sequence[np.ndarray] | None = None,
                 round_to: int = 1, allowed: Sequence[np.ndarray] | None = None,
                 branches: Mapping[int, Sequence[int]] | None = None):
        if (share is not None and not 0 < share < 1) or round_to < 1:
            raise ValueError(f"share must be between 0 and 1, not {share}, and round_to at least 1, not {round_to}")
        self.share = share or 0.0
        self.lengths = [len(norm.weight) for norm in norms]
        trained = self.trained = [i for i, norm in enumerate(norms) if norm.weight.requires_grad]
        self.sizes = [self.lengths[i] for i in trained]
        self.total = sum(self.sizes)  # channels
        self.attach(norms, copies)
        sizes, device = np.asarray(self.sizes, int), self.gammas[0].device if self.gammas else None

        def of_all(values: Sequence[np.ndarray] | None, default: np.ndarray) -> np.ndarray:
            return default if values is None else np.concatenate([values[i] for i in trained])

        floors = np.zeros_like(sizes)
        if allowed is None:
            floors = np.maximum(np.ceil(sizes * self.FLOOR).astype(int), np.minimum(sizes, self.LEAST))
            floors[np.isin(trained, [*(branches or ())])] = 0
        self.groups = ChannelGroups(
            sizes, of_all(groups, np.arange(self.total)), cost=of_all(costs, np.ones(self.total)),
            floors=floors, may_go=of_all(allowed, np.ones(self.total, bool)),
            device=device)
        self.blocks = ChannelBlocks(self.groups.in_layer, round_to, device)
        self.most = 1 - self.blocks.min_remaining(floors) / max(self.total, 1)  # share of the channels that can go
        place, in_layer, branches = {i: place for place, i in enumerate(trained)}, self.groups.in_layer, branches or {}
        ends = [int(in_layer[:, place[last]].argmax()) for last in branches]
        inner = [in_layer[:, [place[i] for i in others]].any(1) for others in branches.values()]
        self.ends = torch.as_tensor(np.array(ends, int), device=device)  # (branches,) groups
        self.inner = torch.as_tensor(np.array(inner, bool).reshape(len(ends), len(in_layer)),
                                     device=device)                      # (branches, groups) that go with them
        self.settled = False  # the run is past LAST
        self.score = torch.zeros(len(self.groups), device=device)  # (groups,) importances
        self.dead = torch.zeros(len(self.groups), dtype=torch.bool, device=device)  # (groups,) they are 0 for good

    def attach(self, norms: Sequence[_BatchNorm | None], copies: Sequence[_BatchNorm | None] = (),
               kept: Sequence[np.ndarray] | None = None) -> None:
        """Act on these BatchNorms from now on: the same ones after a cut of dead channels; None: all of one were cut.

        kept: bool (channels,) per BatchNorm, over the channels of the first ones: those that are left. What is counted
        and ranked here still refers to the channels of the first ones, so that a cut changes no choice.
        """
        active = [norm for i in self.trained if (norm := norms[i])]
        self.gammas: list[Tensor] = [norm.weight for norm in active]
        self.betas: list[Tensor] = [norm.bias for norm in active]
        followers = [copy for i in self.trained if (copy := copies[i])] if copies else []
        self.copies: list[Tensor] = [tensor for copy in followers for tensor in (copy.weight, copy.bias)]
        self.present: Tensor | slice = slice(None)  # numbers of the channels that are left
        if kept is not None:
            numbers = np.flatnonzero(np.concatenate([kept[i] for i in self.trained]))
            self.present = torch.as_tensor(numbers, device=self.gammas[0].device)

    def aim(self, reached: Callable[[list[np.ndarray]], bool]) -> list[np.ndarray]:
        """Choose the smallest share with which `reached` is true, by the present ranking. Returns what goes with it.

        reached: of what goes, bool (channels,) per BatchNorm. It is assumed to stay true where more goes.
        """
        blocks, order, channels, protected = self._arranged()
        low, high = 0, int((~protected).sum())

        def gone_with(number: int) -> list[np.ndarray]:
            flags = torch.zeros_like(protected)
            flags[order[:number]] = True
            return self._per_norm(self._groups_of(flags, blocks))

        while low < high:
            middle = (low + high) // 2
            if reached(gone_with(middle)):
                high = middle
            else:
                low = middle + 1
        self.share = int(channels[order[:high]].sum()) / self.total
        return gone_with(high)

    @property
    def most_gone(self) -> list[np.ndarray]:
        """Bool (channels,) per BatchNorm: all that may go, by the present ranking."""
        blocks, _, _, protected = self._arranged()
        return self._per_norm(self._groups_of(~protected, blocks))

    @property
    def gone(self) -> list[np.ndarray]:
        """Bool (channels,) per BatchNorm: those that are 0 for good."""
        return self._per_norm(self.dead)

    def due(self, progress: float) -> bool:
        """Is this a moment at which aim() is needed: before the first channel shrinks, and before the last one is 0?"""
        return not self.settled and (progress >= self.LAST or (progress >= self.BEGIN and not self.share))

    def channels_at(self, progress: float) -> int:
        """Channels that should be 0, or on their way there, at this point (0..1) of the run."""
        u = min(max((progress - self.BEGIN) / (self.END - self.BEGIN), 0.0), 1.0)
        return round(self.share * (1 - (1 - u) ** 3) * self.total)

    @torch.no_grad()
    def observe(self) -> None:
        """Update the importances from complete, unscaled gradients. Call it before the optimizer's step."""
        square = self._of_all((_times_gradient(self.gammas) + _times_gradient(self.betas)).float().square())
        # Not finite in a step that the loss scaler is about to skip: such a step does not count.
        finite = square.isfinite().all()
        summed = append(square.nan_to_num(0, 0), 0)[self.groups.members].sum(1)
        self.score.lerp_(summed / self.groups.cost, (1 - self.MEMORY) * finite)

    @torch.no_grad()
    def shrink(self, progress: float) -> None:
        """Shrink what ranks lowest now. Call it after the optimizer's step."""
        if not (count := self.channels_at(progress)):
            self.settled |= progress >= self.LAST
            return
        blocks, order, channels, protected = self._arranged()
        chosen = torch.zeros_like(protected)
        chosen[order] = channels[order].cumsum(0) <= count
        if self.settled:  # no channel is given up any more
            chosen &= append(self.dead, False)[blocks].any(1)
        else:
            chosen &= ~protected
        self.settled |= progress >= self.LAST
        # A block dies as a whole, or the rest of its layer would not be a multiple.
        dying = chosen if self.settled else chosen & (self._largest_gamma(blocks) < self.DEAD)
        self.dead |= self._groups_of(dying, blocks)
        self.dead |= self.inner[self.dead[self.ends]].any(0)
        self._multiply(self._groups_of(chosen, blocks).to(self.score.dtype))

    def _multiply(self, shrinking: Tensor) -> None:
        """SHRINK the gammas and betas of the shrinking groups (1 or 0 each), set those of dead groups to 0."""
        alive = (~self.dead).to(self.score.dtype)[self.groups.group]
        factors = (1 - (1 - self.SHRINK) * shrinking)[self.groups.group] * alive
        sizes = [len(gamma) for gamma in self.gammas]
        parts = list(factors[self.present].split(sizes))
        torch._foreach_mul_(self.gammas, parts)
        torch._foreach_mul_(self.betas, parts)
        if self.copies:
            torch._foreach_mul_(self.copies, [part for part in alive[self.present].split(sizes) for _ in range(2)])

    def _of_all(self, values: Tensor) -> Tensor:
        """Values of the channels that are left -> (channels,) of all, 0 for the others."""
        everything = values.new_zeros(self.total)
        everything[self.present] = values
        return everything

    def _per_norm(self, groups: Tensor) -> list[np.ndarray]:
        """Flags of groups -> bool (channels,) per BatchNorm; no channel of a frozen one is flagged."""
        per_norm = [np.zeros(length, bool) for length in self.lengths]
        for i, flags in zip(self.trained, groups[self.groups.group].split(self.sizes)):
            per_norm[i] = flags.cpu().numpy()
        return per_norm

    def _arranged(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The blocks by the present ranking.

        Returns blocks (blocks, most groups), their order from the first to go to the last, their channels, and which
        are protected: these come last in the order, and never go.
        """
        ranking = self.score.masked_fill(self.dead, -1.0).argsort(stable=True)  # dead groups, then by importance
        blocks = self.blocks.arrange(ranking)
        dead = append(self.dead, False)[blocks].any(1)
        protected = append(self.groups.protected(ranking) & ~self.dead, False)[blocks].any(1)
        mean = append(self.score, 0)[blocks].sum(1) / (blocks < len(self.score)).sum(1)
        channels = append(self.groups.counts, 0)[blocks].sum(1)
        # The first to go are the dead, then the others by importance.
        order = mean.masked_fill(dead, -1.0).masked_fill(protected, float("inf")).argsort(stable=True)
        return blocks, order, channels, protected

    def _largest_gamma(self, blocks: Tensor) -> Tensor:
        """(blocks,) largest |gamma| of a block."""
        per_channel = self._of_all(torch.cat(self.gammas).abs().to(self.score.dtype))
        per_group = append(per_channel, 0)[self.groups.members].amax(1)
        return append(per_group, 0)[blocks].amax(1)

    def _groups_of(self, flags: Tensor, blocks: Tensor) -> Tensor:
        """Flags of blocks -> flags of their groups."""
        group_flags = append(torch.zeros_like(self.dead), False)
        group_flags[blocks] = flags[:, None].expand_as(blocks)
        return group_flags[:-1]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"score": self.score, "dead": self.dead, "settled": self.settled, "share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take state_dict()'s values back."""
        if not state["score"].shape == state["dead"].shape == self.score.shape:
            raise ValueError(f"the state is not of {len(self.score)} channels")
        self.settled = state.get("settled", False)
        self.share = state.get("share", self.share)
        self.score.copy_(state["score"])
        self.dead.copy_(state["dead"])


def _times_gradient(parameters: list[Tensor]) -> Tensor:
    """(channels,) parameter * gradient, 0 where there is no gradient."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat(torch._foreach_mul(parameters, gradients))
