"""The pruning engine: rank the channels of a model, choose a cut, make it, check it.

    pruner = Pruner(model, imgsz=640)
    result = pruner.rank("gamma", Rules(min_share=0.25)).cut(percent=0.5)
    result.slim, result.masked, result.masks, result.report

It works on any nn.Module that torch.fx can trace, and knows no YOLO, no files and no command line.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils.slimming.equivalence import EQUIVALENCE_BOUND, largest_difference
from utils.slimming.graph import Masks
from utils.slimming.ranking import NothingToCutError, Ranking, Rules, TracedModel
from utils.slimming.result import PruneResult, TargetOutcome, gammas_tell
from utils.slimming.surgery import M, masked_view, slim
from utils.slimming.targets import TARGETS


class Pruner(TracedModel[M]):
    """A model whose channels can be ranked and cut. See TracedModel for the arguments.

    stride: the sides of the images of the equivalence check are multiples of it.
    """

    stride = 32

    def rank(self, score: str = "gamma", rules: Rules = Rules(), per_flop: bool = False) -> Pruner[M]:  # noqa: B008
        """Rank the channels by one of SCORES, per FLOP or not, as the weights are now. Returns this pruner.

        score="auto": by gamma; a cut for which gammas do not tell channels apart is made by taylor instead.
        Raises NothingToCutError where no channel may go, and UnknownNormError for a pattern in rules.keep that no
        BatchNorm fits; both are ValueErrors.
        """
        self.automatic, self.score = score == "auto", "gamma" if score == "auto" else score
        self.ranking = Ranking(self, rules, self.score, per_flop)
        if not self.ranking.total:
            raise NothingToCutError
        return self

    def cut(self, percent: float | None = None, target: tuple[str, float] | None = None) -> PruneResult[M]:
        """Cut a share (0..1) of the prunable channels, or as many as a target (a name of TARGETS, number) takes.

        The model itself is not changed. Raises ValueError where the slim model does not compute what the masked one
        does, which means that the channel graph misreads a block.
        """
        if (percent is None) == (target is None):
            raise ValueError("give either percent or target")
        result = self._cut(percent, target)
        if not self.automatic or result.small_gammas:
            return result
        self.rank("taylor", self.ranking.rules, self.ranking.per_flop)
        return self._cut(percent, target)

    def _cut(self, percent: float | None, target: tuple[str, float] | None) -> PruneResult[M]:
        """cut() by the ranking as it is."""
        keep, outcome = (self.ranking.keep_percent(percent or 0.0), None) if target is None else self._reach(*target)
        masks = self.graph.masks(keep)
        zeroed, narrow = masked_view(self.model, masks), slim(self.model, masks, self.graph)
        difference = self.check(zeroed, narrow)
        gone = torch.cat([self.norms[name].weight.detach().abs()[~mask] for name, mask in masks.items()])
        prunable = self.ranking.prunable
        return PruneResult(
            self.model, narrow, masks, prunable=prunable, gammas=torch.cat(list(self.gammas(prunable).values())),
            safe=self.safe_threshold(prunable), threshold=float(gone.max()) if len(gone) else 0.0,
            achieved=len(gone) / self.ranking.total, difference=difference, target=outcome,
            graph_notes=self.graph.notes, score=self.score)

    def check(self, zeroed: M, narrow: M) -> float:
        """The equivalence check: the largest relative |narrow - zeroed| in float64. ValueError if it is too large."""
        side = max(self.stride, 32)
        sizes = ((1, 2 * side, 2 * side), (3, 2 * side, 3 * side))
        difference = largest_difference(zeroed, narrow, self.channels, sizes)
        if not difference < EQUIVALENCE_BOUND:
            raise ValueError(f"the slim model differs from the masked one by {difference:.1e} (relative; rounding is "
                             f"below {EQUIVALENCE_BOUND:.0e}): it holds a block that the channel graph misreads")
        return difference

    def _reach(self, name: str, wanted: float) -> tuple[np.ndarray, TargetOutcome]:
        """What the cut keeps that just reaches a target, and the outcome."""
        target, ranking = TARGETS[name], self.ranking

        @cache
        def value(groups: int) -> float:
            return target.value(self, ranking.keep_groups(groups))

        if target.limit:  # one group less than the first cut that loses more
            groups, exceeded = ranking.smallest_cut(lambda groups: value(groups) < -wanted)
            groups -= int(exceeded and groups > 0)
            reached = True
        else:
            groups, reached = ranking.smallest_cut(lambda groups: value(groups) <= wanted)
        return ranking.keep_groups(groups), TargetOutcome(name, wanted, value(groups), reached)

    def preview(self, percent: float) -> tuple[Masks, int, int]:
        """(masks, parameters, FLOPs) that cut(percent) would leave. Nothing is cut."""
        keep = self.ranking.keep_percent(percent)
        return self.graph.masks(keep), *self.costs.remaining(keep)

    def _settle_score(self, percent: float) -> None:
        """score="auto": rank by taylor from here on, if gammas do not tell which channels a cut of `percent` takes."""
        if not self.automatic:
            return
        masks, prunable = self.graph.masks(self.ranking.keep_percent(percent)), self.ranking.prunable
        gammas = self.gammas(prunable)
        kept = torch.cat([masks[name][prunable[name]] for name in gammas])
        if not gammas_tell(torch.cat(list(gammas.values())), kept):
            self.rank("taylor", self.ranking.rules, self.ranking.per_flop)

    def sweep(self, percents: Sequence[float]) -> list[dict[str, Any]]:
        """A row per share (0..1, rising) of the prunable channels, as cut() would cut it.

        Keys: percent, score, those of the accuracy, parameters, GFLOPs, ms (milliseconds per image).
        """
        rows, models = [], []
        for percent in tqdm(percents, desc="sweep", leave=False, disable=None):
            self._settle_score(percent)
            keep = self.ranking.keep_percent(percent)
            models.append(slim(self.model, self.graph.masks(keep), self.graph))
            rows.append({"percent": percent, "score": self.score, **self.evaluate(models[-1]), **self._cost(keep)})
        times = self.milliseconds(models)
        return [row | {"ms": ms} for row, ms in zip(rows, times)]

    def sensitivity(self, share: float) -> list[dict[str, Any]]:
        """A row per layer: accuracy and cost when `share` of its channels goes and all others stay.

        The first row is the whole model. Layers that share their channels have one row, under the name of the first.
        """
        self._settle_score(share)
        whole = self.ranking.keep_groups(0)
        rows: list[dict[str, Any]] = [{"layer": "(none)", "cut": 0, **self.accuracy, **self._cost(whole)}]
        seen: set[bytes] = set()
        for name, ids in tqdm(self.graph.norms.items(), desc="layers", leave=False, disable=None):
            keep = self.ranking.keep_layer(name, share)
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
