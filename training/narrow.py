"""Going on with a slimmer model in the middle of a run."""
from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from models.yolo import Model
from training.run import Run
from utils.slimming import trace
from utils.slimming.graph import ChannelGraph, Masks
from utils.slimming.surgery import last_masks, slim


def narrow(run: Run, masks: Masks) -> None:
    """Cut channels out of everything that a run holds: the model, its average, the optimizer's state.

    masks: over the channels that run.model has now. Where gamma and beta of all that goes are 0 and stay 0, the run
    goes on as it would have gone on without the cut, to rounding. Call it between two steps, in all processes.
    """
    graph = trace(run.model)
    model, ema = slim(run.model, masks, graph), slim(run.ema.ema, masks, graph)
    narrow_optimizer(run.optimizer, run.model, model, masks, graph)
    run.replace_model(model, ema)


def narrow_optimizer(optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module, masks: Masks,
                     graph: ChannelGraph) -> None:
    """Make an optimizer of `old` one of `new`, which is slim(old, masks, graph), with the state of what is left.

    A state of a parameter's shape, such as a momentum, is cut by the same surgery as the parameter: it takes the place
    of the weights in a copy of the model.
    """
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    names: dict[Tensor, str] = {parameter: name for name, parameter in before.items()}
    state = {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}
    for key in sorted({key for values in state.values() for key, value in values.items() if value.dim()}):
        copy = deepcopy(old)
        for name, parameter in copy.named_parameters():
            if key in state.get(name, {}):
                parameter.data = state[name][key]
        for name, parameter in slim(copy, masks, graph).named_parameters():
            if key in state.get(name, {}):
                state[name][key] = parameter.detach()
    for group in optimizer.param_groups:
        group["params"] = [after[names[parameter]] for parameter in group["params"] if names[parameter] in after]
    optimizer.state.clear()
    optimizer.state.update({after[name]: values for name, values in state.items() if name in after})


class RemainingChannels:
    """Which channels of the model that a run started with are left, and the way between that model and the present one.

    before: masks of the start, over the channels of the first, dense model: what a checkpoint calls masks.
    masks: those of the present model, over the channels of the start. A BatchNorm without a mask has all of them.
    """

    def __init__(self, before: Masks, model: Model):
        self.before = dict(before)
        self.update(model)

    def update(self, model: Model) -> None:
        """`model` is the present one."""
        self.masks: Masks = last_masks(self.before, model.masks)

    @property
    def fewer(self) -> bool:
        """Has anything been cut since the start?"""
        return not all(bool(mask.all()) for mask in self.masks.values())

    def to_present(self, masks: Masks) -> Masks:
        """Masks over the channels of the start -> over those that are left."""
        return last_masks(self.masks, masks)

    def holds(self, name: str) -> bool:
        """Has the present model this BatchNorm of the start? It has not where a whole branch was cut."""
        return name not in self.masks or bool(self.masks[name].any())

    def to_start(self, name: str, values: Tensor) -> Tensor:
        """Values of a BatchNorm's channels -> of its channels at the start, on the CPU; 0 where one was cut."""
        values = values.detach().cpu()
        if name not in self.masks:
            return values
        wide = values.new_zeros(len(self.masks[name]))
        wide[self.masks[name]] = values
        return wide
