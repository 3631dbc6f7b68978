"""The detection loss: which anchors answer for which box, and what they pay.

Box: 1 - complete IoU; objectness: binary cross-entropy against the IoU reached; class: binary cross-entropy.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import ciou

BALANCE = {3: (4.0, 1.0, 0.4)}  # weight of a level's objectness
BALANCE_OTHER = (4.0, 1.0, 0.25, 0.06, 0.02)
FOCAL_ALPHA = 0.25


def scale_gains(hyp: dict[str, float], nl: int, nc: int, imgsz: int) -> dict[str, float]:
    """Hyper-parameters with the three gains made fit for levels, classes and image size; a new dict."""
    return {**hyp, "box": hyp["box"] * 3 / nl, "cls": hyp["cls"] * nc / 80 * 3 / nl, "obj": hyp["obj"] * (imgsz / 640) ** 2 * 3 / nl}


@dataclass(frozen=True)
class Assignment:
    """One level's k positive cells: image b, anchor a, cell (gj, gi), and what they should say."""

    b: Tensor       # (k,)
    a: Tensor
    gj: Tensor
    gi: Tensor
    tbox: Tensor    # (k, 4) xywh in grid units, centre relative to the cell
    anch: Tensor    # (k, 2) the anchor's size
    tcls: Tensor    # (k,) class


def assign(targets: Tensor, anchors: Tensor, sizes: list[tuple[int, int]], anchor_t: float) -> list[Assignment]:
    """Positive cells of every level. targets (n, 6), anchors (nl, na, 2) in grid units, sizes: (ny, nx) of each level.

    An anchor answers for a box if neither side differs by more than a factor of anchor_t; besides the cell of the
    box's centre, its nearest neighbours in x and in y answer too.
    """
    steps = targets.new_tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]) * 0.5  # centre, left, up, right, down
    return [_assign_level(targets, anchor, ny, nx, anchor_t, steps) for anchor, (ny, nx) in zip(anchors, sizes)]


def _assign_level(targets: Tensor, anchors: Tensor, ny: int, nx: int, anchor_t: float, steps: Tensor) -> Assignment:
    size = targets.new_tensor([nx, ny])
    wh = targets[:, 4:6] * size
    ratio = wh[None] / anchors[:, None]                                     # (na, n, 2)
    a, row = (torch.max(ratio, 1 / ratio).amax(2) < anchor_t).nonzero(as_tuple=True)
    xy = targets[row, 2:4] * size
    mirrored = size - xy
    # A neighbour answers if the centre lies in its half of the cell, and the neighbour exists.
    lower = (xy % 1 < 0.5) & (xy > 1)
    upper = (mirrored % 1 < 0.5) & (mirrored > 1)
    chosen = torch.stack((torch.ones_like(lower[:, 0]), lower[:, 0], lower[:, 1], upper[:, 0], upper[:, 1]))  # (5, k)
    which, k = chosen.nonzero(as_tuple=True)
    row, a, xy = row[k], a[k], xy[k]
    cell = (xy - steps[which]).long()
    gi, gj = cell[:, 0].clamp(0, nx - 1), cell[:, 1].clamp(0, ny - 1)
    tbox = torch.cat((xy - torch.stack((gi, gj), 1), wh[row]), 1)
    return Assignment(targets[row, 0].long(), a, gj, gi, tbox, anchors[a], targets[row, 1].long())


class DetectionLoss:
    """loss = box + objectness + class, times the batch size.

    `model.detect` tells nl, na, nc, anchors (nl, na, 2) in grid units. hyp's gains are already scaled (scale_gains).
    """

    def __init__(self, model: Any, hyp: dict[str, float]):
        self.detect, self.hyp = model.detect, hyp
        self.balance = BALANCE.get(self.detect.nl, BALANCE_OTHER)
        smoothing = hyp.get("label_smoothing", 0.0)
        self.positive, self.negative = 1 - smoothing / 2, smoothing / 2

    def __call__(self, outputs: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """outputs: (B, na, ny, nx, nc+5) a level; targets (n, 6). Returns (loss (1,), items (3,): box, obj, cls, detached)."""
        hyp, device = self.hyp, targets.device
        box, obj, cls = (torch.zeros(1, device=device) for _ in range(3))
        anchors = self.detect.anchors.to(device)
        sizes = [(y.shape[2], y.shape[3]) for y in outputs]
        for y, cells, weight in zip(outputs, assign(targets, anchors, sizes, hyp["anchor_t"]), self.balance):
            y = y.float()
            wanted = torch.zeros(y.shape[:4], device=device)
            if len(cells.b):
                mine = y[cells.b, cells.a, cells.gj, cells.gi]
                xy = mine[:, :2].sigmoid() * 2 - 0.5
                wh = (mine[:, 2:4].sigmoid() * 2).square() * cells.anch
                iou = ciou(torch.cat((xy, wh), 1), cells.tbox)
                box = box + (1 - iou).mean()
                wanted[cells.b, cells.a, cells.gj, cells.gi] = iou.detach().clamp(0)
                if self.detect.nc > 1:
                    classes = torch.full_like(mine[:, 5:], self.negative)
                    classes[torch.arange(len(mine), device=device), cells.tcls] = self.positive
                    cls = cls + self._bce(mine[:, 5:], classes, hyp["cls_pw"])
            obj = obj + weight * self._bce(y[..., 4], wanted, hyp["obj_pw"])
        box, obj, cls = box * hyp["box"], obj * hyp["obj"], cls * hyp["cls"]
        return (box + obj + cls) * outputs[0].shape[0], torch.cat((box, obj, cls)).detach()

    def _bce(self, logits: Tensor, wanted: Tensor, positive_weight: float) -> Tensor:
        """Mean binary cross-entropy; focal (Lin et al. 2017) where hyp asks for it."""
        gamma = self.hyp["fl_gamma"]
        weight = logits.new_tensor(positive_weight) if positive_weight != 1 else None
        if not gamma:
            return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)
        loss = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight, reduction="none")
        p = logits.sigmoid()
        p_right = wanted * p + (1 - wanted) * (1 - p)
        alpha = wanted * FOCAL_ALPHA + (1 - wanted) * (1 - FOCAL_ALPHA)
        return (loss * alpha * (1 - p_right) ** gamma).mean()
