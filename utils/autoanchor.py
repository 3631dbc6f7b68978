"""Autoanchor: do the anchors fit the data set's boxes, and if not, which would."""
from __future__ import annotations

import numpy as np

GOOD_RECALL = 0.98


def _closeness(wh: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(n, 2) boxes and (k, 2) anchors -> (n, k): the worse of the two side ratios, 1 = equal."""
    ratio = wh[:, None] / anchors[None]
    return np.minimum(ratio, 1 / ratio).min(2)


def check_anchors(wh: np.ndarray, anchors_px: np.ndarray, thr: float = 4.0) -> tuple[float, float]:
    """Best-possible recall (0..1) of boxes (n, 2) with anchors (nl, na, 2), and how many anchors fit a box on average."""
    closeness = _closeness(wh, anchors_px.reshape(-1, 2))
    return float((closeness.max(1) > 1 / thr).mean()), float((closeness > 1 / thr).sum(1).mean())


def _fitness(wh: np.ndarray, anchors: np.ndarray, thr: float) -> float:
    best = _closeness(wh, anchors).max(1)
    return float((best * (best > 1 / thr)).mean())


def evolve_anchors(wh: np.ndarray, n: int = 9, thr: float = 4.0, gen: int = 1000, seed: int = 0) -> np.ndarray:
    """n anchors (n, 2) in pixels, ascending by area, for boxes (m, 2): k-means, then `gen` mutations that keep the better."""
    rng = np.random.default_rng(seed)
    scale = wh.std(0) + 1e-9
    anchors = _kmeans(wh / scale, n, rng) * scale
    best = _fitness(wh, anchors, thr)
    for _ in range(gen):
        change = np.where(rng.random(anchors.shape) < 0.9, 1 + 0.1 * rng.standard_normal(anchors.shape) * rng.random(), 1.0)
        mutant = np.maximum(anchors * change.clip(0.3, 3.0), 2.0)
        score = _fitness(wh, mutant, thr)
        if score > best:
            anchors, best = mutant, score
    return anchors[np.argsort(anchors.prod(1))]


def _kmeans(points: np.ndarray, k: int, rng: np.random.Generator, rounds: int = 30) -> np.ndarray:
    """Lloyd's algorithm with k-means++ seeding."""
    centres = points[rng.integers(len(points))][None]
    while len(centres) < k:
        distance = ((points[:, None] - centres) ** 2).sum(2).min(1) + 1e-12
        centres = np.vstack((centres, points[rng.choice(len(points), p=distance / distance.sum())]))
    for _ in range(rounds):
        nearest = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
        centres = np.array([points[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(k)])
    return centres


def fit_anchors(wh: np.ndarray, anchors_px: np.ndarray, imgsz: int, thr: float = 4.0, seed: int = 0) -> tuple[np.ndarray | None, str]:
    """Better anchors (nl, na, 2) in pixels, or None when the present ones do; and one line that says what was found.

    wh (n, 2): the boxes in pixels at imgsz; those under 2 px are left out.
    """
    wh = wh[(wh >= 2).all(1)].astype(float)
    count = anchors_px.reshape(-1, 2).shape[0]
    if len(wh) <= count:
        return None, f"autoanchor: {len(wh)} boxes are too few to fit anchors to; the model's are kept"
    recall, fitting = check_anchors(wh, anchors_px, thr)
    if recall > GOOD_RECALL:
        return None, f"autoanchor: {recall:.1%} best-possible recall, {fitting:.2f} anchors a box; the anchors fit"
    new = evolve_anchors(wh, count, thr, seed=seed).reshape(anchors_px.shape)
    better, _ = check_anchors(wh, new, thr)
    if better <= recall:
        return None, f"autoanchor: {recall:.1%} best-possible recall, and no better anchors were found; the model's are kept"
    return new, f"autoanchor: best-possible recall {recall:.1%} -> {better:.1%} at {imgsz} px with new anchors"
