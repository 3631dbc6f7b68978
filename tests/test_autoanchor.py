"""Autoanchor: properties of the fit, of k-means with evolution, and of what is kept."""
from __future__ import annotations

import numpy as np
import pytest

from training.autoanchor import SAMPLED_BOXES, check_anchors, evolve_anchors, fit_anchors

FAR = np.full((3, 3, 2), 400.0)


def boxes(n: int, seed: int = 0) -> np.ndarray:
    """(n, 2) widths and heights in pixels, most of them small."""
    return np.exp(np.random.default_rng(seed).normal(3, 0.6, (n, 2)))


def fitness(wh: np.ndarray, anchors: np.ndarray, thr: float = 4.0) -> float:
    """The mean over boxes of the best anchor's worse side ratio, 0 where none fits; written out box by box."""
    best = [max(min(w / a, a / w, h / b, b / h) for a, b in anchors) for w, h in wh]
    return float(np.mean([x if x > 1 / thr else 0 for x in best]))


def test_recall_counts_boxes_and_anchors():
    anchors = np.array([[[10.0, 10.0], [20.0, 20.0]]])
    wh = np.array([[10.0, 10.0], [70.0, 70.0], [100.0, 100.0], [10.0, 45.0]])
    assert check_anchors(wh, anchors) == (0.75, 1.0)  # both, the second, none, the second: 45 / 10 is over 4
    assert check_anchors(np.array([[40.0, 40.0]]), anchors[:, :1]) == (0.0, 0.0)  # just 4 times is too much


@pytest.mark.parametrize("seed", range(3))
def test_evolution_is_never_worse_than_kmeans_repeats_and_ascends(seed):
    wh = boxes(300, seed)
    start, end = evolve_anchors(wh, gen=0, seed=seed), evolve_anchors(wh, gen=200, seed=seed)
    assert fitness(wh, end) > fitness(wh, start)
    assert np.array_equal(end, evolve_anchors(wh, gen=200, seed=seed))
    assert end.shape == (9, 2) and (np.diff(end.prod(1)) >= 0).all() and (np.diff(start.prod(1)) >= 0).all()


def test_anchors_stay_within_the_image():
    anchors = evolve_anchors(np.random.default_rng(0).uniform(2, 64, (200, 2)), imgsz=64, gen=200)
    assert anchors.min() >= 2 and anchors.max() <= 64


@pytest.mark.parametrize("wh", [np.full((20, 2), 30.0), np.stack((np.full(20, 30.0), np.arange(20) + 5.0), 1)])
def test_boxes_without_spread(wh):
    anchors = evolve_anchors(wh, gen=20)
    assert np.isfinite(anchors).all() and check_anchors(wh, anchors[None])[0] == 1


def test_large_sets_are_sampled():
    wh = boxes(SAMPLED_BOXES * 3)
    assert check_anchors(wh, evolve_anchors(wh, gen=5)[None])[0] > 0.98


def test_bad_anchors_are_replaced_once():
    wh = boxes(500)
    new, message = fit_anchors(wh, FAR, 320)
    assert new is not None and new.shape == FAR.shape and "->" in message
    assert (np.diff(new.reshape(-1, 2).prod(1)) >= 0).all() and check_anchors(wh, new)[0] > 0.98
    assert fit_anchors(wh, new, 320)[0] is None


def test_the_present_anchors_are_kept_where_nothing_better_is_known():
    assert fit_anchors(boxes(5), FAR, 320)[0] is None
    assert fit_anchors(np.zeros((0, 2)), FAR, 320)[0] is None
    specks = np.concatenate((boxes(5), np.full((100, 2), 1.5)))
    assert "5 boxes are too few" in fit_anchors(specks, FAR, 320)[1]
    # Ten corners of a wide spread that one anchor cannot cover any better than it does.
    wide = np.array([[2.0, 2.0]] * 5 + [[300.0, 300.0]] * 5)
    one = np.array([[[300.0, 300.0]]])
    new, message = fit_anchors(wide, one, 320)
    assert new is None and "no better anchors" in message and "\n" not in message
