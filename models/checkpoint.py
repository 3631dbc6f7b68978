"""Checkpoints: save, read and load. Only this file touches torch.load, and it never executes what a file says.

A checkpoint of ours is one dict of plain types and tensors: yaml + masks + state_dict is the whole model.
Official YOLOv5 files are pickles of whole modules. They are read with stand-in classes that do nothing but hold
attributes, through torch's restricted unpickler; the weights are then loaded into a Model built from their yaml.
"""
from __future__ import annotations

import os
import re
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.common import Conv
from models.yolo import Model, fused
from utils.downloads import fetch
from utils.errors import UserError, first_line
from utils.files import atomic
from utils.slimming.surgery import resize_like

FORMAT = "yolov5-slimming/1"
# Names that a foreign file may mention. Each gets an inert stand-in: nothing that they name is imported or called.
FOREIGN = re.compile(r"(models\.(yolo|common|experimental)|torch\.nn\.modules\.\w+|utils\.(loss|autoanchor))\.\w+"
                     r"|(__builtin__|builtins)\.set|pathlib(\._local)?\.(Posix|Windows|PurePosix|PureWindows)?Path"
                     r"|argparse\.Namespace|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)"
                     r"|numpy\.dtypes\.\w+")
RELEASE = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
# Fetched where they are named but missing. The variable YOLO_WEIGHTS_URL gives another address.
OFFICIAL = re.compile(r"yolov5[nsmlx]6?\.pt")
KINDS: dict[str, Any] = {"yaml": dict, "names": dict, "state_dict": dict, "masks": dict, "ema": (dict, type(None))}
OTHER_TASKS = {"SegmentationModel": "segmentation", "ClassificationModel": "classification", "Segment": "segmentation",
               "Classify": "classification"}


