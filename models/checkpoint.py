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
from models.config import read_yaml
from models.schema import ANY, FORMAT, MOST_VALUES, checked, require, sound, tree
from models.yolo import BUILD_ERRORS, Model, fused
from utils.downloads import fetch
from utils.errors import NonFiniteError, UserError, first_line
from utils.files import atomic
from utils.slimming.surgery import resize_like, take_out_missing

# Names that a foreign file may mention. Each gets an inert stand-in: nothing that they name is imported or called.
# The package of PyPI that carries YOLOv5 puts its own name in front.
FOREIGN = re.compile(r"(yolov5\.)?(models\.(yolo|common|experimental)|utils\.(loss|autoanchor))\.\w+"
                     r"|torch\.nn\.modules\.\w+\.\w+"
                     r"|(__builtin__|builtins)\.set|pathlib(\._local)?\.(Posix|Windows|PurePosix|PureWindows)?Path"
                     r"|argparse\.Namespace|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)"
                     r"|numpy\.dtypes\.\w+")
RELEASE = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
# Fetched where they are named but missing. The variable YOLO_WEIGHTS_URL gives another address.
OFFICIAL = re.compile(r"yolov5[nsmlx]6?\.pt")
LONGEST_NAME = 500    # characters of a tensor's name
MOST_TUPLES = 100_000  # in a file's pickle; the largest checkpoints have a fifth of it
OTHER_TASKS = {"SegmentationModel": "segmentation", "ClassificationModel": "classification", "Segment": "segmentation",
               "Classify": "classification"}


