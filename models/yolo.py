"""From a yaml to a model: Detect and Model. A slim model is this same Model with narrower layers."""
from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if not __package__:  # run as a script: python models/yolo.py --cfg yolov5s.yaml
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models.experimental  # noqa: F401  (registers its block)
from models.common import BLOCKS, EPS, MOMENTUM, Conv, block
from models.config import read_yaml
from models.schema import is_number, whole
from models.summary import show
from utils.errors import UserError, first_line, run_cli
from utils.modules import copy_module

LEAST_DIVISOR = 32  # as in YOLOv5, also where the strides are smaller
# What blocks raise for wrong arguments.
BUILD_ERRORS = (TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError, RuntimeError,
                ArithmeticError)
# Of a model. The largest of the repository's yamls has 144,000,000 parameters; the loss weighs five levels.
MOST_PARAMETERS, MOST_LAYERS, MOST_CHANNELS, MOST_LEVELS = 500_000_000, 500, 1_000_000, 5
MOST_GROWTH = 64  # that a layer adds to a map, or the times by which it makes it larger
ACTIVATIONS = {"nn.SiLU": nn.SiLU, "nn.ReLU": nn.ReLU, "nn.LeakyReLU": nn.LeakyReLU, "nn.Hardswish": nn.Hardswish,
               "nn.ReLU6": nn.ReLU6, "nn.Mish": nn.Mish, "nn.GELU": nn.GELU, "nn.Identity": nn.Identity}


@block(channels="detect")
class Detect(nn.Module):
    """The head: one 1x1 convolution a level, and the decoding of its output into boxes.

    nl levels, na anchors a level, no = nc + 5 numbers an anchor: x, y, w, h, objectness, classes.
    """

    anchors: Tensor
    stride: Tensor

    def __init__(self, nc: int, anchors: list[list[float]], ch: list[int]):
        super().__init__()
        if not 1 <= len(ch) == len(anchors) <= MOST_LEVELS:
            raise ValueError(f"{len(ch)} layers are read, there are {len(anchors)} rows of anchors; one for each, at "
                             f"most {MOST_LEVELS}")
        if len({len(row) for row in anchors}) > 1 or len(anchors[0]) < 2 or len(anchors[0]) % 2 or not all(
                is_number(side) and side > 0 for row in anchors for side in row):
            raise ValueError("a row of anchors is [width, height, width, height ...] in pixels, in all rows as many")
        self.nc, self.no = nc, nc + 5
        self.nl, self.na = len(anchors), len(anchors[0]) // 2
        # In grid units once Model has divided by the strides. A buffer, so that autoanchor's result travels with the
        # weights. Both have values even where a model is built on the meta device.
        grid = torch.tensor(anchors, dtype=torch.float32, device="cpu")
        self.register_buffer("anchors", grid.view(self.nl, -1, 2))
        self.register_buffer("stride", torch.zeros(self.nl, device="cpu"), persistent=False)
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in ch)

    def forward(self, x: list[Tensor]) -> Any:
        """Training: list of (B, na, ny, nx, no). Eval: (decoded (B, N, no) with xywh in pixels, that list)."""
        raw = []
        for features, head in zip(x, self.m):
            y = head(features)
            b, _, ny, nx = y.shape
            raw.append(y.view(b, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2))
        if self.training:
            return [r.contiguous() for r in raw]
        decoded = [self.decode(r, level) for level, r in enumerate(raw)]
        return torch.cat(decoded, 1), raw

    def decode(self, raw: Tensor, level: int) -> Tensor:
        """(B, na, ny, nx, no) logits -> (B, na*ny*nx, no): centre and size in pixels, confidences in 0..1."""
        b, _, ny, nx, _ = raw.shape
        y = raw.sigmoid()
        gy, gx = torch.meshgrid(torch.arange(ny, device=y.device, dtype=y.dtype),
                                torch.arange(nx, device=y.device, dtype=y.dtype), indexing="ij")
        grid = torch.stack((gx, gy), 2) - 0.5
        stride = self.stride[level].to(y.dtype)
        anchor = (self.anchors[level].to(y.dtype) * stride).view(1, self.na, 1, 1, 2)
        xy = (y[..., :2] * 2 + grid) * stride
        wh = y[..., 2:4] * 2
        wh = wh * wh * anchor  # a product, for converters that have no power
        return torch.cat((xy, wh, y[..., 4:]), -1).view(b, -1, self.no)

    def init_biases(self) -> None:
        """Prior (Lin et al. 2017): about 8 objects in a 640 px image, all classes equally likely."""
        for head, s in zip(self.m, self.stride):
            with torch.no_grad():
                bias = head.bias.view(self.na, -1)  # type: ignore[operator, union-attr]
                bias[:, 4] += math.log(8 / (640 / float(s)) ** 2)
                bias[:, 5:] += math.log(0.6 / (self.nc - 0.99999))


