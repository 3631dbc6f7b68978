"""Run, everything of a training run in one value, and Hook, the one extension point of the loop."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.yolo import Model
from training.distributed import World, wrapped
from training.interruption import Listener
from training.loggers import Cell, RunLogger
from training.loss import DetectionLoss
from training.optimizer import EarlyStopping, ModelEMA, Schedule
from utils.data.config import DataConfig
from utils.data.loader import Batch, DetectionLoader
from utils.metrics import APResult


class Hook:
    """Override what you need.

    In a step the order is: backward of every micro-batch, unscale, clip, before_step, optimizer, EMA, after_step.
    """

    @property
    def name(self) -> str:
        """Under this name a checkpoint keeps the hook's state."""
        return type(self).__name__

    def start(self, run: Run) -> None:
        """Everything is built, nothing has been trained."""

    def extra_loss(self, batch: Batch, outputs: list[Tensor]) -> Tensor | None:
        """A term (1,) to add to the loss of a micro-batch, which is a sum over its images.

        run.images holds the images as the model saw them.
        """
        return None

    def before_step(self) -> None:
        """Gradients are complete, unscaled and clipped; the optimizer has not used them yet."""

    def after_step(self, skipped: bool) -> None:
        """The weights have moved, unless the scaler skipped the step."""

    def epoch_end(self, log: dict[str, float]) -> None:
        """Add what results.csv and TensorBoard should carry for this epoch."""

    def columns(self) -> dict[str, Cell]:
        """Title -> what the line of an epoch shows of its log under it."""
        return {}

    def narrowed(self) -> None:
        """run.model and run.ema.ema are other objects now, with fewer channels (training/narrow.py)."""

    def end(self) -> None:
        """The last epoch is over. Called in the main process only: time for pictures."""

    def may_be_best(self) -> bool:
        """May this epoch's weights become best.pt? Only such epochs count for --patience."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take state_dict()'s data back."""

    def record(self) -> dict[str, Any]:
        """Plain data that every checkpoint of the run should tell whoever goes on with it, best.pt included."""
        return {}


@dataclass
class Step:
    """The micro-batches of one optimizer step, as far as they are done."""

    batches: int = 0
    images: int = 0  # over all processes
    loss: Any = 0.0  # (1,) the sum of theirs
    paths: list[str] = field(default_factory=list)  # of this process's images

    def add(self, batch: Batch, loss: Tensor, processes: int) -> None:
        """One more, with its loss (1,)."""
        self.batches, self.images = self.batches + 1, self.images + len(batch.images) * processes
        self.loss, self.paths = self.loss + loss.detach(), self.paths + batch.paths


@dataclass
class Run:
    """Everything of a training run; hooks may look at all of it."""

    opt: Namespace                # as the command line and the defaults say; it does not change
    imgsz: int                    # in pixels, whole strides
    nbs: int                      # nominal batch
    world: World
    folder: Path
    config: DataConfig
    model: Model
    wrapped: nn.Module            # the model, in DistributedDataParallel where there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    ema: ModelEMA[Model]
    loss: DetectionLoss
    loader: DetectionLoader
    val_loader: DetectionLoader        # this process's share of the val images
    hooks: Sequence[Hook]
    stopper: EarlyStopping
    signals: Listener             # SIGINT and SIGTERM
    logger: RunLogger | None = None  # None on all processes but the main one
    resumed: dict[str, Any] = field(default_factory=dict)  # the checkpoint that the run goes on from; empty if new
    epoch: int = 0
    iteration: int = 0            # batches since the beginning of epoch 0
    batches_done: int = 0         # of this epoch, before it begins here: 0 unless an interrupted epoch goes on
    mean: Tensor = field(default_factory=lambda: torch.zeros(3))  # of the losses over those
    batch_fraction: float = 1.0   # images of this step / nominal batch: 1 for a whole step
    images: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, C, h, w) in 0..1, this micro-batch's
    skipped: int = 0              # steps in a row that the scaler has skipped
    ap: APResult | None = None    # of the last validation, over all processes' images
    metrics: dict[str, float] = field(default_factory=dict)  # the last epoch's log
    _statistics: list[Tensor] | None = None

    def replace_model(self, model: Model, ema: Model) -> None:
        """Go on with another model and its average. The optimizer must hold its parameters already."""
        self.model, self.wrapped = model, wrapped(model, self.world)
        self.ema.attach(model, ema)
        self.loss.detect = model.detect
        self._statistics = None
        for hook in self.hooks:
            hook.narrowed()

    def statistics_norm(self) -> Tensor:
        """A number that is finite exactly where all running means and variances of BatchNorm are."""
        if self._statistics is None:  # collected once; the tensors stay the same objects
            self._statistics = [buffer for name, buffer in self.model.named_buffers()
                                if name.endswith((".running_mean", ".running_var"))]
        if not self._statistics:
            return torch.zeros((), device=self.world.device)
        return torch.stack(torch._foreach_norm(self._statistics)).sum()

    @property
    def settings(self) -> dict[str, Any]:
        """The options with what this run has made of them: a run that goes on takes no others."""
        return {**vars(self.opt), "imgsz": self.imgsz, "nbs": self.nbs}

    @property
    def progress(self) -> float:
        """Share of the run that is done when this iteration is, 0..1."""
        return (self.iteration + 1) / (self.opt.epochs * len(self.loader))

    @property
    def amp(self) -> torch.dtype | None:
        """Type of autocast, or None."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp_name(self.opt, self.world.device))


def amp_name(opt: Namespace, device: torch.device) -> str:
    """--amp, or what holds without it: fp16 on a GPU, off elsewhere."""
    return opt.amp or ("fp16" if device.type == "cuda" else "off")
