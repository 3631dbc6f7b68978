"""Building blocks of the YOLOv5 family, and the register that a model yaml looks them up in.

All tensors are (B, C, H, W). To make your own block usable in a yaml, put one line above it:

    @block(channels="first", repeats=False)
    class MyBlock(nn.Module):
        def __init__(self, c1: int, c2: int, ...): ...
"""
from __future__ import annotations

import math
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
              "input" - channels pass through and the block is told their number: cls(c1, *args);
              "sum"   - several inputs are concatenated: cls(*args), output channels are the sum;
              "detect" - the head: cls(nc, anchors, list of input channels);
              a function (c1, *args) -> output channels of a block that is built as cls(*args).
    repeats:  the block takes the row's repeat count itself, as third argument (C3); otherwise it is stacked.
    """

    cls: type[nn.Module]
    channels: str | Callable[..., int]
    repeats: bool


BLOCKS: dict[str, BlockSpec] = {}


def block(channels: str | Callable[..., int] = "first", repeats: bool = False,
          name: str | None = None) -> Callable[[type], type]:
    """Class decorator that makes a block known to model yamls under its class name (or `name`)."""

    def add(cls: type) -> type:
        BLOCKS[name or cls.__name__] = BlockSpec(cls, channels, repeats)
        return cls

    return add


BLOCKS["nn.Upsample"] = BlockSpec(nn.Upsample, "same", False)
BLOCKS["nn.MaxPool2d"] = BlockSpec(nn.MaxPool2d, "same", False)
BLOCKS["nn.ZeroPad2d"] = BlockSpec(nn.ZeroPad2d, "same", False)
BLOCKS["nn.BatchNorm2d"] = BlockSpec(nn.BatchNorm2d, "input", False)
BLOCKS["nn.ConvTranspose2d"] = BlockSpec(nn.ConvTranspose2d, "first", False)
EPS, MOMENTUM = 1e-3, 0.03  # of every BatchNorm2d of a model


@block()
class Conv(nn.Module):
    """Convolution, BatchNorm, SiLU: the unit whose BN scale (gamma) network slimming looks at."""

    def __init__(self, c1: int, c2: int, k: int | tuple[int, int] = 1, s: int | tuple[int, int] = 1,
                 p: int | None = None, g: int = 1, act: bool = True):
        super().__init__()
        same = k // 2 if isinstance(k, int) else (k[0] // 2, k[1] // 2)
        self.conv = nn.Conv2d(c1, c2, k, s, same if p is None else p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2, EPS, MOMENTUM)
        self.act: nn.Module = nn.SiLU(inplace=True) if act else nn.Identity()

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
        self.m: nn.Module = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@block()
class CrossConv(nn.Module):
    """1 x k, then k x 1, with the input added where the shape allows it and `shortcut` asks for it."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False):
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, (1, k), (1, s))
        self.cv2 = Conv(hidden, c2, (k, 1), (s, 1), g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@block(repeats=True)
class C3x(C3):
    """C3 with CrossConvs."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = nn.Sequential(*(CrossConv(hidden, hidden, 3, 1, g, 1.0, shortcut) for _ in range(n)))


@block(repeats=True)
class BottleneckCSP(nn.Module):
    """The block before C3: two bare convolutions share the BatchNorm behind their concat.

    Wang et al. 2019, arXiv 1911.11929.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = nn.Conv2d(c1, hidden, 1, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, 1, bias=False)
        self.cv4 = Conv(2 * hidden, c2, 1, 1)
        self.bn = nn.BatchNorm2d(2 * hidden, EPS, MOMENTUM)
        self.act = nn.SiLU()
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1)
        return self.cv4(self.act(self.bn(both)))


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
class C3SPP(C3):
    """C3 with an SPP in the place of the bottlenecks (n is ignored; a yaml row never gives it)."""

    def __init__(self, c1: int, c2: int, k: tuple[int, ...] = (5, 9, 13), n: int = 1, shortcut: bool = True, g: int = 1,
                 e: float = 0.5):
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = SPP(hidden, hidden, k)


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


