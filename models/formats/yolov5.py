"""A model as a file that unmodified YOLOv5 (v6.0 to v7.0) opens: its own detect.py, val.py and export.py take it.

YOLOv5 pickles whole modules and finds their classes by name. The names of the blocks here are the same, and so are
their parts; what its code expects beside them is added to a copy. A narrowed module needs nothing else: convolutions
know their own channels.
"""
from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.common import TransformerBlock
from models.formats.format import ExportOptions, Format
from models.yolo import Model
from utils.errors import UserError
from utils.files import atomic

# What YOLOv5 v6.0 has in these files, with the same parts as the blocks of the same name here. (CrossConv, C3x and
# DWConvTranspose2d are there from v6.2 on.)
SHARED = {"models.yolo": {"Model", "Detect"}, "models.experimental": {"MixConv2d"}, "models.common": {
    "Conv", "DWConv", "Bottleneck", "BottleneckCSP", "C3", "C3SPP", "SPP", "SPPF", "Focus", "Contract", "Expand",
    "Concat", "GhostConv", "GhostBottleneck", "C3Ghost", "TransformerLayer", "TransformerBlock", "C3TR", "CrossConv",
    "C3x", "DWConvTranspose2d"}}


def write(model: Model, path: Path, options: ExportOptions) -> None:
    """Write `model` as YOLOv5 writes a finished training: fp16, no optimizer. The file is there whole or not at all."""
    classes = {type(m) for m in model.modules() if not type(m).__module__.startswith("torch.")}
    if unsupported := sorted(c.__name__ for c in classes if c.__name__ not in SHARED.get(c.__module__, ())):
        raise UserError(f"--include yolov5: YOLOv5 has no block {', '.join(unsupported)}; "
                        "export onnx or torchscript instead")
    content = {"epoch": -1, "best_fitness": None, "model": to_yolov5(model).half(), "ema": None, "updates": None,
               "optimizer": None, "wandb_id": None, "opt": None, "git": None, "date": None}
    with atomic(path) as temporary:
        torch.save(content, temporary)


def to_yolov5(model: Model) -> Model:
    """A copy that carries the attributes that YOLOv5's code reads, and none of those that only ours does."""
    new = deepcopy(model).float().eval()
    for parameter in new.parameters():
        parameter.data = parameter.data.contiguous()  # YOLOv5 calls view() on them; channels_last would not do
    own: dict[str, Any] = new.__dict__
    stride, head = model.stride.clone(), new.detect
    for i, (layer, read) in enumerate(zip(new.model, model.inputs)):
        sources = [-1 if j == i - 1 else j for j in read]
        layer.__dict__.update(i=i, f=sources if len(sources) > 1 or layer is head else sources[0],
                              type=f"{type(layer).__module__}.{type(layer).__name__}",
                              np=sum(p.numel() for p in layer.parameters()))
    del head._buffers["stride"]  # there it is a plain attribute, and a class attribute would hide the buffer
    head._non_persistent_buffers_set.discard("stride")
    head.__dict__.update(stride=stride, inplace=True, grid=[torch.empty(0) for _ in range(head.nl)],
                         anchor_grid=[torch.empty(0) for _ in range(head.nl)])
    for key in ("inputs", "kept", "masks"):
        del own[key]
    own.update(stride=stride, nc=head.nc, save=sorted(model.kept - {-1}), inplace=True, names=dict(model.names))
    for module in new.modules():
        if isinstance(module, nn.Upsample):
            module.__dict__["recompute_scale_factor"] = None  # older PyTorch asks for it
        if isinstance(module, TransformerBlock):
            module.__dict__["c2"] = module.linear.out_features
    return new


FORMAT = Format("yolov5", ".yolov5.pt", write, precisions=("fp32", "fp16"))  # the weights are fp16 in any case
