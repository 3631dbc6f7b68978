"""--image-weights: draw images with rare and badly detected classes more often."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from training.run import Hook, Run
from utils.metrics import APResult


class ImageWeights(Hook):
    """Sets the sampler's weights before the first epoch and after every validation."""

    def start(self, run: Run) -> None:
        self.run = run
        self.class_map = np.zeros(run.model.detect.nc)  # (nc,) mAP50-95 at the last validation
        self._apply()

    def epoch_end(self, log: dict[str, float]) -> None:
        if self.run.ap is not None:
            self.class_map = map_of_classes(self.run.ap, len(self.class_map))
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        return {"class_map": self.class_map.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        class_map = np.array(state["class_map"])
        if class_map.shape != self.class_map.shape:
            raise ValueError(f"image weights are not of {len(self.class_map)} classes")
        self.class_map = class_map
        self._apply()

    def _apply(self) -> None:
        loader = self.run.loader
        loader.batch_sampler.weights = image_weights(loader.dataset.labels, self.class_map)


def map_of_classes(ap: APResult, nc: int) -> np.ndarray:
    """(nc,) mAP50-95 of each class; a class without labels has the mean."""
    values = np.full(nc, ap.map)
    values[ap.classes.astype(int)] = ap.ap.mean(1)
    return values


def image_weights(labels: Iterable[np.ndarray], class_map: np.ndarray) -> np.ndarray:
    """(images,) chance of each image: the sum over its boxes of (1 - mAP of the class)^2 / boxes of the class.

    labels: (m, 5) per image, class first. class_map: (nc,) in 0..1. Images without boxes get the smallest chance.
    """
    nc = len(class_map)
    counts = np.stack([np.bincount(rows[:, 0].astype(int), minlength=nc) for rows in labels])
    weights = counts @ ((1 - class_map) ** 2 / np.maximum(counts.sum(0), 1))
    least = weights[weights > 0].min(initial=np.inf)
    return np.maximum(weights, least if np.isfinite(least) else 1.0)
