"""Four attention blocks as an example of blocks of your own. Input and output (B, C, H, W); a yaml row is
[-1, 1, SE, []].

Importing this file makes them known to model yamls. What pruning makes of each is in its docstring.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.common import Conv, block


@block(channels="input")
class SE(nn.Module):
    """Squeeze-and-excitation: every channel is scaled by what the means of all channels say.

    Hu et al. 2018, arXiv 1709.01507. Pruned with the channels that it scales; its hidden layer stays whole.
    """

    def __init__(self, c1: int, reduction: int = 16):
        super().__init__()
        hidden = max(c1 // reduction, 8)
        self.squeeze, self.excite = nn.Conv2d(c1, hidden, 1), nn.Conv2d(hidden, c1, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.excite(self.squeeze(means).relu()).sigmoid()


@block(channels="input")
class ECA(nn.Module):
    """Efficient channel attention: every channel is scaled by what the means of its neighbours say.

    Wang et al. 2020, arXiv 1910.03151. Without a channel its neighbours would be others, so what it reads stays whole.
    """

    def __init__(self, c1: int):
        super().__init__()
        size = int((math.log2(c1) + 1) / 2) | 1  # the paper's k = |log2(C) / 2 + 1 / 2|, the next odd number
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3)).unsqueeze(1)  # (B, 1, C)
        return x * self.conv(means).sigmoid().transpose(1, 2).unsqueeze(3)


@block(channels="input")
class CBAM(nn.Module):
    """Convolutional block attention: a scale for every channel, then one for every pixel.

    Woo et al. 2018, arXiv 1807.06521. The pixel's scale comes from the mean and the maximum over the channels, which
    change with their number, so what it reads stays whole.
    """

    def __init__(self, c1: int, reduction: int = 16, k: int = 7):
        super().__init__()
        hidden = max(c1 // reduction, 8)
        self.channels = nn.Sequential(nn.Conv2d(c1, hidden, 1, bias=False), nn.ReLU(),
                                      nn.Conv2d(hidden, c1, 1, bias=False))
        self.pixels = nn.Conv2d(2, 1, k, padding=k // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * (self.channels(pooled[0]) + self.channels(pooled[1])).sigmoid()
        return x * self.pixels(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)).sigmoid()


@block(channels="input")
class CoordAttention(nn.Module):
    """Coordinate attention: every channel is scaled by what the means of its rows and of its columns say.

    Hou et al. 2021, arXiv 2103.02907. Pruned with the channels that it scales, and so is its hidden layer.
    """

    def __init__(self, c1: int, reduction: int = 32):
        super().__init__()
        hidden = max(c1 // reduction, 8)
        self.conv = Conv(c1, hidden)
        self.conv.act = nn.Hardswish()
        self.rows, self.columns = nn.Conv2d(hidden, c1, 1), nn.Conv2d(hidden, c1, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)  # (B, C, H, 1), (B, C, W, 1)
        y, height = self.conv(torch.cat((rows, columns), 2)), x.shape[2]
        return x * self.rows(y[:, :, :height]).sigmoid() * self.columns(y[:, :, height:]).transpose(2, 3).sigmoid()
