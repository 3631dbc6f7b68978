"""Test-time augmentation: three views of an image, the boxes of all of them."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.yolo import Model


class TestTimeAugmentation:
    """The image, its mirror image at 0.83 and itself at 0.67 of the size. A Detector."""

    VIEWS = ((1.0, False), (0.83, True), (0.67, False))  # scale, mirrored

    def __init__(self, model: Model):
        self.model, self.names, self.divisor = model, model.names, model.divisor
        self.dtype, self.input_shape, self.file = model.dtype, model.input_shape, model.file

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, 3, h, w) -> (decoded (B, N, nc + 5), None)."""
        strides = self.model.stride.tolist()
        width, predictions = images.shape[3], []
        for scale, mirrored in self.VIEWS:
            view = images.flip(3) if mirrored else images
            boxes = self.model(_scaled(view, scale, self.divisor))[0].clone()
            boxes[..., :4] /= scale
            if mirrored:
                boxes[..., 0] = width - boxes[..., 0]
            predictions.append(boxes)
        # The level that a view is too large or too small for is left out: the coarsest of the first, the finest of
        # the last.
        shares = [1 / s ** 2 for s in strides]
        coarsest = round(shares[-1] / sum(shares) * predictions[0].shape[1])
        finest = round(shares[0] / sum(shares) * predictions[-1].shape[1])
        return torch.cat((predictions[0][:, :-coarsest], *predictions[1:-1], predictions[-1][:, finest:]), 1), None


def _scaled(images: Tensor, scale: float, divisor: int) -> Tensor:
    """Images of `scale` times the size, padded at the right and below to multiples of it with ImageNet's mean."""
    if scale == 1:
        return images
    sides = [int(s * scale) for s in images.shape[2:]]
    smaller = F.interpolate(images, size=sides, mode="bilinear", align_corners=False)
    height, width = (math.ceil(s * scale / divisor) * divisor for s in images.shape[2:])
    return F.pad(smaller, (0, width - sides[1], 0, height - sides[0]), value=0.447)
