"""How long pruning itself takes, and how much memory: from the checkpoint's model to the proven slim model, without any evaluation.

    python bench/engine.py                       # yolov5s and yolov5x; with `pip install torch-pruning` also beside its BNScalePruner

Every case runs in a process of its own: imports and building the model are not counted, the median of --runs is shown. Memory is
the most that the process held at once beyond what it held before, relative to the model's weights in fp32.
"""
from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import ROOT, write_csv

from utils.errors import run_cli
from utils.options import HelpfulParser
from utils.slimming.report import table


def prune_ours(model, folder: Path) -> int:
    """Rank, select, cut, prove, save; returns the parameters that are left."""
    import prune
    from models import checkpoint

    opt = prune.parse(["--percent", "0.5"])
    opt.imgsz, opt.shortcuts, opt.round_to = 640, "joint", 1
    ranked = prune.rank(model, opt)
    result = prune.cut(model, ranked, ranked.percent(opt.percent))
    checkpoint.save(folder / "slim.pt", result.slim)
    return sum(p.numel() for p in result.slim.parameters())


def prune_theirs(model, folder: Path) -> int:
    """Torch-Pruning's BNScalePruner: global ranking, no proof; saves the whole module."""
    import torch
    import torch_pruning as tp

    model.train()
    pruner = tp.pruner.BNScalePruner(model, torch.rand(1, 3, 64, 64), importance=tp.importance.BNScaleImportance(), pruning_ratio=0.5,
                                     global_pruning=True, ignored_layers=list(model.detect.m))
    pruner.step()
    torch.save(model, folder / "slim.pt")
    return sum(p.numel() for p in model.parameters())


METHODS = {"ours": prune_ours, "Torch-Pruning": prune_theirs}


def case(how: str, name: str) -> None:
    """One measurement, printed as JSON."""
    import tempfile

    import torch

    sys.path.insert(0, str(ROOT))
    import prune  # noqa: F401  (imports are not counted)
    from models.yolo import Model
    from tests.blocks import randomised

    if how == "Torch-Pruning":
        import torch_pruning  # noqa: F401
    torch.manual_seed(0)
    model = randomised(Model(f"{name}.yaml")).eval()
    weights = sum(4 * p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        left = METHODS[how](model, Path(folder))
        seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"seconds": seconds, "memory": grown / weights, "left": 4 * left / weights}))


def main() -> None:
    """All cases, their medians, bench/results/engine.csv."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--models", nargs="+", default=["yolov5s", "yolov5x"], help="yamls of models/")
    parser.add_argument("--runs", type=int, default=5, help="processes a case")
    parser.add_argument("--case", nargs=2, help="internal: how and model of one measurement")
    opt = parser.parse_args()
    if opt.case:
        case(*opt.case)
        return
    methods = list(METHODS)
    if not find_spec("torch_pruning"):
        methods.remove("Torch-Pruning")
        print("torch-pruning is not installed; ours alone (pip install torch-pruning)")
    rows = []
    for name in opt.models:
        samples: dict[str, list[dict]] = {how: [] for how in methods}
        for _ in range(opt.runs):  # in turns, so that a busy moment hits both
            for how in methods:
                done = subprocess.run([sys.executable, __file__, "--case", how, name], capture_output=True, text=True, check=True)
                samples[how].append(json.loads(done.stdout.splitlines()[-1]))
        rows += [{"model": name, "method": how, **{k: float(np.median([s[k] for s in found])) for k in ("seconds", "memory", "left")}}
                 for how, found in samples.items()]
    write_csv(ROOT / "bench" / "results" / "engine.csv", rows)
    print(table([(r["model"], r["method"], f"{r['seconds']:.2f}", f"{r['memory']:.1f}", f"{r['left']:.0%}") for r in rows],
                ("model", "", "seconds", "memory / weights", "parameters left")))


if __name__ == "__main__":
    run_cli(main)
