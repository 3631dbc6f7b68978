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
FOCAL_FLOOR = 1e-12  # x ** gamma with gamma below 1 has no finite slope at x = 0


def scale_gains(hyp: dict[str, float], nl: int, nc: int, imgsz: int) -> dict[str, float]:
    """Hyper-parameters with the three gains made fit for levels, classes and image size; a new dict."""
    share = 3 / nl
    return {**hyp, "box": hyp["box"] * share, "cls": hyp["cls"] * nc / 80 * share,
            "obj": hyp["obj"] * (imgsz / 640) ** 2 * share}


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
    box's centre, its nearest neighbours in x and in y answer too. A level's cells are in the order centre, left, up,
    right, down; within these by anchor, then by target.
    """
    grid = targets.new_tensor([(nx, ny) for ny, nx in sizes])[:, None]      # (nl, 1, 2)
    xy, wh = targets[:, 2:4] * grid, targets[:, 4:6] * grid                 # (nl, n, 2)
    ratio = wh[:, None] / anchors[:, :, None]                               # (nl, na, n, 2)
    fits = torch.maximum(ratio, 1 / ratio).amax(3) < anchor_t
    # A neighbour answers if the centre lies in its half of the cell, and the neighbour exists.
    lower, upper = ((d % 1 < 0.5) & (d > 1) for d in (xy, grid - xy))
    near = torch.cat((torch.ones_like(lower[..., :1]), lower, upper), 2).transpose(1, 2)  # (nl, 5, n)
    chosen = near[:, :, None] & fits[:, None]                               # (nl, 5, na, n)
    # One search and one count for all levels: the only two reads that wait for a GPU.
    level, step, a, row = chosen.nonzero(as_tuple=True)
    counts = chosen.flatten(1).sum(1).tolist()
    steps = targets.new_tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]) * 0.5  # centre, left, up, right, down
    centre = xy[level, row]
    cell = torch.minimum((centre - steps[step]).long().clamp(min=0), grid[level, 0].long() - 1)
    columns = (targets[row, 0].long(), a, cell[:, 1], cell[:, 0], torch.cat((centre - cell, wh[level, row]), 1),
               anchors[level, a], targets[row, 1].long())
    return [Assignment(*parts) for parts in zip(*(column.split(counts) for column in columns))]


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
        """outputs: (B, na, ny, nx, nc+5) a level, any float type; targets (n, 6): image, class, x, y, w, h in 0..1.

        Returns (loss (1,), items (3,): box, obj, cls, detached), float32 on the outputs' device.
        """
        hyp, device = self.hyp, outputs[0].device
        box, obj, cls = (torch.zeros(1, device=device) for _ in range(3))
        anchors = self.detect.anchors.to(device, torch.float32)
        sizes = [(y.shape[2], y.shape[3]) for y in outputs]
        levels = assign(targets.to(device), anchors, sizes, hyp["anchor_t"])
        for y, cells, weight in zip(outputs, levels, self.balance):
            objectness = torch.zeros(y.shape[:4], device=device)
            if len(cells.b):
                index, last = (cells.b, cells.a, cells.gj, cells.gi), _last_of_cell(cells, y.shape)
                mine = F.embedding(last, y[index].float())  # the same rows; why not plainly, see _last_of_cell
                xy = mine[:, :2].sigmoid() * 2 - 0.5
                wh = (mine[:, 2:4].sigmoid() * 2).square() * cells.anch
                iou = ciou(torch.cat((xy, wh), 1), cells.tbox)
                box = box + (1 - iou).mean()
                objectness[index] = iou.detach().clamp(0)[last]
                if self.detect.nc > 1:
                    classes = torch.full_like(mine[:, 5:], self.negative)
                    classes.scatter_(1, cells.tcls[:, None], self.positive)
                    cls = cls + self._bce(mine[:, 5:], classes, hyp["cls_pw"])
            obj = obj + weight * self._bce(y[..., 4].float(), objectness, hyp["obj_pw"])
        box, obj, cls = box * hyp["box"], obj * hyp["obj"], cls * hyp["cls"]
        return (box + obj + cls) * outputs[0].shape[0], torch.cat((box, obj, cls)).detach()

    def _bce(self, logits: Tensor, target: Tensor, positive_weight: float) -> Tensor:
        """Mean binary cross-entropy; focal (Lin et al. 2017) where hyp asks for it."""
        gamma = self.hyp["fl_gamma"]
        weight = logits.new_tensor(positive_weight) if positive_weight != 1 else None
        if not gamma:
            return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
        loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
        p = logits.sigmoid()
        p_right = target * p + (1 - target) * (1 - p)
        alpha = target * FOCAL_ALPHA + (1 - target) * (1 - FOCAL_ALPHA)
        return (loss * alpha * (1 - p_right).clamp(min=FOCAL_FLOOR) ** gamma).mean()


def _last_of_cell(cells: Assignment, shape: torch.Size) -> Tensor:
    """For each of k positives the number of the last one in the same cell, (k,); shape: (B, na, ny, nx, ...).

    Several boxes may share a cell. torch leaves open which of several writes to one place stays, and in which order
    gradients that meet in one place are added: with some thousand cells both depend on the threads, and a repeated or
    resumed run would differ. So a cell writes its last value only, and its gradients meet in its last row, through an
    embedding, whose sum has a fixed order.
    """
    _, na, ny, nx = shape[:4]
    flat = ((cells.b * na + cells.a) * ny + cells.gj) * nx + cells.gi
    order = torch.arange(len(flat), device=flat.device)
    return order.new_zeros(shape[:4].numel()).scatter_reduce_(0, flat, order, "amax")[flat]
