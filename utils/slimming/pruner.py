"""The pruning engine: rank the channels of a model, choose a cut, make it, check it.

    pruner = Pruner(model, imgsz=640)
    result = pruner.rank("gamma", Rules(min_share=0.25)).cut(percent=0.5)
    result.slim, result.masked, result.masks, result.report

It works on any nn.Module that torch.fx can trace, and knows no YOLO, no files and no command line.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.slimming.equivalence import EQUIVALENCE_BOUND, Sizes, UnfitImagesError, difference, outputs
from utils.slimming.graph import Masks
from utils.slimming.ranking import SCORES, NothingToCutError, Ranking, Rules, SafeThreshold, TracedModel
from utils.slimming.result import PruneResult, TargetOutcome, separates
from utils.slimming.surgery import M, masked_view, slim
from utils.slimming.targets import TARGETS, is_target


class Pruner(TracedModel[M]):
    """A model whose channels can be ranked and cut. See TracedModel for the arguments.

    stride: the sides of the images of the equivalence check are multiples of it.
    """

    stride = 32
    score, per_flop = "gamma", False
    _ranked: Callable[[str, bool], Ranking] | None = None

    def rank(self, score: str = "gamma", rules: Rules = Rules(), per_flop: bool = False) -> Pruner[M]:  # noqa: B008
        """Rank the channels by one of SCORES, per FLOP or not, as the weights are now. Returns this pruner.

        score="auto": by gamma; a cut for which gammas do not tell channels apart is made by taylor instead.
        Raises NothingToCutError where no channel may go, and UnknownNormError for a pattern in rules.keep that no
        BatchNorm fits; both are ValueErrors, which another score is, too.
        """
        if score not in ("auto", *SCORES):
            raise ValueError(f"score must be one of auto, {', '.join(SCORES)}, not {score!r}")
        self.score, self.per_flop = score, per_flop
        self._ranked = cache(lambda by, per_flop: Ranking(self, rules, by, per_flop))
        if not self.ranking.total:
            raise NothingToCutError(self.ranking.why_empty())
        return self

    def ranked_by(self, score: str, per_flop: bool) -> Ranking:
        """The ranking by a score, by the rules that rank() was given. ValueError before that."""
        if self._ranked is None:
            raise ValueError("the channels are not ranked yet; call rank() first, as in pruner.rank().cut(percent=0.5)")
        return self._ranked(score, per_flop)

    @property
    def ranking(self) -> Ranking:
        """The ranking by the score that rank() was given; by gamma where that is "auto"."""
        return self.ranked_by("gamma" if self.score == "auto" else self.score, self.per_flop)

    def cut(self, percent: float | None = None, target: tuple[str, float] | None = None) -> PruneResult[M]:
        """Cut a share (0..1) of the prunable channels, or as many as a target (a name of TARGETS, number) takes.

        The model itself is not changed. Raises ValueError before rank(), for a target that can't be, and where the
        slim model does not compute what the masked one does: the channel graph misreads a block.
        """
        if (percent is None) == (target is None):
            raise ValueError("give either percent or target")
        if target is not None and not is_target(target):
            raise ValueError(f"target must be one of {', '.join(TARGETS)} and a number between 0 and 1, such as "
                             f"('flops', 0.5), not {target!r}")
        ranking, keep, outcome = self._choose(percent, target)
        masks, (gammas, kept) = self.graph.masks(keep), self._gammas_and_kept(ranking, keep)
        narrow = slim(self.model, masks, self.graph)
        difference = self.check_equivalence(masked_view(self.model, masks), narrow)
        return PruneResult(
            self.model, narrow, masks, [branch.module for branch in self.graph.gone(keep)],
            prunable=ranking.prunable, gammas=gammas, kept=kept,
            safe=self.safe_threshold(), unused=ranking.leading_share(self.largest("weight", "bias") == 0),
            threshold=float(gammas[~kept].max()) if not kept.all() else 0.0,
            achieved=sum(int((~mask).sum()) for mask in masks.values()) / ranking.total,
            difference=difference, target=outcome, graph_notes=self.graph.notes, score=ranking.score,
            per_flop=self.per_flop)

    def _choose(self, percent: float | None, target: tuple[str, float] | None = None,
                ) -> tuple[Ranking, np.ndarray, TargetOutcome | None]:
        """What cut() keeps, bool (ids,), the ranking that it cuts by, and what becomes of a target."""
        def choose(ranking: Ranking) -> tuple[Ranking, np.ndarray, TargetOutcome | None]:
            if target is not None:
                return ranking, *self._reach(ranking, *target)
            return ranking, ranking.keep_percent(percent or 0.0), None

        choice = choose(self.ranking)
        if self.score == "auto" and not separates(*self._gammas_and_kept(*choice[:2])):
            return choose(self.ranked_by("taylor", self.per_flop))
        return choice

    def _gammas_and_kept(self, ranking: Ranking, keep: np.ndarray) -> tuple[Tensor, Tensor]:
        """(channels,) |gamma| of the prunable channels, and which of them are kept.

        Of a branch that goes they are those of its last BatchNorm: the gammas before it do not tell what it is worth.
        """
        masks = self.graph.masks(keep)
        before = {name for last, branch in self.graph.branches.items() if not keep[branch.number]
                  for name in branch.norms if name != last}
        gammas = self.gammas({name: mask for name, mask in ranking.prunable.items() if name not in before})
        kept = [masks[name][ranking.prunable[name]] for name in gammas]
        return torch.cat(list(gammas.values())), torch.cat(kept)

    def score_for(self, percent: float) -> str:
        """What cut(percent) ranks the channels by, one of SCORES."""
        return self._choose(percent)[0].score

    def safe_threshold(self) -> SafeThreshold:
        """The largest safe gamma, and the percent up to which a cut by gamma alone stays below it."""
        ranking = self.ranked_by("gamma", False)
        zero = self.graph.gone((self.largest("weight") > 0) | ~ranking.may_go)  # of these nothing need be left
        alone = {name: torch.from_numpy(ranking.may_go[ids]) for name, ids in self.graph.norms.items()
                 if not any(branch.holds(name) for branch in zero)}
        safe = min((float(gammas.max()) for gammas in self.gammas(alone).values()), default=0.0)
        return SafeThreshold(safe, ranking.leading_share(self.largest("weight") < safe))

    def check_equivalence(self, zeroed: M, narrow: M) -> float:
        """The equivalence check: the largest relative |narrow - zeroed| in float64. ValueError if it is too large.

        The images are small ones of two shapes; for a model that does not compute these, of `imgsz`. Of example inputs
        it takes the shapes.
        """
        side = max(self.stride, 32)
        sizes: Sizes = ((1, 2 * side, 2 * side), (2, 2 * side, 3 * side))
        try:
            expected = outputs(zeroed, self.channels, sizes, inputs=self.inputs)
        except UnfitImagesError:
            if self.inputs is not None:
                raise
            sizes = ((2, self.imgsz, self.imgsz),)
            expected = outputs(zeroed, self.channels, sizes)
        tensors = [y for y in expected if isinstance(y, Tensor) and y.numel()]
        if not tensors:
            raise ValueError(f"{type(zeroed).__name__} gives no tensor, so there is nothing to check a cut by")
        if not all(bool(y.isfinite().all()) for y in tensors):
            raise ValueError(f"{type(zeroed).__name__} gives values that are not finite, with the cut channels masked; "
                             "a cut can't be checked")
        try:
            deviation = difference(expected, outputs(narrow, self.channels, sizes, inputs=self.inputs))
        except UnfitImagesError:
            deviation = float("inf")
        if not deviation < EQUIVALENCE_BOUND:
            raise ValueError(f"the slim model differs from the masked one by {deviation:.1e} (relative; rounding is "
                             f"below {EQUIVALENCE_BOUND:.0e}): it holds a block that the channel graph misreads")
        return deviation

    def _reach(self, ranking: Ranking, name: str, goal: float) -> tuple[np.ndarray, TargetOutcome]:
        """What the cut keeps that just reaches a target, and the outcome."""
        target = TARGETS[name]

        @cache
        def value(groups: int) -> float:
            return target.value(self, ranking.keep_groups(groups))

        if target.allowance:  # one group less than the first cut that loses more
            groups, exceeded = ranking.smallest_cut(lambda groups: value(groups) < -goal)
            groups -= int(exceeded and groups > 0)
            reached = True
        else:
            groups, reached = ranking.smallest_cut(lambda groups: value(groups) <= goal)
        return ranking.keep_groups(groups), TargetOutcome(name, goal, value(groups), reached)

    def preview(self, percent: float) -> tuple[Masks, int, int]:
        """(masks, parameters, FLOPs) that cut(percent) would leave. Nothing is cut."""
        keep = self._choose(percent)[1]
        return self.graph.masks(keep), *self.costs.remaining(keep)

    def sweep(self, percents: Sequence[float]) -> list[dict[str, Any]]:
        """A row per share (0..1, rising) of the prunable channels, as cut() would cut it.

        Keys: percent, score, those of the accuracy, parameters, GFLOPs, ms (milliseconds per image).
        """
        rows, models = [], []
        for percent in tqdm(percents, desc="sweep", leave=False, disable=None):
            ranking, keep, _ = self._choose(percent)
            models.append(slim(self.model, self.graph.masks(keep), self.graph))
            rows.append({"percent": percent, "score": ranking.score, **self.evaluate(models[-1]), **self._cost(keep)})
        times = self.milliseconds(models)
        return [row | {"ms": ms} for row, ms in zip(rows, times)]

    def sensitivity(self, share: float) -> list[dict[str, Any]]:
        """A row per layer: accuracy and cost when `share` of its prunable channels goes and all others stay.

        The channels are ranked by score_for(share).

        The first row is the whole model. Layers that share their channels have one row, under the name of the first.
        """
        ranking = self._choose(share)[0]
        whole = ranking.keep_groups(0)
        rows: list[dict[str, Any]] = [{"layer": "(none)", "cut": 0, **self.accuracy, **self._cost(whole)}]
        seen: set[bytes] = set()
        for name, ids in tqdm(self.graph.norms.items(), desc="layers", leave=False, disable=None):
            keep = ranking.keep_layer(name, share)
            channels = self.graph.group[ids].tobytes()
            if keep[ids].all() or channels in seen:
                continue
            seen.add(channels)
            narrow = slim(self.model, self.graph.masks(keep), self.graph)
            rows.append({"layer": name, "cut": int((~keep[ids]).sum()), **self.evaluate(narrow), **self._cost(keep)})
        return rows

    def _cost(self, keep: np.ndarray) -> dict[str, float]:
        parameters, flops = self.costs.remaining(keep)
        return {"parameters": parameters, "GFLOPs": flops / 1e9}
