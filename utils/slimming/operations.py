"""What the channel graph knows of PyTorch's operations. Strings are methods of a tensor."""
from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# They leave the channels in place and map 0 to 0: a channel whose gamma and beta are 0 is still 0 behind them.
PASSTHROUGH: set[Any] = {
    nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardswish, nn.Mish, nn.GELU, nn.ELU, nn.Tanh, nn.Identity,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.Dropout, nn.Dropout2d,
    nn.ZeroPad2d,
    F.silu, F.relu, F.leaky_relu, F.relu6, F.hardswish, F.mish, F.gelu, F.interpolate, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.dropout, torch.relu, torch.tanh, torch.neg, operator.neg,
    "contiguous", "clone", "detach", "float", "half", "to", "relu", "tanh"}
# They leave the channels in place but map 0 to another value. Their output may scale channels, and nothing else.
GATES = {nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid", "sigmoid_"}
CONCATS = {torch.cat, torch.concat}
ADDITIONS = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
DIVISIONS = {operator.truediv, torch.div, "div"}
SPATIAL_MEANS = {"mean", "amax", torch.mean, torch.amax}
CHUNKS = {torch.chunk, "chunk"}
SPLITS = {torch.split, "split"}
STACKS = {torch.stack}
FLATTENS = {torch.flatten, "flatten"}
PERMUTES = {torch.permute, "permute"}
TRANSPOSES = {torch.transpose, "transpose"}
# Pixels become channels, channels become pixels, channels change places; and how the modules call their factor.
UNSHUFFLES = {nn.PixelUnshuffle, F.pixel_unshuffle}
SHUFFLES = {nn.PixelShuffle, F.pixel_shuffle}
CHANNEL_SHUFFLES = {nn.ChannelShuffle, F.channel_shuffle}
SHUFFLE_FACTORS = {nn.PixelUnshuffle: "downscale_factor", nn.PixelShuffle: "upscale_factor",
                   nn.ChannelShuffle: "groups"}
SHAPE_QUERIES = {"size", "dim", getattr}
CHANNEL_FREE = {"device", "dtype", "ndim", "is_cuda", "requires_grad", "layout"}  # attributes of a tensor


def register_passthrough(*operations: type[nn.Module] | Callable | str) -> None:
    """Tell the graph of module classes, functions or tensor methods that keep channels in place and map 0 to 0."""
    PASSTHROUGH.update(operations)


def is_plain(layer: nn.Module) -> bool:
    """Is this a convolution or BatchNorm that computes what PyTorch's own do, whatever its class is called?"""
    if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, _BatchNorm)):
        return False
    methods = [getattr(layer, name, None) for name in ("forward", "_conv_forward")]
    return all(getattr(method, "__module__", "").startswith("torch.nn.") for method in methods if method)
