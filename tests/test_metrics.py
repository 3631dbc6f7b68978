"""Matching and AP: stock's values, and properties."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.metrics import ConfusionMatrix, ap_per_class, compute_ap, match

THRESHOLDS = torch.linspace(0.5, 0.95, 10)


def test_match_and_ap_are_stocks(golden):
    hits, dets, labels = [], [], []
    for i in range(30):
        d, lab = torch.from_numpy(golden[f"ap/dets{i}"]), torch.from_numpy(golden[f"ap/labels{i}"])
        correct = match(d, lab, THRESHOLDS)
        assert np.array_equal(correct.numpy(), golden[f"ap/correct{i}"]), i
        hits.append(correct.numpy())
        dets.append(d.numpy())
        labels.append(lab.numpy())
    d = np.concatenate(dets)
    result = ap_per_class(np.concatenate(hits), d[:, 4], d[:, 5], np.concatenate(labels)[:, 0])
    for key in ("p", "r", "ap", "classes"):
        assert np.allclose(getattr(result, key), golden[f"ap/{key}"], atol=1e-6), key
    assert np.allclose(2 * result.p * result.r / (result.p + result.r + 1e-16), golden["ap/f1"], atol=1e-6)


def test_compute_ap():
    assert compute_ap(np.array([0.5, 1]), np.array([1, 2 / 3]))[0] == pytest.approx(0.913333, abs=1e-6)


def test_perfect_none_and_nothing():
    labels = torch.tensor([[0, 0, 0, 10, 10], [1, 20, 20, 40, 40.0]])
    dets = torch.cat((labels[:, 1:], torch.tensor([[0.9, 0], [0.8, 1]])), 1)
    hits = match(dets, labels, THRESHOLDS).numpy()
    assert hits.all()
    assert ap_per_class(hits, dets[:, 4].numpy(), dets[:, 5].numpy(), labels[:, 0].numpy()).map > 0.99
    nothing = ap_per_class(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.zeros(0))
    assert (nothing.map, nothing.mp, len(nothing.classes)) == (0.0, 0.0, 0)
    missed = ap_per_class(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.array([2.0]))
    assert missed.map == 0.0 and missed.classes.tolist() == [2]


def test_a_label_is_found_once():
    labels = torch.tensor([[0, 0, 0, 10, 10.0]])
    dets = torch.tensor([[0, 0, 10, 10, 0.5, 0], [0, 0, 10, 9, 0.9, 0], [0, 0, 10, 10, 0.7, 1]])
    hits = match(dets, labels, THRESHOLDS)
    assert int(hits[:, 0].sum()) == 1 and bool(hits[1, 0])


def test_confusion_matrix_counts_every_label_and_detection():
    matrix = ConfusionMatrix(2)
    labels = torch.tensor([[0, 0, 0, 10, 10], [1, 20, 20, 40, 40.0]])
    matrix.update(torch.tensor([[0, 0, 10, 10, 0.9, 1], [60, 60, 70, 70, 0.9, 0], [0, 0, 9, 9, 0.1, 0]]), labels)
    matrix.update(torch.zeros(0, 6), labels[:1])
    assert matrix.matrix.tolist() == [[0, 0, 1], [1, 0, 0], [1, 1, 0]]
