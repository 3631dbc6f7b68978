"""--teacher: the outputs of a trained model as further targets."""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models import checkpoint
from models.yolo import Detect, Model, fused, on_device
from training.run import Hook, Run
from utils.data.loader import Batch
from utils.errors import UserError


class Teacher(Hook):
    """Output distillation: a trained model sees the images that the student sees, augmented alike.

    weights: the teacher's checkpoint. It may be larger than the student; classes, levels and anchors a level agree.
    weight: of distillation_loss(), whose gains are those of the detection loss.
    """

    def __init__(self, weights: str | Path, weight: float = 1.0):
        self.weights, self.weight = weights, weight

    def start(self, run: Run) -> None:
        self.run = run
        teacher = checkpoint.load(self.weights)
        refuse_other_kind(f"--teacher {self.weights}", teacher, run.model)
        # Fused it has no statistics to keep; a head in training mode returns raw outputs.
        self.teacher = on_device(fused(teacher), run.world.device).requires_grad_(False)
        self.teacher.detect.train()
        if run.world.main:
            print(f"teacher: {self.weights}, weight {self.weight:g}")

    def extra_loss(self, batch: Batch, outputs: list[Tensor]) -> Tensor:
        run = self.run
        with torch.no_grad(), torch.autocast(run.world.device.type, run.amp, enabled=run.amp is not None):
            targets = self.teacher(run.images)
        loss = distillation_loss(outputs, targets, run.model.detect, self.teacher.detect, run.loss.balance,
                                 run.loss.hyp)
        return loss * self.weight * len(run.images)


def refuse_other_kind(what: str, teacher: Model, student: Model) -> None:
    """UserError where the outputs of two models can't be compared."""
    kinds = {"classes": "nc", "levels": "nl", "anchors a level": "na"}
    for kind, name in kinds.items():
        theirs, mine = getattr(teacher.detect, name), getattr(student.detect, name)
        if theirs != mine:
            raise UserError(f"{what}: has {theirs} {kind}, the model has {mine}; give a teacher with as many, or "
                            "--teacher none")
    if list(teacher.names.values()) != list(student.names.values()):
        raise UserError(f"{what}: its classes are {', '.join(teacher.names.values())}; "
                        "give one trained on the same, or --teacher none")


def distillation_loss(outputs: list[Tensor], targets: list[Tensor], student: Detect, teacher: Detect,
                      balance: tuple[float, ...], gains: dict[str, float]) -> Tensor:
    """How far a student's raw outputs are from a teacher's, (1,), the mean over the images.

    Objectness is learnt everywhere: binary cross-entropy against the teacher's, weighted by level as the detection loss
    is. Class (binary cross-entropy) and box (squared difference, relative to the anchor) are learnt where the teacher
    sees an object: the mean over all places, weighted by its objectness (Chen et al. 2017, "Learning efficient object
    detection models with knowledge distillation"; Mehta and Ozturk 2018, arXiv 1805.06361).

    outputs, targets: (B, na, ny, nx, nc + 5) a level. balance: a weight a level. gains: box, obj and cls.
    """
    box, obj, cls = (torch.zeros(1, device=outputs[0].device) for _ in range(3))
    for level, (mine, theirs) in enumerate(zip(outputs, targets)):
        mine, theirs = mine.float(), theirs.float()
        objectness = theirs[..., 4].sigmoid()
        obj = obj + balance[level] * F.binary_cross_entropy_with_logits(mine[..., 4], objectness)
        share = objectness / objectness.sum().clamp(min=1e-6)
        if student.nc > 1:
            classes = theirs[..., 5:].sigmoid()
            difference = F.binary_cross_entropy_with_logits(mine[..., 5:], classes, reduction="none")
            cls = cls + (difference.mean(-1) * share).sum()
        anchors = student.anchors[level].to(mine)
        difference = _boxes(mine, anchors) - _boxes(theirs, teacher.anchors[level].to(mine))
        difference = difference / anchors.repeat(1, 2)[:, None, None]  # large and small objects count alike
        box = box + (difference.square().mean(-1) * share).sum()
    return box * gains["box"] + obj * gains["obj"] + cls * gains["cls"]


def _boxes(raw: Tensor, anchors: Tensor) -> Tensor:
    """Raw outputs of a level, anchors (na, 2) -> (B, na, ny, nx, 4) centre in the cell and size, in grid units."""
    xy = raw[..., :2].sigmoid() * 2
    wh = (raw[..., 2:4].sigmoid() * 2).square() * anchors[:, None, None]
    return torch.cat((xy, wh), -1)
