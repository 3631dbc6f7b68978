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
    nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardswish, nn.Mish, nn.GELU, nn.ELU, nn.SELU, nn.CELU, nn.Tanh,
    nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d,
    F.silu, F.relu, F.leaky_relu, F.relu6, F.hardswish, F.mish, F.gelu, F.elu, F.selu, F.celu, F.interpolate,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout, F.dropout2d,
    torch.relu, torch.tanh, torch.neg, operator.neg, torch.clone,
    "contiguous", "clone", "detach", "float", "half", "to", "relu", "relu_", "tanh"}
# Modules of other packages that drop parts of a batch while they train, by the name of their class.
DROPS = {"StochasticDepth", "DropPath", "DropBlock2d"}
# They leave the channels in place but map 0 to another value. Their output may scale channels, and nothing else.
GATES = {nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid", "sigmoid_"}
CONCATS = {torch.cat, torch.concat}
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
ADDITIONS = {*SUMS, operator.sub, torch.sub, "sub"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}
DIVISIONS = {operator.truediv, torch.div, "div"}
SPATIAL_MEANS = {"mean", "sum", "amax", torch.mean, torch.sum, torch.amax}
PADS = {F.pad, torch._C._nn.pad}  # type: ignore[attr-defined]
PRELUS = {F.prelu, torch.prelu}
CHUNKS = {torch.chunk, "chunk"}
SPLITS = {torch.split, "split"}
STACKS = {torch.stack}
FLATTENS = {torch.flatten, "flatten"}
VIEWS = {"view", "reshape", torch.reshape}
SQUEEZES = {torch.squeeze, "squeeze"}
UNSQUEEZES = {torch.unsqueeze, "unsqueeze"}
EXPANSIONS = {"expand_as"}
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
    """Is this a layer with weights, or a BatchNorm, that computes what PyTorch's own do, whatever its class is called?

    A weight that is made anew in every call is none.
    """
    if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, _BatchNorm)):
        return False
    methods = [getattr(layer, name, None) for name in ("forward", "_conv_forward")]
    return "weight" in layer._parameters and all(
        getattr(method, "__module__", "").startswith("torch.nn.") for method in methods if method)
