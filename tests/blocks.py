"""Networks with blocks that the repository has none of, and random masks for any network.

The pruning engine must get all of them right.
"""
from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from models.common import Bottleneck, Conv
from utils.slimming import ChannelGraph, Masks


class Net(nn.Module):
    """stem -> a block of 16 channels -> head."""

    def __init__(self, block: nn.Module, out: int = 16):
        super().__init__()
        self.stem, self.block, self.head = Conv(3, 16, 3), block, nn.Conv2d(out, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate in 0..1 that is never 0 itself (Hu et al. 2018)."""

    def __init__(self, c: int = 16, norm: bool = False):
        super().__init__()
        self.conv, self.squeeze = Conv(c, c, 3), Conv(c, 4, 1)
        self.excite: nn.Module = nn.Sequential(nn.Conv2d(4, c, 1), nn.Sigmoid())
        if norm:
            excite: nn.Module = Conv(4, c, 1)
            excite.act = nn.Sigmoid()
            self.excite = excite

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)))


class LeakyGate(nn.Module):
    """A gate that is also read by a convolution, which sees 0.5 where the gate's channel is off: must stay whole."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.conv, self.gate, self.reader = Conv(c, c, 3), Conv(c, c, 1), Conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return self.conv(x) * gate + self.reader(gate)


class Separable(nn.Sequential):
    """Depthwise, then pointwise (MobileNet)."""

    def __init__(self, c: int = 16):
        super().__init__(Conv(c, c, 3, g=c), Conv(c, 24, 1), Conv(24, 24, 3, g=24), Conv(24, c, 1))


class C2f(nn.Module):
    """Halves of one convolution, the second one refined again and again, all of them concatenated (as in YOLOv8)."""

    def __init__(self, c: int = 16, n: int = 2, shortcut: bool = True):
        super().__init__()
        self.cv1, self.cv2 = Conv(c, 16, 1), Conv(8 * (2 + n), c, 1)
        self.m = nn.ModuleList(Bottleneck(8, 8, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            parts.append(m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class FixedSplit(nn.Module):
    """A split at a number that the code holds: what it splits must keep its width."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.cv1, self.cv2 = Conv(c, 16, 1), Conv(16, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((6, 10), 1)
        return self.cv2(torch.cat((b, a), 1))


class WeightedAdd(nn.Module):
    """The fast normalised fusion of BiFPN (Tan et al. 2020)."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.a, self.b, self.after = Conv(c, c, 1), Conv(c, c, 3), Conv(c, c, 1)
        self.w = nn.Parameter(torch.tensor([0.3, 0.9]))

    def forward(self, x: Tensor) -> Tensor:
        w = F.relu(self.w)
        w = w / (w.sum() + 1e-4)
        return self.after(w[0] * self.a(x) + w[1] * self.b(x))


class Attention(nn.Module):
    """Self-attention over the pixels; its width is part of its arithmetic."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.qkv, self.out = Conv(c, 3 * c, 1), Conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        mixed = v @ ((q.transpose(1, 2) @ k) / c ** 0.5).softmax(-1).transpose(1, 2)
        return x + self.out(mixed.view(b, c, h, w))


class Unknown(nn.Module):
    """An operation over the channels that no list knows."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.a, self.b = Conv(c, c, 1), Conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.roll(self.a(x), 1, dims=1))


class Grouped(nn.Sequential):
    """Groups of four channels in, six out."""

    def __init__(self, c: int = 16):
        super().__init__(Conv(c, 24, 3, g=4), Conv(24, c, 1))


class Multiplied(nn.Sequential):
    """Two outputs for each input channel."""

    def __init__(self, c: int = 16):
        super().__init__(Conv(c, 2 * c, 3, g=c), Conv(2 * c, c, 1))


class Cropped(nn.Module):
    """Slices in space, as in Focus, and a shortcut of a downsampled map."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.a, self.b = Conv(4 * c, c, 1), Conv(c, c, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        four = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.a(torch.cat(tensors=four, dim=1)) - self.b(x)


class Twice(nn.Module):
    """One convolution and its BatchNorm, called twice."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.b, self.after = Conv(c, c, 3), Conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.b(self.b(x)))


class ByKeyword(nn.Module):
    """Modules called with input=, one of them unknown to the graph."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.a, self.conv, self.act, self.b = Conv(c, c, 1), nn.Conv2d(c, c, 1), nn.Softplus(), Conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(input=self.conv(input=self.a(x))))


class Bare(nn.Module):
    """A convolution without BatchNorm, added to one with; and a depthwise one with a bias."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.conv, self.b, self.after = nn.Conv2d(c, c, 1), Conv(c, c, 3), Conv(c, c, 1)
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.depthwise(self.conv(x) + self.b(x)))


class Linears(nn.Module):
    """A map flattened into a Linear, a BatchNorm1d and another Linear, whose output is added to every pixel."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.before, self.pool, self.after = Conv(c, c, 3), nn.AdaptiveMaxPool2d(2), Conv(2 * c, c, 1)
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(4 * c, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, c))
        self.norm = nn.BatchNorm1d(c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        row = self.norm(self.fc(self.pool(x)))[:, :, None, None]
        return self.after(torch.cat((x, row.expand_as(x)), 1))


class LinearGate(nn.Module):
    """Squeeze and excite by Linears, as most code writes it: with the number of channels, as it is."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.conv, self.pool, self.after = Conv(c, c, 3), nn.AdaptiveAvgPool2d(1), Conv(c, c, 1)
        self.fc = nn.Sequential(nn.Linear(c, 4), nn.ReLU(), nn.Linear(4, c), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, _, _ = x.size()
        return self.after(x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x))


class Shuffled(nn.Module):
    """Halves by a chunk, and channels shuffled by views (ShuffleNet)."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.a, self.b, self.after = Conv(c, c, 1), Conv(c // 2, c // 2, 3), Conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.a(x).chunk(2, 1)
        x = torch.cat((x, self.b(y)), 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        half = x[:, :c // 2]
        return self.after(torch.cat((x[:, c // 2:], half.flatten(2).mean(-1)[..., None, None] * half), 1))


class Ghost(nn.Module):
    """The first channels of a concat: a number that is not smaller leaves all of them free (GhostNet)."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.a, self.b, self.few, self.c = Conv(c, 8, 1), Conv(8, 8, 3), Conv(c, 12, 1), Conv(22, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.c(torch.cat((torch.cat((a, self.b(a)), 1)[:, :16], self.few(x)[:, 6:]), 1))


class PerChannel(nn.Module):
    """Slopes and scales with a value for each channel, a border of zeros, a branch that is dropped now and then."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.a, self.act, self.b = Conv(c, c, 3), nn.PReLU(c), Conv(c, c, 1)
        self.scale, self.gamma = nn.Parameter(torch.rand(c, 1, 1)), nn.Parameter(torch.rand(c))
        self.drop, self.after = StochasticDepth(0.2, "row"), Conv(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.act(self.a(x)), (1, 0, 1, 0)) * self.scale
        y = self.drop(self.b(x)) * self.gamma.view(1, -1, 1, 1)
        return self.after(x + y)


class Branching(nn.Module):
    """A block that torch.fx can't trace, between others."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.a, self.b, self.inner, self.after = Conv(c, c, 1), Conv(c, c, 1), Outside(c), Conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.b(self.a(x))))


class Outside(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.one, self.two = Conv(c, c, 1), Conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) if x.shape[2] > 8 else self.one(x)


NETWORKS: dict[str, type[nn.Module]] = {c.__name__: c for c in (
    SqueezeExcite, LeakyGate, Separable, C2f, FixedSplit, WeightedAdd, Attention, Unknown, Grouped, Multiplied, Cropped,
    Twice, ByKeyword, Bare, Linears, LinearGate, Shuffled, Ghost, PerChannel, Branching)}
RANGES = {"weight": (0.1, 1.5), "bias": (-0.5, 0.5), "running_mean": (-0.3, 0.3), "running_var": (0.5, 2)}
M = TypeVar("M", bound=nn.Module)


def randomised(model: M, seed: int = 0) -> M:
    """Trained-looking BatchNorms: no two scales alike, shifts and statistics that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for key, (low, high) in RANGES.items():
                    getattr(m, key).copy_(torch.rand(m.num_features, generator=generator) * (high - low) + low)
    return model


def random_masks(graph: ChannelGraph, seed: int, coupled: bool = True) -> Masks:
    """Masks at random: nothing cut, anything between, or down to one channel a layer as far as groups allow.

    coupled: channels that an addition couples may go as well.
    """
    rng = np.random.default_rng(seed)
    share = rng.choice([0.0, 1.0, *rng.random(4)])
    keep = ~graph.removable(coupled) | (rng.random(len(graph.group)) >= share)
    keep = keep[graph.group]
    for ids in graph.norms.values():
        if not keep[graph.group[ids]].any():
            keep[graph.group[rng.choice(ids)]] = True
    return graph.masks(keep)
