"""Images to measure the range of activations on, before a model is quantized."""
from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from utils.boxes import letterbox
from utils.data.augmentations import to_tensor_layout
from utils.data.config import DataConfig
from utils.data.dataset import DetectionDataset, in_threads
from utils.errors import UserError


class CalibrationImages(Sequence[np.ndarray]):
    """`count` random training images, each (batch, 3, h, w) float32 in 0..1, letterboxed to `shape` (h, w).

    As in val.py. A batch is one image, repeated: files of a fixed batch take no other. The same seed gives the same
    images. single_cls: labels may be of any class. UserError where the data set has no training images.
    """

    def __init__(self, config: DataConfig, shape: tuple[int, int], count: int = 100, seed: int = 0,
                 batch: int = 1, single_cls: bool = False):
        if not config.train:
            raise UserError(f"{config.file}: has no 'train:' entry, whose images --int8 measures activations on")
        dataset = DetectionDataset(config.train, max(shape), nc=config.nc, single_cls=single_cls, prefix="calibration")
        chosen = np.random.default_rng(seed).permutation(len(dataset))[:count].tolist()

        def boxed(index: int) -> np.ndarray:
            return to_tensor_layout(letterbox(dataset.load(index), shape, scale_up=False)[0])[None]

        self.batch = batch
        pixels = in_threads(boxed, chosen, "calibration images")  # uint8: a quarter of the memory
        dataset.report_broken(dataset.broken)
        self.pixels = [image for index, image in zip(chosen, pixels) if index not in dataset.broken]

    def __len__(self) -> int:
        return len(self.pixels)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return np.repeat(self.pixels[index].astype(np.float32) / 255, self.batch, 0)