class _Inert:
    """Holds what an object of a foreign file saved, as attributes."""

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
    """Everything in a checkpoint, ours or an official one, as plain data with the keys of ours (models/schema.py).

    Raises UserError when it is not a detection checkpoint, or holds what it must not.
    """
    path = Path(path)
    if not path.suffix and not path.exists():  # yolov5n, as in YOLOv5
        path = path.with_suffix(".pt")
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
        _require_harmless(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        _require_yolov5(path, names)
        with torch.serialization.safe_globals([_stand_in(n) for n in names]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: can't be read as a checkpoint ({first_line(error)})") from None
    version = data.get("format") if isinstance(data, dict) else None
    ours = isinstance(version, str) and version.startswith(FORMAT.partition("/")[0] + "/")
    if ours and version != FORMAT:
        raise UserError(f"{path}: has format {str(version)[:40]}, this version reads {FORMAT}; update the repository")
    try:
        return checked(data if ours else _from_official(data))
    except (*BUILD_ERRORS, UserError) as error:
        what, mend = ("damaged", "checkpoint of the run") if ours else ("damaged, or not of YOLOv5", "file")
        raise UserError(f"{path}: {what}: {first_line(error)}; take another {mend}") from None


def load(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model of a checkpoint, fp32, in eval mode; the EMA weights where there are two."""
    return _assemble(read(path), path).to(device)


def build(data: dict[str, Any], device: str | torch.device = "cpu", path: str | Path = "checkpoint",
          ema: bool = True) -> Model:
    """The Model that read()'s dict describes, with a copy of its weights; ema=False: the raw ones where there are two.
    """
    return deepcopy(_assemble(data, path, ema)).to(device)


def _assemble(data: dict[str, Any], path: str | Path, ema: bool = True, place: str = "meta") -> Model:
    """A model of data's yaml, narrowed to the shapes of its weights, that holds these very tensors.

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
    try:
        take_out_missing(model, state.keys())
        convs = [name for name, module in model.named_modules() if isinstance(module, Conv)]
        if not any(f"{name}.bn.running_mean" in state for name in convs):  # they are folded into the convolutions
            model = fused(model)
        resize_like(model, state)
        for name, value in model.state_dict().items():
            if value.is_floating_point() != state[name].is_floating_point():
                raise ValueError(f"{name}: is of {state[name].dtype}")
            if name.endswith("running_var") and bool((state[name] < 0).any()):
                raise ValueError(f"{name}: a variance below 0")
        model.load_state_dict(state, assign=True)
    except BUILD_ERRORS as error:
        raise UserError(f"{path}: the weights do not fit the yaml inside ({first_line(error)})") from None
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return _assemble(data, path, ema, "cpu")
    require_finite(model.state_dict(), f"{path}: ", "; such a model finds nothing, take another file")
    model.masks = dict(data.get("masks") or {})
    model.float().eval()
    try:
        model.set_strides()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return model


def require_finite(state: dict[str, Tensor], before: str, after: str) -> None:
    """Raise NonFiniteError, its message between `before` and `after`, where a tensor holds a NaN or an infinity."""
    floats = {name: value for name, value in state.items() if value.is_floating_point()}
    if not floats or bool(torch.stack(torch._foreach_norm(list(floats.values()))).isfinite().all()):
        return  # one pass, ten times faster than isfinite; the square of a large number may be infinite all the same
    for name, value in floats.items():
        if not bool(value.isfinite().all()):
            raise NonFiniteError(f"{before}{name} is not finite{after}")


def load_fitting(model: Model, path: str | Path) -> int:
    """Give `model` the weights of a checkpoint that have the same name and shape, but no anchors; returns how many."""
    theirs, mine = load(path).state_dict(), model.state_dict()
    same = {k: v for k, v in theirs.items() if k in mine and v.shape == mine[k].shape and not k.endswith("anchors")}
    model.load_state_dict(same, strict=False)
    return len(same)


def _cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu() for k, v in state.items()}


def _stand_in(name: str) -> type:
    module, _, cls = name.rpartition(".")
    return type(cls, (_Inert,), {"__module__": module, "__qualname__": cls})


def _require_harmless(path: Path) -> None:
    """UserError where reading would take far more memory than the file has bytes, or end the interpreter."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:  # PyTorch does not compress
            raise UserError(f"{path}: refused, its contents are larger than the file")
        for member in members:
            if member.filename.endswith("data.pkl"):
                pickled = archive.read(member)
                tuples = sum(map(pickled.count, (b"\x85", b"\x86", b"\x87")))
                # A tuple of tuples of tuples as a key: Python's hash has no limit and runs out of stack.
                if tuples + min(pickled.count(b"("), pickled.count(b"t")) > MOST_TUPLES:
                    raise UserError(f"{path}: refused, it is nested without end")


def _require_yolov5(path: Path, names: list[str]) -> None:
    """UserError where a file names what no YOLOv5 detection checkpoint does: what it is, and what to do."""
    if any(name.startswith("ultralytics.") for name in names):
        raise UserError(f"{path}: of the ultralytics package (YOLOv8, YOLO11, yolov5nu ...), another architecture; "
                        "start from YOLOv5's own files, such as yolov5n.pt, or train: --weights '' "
                        "--cfg models/yolov5n.yaml")
    refused = [name[:80] for name in names if not FOREIGN.fullmatch(name)]
    if refused:
        raise UserError(f"{path}: refused, it names {', '.join(refused[:3])}, which no detection checkpoint needs")
    for name in names:
        if task := OTHER_TASKS.get(name.rpartition(".")[2]):
            raise UserError(f"{path}: a {task} checkpoint; this project trains and prunes detection models")


def _from_official(data: Any) -> dict[str, Any]:
    """An official file's stand-in objects -> a dict with our keys. The EMA model is taken where there is one.

    ValueError, or another of BUILD_ERRORS, where something is not what it should be.
    """
    whole = data
    if isinstance(data, dict):
        whole = data["ema"] if data.get("ema") is not None else data.get("model")
    saved = vars(whole) if isinstance(whole, _Inert) else {}
    if not isinstance(saved.get("yaml"), dict):
        raise ValueError("it holds no YOLOv5 model (needs a 'model' or 'ema' entry with its yaml)")
    config, names = read_yaml(saved["yaml"]), tree({"names": saved.get("names")})["names"]
    state = {key: value.float() if value.is_floating_point() else value for key, value in _tensors(whole).items()}
    if names is None:
        names = [str(i) for i in range(config.get("nc", 80))]
    require(names, ([ANY], {...: ANY}), "names")
    names = {key: str(name) for key, name in (names.items() if isinstance(names, dict) else enumerate(names))}
    config["nc"] = len(names)
    head = max((key for key in state if key.endswith(".anchors")), default=None)
    if head is not None and "stride" in saved:  # autoanchor may have changed them since the yaml was written
        pixels = state[head] * torch.as_tensor(saved["stride"], dtype=torch.float32).view(-1, 1, 1)
        config["anchors"] = [[round(v, 3) for v in level.flatten().tolist()] for level in pixels]
    return {"format": FORMAT, "yaml": config, "names": names, "masks": {}, "state_dict": state, "ema": None}


def _tensors(whole: Any) -> dict[str, Tensor]:
    """Every parameter and buffer below a stand-in module, as state_dict would name them; each module counts once."""
    state, seen, waiting, budget = {}, {id(whole)}, [("", whole)], MOST_VALUES
    while waiting:
        prefix, module = waiting.pop()
        tensors = [*(vars(module).get("_parameters") or {}).items(), *(vars(module).get("_buffers") or {}).items()]
        children = (vars(module).get("_modules") or {}).items()
        budget -= len(tensors) + len(children)
        if len(prefix) > LONGEST_NAME or budget < 0:
            raise ValueError("its modules are nested without end")
        for key, value in tensors:
            if isinstance(value, Tensor) and key != "anchor_grid":  # which is in older files
                state[f"{prefix}{key}"] = sound(value.detach(), f"{prefix}{key}")
        for name, child in children:
            if isinstance(child, _Inert) and id(child) not in seen:
                seen.add(id(child))
                waiting.append((f"{prefix}{name}.", child))
    return state