def _resolve(value: Any, cfg: dict) -> Any:
    """A yaml argument as a value: the words nc, anchors, None, True and False stand for what they name."""
    words = {"nc": cfg["nc"], "anchors": cfg["anchors"], "None": None, "True": True, "False": False}
    return words.get(value, value) if isinstance(value, str) else value


def build_layers(cfg: dict, ch: int) -> tuple[nn.Sequential, list[tuple[int, ...]]]:
    """Rows [from, number, module, args] -> (layers, inputs).

    inputs[i] are the layers that layer i reads; -1 is the image.
    """
    layers: list[nn.Module] = []
    inputs: list[tuple[int, ...]] = []
    channels, rows = {-1: ch}, cfg["backbone"] + cfg["head"]
    if sum(_repeat(row, cfg) for row in rows) > MOST_LAYERS:
        raise UserError(f"model yaml: with the numbers of its rows it has more than {MOST_LAYERS} layers; lower them, "
                        "or depth_multiple")
    for i, row in enumerate(rows):
        source, _, name, _ = row
        if name not in BLOCKS:
            raise UserError(f"model yaml, row {i}: no block named '{name}'; known are {', '.join(sorted(BLOCKS))} "
                            "(see models/common.py)")
        sources = source if isinstance(source, list) else [source]
        read = tuple(j if j >= 0 else i + j for j in sources if isinstance(j, int))
        if len(read) != len(sources) or not read or any(not -1 <= j < i for j in read):
            raise UserError(f"model yaml, row {i} ({name}): reads from layer {source}, which does not come before it")
        try:
            layer, channels[i] = _layer(row, cfg, [channels[j] for j in read])
            if not channels[i] <= MOST_CHANNELS:
                raise ValueError(f"{channels[i]} channels are too many")
        except BUILD_ERRORS as error:
            raise UserError(f"model yaml, row {i} ({name}): can't be built from {str(row[3])[:80]} "
                            f"({first_line(error, 100)})") from None
        layers.append(layer)
        inputs.append(read)
    return nn.Sequential(*layers), inputs


def _repeat(row: list, cfg: dict) -> int:
    """How often a row's block comes."""
    return max(round(row[1] * cfg.get("depth_multiple", 1.0)), 1) if row[1] > 1 else row[1]


def _layer(row: list, cfg: dict, c1: list[int]) -> tuple[nn.Module, int]:
    """(layer, its output channels) of a row whose inputs have c1 channels."""
    _, _, name, args = row
    spec, args, repeat = BLOCKS[name], [_resolve(a, cfg) for a in args], _repeat(row, cfg)
    if spec.channels == "detect":
        if not isinstance(anchors := args[1], list):
            if not whole(1, 100).fits(anchors):
                raise ValueError("its second argument is rows of anchors, or how many a level has, up to 100")
            anchors = [list(range(1, anchors * 2 + 1))] * len(c1)
        if args[0] != cfg["nc"]:
            raise ValueError(f"its first argument is the number of classes, {cfg['nc']}: write nc")
        return spec.cls(args[0], anchors, c1), 0
    c2 = sum(c1) if spec.channels == "sum" else c1[0]
    if spec.channels == "first":
        c2 = math.ceil(args[0] * cfg.get("width_multiple", 1.0) / 8) * 8
        args = [c1[0], c2, *args[1:]]
    elif spec.channels == "input":
        args = [c1[0], *args]
    elif callable(spec.channels):
        for _ in range(repeat):
            c2 = spec.channels(c2, *args)
    if spec.repeats:
        return spec.cls(*args[:2], repeat, *args[2:]), c2
    return (spec.cls(*args) if repeat == 1 else nn.Sequential(*_stack(spec, args, repeat))), c2


def _stack(spec: Any, args: list, repeat: int) -> list[nn.Module]:
    """`repeat` copies in a row; from the second on, the input has the output's channels."""
    if spec.channels != "first":
        return [spec.cls(*args) for _ in range(repeat)]
    return [spec.cls(args[0] if k == 0 else args[1], *args[1:]) for k in range(repeat)]


