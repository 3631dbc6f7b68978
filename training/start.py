"""What a training starts from: its options, model and anchors, its hooks, frozen layers and kind of BatchNorm."""
from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models import checkpoint
from models.inference import require_rgb
from models.yolo import Model, set_anchors, with_classes
from training.autoanchor import fit_anchors
from training.distillation import Teacher
from training.distributed import World, broadcast
from training.image_weights import ImageWeights
from training.run import Hook
from training.settings import DEFAULTS, checked_defaults, resolve
from utils.data.config import other_names, read_data
from utils.data.dataset import DetectionDataset
from utils.errors import UserError
from utils.files import ROOT, in_use, new_run_folder
from utils.options import BUILT_IN_DATA


def start_options(opt: Namespace) -> Namespace:
    """resolve(), with the recipe of the weights that the run starts from where they were trained here."""
    weights = opt.weights
    if weights is None and not opt.cfg:
        config = read_data(opt.data or ROOT / BUILT_IN_DATA, needed=())
        weights = checked_defaults(config).get("weights", DEFAULTS["weights"])
    is_here = weights and Path(weights).is_file()  # one that is to be fetched is not ours
    return resolve(opt, checkpoint.read(weights) if is_here else None)


def start_model(opt: Namespace, names: dict[int, str], resumed: dict[str, Any], world: World) -> Model:
    """From a resumed run, a checkpoint (slim ones stay slim), a yaml, or a yaml with a checkpoint's weights."""
    model = _start_model(opt, names, resumed, world)
    require_rgb(model, opt.cfg or opt.weights or "the model")
    return model


def _start_model(opt: Namespace, names: dict[int, str], resumed: dict[str, Any], world: World) -> Model:
    if resumed:
        model = checkpoint.build(resumed, path=opt.resume, ema=False)
        if other := other_names(names, model.names):
            raise UserError(f"{opt.data}: {other} as the run that goes on does; --data may name the same set at "
                            f"another place, --weights {opt.resume} starts a run on another set")
        return model
    if opt.weights and not opt.cfg:
        model = with_classes(checkpoint.load(opt.weights), names)
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            raise UserError(f"{opt.weights}: BatchNorm is fused into the convolutions; "
                            "train the file from before fusing or exporting")
        return model
    if not opt.cfg:
        raise UserError("--weights '' needs --cfg, a model yaml such as models/yolov5s.yaml")
    model = Model(opt.cfg, nc=len(names), names=names)
    if opt.weights:
        tensors = checkpoint.load_fitting(model, opt.weights)
        if world.main:
            print(f"{tensors} of {len(model.state_dict())} tensors taken from {opt.weights}")
    return model


def standard_hooks(opt: Namespace) -> list[Hook]:
    """The hooks that flags of every training script ask for."""
    hooks: list[Hook] = [ImageWeights()] if opt.image_weights else []
    return [*hooks, Teacher(opt.teacher, opt.teacher_weight)] if opt.teacher else hooks


def shared_run_folder(opt: Namespace, world: World, locks: ExitStack) -> Path:
    """A new folder for the run, the same one for all processes. `locks` gets its lock."""
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok) if world.main else Path()
    if world.main:
        locks.enter_context(in_use(folder))
        move_away(folder / "weights")
    return Path(str(broadcast(str(folder), world.size)))


def move_away(weights: Path) -> None:
    """--exist-ok: give the checkpoints of an earlier run in this folder another name, such as best.old.pt."""
    kept = [weights / f"{name}.pt" for name in ("best", "last") if (weights / f"{name}.pt").exists()]
    others = ({file: file.with_name(f"{file.stem}.old{n if n > 1 else ''}.pt") for file in kept} for n in count(1))
    free = next(names for names in others if not any(map(os.path.lexists, names.values())))
    for file, name in free.items():
        file.rename(name)


def adapt_anchors(opt: Namespace, imgsz: int, model: Model, dataset: DetectionDataset, world: World) -> None:
    """Autoanchor: fit the anchors to the data set's boxes unless they fit already."""
    if opt.noautoanchor:
        return
    largest = dataset.shapes.max(1, keepdims=True)
    sizes = dataset.shapes / largest * imgsz
    wh = dataset.labels.flat()[:, 3:5] * np.repeat(sizes, dataset.labels.counts, 0)
    pixels = (model.detect.anchors * model.stride.view(-1, 1, 1)).cpu().numpy()
    better, message = fit_anchors(wh, pixels, imgsz, opt.hyp["anchor_t"], opt.seed)
    if world.main:
        print(message)
    if better is not None:
        set_anchors(model, torch.as_tensor(better, dtype=torch.float32).view(pixels.shape))


def synchronised(model: Model, world: World) -> Model:
    """--sync-bn: BatchNorms that take their statistics over the images of all processes."""
    if world.device.type != "cuda":
        raise UserError("--sync-bn: PyTorch synchronises BatchNorm on GPUs only; leave it out here")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def seed_and_kernels(opt: Namespace) -> None:
    """--seed, and --deterministic: GPU kernels whose result does not depend on the order in which threads finish.

    An operation that has none warns and runs all the same. PyTorch documents the limits under "Reproducibility".
    """
    torch.manual_seed(opt.seed)
    if opt.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
    # Else cuDNN tries its kernels once for a shape and keeps the fastest one.
    torch.backends.cudnn.benchmark = not (opt.deterministic or opt.multi_scale or opt.rect)


def freeze(model: Model, layers: Sequence[int]) -> None:
    """--freeze 10 freezes layers 0 to 9, --freeze 0 3 5 those three."""
    indices: Sequence[int] = range(layers[0]) if len(layers) == 1 else sorted(layers)
    if indices and indices[-1] >= len(model.model):
        raise UserError(f"--freeze {' '.join(map(str, layers))}: the model has {len(model.model)} layers, "
                        f"0 to {len(model.model) - 1}; give fewer")
    for i in indices:
        model.model[i].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("--freeze: nothing is left to train; freeze fewer layers")
