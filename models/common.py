"""Building blocks of the YOLOv5 family, and the register that a model yaml looks them up in.

All tensors are (B, C, H, W). To make your own block usable in a yaml, put one line above it:

    @block(channels="first", repeats=False)
    class MyBlock(nn.Module):
        def __init__(self, c1: int, c2: int, ...): ...
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockSpec:
    """How the yaml parser treats a block.

    channels: "first" - the first yaml argument is the number of output channels: it is scaled by the width multiple and
              the block is built as cls(c1, c2, *rest);
              "same"  - channels pass through and the block is built as cls(*args);
              "sum"   - several inputs are concatenated: cls(*args), output channels are the sum;
              "detect" - the head: cls(nc, anchors, list of input channels).
    repeats:  the block takes the row's repeat count itself, as third argument (C3); otherwise it is stacked.
    """

    cls: type[nn.Module]
    channels: str
    repeats: bool


BLOCKS: dict[str, BlockSpec] = {}


def block(channels: str = "first", repeats: bool = False, name: str | None = None) -> Callable[[type], type]:
    """Class decorator that makes a block known to model yamls under its class name (or `name`)."""

    def add(cls: type) -> type:
        BLOCKS[name or cls.__name__] = BlockSpec(cls, channels, repeats)
        return cls

    return add


BLOCKS["nn.Upsample"] = BlockSpec(nn.Upsample, "same", False)
BLOCKS["nn.MaxPool2d"] = BlockSpec(nn.MaxPool2d, "same", False)
BLOCKS["nn.ZeroPad2d"] = BlockSpec(nn.ZeroPad2d, "same", False)


@block()
class Conv(nn.Module):
    """Convolution, BatchNorm, SiLU: the unit whose BN scale (gamma) network slimming looks at."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2 if p is None else p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


@block()
class Bottleneck(nn.Module):
    """1x1 then 3x3, with the input added where the shape allows it and `shortcut` asks for it."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5):
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(hidden, c2, 3, 1, g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@block(repeats=True)
class C3(nn.Module):
    """Cross-stage partial block with three convolutions: cv3(cat(bottlenecks(cv1(x)), cv2(x)))."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(c1, hidden, 1, 1)
        self.cv3 = Conv(2 * hidden, c2, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@block()
class SPP(nn.Module):
    """Spatial pyramid pooling (v5.0 models): parallel max-pools of three sizes beside the input."""

    def __init__(self, c1: int, c2: int, k: tuple[int, ...] = (5, 9, 13)):
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(hidden * (len(k) + 1), c2, 1, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x] + [pool(x) for pool in self.m], 1))


@block()
class SPPF(nn.Module):
    """SPP computed faster: three chained pools of size k see what pools of k, 2k-1 and 3k-2 see."""

    def __init__(self, c1: int, c2: int, k: int = 5):
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(hidden * 4, c2, 1, 1)
        self.m = nn.MaxPool2d(k, stride=1, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


@block()
class Focus(nn.Module):
    """Stem of the v5.0 models: the four pixels of each 2x2 cell become channels, then a convolution."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, act: bool = True):
        super().__init__()
        self.conv = Conv(c1 * 4, c2, k, s, p, g, act)

    def forward(self, x: Tensor) -> Tensor:
        cells = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.conv(torch.cat(cells, 1))


@block(channels="sum")
class Concat(nn.Module):
    """Concatenates a list of tensors along a dimension (channels by default)."""

    def __init__(self, dimension: int = 1):
        super().__init__()
        self.d = dimension

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, self.d)
