"""Optimizer groups, the learning-rate schedule with warm-up, and the moving average of the weights."""
from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def build_optimizer(model: nn.Module, name: str, lr: float, momentum: float, decay: float,
                    scaled: bool = False) -> torch.optim.Optimizer:
    """An optimizer (SGD, Adam or AdamW) with three groups: biases, weights (the only ones that decay), norm weights.

    Frozen parameters are left out. Fused kernels where there are any: one pass over memory a step. scaled: a GradScaler
    will skip steps. SGD is not fused then: where the first step is skipped, its fused kernel keeps a momentum buffer
    that it has not filled.
    """
    norms = (_NormBase, nn.LayerNorm, nn.GroupNorm)
    groups: dict[str, list[nn.Parameter]] = {"bias": [], "weight": [], "norm": []}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                kind = "bias" if key == "bias" else "norm" if isinstance(module, norms) else "weight"
                groups[kind].append(parameter)
    settings = [{"params": p, "weight_decay": decay if kind == "weight" else 0.0} for kind, p in groups.items()]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if name == "SGD":
        return torch.optim.SGD(settings, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused and not scaled)
    cls = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return cls(settings, lr=lr, betas=(momentum, 0.999), fused=fused)


ENOUGH_STEPS = 2000  # optimizer steps


@dataclass(frozen=True)
class Schedule:
    """Learning rate, momentum and accumulation as pure functions of the iteration: a resumed run needs no state.

    The factor falls over the epochs from 1 to lrf, linearly or as a cosine. Warm-up: max(3 epochs, 100 iterations), but
    never more than a quarter of the run; in it the bias rate comes down from warmup_bias_lr, the others rise from 0.
    """

    hyp: dict[str, float]
    epochs: int
    batches: int     # iterations an epoch
    batch_size: int  # images an iteration, all processes together
    nbs: int         # images a step is meant to see
    cosine: bool = False

    def factor(self, epoch: float) -> float:
        """Learning rate relative to lr0 at an epoch."""
        lrf, x = self.hyp["lrf"], epoch / self.epochs
        if self.cosine:
            return (1 - math.cos(x * math.pi)) / 2 * (lrf - 1) + 1
        return (1 - x) * (1 - lrf) + lrf

    @property
    def warmup(self) -> int:
        """Iterations of warm-up."""
        iterations = max(round(self.hyp["warmup_epochs"] * self.batches), 100) if self.hyp["warmup_epochs"] > 0 else 0
        return min(iterations, self.epochs * self.batches // 4)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, about: during warm-up there are a few more."""
        return math.ceil(self.batches / self.accumulate(self.warmup)) * self.epochs

    def accumulate(self, iteration: int) -> int:
        """Iterations a step, at this iteration."""
        full = max(round(self.nbs / self.batch_size), 1)
        if iteration >= self.warmup:
            return full
        return max(1, round(float(np.interp(iteration, [0, self.warmup], [1, self.nbs / self.batch_size]))))

    def apply(self, optimizer: torch.optim.Optimizer, iteration: int) -> None:
        """Set rate and momentum of every group (group 0: biases) for this iteration."""
        hyp, factor = self.hyp, self.factor(iteration // self.batches)
        for j, group in enumerate(optimizer.param_groups):
            group["lr"], momentum = hyp["lr0"] * factor, hyp["momentum"]
            if iteration < self.warmup:
                start = hyp["warmup_bias_lr"] if j == 0 else 0.0
                group["lr"] = float(np.interp(iteration, [0, self.warmup], [start, group["lr"]]))
                momentum = float(np.interp(iteration, [0, self.warmup], [hyp["warmup_momentum"], momentum]))
            if "momentum" in group:
                group["momentum"] = momentum
            else:
                group["betas"] = (momentum, group["betas"][1])


def suited_nbs(iterations: int, batch_size: int) -> int:
    """Nominal batch of a run of so many iterations: YOLOv5's 64; less, down to 16, where it has too few steps."""
    sizes = (64, 32, 16)
    return next((nbs for nbs in sizes if iterations * batch_size / max(nbs, batch_size) >= ENOUGH_STEPS), sizes[-1])


class ModelEMA(Generic[AnyModel]):
    """Moving average of a model's float state: decay * (1 - exp(-updates / tau)), which starts fast.

    `ema` is a model of its own in eval mode, ready to be validated and saved.
    """

    def __init__(self, model: AnyModel, decay: float = 0.9999, tau: float = 2000.0):
        self.decay, self.tau, self.updates = decay, tau, 0
        self.attach(model, deepcopy(model).eval().requires_grad_(False))

    def attach(self, model: AnyModel, ema: AnyModel) -> None:
        """From now on `ema` is the average, of `model`'s weights."""
        self.ema: AnyModel = ema
        mine, theirs = ema.state_dict(), model.state_dict()
        floats = [k for k, v in mine.items() if v.is_floating_point()]
        # References, collected once: the tensors stay the same objects while training changes what is in them.
        self._mine, self._theirs = [mine[k] for k in floats], [theirs[k] for k in floats]
        counters = [k for k, v in mine.items() if not v.is_floating_point()]
        self._counters = [mine[k] for k in counters], [theirs[k] for k in counters]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model's present weights; call it after each optimizer step."""
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.tau))
        torch._foreach_lerp_(self._mine, self._theirs, 1 - decay)
        if self._counters[0]:
            torch._foreach_copy_(*self._counters)


def ema_tau(steps: int) -> float:
    """The tau of ModelEMA for a run of so many steps: 2000, and less for runs below some 14,000.

    With tau 2000 a short run would end with hardly any averaging (750 steps: over the last 1.5 steps). The average
    reaches back about exp(n / tau) steps; this tau makes that a twentieth of the run at its end.
    """
    return min(2000.0, steps / math.log(max(steps / 20, 2.0)))


class EarlyStopping:
    """Stops when the fitness has not risen for `patience` epochs (0: never). Epochs that are not noted do not count."""

    def __init__(self, patience: int):
        self.patience, self.best, self.best_epoch = patience or 10 ** 9, -1.0, 0

    def better(self, epoch: int, fitness: float) -> bool:
        """Note this epoch's fitness; True if it is the best so far (a tie counts: later weights are preferred)."""
        if fitness < self.best:
            return False
        self.best, self.best_epoch = fitness, epoch
        return True

    def over(self, epoch: int) -> bool:
        """Has it been too long?"""
        return self.best >= 0 and epoch - self.best_epoch >= self.patience
