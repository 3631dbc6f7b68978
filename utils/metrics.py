"""From detections to P, R and mAP, as YOLOv5 counts them."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.boxes import box_iou

AXIS = np.linspace(0, 1, 1000)  # the axis of every curve: confidence, or recall


def match(dets: Tensor, labels: Tensor, iou_thresholds: Tensor) -> Tensor:
    """Which detections are right: dets (n, 6), labels (m, 5: class, xyxy), thresholds (t,) -> bool (n, t).

    At each threshold a detection goes to the label of its class that it overlaps most, and a label takes the most
    confident of the detections that came to it.
    """
    correct = torch.zeros(len(dets), len(iou_thresholds), dtype=torch.bool)
    if not len(dets) or not len(labels):
        return correct
    iou = box_iou(labels[:, 1:], dets[:, :4]) * (labels[:, :1] == dets[:, 5])
    best, owner = iou.max(0)                                   # each detection's label; the same at every threshold
    order = dets[:, 4].argsort(descending=True, stable=True)
    for t, threshold in enumerate(iou_thresholds):
        passed = order[(best[order] >= threshold) & (best[order] > 0)]
        labels_taken = owner[passed].numpy()
        _, first = np.unique(labels_taken, return_index=True)  # the most confident comes first
        correct[passed[torch.from_numpy(first)], t] = True
    return correct


@dataclass(frozen=True)
class APResult:
    """Per class, in the order of .classes (those that have labels); P and R at the confidence of the best mean F1."""

    p: np.ndarray                    # (classes,)
    r: np.ndarray
    ap: np.ndarray                   # (classes, thresholds)
    classes: np.ndarray              # (classes,) int
    px: np.ndarray                   # (1000,) confidence
    p_curve: np.ndarray              # (classes, 1000) over px
    r_curve: np.ndarray
    f1_curve: np.ndarray
    precision_at_recall: np.ndarray  # (classes, 1000) over recall 0..1, at IoU 0.5

    @property
    def ap50(self) -> np.ndarray:
        return self.ap[:, 0]

    @property
    def mp(self) -> float:
        return _mean(self.p)

    @property
    def mr(self) -> float:
        return _mean(self.r)

    @property
    def map50(self) -> float:
        return _mean(self.ap[:, 0])

    @property
    def map(self) -> float:
        return _mean(self.ap)


def compute_ap(recall: np.ndarray, precision: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Area under the precision envelope at 101 recall points, and the padded curve (recall, envelope)."""
    r = np.concatenate(([0.0], recall, [1.0]))
    p = np.concatenate(([1.0], precision, [0.0]))
    envelope = np.maximum.accumulate(p[::-1])[::-1]
    x = np.linspace(0, 1, 101)
    y = np.interp(x, r, envelope)
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()), r, envelope


def ap_per_class(tp: np.ndarray, conf: np.ndarray, pred_cls: np.ndarray, target_cls: np.ndarray) -> APResult:
    """AP of every class that has labels.

    tp (n, t): hits of n detections of all images at t IoU thresholds; conf (n,), pred_cls (n,): their confidence and
    class; target_cls (m,): the classes of all labels.
    """
    eps = 1e-16
    order = np.argsort(-conf, kind="stable")
    tp, conf, pred_cls = tp[order], conf[order], pred_cls[order]
    classes, counts = np.unique(target_cls, return_counts=True)
    n, thresholds = len(classes), tp.shape[1]
    ap, p, r, pr = np.zeros((n, thresholds)), np.zeros((n, 1000)), np.zeros((n, 1000)), np.zeros((n, 1000))
    for i, (c, labels) in enumerate(zip(classes, counts)):
        mine = pred_cls == c
        if not mine.any():
            continue
        hits = tp[mine].cumsum(0)
        recall = hits / (labels + eps)
        precision = hits / np.arange(1, len(hits) + 1)[:, None]
        r[i] = np.interp(-AXIS, -conf[mine], recall[:, 0], left=0)
        p[i] = np.interp(-AXIS, -conf[mine], precision[:, 0], left=1)
        for t in range(thresholds):
            ap[i, t], x, envelope = compute_ap(recall[:, t], precision[:, t])
            if t == 0:
                pr[i] = np.interp(AXIS, x, envelope)
    f1 = 2 * p * r / (p + r + eps)
    best = int(smooth(f1.mean(0), 0.1).argmax()) if n else 0
    return APResult(p[:, best], r[:, best], ap, classes.astype(int), AXIS, p, r, f1, pr)


def smooth(y: np.ndarray, fraction: float) -> np.ndarray:
    """Box filter over an odd window of `fraction` of the length, edges repeated."""
    window = round(len(y) * fraction * 2) // 2 + 1
    padded = np.concatenate((np.full(window // 2, y[0]), y, np.full(window // 2, y[-1])))
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def fitness(map50: float, map50_95: float) -> float:
    """What decides which epoch is best: 0.1 mAP50 + 0.9 mAP50-95."""
    return 0.1 * map50 + 0.9 * map50_95


class ConfusionMatrix:
    """matrix (nc+1, nc+1): rows predicted, columns true; the last is background."""

    def __init__(self, nc: int, conf: float = 0.25, iou: float = 0.45):
        self.nc, self.conf, self.iou = nc, conf, iou
        self.matrix = np.zeros((nc + 1, nc + 1))

    def update(self, dets: Tensor, labels: Tensor) -> None:
        """Add an image: dets (n, 6), labels (m, 5: class, xyxy). Pairs are made greedily, the best overlap first."""
        dets = dets[dets[:, 4] > self.conf]
        true, predicted = labels[:, 0].int().tolist(), dets[:, 5].int().tolist()
        iou = box_iou(labels[:, 1:], dets[:, :4])
        pairs = (iou > self.iou).nonzero().tolist()
        free_labels, free_dets = set(range(len(true))), set(range(len(predicted)))
        for i, j in sorted(pairs, key=lambda pair: -float(iou[pair[0], pair[1]])):
            if i in free_labels and j in free_dets:
                free_labels.remove(i)
                free_dets.remove(j)
                self.matrix[predicted[j], true[i]] += 1
        for i in free_labels:
            self.matrix[self.nc, true[i]] += 1
        for j in free_dets:
            self.matrix[predicted[j], self.nc] += 1


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0
