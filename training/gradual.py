"""A cut that takes channels that the model uses, made gradually while the model is fine-tuned."""
from __future__ import annotations

from typing import Any

import numpy as np

from training.narrow import narrow
from training.run import Hook, Run
from utils.slimming import trace
from utils.slimming.cost import profile
from utils.slimming.graph import Masks, batch_norms
from utils.slimming.target_sparsity import TargetSparsity

GRADUAL_SHARE = 1 / 3  # of the run, in which the channels go


class GradualCut(Hook):
    """The run starts with the wide model, as it was before the cut, and has the slim one before GRADUAL_SHARE is over.

    The channels that `masks` cut shrink to 0 as under --target-sparsity: those first that the loss uses least at the
    moment. Of a branch that goes as a whole it is those of its last BatchNorm. They are taken out at the end of the
    epoch in which the last one is 0. Without masks the hook does nothing, unless the resumed run has not made its cut.
    """

    def __init__(self, masks: Masks | None = None):
        self.masks = masks or {}  # over the channels that the model has before the cut; empty: nothing is to be cut

    def start(self, run: Run) -> None:
        self.run = run
        if run.resumed:
            self.masks = run.resumed.get("to_cut", {})
        if not self.masks:
            return
        graph = trace(run.model)
        gone = graph.gone(graph.kept(self.masks))
        whole = [last for last, branch in graph.branches.items() if branch in gone]
        names = [name for name, mask in self.masks.items() if not mask.all() and (
            name in whole or not any(branch.holds(name) for branch in gone))]
        norms, averaged = (list(batch_norms(model, names).values()) for model in (run.model, run.ema.ema))
        allowed = [~self.masks[name].numpy() for name in names]
        self.target = TargetSparsity(norms, float(np.concatenate(allowed).mean()), averaged, allowed=allowed,
                                     groups=graph.groups(names, whole))

    def before_step(self) -> None:
        if self.masks:
            self.target.observe()

    def after_step(self, skipped: bool) -> None:
        if self.masks and not skipped:
            self.target.shrink(self.run.progress / GRADUAL_SHARE)

    def epoch_end(self, log: dict[str, float]) -> None:
        if not self.masks or not self.target.settled:
            return
        masks, self.masks = self.masks, {}
        narrow(self.run, masks)
        if self.run.world.main:
            cost = profile(self.run.model, self.run.imgsz)
            print(f"{'':>11}slim from here on: {cost.parameters:,} parameters, {cost.gflops:.2f} GFLOPs")

    def may_be_best(self) -> bool:
        """An epoch that ends with more channels than the run does not count."""
        return not self.masks

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target.state_dict()} if self.masks else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.masks:
            self.target.load_state_dict(state["target"])

    def record(self) -> dict[str, Any]:
        """For a resumed run: what is still to be cut."""
        return {"to_cut": self.masks} if self.masks else {}
