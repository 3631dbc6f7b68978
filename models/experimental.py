"""MixConv2d: YOLOv5 keeps it in a file of this name, and a file for YOLOv5 names its classes by their module."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.common import EPS, MOMENTUM, block


@block()
class MixConv2d(nn.Module):
    """Convolutions with kernels of several sizes, side by side. Tan and Le 2019, arXiv 1907.09595.

    equal_ch: every kernel size makes equally many channels; otherwise they have equally many weights, as far as whole
    channels allow.
    """

    def __init__(self, c1: int, c2: int, k: tuple[int, ...] = (1, 3), s: int = 1, equal_ch: bool = True):
        super().__init__()
        if equal_ch:
            ends = [i * (c2 - 1) // len(k) + 1 for i in range(1, len(k) + 1)]
            channels = [end - start for start, end in zip([0, *ends], ends)]
        else:
            share = c2 / sum(size ** -2 for size in k)
            channels = [round(share * size ** -2) for size in k]
        self.m = nn.ModuleList(nn.Conv2d(c1, c, size, s, size // 2, groups=math.gcd(c1, c), bias=False)
                               for c, size in zip(channels, k))
        self.bn = nn.BatchNorm2d(c2, EPS, MOMENTUM)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(torch.cat([conv(x) for conv in self.m], 1)))
