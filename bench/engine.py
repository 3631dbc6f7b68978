"""Seconds and memory of a pruning: from the checkpoint's model to the checked and saved slim model.

    python bench/engine.py                       # yolov5s and yolov5x
    python bench/engine.py --classifiers         # of torchvision, and of timm where that is installed

Where torch-pruning is installed, its BNScalePruner is measured as well. Every sample is a process of its own: imports
and building the model do not count. Memory is the peak beyond what the process held before, relative to the model's
fp32 weights. Writes bench/results/engine.csv, medians of --runs samples. Classifiers go to classifiers.csv: half of the
channels of each layer by Torch-Pruning, which checks nothing but that the model still runs.
"""
from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from columns import Row, publish
from runtimes import random_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import checkpoint
from models.pruning import model_pruner
from models.yolo import Model
from utils.errors import run_cli
from utils.parser import HelpfulParser
from utils.slimming import Pruner
from utils.slimming.ranking import MIN_SHARE, Rules


def prune_ours(model: Model, path: Path) -> Model:
    """Rank, cut, check and save."""
    rules = Rules(min_share=MIN_SHARE, coupled=True)
    slim = model_pruner(model, 640).rank(rules=rules).cut(percent=0.5).slim
    checkpoint.save(path, slim)
    return slim


def prune_theirs(model: Model, path: Path) -> Model:
    """Rank globally, cut in place without a check, save the whole module."""
    import torch_pruning as tp

    pruner = tp.pruner.BNScalePruner(model.train(), torch.rand(1, 3, 64, 64), tp.importance.BNScaleImportance(),
                                     pruning_ratio=0.5, global_pruning=True, ignored_layers=list(model.detect.m))
    pruner.step()
    torch.save(model, path)
    return model


TORCHVISION = [
    "alexnet", "vgg11_bn", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2",
    "densenet121", "googlenet", "inception_v3", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "shufflenet_v2_x1_0", "squeezenet1_1", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_y_400mf", "regnet_x_400mf", "convnext_tiny", "vit_b_16", "swin_t", "maxvit_t"]
TIMM = [
    "resnet50d", "seresnet50", "skresnet50", "ecaresnet50t", "res2net50_26w_4s", "resnest50d",
    "tf_efficientnet_b0", "ghostnet_100", "cspresnet50", "dla34", "dpn68", "hrnet_w18_small",
    "inception_resnet_v2", "xception41", "ese_vovnet19b_dw", "rexnet_100", "tresnet_m", "mixnet_s",
    "mobileone_s0", "levit_128", "mobilevit_s", "coatnet_nano_rw_224"]


def classifier(name: str) -> nn.Module:
    """torchvision/NAME or timm/NAME, that looks trained to a ranking."""
    package, _, name = name.partition("/")
    torch.manual_seed(0)
    if package == "timm":
        import timm

        model = timm.create_model(name)
    else:
        import torchvision

        plain = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **plain)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.1, 1.5)
    return model.eval()


def half_of(method: str, name: str) -> dict[str, Any]:
    """Half of a classifier's channels cut: seconds, the share of parameters left, or why not."""
    model = classifier(name)
    side = getattr(model, "default_cfg", {}).get("input_size", (3, 299 if "inception" in name else 224))[-1]
    before, start = sum(p.numel() for p in model.parameters()), time.perf_counter()
    try:
        if method == "ours":
            model = Pruner(model, side).rank(rules=Rules(coupled=True)).cut(percent=0.5).slim
        else:
            import torch_pruning as tp

            images = torch.rand(1, 3, side, side)
            last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
            tp.pruner.BasePruner(model, images, tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.5,
                                 ignored_layers=[last]).step()
            model(images)
    except Exception as error:  # whatever their code and the models' raise
        return {"seconds": "", "left": "", "error": f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"}
    share = sum(p.numel() for p in model.parameters()) / before
    return {"seconds": time.perf_counter() - start, "left": share, "error": ""}


METHODS = {"ours": prune_ours, "Torch-Pruning": prune_theirs}


def sample(method: str, name: str) -> dict[str, float]:
    """One measurement, in this process."""
    if method == "Torch-Pruning":
        import torch_pruning  # noqa: F401  (so that its import does not count)
    model = random_model(name)
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        slim = METHODS[method](model, Path(folder) / "slim.pt")
        seconds = time.perf_counter() - start
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "memory": 1024 * kilobytes / (4 * parameters),
            "left": sum(p.numel() for p in slim.parameters()) / parameters}


def one_sample(method: str, name: str) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--sample", method, name]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    """Measure all models by all methods."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--models", nargs="+", default=["yolov5s", "yolov5x"], help="yamls of models/")
    parser.add_argument("--runs", type=int, default=5, help="samples per row")
    parser.add_argument("--classifiers", nargs="*", metavar="NAME",
                        help="torchvision/NAME and timm/NAME instead; all of both lists where none is named")
    parser.add_argument("--sample", nargs=2, metavar=("METHOD", "MODEL"), help="internal: print one sample as JSON")
    opt = parser.parse_args()
    if opt.sample:
        sampler = half_of if "/" in opt.sample[1] else sample
        print(json.dumps(sampler(*opt.sample)))
        return
    methods = [method for method in METHODS if method == "ours" or find_spec("torch_pruning")]
    if len(methods) == 1:
        print("torch-pruning is not installed (pip install torch-pruning): only this project is measured")
    if opt.classifiers is not None:
        names = [f"torchvision/{name}" for name in TORCHVISION]
        names += [f"timm/{name}" for name in TIMM if find_spec("timm")]
        publish("classifiers", [{"model": name, "method": method, **one_sample(method, name)}
                                for name in opt.classifiers or names for method in methods])
        return
    rows: list[Row] = []
    for name in opt.models:
        samples: dict[str, list[dict]] = {method: [] for method in methods}
        for _ in range(opt.runs):  # in turns, so that a busy moment of the machine hits all methods
            for method in methods:
                samples[method].append(one_sample(method, name))
        for method, points in samples.items():
            medians = {key: float(np.median([one[key] for one in points])) for key in ("seconds", "memory", "left")}
            rows.append({"model": name, "method": method, **medians})
    publish("engine", rows)


if __name__ == "__main__":
    run_cli(main)