class _Inert:
    """Holds what an object of a foreign file held, as attributes."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def save(path: str | Path, model: Model, ema: Model | None = None, **meta: Any) -> None:
    """Write a checkpoint atomically: a crash at any instant leaves the previous file whole.

    model's weights go under "state_dict", ema's (if there is one) under "ema". `meta` must be plain data: data, imgsz,
    hyp, command, metrics, training state, ...
    """
    data = {"format": FORMAT, "yaml": model.yaml, "names": dict(model.names),
            "masks": {k: v.cpu() for k, v in model.masks.items()}, "state_dict": _cpu(model.state_dict()),
            "ema": _cpu(ema.state_dict()) if ema is not None else None, **meta}
    with atomic(Path(path)) as temporary, open(temporary, "wb") as file:
        torch.save(data, file)
        file.flush()
        os.fsync(file.fileno())


def read(path: str | Path) -> dict[str, Any]:
    """Everything in a checkpoint, ours or an official one, as plain data with the keys of ours.

    Raises UserError when it is not a detection checkpoint, or holds what it must not.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a checkpoint")
    if not path.is_file():
        if not OFFICIAL.fullmatch(path.name):
            raise UserError(f"{path}: no such checkpoint")
        fetch(f"{os.environ.get('YOLO_WEIGHTS_URL', RELEASE)}/{path.name}", path, zipfile.is_zipfile,
              f"put the file at {path} yourself, or train from scratch: --weights '' --cfg models/{path.stem}.yaml")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a PyTorch checkpoint, or cut off (a .pt file is a zip archive)")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:
        raise UserError(f"{path}: can't be read as a checkpoint ({first_line(error)})") from None
    refused = [n for n in names if not FOREIGN.fullmatch(n)]
    if refused:
        raise UserError(f"{path}: refused, it names {', '.join(refused[:3])}, which no detection checkpoint needs")
    for name in names:
        task = OTHER_TASKS.get(name.rpartition(".")[2])
        if task:
            raise UserError(f"{path}: a {task} checkpoint; this project trains and prunes detection models")
    try:
        with torch.serialization.safe_globals([_stand_in(n) for n in names]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: can't be read as a checkpoint ({first_line(error)})") from None
    if isinstance(data, dict) and str(data.get("format", "")).startswith("yolov5-slimming/"):
        if data["format"] != FORMAT:
            raise UserError(f"{path}: has format {data['format']}, this version reads {FORMAT}; update the repository")
        for key, kind in KINDS.items():
            if not isinstance(data.get(key), kind):
                raise UserError(f"{path}: damaged, its '{key}' is missing or of the wrong type; "
                                "take another checkpoint of the run")
        return data
    return _from_official(path, data)


def load(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model of a checkpoint, fp32, in eval mode; the EMA weights where there are two."""
    return _assemble(read(path), path).to(device)


def build(data: dict[str, Any], device: str | torch.device = "cpu", path: str | Path = "checkpoint",
          ema: bool = True) -> Model:
    """The Model that read()'s dict describes, with a copy of its weights; ema=False: the raw ones where there are two.
    """
    return deepcopy(_assemble(data, path, ema)).to(device)


def _assemble(data: dict[str, Any], path: str | Path, ema: bool = True, place: str = "meta") -> Model:
    """Built from its yaml, narrowed to the shapes of its weights, and given these: they are data's own tensors.

    On the meta device a yaml allocates nothing, whatever width it asks for: only what is in the file takes memory. A
    block that computes with values while it is built, or keeps some that are not in the file, needs a real device.
    """
    state = data["ema"] if ema and data.get("ema") else data["state_dict"]
    try:
        with torch.device(place):
            model = Model(data["yaml"], names=data["names"])
    except UserError as error:
        if place == "meta" and "meta tensor" in str(error.__context__):
            return _assemble(data, path, ema, "cpu")
        raise UserError(f"{path}: {error}") from None
    convs = [name for name, module in model.named_modules() if isinstance(module, Conv)]
    if not any(f"{name}.bn.running_mean" in state for name in convs):  # they are folded into the convolutions
        model = fused(model)
    try:
        resize_like(model, state)
        for name, value in state.items():
            if value.is_meta or value.untyped_storage().nbytes() < value.numel() * value.element_size():
                raise ValueError(f"{name}: fewer numbers than its shape {tuple(value.shape)} has")
        model.load_state_dict(state, assign=True)
    except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: the weights do not fit the yaml inside ({first_line(error)})") from None
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return _assemble(data, path, ema, "cpu")
    model.masks = dict(data.get("masks") or {})
    model.float().eval()
    try:
        model.set_strides()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return model


def load_fitting(model: Model, path: str | Path) -> int:
    """Give `model` those weights of a checkpoint that have the same name and shape, its anchors not; how many."""
    theirs, mine = load(path).state_dict(), model.state_dict()
    same = {k: v for k, v in theirs.items() if k in mine and v.shape == mine[k].shape and not k.endswith("anchors")}
    model.load_state_dict(same, strict=False)
    return len(same)


def _cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu() for k, v in state.items()}


def _stand_in(name: str) -> type:
    module, _, cls = name.rpartition(".")
    return type(cls, (_Inert,), {"__module__": module, "__qualname__": cls})


def _from_official(path: Path, data: Any) -> dict[str, Any]:
    """An official file's stand-in objects -> a dict with our keys. The EMA model is taken where there is one."""
    whole = data
    if isinstance(data, dict):
        whole = data["ema"] if data.get("ema") is not None else data.get("model")
    config = getattr(whole, "yaml", None)
    if not isinstance(whole, _Inert) or not isinstance(config, dict):
        raise UserError(f"{path}: holds no YOLOv5 model (needs a 'model' or 'ema' entry with its yaml)")
    tensors = [(k, v) for k, v in _tensors(whole, "") if not k.endswith(".anchor_grid")]  # in older files
    state = {k: v.float() if v.is_floating_point() else v for k, v in tensors}
    config = dict(config)
    head = max((k for k in state if k.endswith(".anchors")), default=None)
    names = getattr(whole, "names", None) or [str(i) for i in range(config.get("nc", 80))]
    names = dict(names) if isinstance(names, dict) else dict(enumerate(names))
    config["nc"] = len(names)
    if head is not None and hasattr(whole, "stride"):  # autoanchor may have changed them since the yaml was written
        pixels = state[head] * whole.stride.float().view(-1, 1, 1)
        config["anchors"] = [[round(v, 3) for v in level.flatten().tolist()] for level in pixels]
    return {"format": FORMAT, "yaml": config, "names": names, "masks": {}, "state_dict": state, "ema": None}


def _tensors(module: Any, prefix: str) -> list[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer below a stand-in module, as state_dict would name them."""
    found = []
    for store in ("_parameters", "_buffers"):
        stored = getattr(module, store, None) or {}
        found += [(prefix + k, v.detach()) for k, v in stored.items() if isinstance(v, Tensor)]
    for name, child in (getattr(module, "_modules", None) or {}).items():
        found += _tensors(child, f"{prefix}{name}.")
    return found
