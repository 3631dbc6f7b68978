"""Training images for repairs after a cut."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor

from utils.data.config import read_data
from utils.data.dataset import DetectionDataset
from utils.data.loader import build_loader
from utils.errors import UserError


class CalibrationImages:
    """`count` training images in random order, as training sees them, in batches (B, 3, H, W) in 0..1 on `device`.

    BatchNorm's statistics must be those of training: letterboxed images would bring in the grey of their borders. The
    images are read when they are asked for, and are the same ones each time.
    """

    def __init__(self, opt: Namespace, stride: int, count: int, device: torch.device):
        self.opt, self.stride, self.count, self.device = opt, stride, count, device

    def __iter__(self) -> Iterator[Tensor]:
        opt, config = self.opt, read_data(self.opt.data)
        if not config.train:
            raise UserError(f"{config.file}: has no 'train:' entry, whose images --absorb and --recalibrate look at")
        dataset = DetectionDataset(config.train, opt.imgsz, hyp=opt.hyp, augment=True, stride=self.stride,
                                   single_cls=opt.single_cls, nc=config.nc, prefix="train")
        loader = build_loader(dataset, opt.batch_size, opt.workers, shuffle=True)
        left = self.count
        for batch in loader:
            images = batch.images[:left].to(self.device, torch.float32) / 255
            yield images.contiguous(memory_format=torch.channels_last)
            left -= len(images)
            if left <= 0:
                return
