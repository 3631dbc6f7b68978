"""Training images for what looks at data after a training: repairs of a cut, scores, a loss."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor

from models.inference import require_rgb
from models.yolo import Model, on_device
from training.loss import DetectionLoss, scale_gains
from utils.data.config import read_data
from utils.data.dataset import DetectionDataset
from utils.data.loader import build_loader
from utils.errors import UserError

SAMPLE_IMAGES = 128  # that scores on data and --absorb look at


class TrainingSample:
    """`count` training images in random order, as training sees them: batches of (images, targets) on `device`.

    images (B, 3, H, W) in 0..1, targets (n, 6). They are augmented, for BatchNorm's statistics must be those of
    training: letterboxed images would bring in the grey of their borders. They are read when they are asked for, and
    are the same ones each time.
    """

    def __init__(self, opt: Namespace, model: Model, count: int, device: torch.device):
        self.opt, self.stride, self.count, self.device = opt, model.divisor, count, device
        self.model = model

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        require_rgb(self.model, self.opt.weights)
        opt, config = self.opt, read_data(self.opt.data, needed=("train",))
        if not config.train:
            raise UserError(f"{config.file}: has no 'train:' entry, whose images --score taylor, --reconstruct, "
                            "--absorb and --recalibrate look at (--score gamma looks at none)")
        dataset = DetectionDataset(config.train, opt.imgsz, hyp=opt.hyp, augment=True, stride=self.stride,
                                   single_cls=opt.single_cls, nc=config.nc, prefix="train")
        loader = build_loader(dataset, opt.batch_size, opt.workers, shuffle=True)
        remaining = self.count
        for batch in loader:
            images = batch.images[:remaining].to(self.device, torch.float32) / 255
            targets = batch.targets[batch.targets[:, 0] < remaining].to(self.device)
            yield images.contiguous(memory_format=torch.channels_last), targets
            remaining -= len(images)
            if remaining <= 0:
                return

    def losses(self, model: Model) -> Iterator[Tensor]:
        """The detection loss (1,) of a model in evaluation mode on every batch; moves the model to the device."""
        on_device(model, self.device).detect.train()  # a head in training mode returns raw outputs
        gains = scale_gains(self.opt.hyp, model.detect.nl, model.detect.nc, self.opt.imgsz)
        loss = DetectionLoss(model, gains)
        for images, targets in self:
            yield loss(model(images), targets)[0] / len(images)
