"""What becoming sparse costs on BCCD, before any fine-tuning: the L1 rule at many strengths, --target-sparsity at many shares.

    python bench/sparsity.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt                      # two hours on two cores

A run that is done is not run again; --only shares the work among processes. Writes bench/results/sparsity.csv (one row a run: validation
images, last epoch, and the same model right after cutting 50% and 65%) and img/sparsity.png.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, last_epoch, run, write_csv

from models import checkpoint
from models.yolo import Model, fused
from utils.data_config import read_data
from utils.errors import run_cli
from utils.files import write_json
from utils.options import HelpfulParser
from utils.slimming.cost import CostModel, profile
from utils.slimming.graph import trace
from utils.slimming.pictures import BLUE, GREY, dress, new_figure, save
from utils.slimming.selection import MIN_SHARE, Rules, Selection, select
from utils.slimming.surgery import keep_ids, masked
from val import evaluate, validation_loader

CUTS = (0.5, 0.65)
# Name of a run -> its flags. AdamW as in the other tables; SGD with its own rates.
RUNS = {f"share0-seed{seed}": f"--no-st --adam --seed {seed}" for seed in range(3)}
RUNS |= {f"share{share:g}-seed{seed}": f"--target-sparsity {share} --adam --seed {seed}" for share in (0.3, 0.5) for seed in range(3)}
RUNS |= {f"share{share:g}-seed0": f"--target-sparsity {share} --adam --seed 0" for share in (0.65, 0.8)}
RUNS |= {f"{name}-sr{sr:g}-seed0": f"--sr {sr} {flags} --seed 0" for name, flags in (("AdamW", "--adam"), ("SGD", "--optimizer SGD"))
         for sr in (1e-4, 1e-3, 1e-2, 1e-1)}


def row(folder: Path, name: str, data: Path) -> dict[str, Any]:
    """The last epoch of a run, the cost of what its zeros leave, and its mAP right after cuts."""
    last = last_epoch(folder / "results.csv")
    saved = checkpoint.read(folder / "weights" / "last.pt")
    model = checkpoint.build(saved)
    graph = trace(model)
    zero = float(last["sparsity/zero"])
    parameters, flops = CostModel(model, graph, saved["imgsz"]).remaining(keep_ids(graph, select(graph, model, zero)))
    full = profile(model, saved["imgsz"])
    mode, seed = name.rsplit("-seed", 1)
    return {"run": mode, "seed": seed, "share": float(mode.removeprefix("share")) if mode.startswith("share") else 0.0,
            "zero": zero, "below_0.1": float(last["sparsity/below_1e-1"]), "map50": float(last["metrics/mAP_0.5"]),
            "map": float(last["metrics/mAP_0.5:0.95"]), **after_cuts(folder, model, data, saved["imgsz"]),
            "parameters": parameters / full.parameters, "flops": flops / full.flops}


def after_cuts(folder: Path, model: Model, data: Path, imgsz: int) -> dict[str, float]:
    """mAP50-95 on val of the model right after each of CUTS; kept beside the run."""
    kept = folder / "cuts.json"
    if not kept.is_file():
        loader = validation_loader(read_data(str(data)), "val", imgsz, 32, int(model.stride.max()), workers=2)
        ranked = Selection(trace(model), model, Rules(min_share=MIN_SHARE))
        found = {}
        for share in CUTS:
            cut = masked(model, ranked.percent(share))
            assert isinstance(cut, Model)
            found[f"cut_{share:g}"] = evaluate(fused(cut), loader, torch.device("cpu")).ap.map
        write_json(kept, found)
    return json.loads(kept.read_text())


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """mAP50-95 over the share of zeros, a dot a run, a line through the means."""
    figure = new_figure(7, 4)
    ax = figure.add_subplot()
    dress(ax, "BCCD, yolov5n, 40 epochs: what zeros cost", "share of the prunable channels that are 0", "mAP50-95 on val")
    shares = sorted({r["share"] for r in rows})
    ax.plot(shares, [np.mean([r["map"] for r in rows if r["share"] == s]) for s in shares], color=BLUE)
    ax.scatter([r["share"] for r in rows], [r["map"] for r in rows], color=GREY, zorder=3, s=18)
    for s in shares:
        here = [r for r in rows if r["share"] == s]
        ax.annotate(f"{np.mean([r['flops'] for r in here]):.0%} of\nthe FLOPs", (s, min(r["map"] for r in here)), (0, -26),
                    textcoords="offset points", ha="center", fontsize=8)
    ax.set_ylim(bottom=min(r["map"] for r in rows) - 0.06)
    save(figure, path)


def main() -> None:
    """Run what is missing, then write the rows and the picture."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--voc", required=True, help="folder of the data set, with Annotations and JPEGImages")
    parser.add_argument("--weights", required=True, help="the official yolov5n.pt")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "sparsity"), help="where the runs are")
    parser.add_argument("--epochs", type=int, default=40, help="epochs a run")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the runs to do now, to share the work among processes")
    opt = parser.parse_args()
    folder = Path(opt.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "bccd" / "data.yaml").exists():
        run(f"data/scripts/voc_to_yolo.py --voc '{Path(opt.voc).resolve()}' --out bccd", folder)
    for number, (name, flags) in enumerate(RUNS.items()):
        if (folder / "runs" / "train" / name / "gammas.npy").exists() or (opt.only and number not in opt.only):
            continue
        run(f"train_sparsity.py {flags} --weights '{Path(opt.weights).resolve()}' --data bccd/data.yaml --imgsz 320 --epochs {opt.epochs} --batch-size 16 "
            f"--nbs 16 --cache ram --workers 2 --noplots --name {name} --exist-ok", folder)
    train = folder / "runs" / "train"
    rows = [row(train / name, name, folder / "bccd" / "data.yaml") for name in RUNS if (train / name / "gammas.npy").exists()]
    write_csv(ROOT / "bench" / "results" / "sparsity.csv", rows)
    picture([r for r in rows if r["run"].startswith("share")], ROOT / "img" / "sparsity.png")
    for mode in dict.fromkeys(r["run"] for r in rows):
        values = np.array([r["map"] for r in rows if r["run"] == mode])
        print(f"{mode}: mAP50-95 {values.mean():.3f} (lowest {values.min():.3f}, highest {values.max():.3f}, {len(values)} runs)")


if __name__ == "__main__":
    run_cli(main)