class _Shapes(TorchFunctionMode):
    """Within it convolution and BatchNorm give the right shape and nothing else, for next to no work."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Where channels do not agree the operation itself complains.
        if func is torch.batch_norm and args[3] is not None and all(
                part is None or len(part) == args[0].shape[1] for part in args[1:5]):
            return args[0].clone()  # what follows may work in place
        if func is torch.conv2d and len(args) == 7:
            x, weight, bias, *how, groups = args
            if x.shape[1] == weight.shape[1] * groups and (bias is None or len(bias) == len(weight)):
                return torch.conv2d(x[:, :1], weight[:1, :1], None, *how, 1).repeat(1, len(weight), 1, 1)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > MOST_PARAMETERS:
            raise ValueError(f"a map of {tuple(result.shape)} is too large")
        return result


class _Budget(TorchFunctionMode):
    """Within it at most MOST_PARAMETERS numbers are made: what asks for more is refused before memory is taken."""

    remaining = MOST_PARAMETERS

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.empty, torch.zeros, torch.ones):
            self.remaining -= math.prod(args[0] if isinstance(args[0], (tuple, list)) else args)
            if self.remaining < 0:
                raise ValueError(f"the model would have more than {MOST_PARAMETERS:,} parameters")
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    """A detector built from a yaml. Input (B, ch, H, W) in 0..1, H and W multiples of .divisor.

    Built on the meta device it has shapes only: whoever gives it its weights and anchors calls set_strides().

    .yaml    the description it was built from (nc and anchors as really used)
    .names   dict class index -> name
    .stride  (nl,) pixels a grid cell
    .divisor sides of images are multiples of it: the whole network divides by it, not only the levels of the head
    .masks   dict BN name -> bool mask over the channels of the first, dense model; empty when nothing was cut
    .file    for messages: formats.load() puts the checkpoint's name there
    """

    file = "the model"

    def __init__(self, cfg: str | Path | dict = "yolov5s.yaml", ch: int = 3, nc: int | None = None,
                 anchors: int | list | None = None, names: dict[int, str] | None = None):
        super().__init__()
        self.yaml = read_yaml(cfg)
        ch = self.yaml["ch"] = self.yaml.get("ch", ch)
        self.input_shape = (0, ch, 0, 0)  # B, H and W may be anything
        self.divisor = LEAST_DIVISOR
        self.yaml["nc"] = int(nc or self.yaml.get("nc") or len(names or ()) or 80)
        if anchors:
            self.yaml["anchors"] = round(anchors) if isinstance(anchors, (int, float)) else anchors
        # On the meta device nothing is allocated; a slim checkpoint may have a very wide yaml.
        with nullcontext() if torch.empty(0).is_meta else _Budget():
            self.model, self.inputs = build_layers(self.yaml, ch)
        self._require_small_steps()
        # Only what a later layer reads by number is kept during the forward pass.
        self.kept = frozenset(j for i, read in enumerate(self.inputs) for j in read if j != i - 1)
        self.names = dict(names) if names else {i: str(i) for i in range(self.yaml["nc"])}
        self.masks: dict[str, Tensor] = {}
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):  # of your own blocks, too, as in YOLOv5
                module.eps, module.momentum = EPS, MOMENTUM
        if "activation" in self.yaml:
            self._set_activation(str(self.yaml["activation"]))
        if not self.detect.m[0].weight.is_meta:  # type: ignore[union-attr]
            self.set_strides()
            self._scale_anchors()
            self.detect.init_biases()

    @property
    def detect(self) -> Detect:
        """The head (always the last layer)."""
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def stride(self) -> Tensor:
        """(nl,) strides in pixels, ascending for P3..P5."""
        return self.detect.stride

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of the images that the model wants."""
        return next(self.parameters()).dtype

    def forward(self, x: Tensor) -> Any:
        """Training: list of (B, na, ny, nx, nc+5). Eval: (decoded (B, N, nc+5), that list)."""
        kept: dict[int, Tensor] = {-1: x}
        for i, (layer, read) in enumerate(zip(self.model, self.inputs)):
            sources = [x if j == i - 1 else kept[j] for j in read]
            x = layer(sources if len(sources) > 1 or isinstance(layer, Detect) else sources[0])
            if i in self.kept:
                kept[i] = x
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        return copy_module(self, memo)

    def train(self, mode: bool = True) -> Model:
        """nn.Module.train. Conv's SiLU works in place in eval mode only: where its input is needed for the gradient,
        autograd would copy it first. Other blocks' may be given what others read, too."""
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.act, nn.SiLU):
                module.act.inplace = not mode
        return super().train(mode)

    def _set_activation(self, name: str) -> None:
        """Replace every block's SiLU by the class that the yaml names: `nn.ReLU()` or `nn.LeakyReLU(0.1)`, say."""
        match = re.fullmatch(r"(nn\.\w+)(?:\((-?(?:\d+\.?\d*|\.\d+)(?:e-?\d\d?)?)?\))?", name.strip())
        cls = ACTIVATIONS.get(match[1]) if match else None
        if match is None or cls is None:
            raise UserError(f"model yaml: activation '{name[:60]}' is not one of {', '.join(ACTIVATIONS)}, with at "
                            "most a number, as in nn.LeakyReLU(0.1)")
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.act, nn.SiLU):
                module.act = cls(float(match[2])) if match[2] else cls()

    def _require_small_steps(self) -> None:
        """UserError where a layer makes its map so much larger that no memory would hold it."""
        for i, layer in enumerate(self.model):
            for module in layer.modules():
                settings = [getattr(module, key, None) for key in ("size", "scale_factor", "padding", "output_padding")]
                settings += [module.stride] if isinstance(module, nn.ConvTranspose2d) else []
                numbers = [n for value in settings for n in (value if isinstance(value, (tuple, list)) else [value])]
                if any(isinstance(n, (int, float)) and not n <= MOST_GROWTH for n in numbers):
                    raise UserError(f"model yaml, row {i}: adds more than {MOST_GROWTH} pixels to a map, or makes it "
                                    "more than so many times as large")

    def set_strides(self) -> None:
        """Measure the strides with one blank image. UserError where the layers, or the head and its anchors, do not fit
        together."""
        head, modes = self.detect, [(module, module.training) for module in self.modules()]
        self.eval()  # the blank image must leave the BN statistics alone
        head.train()
        for size in (64, 256):  # a small image is the faster one, if it is large enough
            try:
                with torch.no_grad(), _Shapes(), _sides_of(self.model) as sides:
                    maps = [y.shape[2:4] for y in self.forward(torch.zeros(1, self.yaml["ch"], size, size))]
            except BUILD_ERRORS as error:
                if size == 64:
                    continue
                raise UserError(f"model yaml: its layers do not fit together ({first_line(error, 120)})") from None
            if min(sides) > 1:  # else it may have been rounded up
                break
        for module, training in modes:
            module.training = training
        if any(height != width or size % width for height, width in maps):
            levels = ", ".join(f"{height}x{width}" for height, width in maps)
            raise UserError(f"model yaml: an image of {size}x{size} becomes maps of {levels}; the head needs whole "
                            "strides, the same in both directions")
        if head.anchors.shape != (head.nl, head.na, 2) or not bool((head.anchors > 0).all()):
            raise UserError(f"model: its anchors are not {head.nl} times {head.na} widths and heights above 0")
        head.stride.copy_(torch.tensor([size / width for _, width in maps]))
        self.divisor = max(size // min(sides), LEAST_DIVISOR)

    def _scale_anchors(self) -> None:
        """Bring the anchors into the strides' order, and to grid units."""
        head = self.detect
        areas = head.anchors.prod(-1).mean(-1)
        if head.nl > 1 and (areas[-1] - areas[0]) * (head.stride[-1] - head.stride[0]) < 0:
            head.anchors.copy_(head.anchors.flip(0))
        head.anchors /= head.stride.view(-1, 1, 1)


def set_anchors(model: Model, pixels: Tensor) -> None:
    """Give the head new anchors, (nl, na, 2) in pixels, and write them into the yaml so that a rebuild has them too."""
    head = model.detect
    with torch.no_grad():
        head.anchors.copy_(pixels.to(head.anchors) / head.stride.view(-1, 1, 1))
    model.yaml["anchors"] = [[round(float(v), 2) for v in level.flatten()] for level in pixels]


def with_classes(model: Model, names: dict[int, str]) -> Model:
    """Make `model` detect these classes, in place: where their number differs the head's last layers start afresh."""
    head = model.detect
    if len(names) != head.nc:
        head.nc, head.no = len(names), len(names) + 5
        widths = [int(conv.weight.shape[1]) for conv in head.m]  # type: ignore[union-attr, index, arg-type]
        head.m = nn.ModuleList(nn.Conv2d(width, head.no * head.na, 1) for width in widths)
        head.init_biases()
        model.yaml["nc"] = len(names)
    model.names = dict(names)
    return model


def fused(model: Model) -> Model:
    """A copy for inference: every BatchNorm folded into the convolution before it."""
    model = deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d) and isinstance(module.conv, nn.Conv2d):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            setattr(module, "bn", nn.Identity())  # noqa: B010  (the attribute is annotated as a BatchNorm2d)
    return model


def on_device(model: Model, device: torch.device | str) -> Model:
    """Move `model`, in place, with its weights laid out for speed: channels_last is 1.2 to 1.5 times faster on CPUs."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model.to(device)


@contextmanager
def _sides_of(layers: nn.Sequential) -> Iterator[list[int]]:
    """The shorter side of every map that one of the layers makes while the block runs."""
    sides: list[int] = []

    def record(layer: nn.Module, args: Any, output: Any) -> None:
        sides.extend(min(y.shape[2:4]) for y in (output if isinstance(output, list) else [output]))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield sides
    finally:
        for hook in hooks:
            hook.remove()


def whole_strides(imgsz: int, divisor: int) -> int:
    """`imgsz` pixels, rounded up to a multiple of a model's divisor."""
    return math.ceil(imgsz / divisor) * divisor


if __name__ == "__main__":
    run_cli(lambda: show(Model))
