"""Autoanchor: do the anchors fit the data set's boxes, and if not, which would."""
from __future__ import annotations

import numpy as np

GOOD_RECALL = 0.98
LEAST_BOX_SIDE = 2.0    # pixels; smaller boxes are left out, smaller anchors are not made
SAMPLED_BOXES = 10_000  # that evolution looks at: enough for two digits of recall, and seconds instead of minutes


def _closeness(wh: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(n, 2) boxes and (k, 2) anchors -> (k, n): the worse of the two side ratios, 1 = equal."""
    # Side by side: numpy reduces an axis of length two far more slowly than it takes the minimum of two arrays.
    w, h = (wh[:, side] / anchors[:, side, None] for side in (0, 1))
    return np.minimum(np.minimum(w, 1 / w), np.minimum(h, 1 / h))


def check_anchors(wh: np.ndarray, anchors_px: np.ndarray, thr: float = 4.0) -> tuple[float, float]:
    """How anchors (nl, na, 2) fit boxes (n, 2), n > 0, both in pixels: one fits if no side differs by `thr` times.

    Returns (best-possible recall: the share 0..1 of boxes that some anchor fits, anchors that fit a box on average).
    """
    fits = _closeness(wh, anchors_px.reshape(-1, 2)) > 1 / thr
    return float(fits.any(0).mean()), float(fits.sum(0).mean())


def _fitness(wh: np.ndarray, anchors: np.ndarray, thr: float) -> float:
    best = _closeness(wh, anchors).max(0)
    return float((best * (best > 1 / thr)).mean())


def evolve_anchors(wh: np.ndarray, n: int = 9, imgsz: int = 640, thr: float = 4.0, gen: int = 1000,
                   seed: int = 0) -> np.ndarray:
    """n anchors (n, 2) in pixels, ascending by area, for boxes (m, 2) with m >= n and no empty side.

    k-means, then `gen` mutations of which the better are kept: never worse than k-means. The same seed gives the same.
    """
    rng = np.random.default_rng(seed)
    if len(wh) > SAMPLED_BOXES:
        wh = wh[rng.choice(len(wh), SAMPLED_BOXES, replace=False)]
    scale = wh.std(0)
    scale[scale == 0] = 1.0  # all equally wide or high
    anchors = _kmeans(wh / scale, n, rng) * scale
    best = _fitness(wh, anchors, thr)
    for _ in range(gen):
        noise = 0.1 * rng.standard_normal(anchors.shape) * rng.random()
        change = np.where(rng.random(anchors.shape) < 0.9, 1 + noise, 1.0).clip(0.3, 3.0)
        mutant = (anchors * change).clip(LEAST_BOX_SIDE, imgsz)
        score = _fitness(wh, mutant, thr)
        if score > best:
            anchors, best = mutant, score
    return anchors[np.argsort(anchors.prod(1))]


def _kmeans(points: np.ndarray, k: int, rng: np.random.Generator, rounds: int = 30) -> np.ndarray:
    """Lloyd's algorithm with k-means++ seeding (Arthur and Vassilvitskii 2007): (m, 2) -> (k, 2)."""
    centres = points[rng.integers(len(points))][None]
    while len(centres) < k:
        distance = ((points[:, None] - centres) ** 2).sum(2).min(1) + 1e-12
        centres = np.vstack((centres, points[rng.choice(len(points), p=distance / distance.sum())]))
    for _ in range(rounds):
        nearest = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
        centres = np.array([points[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(k)])
    return centres


def fit_anchors(wh: np.ndarray, anchors_px: np.ndarray, imgsz: int, thr: float = 4.0,
                seed: int = 0) -> tuple[np.ndarray | None, str]:
    """Better anchors (nl, na, 2) in pixels, areas ascending, or None when the present ones do; and a line for the log.

    wh (n, 2): the boxes in pixels at imgsz; those under 2 px are left out.
    """
    wh = wh[(wh >= LEAST_BOX_SIDE).all(1)].astype(float)
    count = anchors_px.reshape(-1, 2).shape[0]
    if len(wh) <= count:
        return None, f"autoanchor: {len(wh)} boxes are too few to fit anchors to; the model's are kept"
    recall, fitting = check_anchors(wh, anchors_px, thr)
    if recall > GOOD_RECALL:
        return None, f"autoanchor: {recall:.1%} best-possible recall, {fitting:.2f} anchors a box; the anchors fit"
    new = evolve_anchors(wh, count, imgsz, thr, seed=seed).reshape(anchors_px.shape)
    better, _ = check_anchors(wh, new, thr)
    if better <= recall:
        return None, f"autoanchor: {recall:.1%} best-possible recall, no better anchors found; the model's are kept"
    return new, f"autoanchor: best-possible recall {recall:.1%} -> {better:.1%} at {imgsz} px with new anchors"
