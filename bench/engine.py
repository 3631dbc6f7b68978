"""Seconds and memory of a pruning: from the checkpoint's model to the checked and saved slim model.

    python bench/engine.py                       # yolov5s and yolov5x

Where torch-pruning is installed, its BNScalePruner is measured as well. Every sample is a process of its own: imports
and building the model do not count. Memory is the peak beyond what the process held before, relative to the model's
fp32 weights. Writes bench/results/engine.csv, medians of --runs samples.
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

import numpy as np
import torch
from columns import Row, publish
from runtimes import random_model

from models import checkpoint
from models.pruning import model_pruner
from models.yolo import Model
from utils.errors import run_cli
from utils.parser import HelpfulParser
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


def main() -> None:
    """Measure all models by all methods."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--models", nargs="+", default=["yolov5s", "yolov5x"], help="yamls of models/")
    parser.add_argument("--runs", type=int, default=5, help="samples per row")
    parser.add_argument("--sample", nargs=2, metavar=("METHOD", "MODEL"), help="internal: print one sample as JSON")
    opt = parser.parse_args()
    if opt.sample:
        print(json.dumps(sample(*opt.sample)))
        return
    methods = [method for method in METHODS if method == "ours" or find_spec("torch_pruning")]
    if len(methods) == 1:
        print("torch-pruning is not installed (pip install torch-pruning): only this project is measured")
    rows: list[Row] = []
    for name in opt.models:
        samples: dict[str, list[dict]] = {method: [] for method in methods}
        for _ in range(opt.runs):  # in turns, so that a busy moment of the machine hits all methods
            for method in methods:
                command = [sys.executable, __file__, "--sample", method, name]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                samples[method].append(json.loads(done.stdout.splitlines()[-1]))
        for method, found in samples.items():
            medians = {key: float(np.median([one[key] for one in found])) for key in ("seconds", "memory", "left")}
            rows.append({"model": name, "method": method, **medians})
    publish("engine", rows)


if __name__ == "__main__":
    run_cli(main)
