"""What becoming sparse costs on BCCD: dense against --target-sparsity at several shares, over seeds, before any cut or fine-tuning.

    python bench/sparsity.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt                      # about an hour on two cores

Since only zeros are cut, the mAP of the sparse model is that of the slim one. A run that is done is not run again. Writes
bench/results/sparsity.csv (one row a run, validation images, last epoch) and img/sparsity.png.
"""
from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from common import ROOT, run, write_csv

from models import checkpoint
from utils.errors import run_cli
from utils.options import HelpfulParser
from utils.slimming.cost import CostModel, profile
from utils.slimming.graph import trace
from utils.slimming.pictures import BLUE, GREY, dress, new_figure, save
from utils.slimming.selection import select
from utils.slimming.surgery import keep_ids

RUNS = [(share, seed) for share in (0.0, 0.5) for seed in (0, 1, 2)] + [(0.65, 0), (0.8, 0)]


def row(folder: Path, share: float, seed: int) -> dict[str, float]:
    """The last epoch of a run, and the cost of what its zeros leave."""
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    data = checkpoint.read(folder / "weights" / "last.pt")
    model = checkpoint.build(data)
    graph = trace(model)
    parameters, flops = CostModel(model, graph, data["imgsz"]).remaining(keep_ids(graph, select(graph, model, share)))
    full = profile(model, data["imgsz"])
    return {"share": share, "seed": seed, "zero": float(last["sparsity/zero"]), "map50": float(last["metrics/mAP_0.5"]),
            "map": float(last["metrics/mAP_0.5:0.95"]), "parameters": parameters / full.parameters, "flops": flops / full.flops}


def picture(rows: list[dict[str, float]], path: Path) -> None:
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
    for number, (share, seed) in enumerate(RUNS):
        name = f"share{share:g}-seed{seed}"
        if (folder / "runs" / "train" / name / "gammas.npy").exists() or (opt.only and number not in opt.only):
            continue
        what = f"--target-sparsity {share}" if share else "--no-st"
        run(f"train_sparsity.py {what} --weights '{Path(opt.weights).resolve()}' --data bccd/data.yaml --imgsz 320 --epochs {opt.epochs} --batch-size 16 "
            f"--nbs 16 --adam --cache ram --workers 2 --seed {seed} --noplots --name {name} --exist-ok", folder)
    done = [(s, n) for s, n in RUNS if (folder / "runs" / "train" / f"share{s:g}-seed{n}" / "gammas.npy").exists()]
    rows = [row(folder / "runs" / "train" / f"share{s:g}-seed{n}", s, n) for s, n in done]
    write_csv(ROOT / "bench" / "results" / "sparsity.csv", rows)
    picture(rows, ROOT / "img" / "sparsity.png")
    for share in sorted({s for s, _ in done}):
        values = np.array([r["map"] for r in rows if r["share"] == share])
        print(f"share {share:g}: mAP50-95 {values.mean():.3f} (lowest {values.min():.3f}, highest {values.max():.3f}, {len(values)} runs)")


if __name__ == "__main__":
    run_cli(main)