@block(channels=lambda c1, gain=2: c1 * gain ** 2)
class Contract(nn.Module):
    """The pixels of each gain x gain cell become channels: (B, C, H, W) -> (B, gain^2 C, H / gain, W / gain)."""

    def __init__(self, gain: int = 2):
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        s = self.gain
        return torch.cat([x[..., row::s, column::s] for row in range(s) for column in range(s)], 1)


@block(channels=lambda c1, gain=2: c1 // gain ** 2)
class Expand(nn.Module):
    """The reverse of Contract: (B, C, H, W) -> (B, C / gain^2, gain H, gain W)."""

    def __init__(self, gain: int = 2):
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        s = self.gain
        pixels = x.chunk(s * s, 1)  # one pixel of each cell after the other
        rows = [torch.stack([pixels[i * s + j] for j in range(s)], 4).flatten(3) for i in range(s)]
        return torch.stack(rows, 3).flatten(2, 3)


@block()
class DWConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution, depthwise as far as the channel counts allow. p1: padding, p2: output padding."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p1: int = 0, p2: int = 0):
        super().__init__(c1, c2, k, s, p1, p2, groups=math.gcd(c1, c2))


@block()
class DWConv(Conv):
    """Depthwise convolution (as far as the channel counts allow), BatchNorm, SiLU."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, act: bool = True):
        super().__init__(c1, c2, k, s, g=math.gcd(c1, c2), act=act)


@block()
class GhostConv(nn.Module):
    """Half of the channels by a convolution, the other half from these by a cheap depthwise one.

    Han et al. 2020, arXiv 1911.11907.
    """

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: bool = True):
        super().__init__()
        half = c2 // 2
        self.cv1 = Conv(c1, half, k, s, g=g, act=act)
        self.cv2 = Conv(half, half, 5, 1, g=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


@block()
class GhostBottleneck(nn.Module):
    """Two GhostConvs, a depthwise convolution between them where it strides, and a shortcut around."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1):
        super().__init__()
        half = c2 // 2
        between: nn.Module = nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if s == 2:
            between = DWConv(half, half, k, s, act=False)
            self.shortcut = nn.Sequential(DWConv(c1, c1, k, s, act=False), Conv(c1, c2, 1, 1, act=False))
        self.conv = nn.Sequential(GhostConv(c1, half, 1, 1), between, GhostConv(half, c2, 1, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


@block(repeats=True)
class C3Ghost(C3):
    """C3 with GhostBottlenecks."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = nn.Sequential(*(GhostBottleneck(hidden, hidden) for _ in range(n)))


class TransformerLayer(nn.Module):
    """Attention and a two-layer perceptron, each with a shortcut, no LayerNorm. (pixels, B, c) -> the same."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(c, c, bias=False) for _ in range(3))
        self.ma = nn.MultiheadAttention(c, heads)
        self.fc1, self.fc2 = nn.Linear(c, c, bias=False), nn.Linear(c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ma(self.q(x), self.k(x), self.v(x))[0] + x
        return self.fc2(self.fc1(x)) + x


class TransformerBlock(nn.Module):
    """Attention among the pixels of a map, with a linear layer for the position.

    Dosovitskiy et al. 2021, arXiv 2010.11929.
    """

    def __init__(self, c1: int, c2: int, heads: int, layers: int):
        super().__init__()
        self.conv = Conv(c1, c2) if c1 != c2 else None
        self.linear = nn.Linear(c2, c2)
        self.tr = nn.Sequential(*(TransformerLayer(c2, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x)
        pixels = x.flatten(2).permute(2, 0, 1)
        return self.tr(pixels + self.linear(pixels)).permute(1, 2, 0).reshape(x.shape)


@block(repeats=True)
class C3TR(C3):
    """C3 with attention in the place of the bottlenecks. Attention's channels are kept whole by pruning."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = TransformerBlock(hidden, hidden, 4, n)


@block(channels="sum")
class Concat(nn.Module):
    """Concatenates a list of tensors along a dimension (channels by default)."""

    def __init__(self, dimension: int = 1):
        super().__init__()
        self.d = dimension

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, self.d)
