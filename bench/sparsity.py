"""What becoming sparse costs on BCCD, before any fine-tuning: the L1 rule at many strengths, --target-sparsity at many shares.

    python bench/sparsity.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt                      # two hours on two cores, half of --only each

A run that is done is not run again; --only shares the work among processes. Writes bench/results/sparsity.csv (one row a run: validation
images, last epoch, the same model right after cutting 50% and 65%, and some without their zeros after fine-tuning) and img/sparsity.png.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, is_done, last_epoch, need_onnxruntime, run, speeds, write_csv

from models import checkpoint
from models.yolo import Model, fused
from utils.data.config import read_data
from utils.errors import run_cli
from utils.files import write_json
from utils.options import HelpfulParser
from utils.slimming.cost import CostModel, profile
from utils.slimming.graph import trace
from utils.plots.style import BLUE, ORANGE, dress, new_figure, save
from utils.slimming.ranking import MIN_SHARE, Rules, Selection, select
from utils.slimming.surgery import keep_ids, masked, slim
from val import evaluate, validation_loader

CUTS = (0.5, 0.65)
# Name of a run -> its flags. AdamW as in the other tables; SGD with its own rates.
RUNS = {f"share0-seed{seed}": f"--no-st --adam --seed {seed}" for seed in range(3)}
RUNS |= {f"share{share:g}-seed{seed}": f"--target-sparsity {share} --round-to 1 --adam --seed {seed}" for share in (0.3, 0.5) for seed in range(3)}
RUNS |= {f"share{share:g}-seed0": f"--target-sparsity {share} --round-to 1 --adam --seed 0" for share in (0.65, 0.8)}
RUNS |= {f"share{share:g}-round16-seed{seed}": f"--target-sparsity {share} --round-to 16 --adam --seed {seed}"
         for share, seeds in ((0.5, 2), (0.55, 3), (0.6, 1)) for seed in range(seeds)}
RUNS |= {f"{name}-sr{sr:g}-seed0": f"--sr {sr} {flags} --seed 0" for name, flags in (("AdamW", "--adam"), ("SGD", "--optimizer SGD"))
         for sr in (1e-4, 1e-3, 1e-2, 1e-1)}
# Runs whose zeros are cut, and what is left fine-tuned for as many epochs.
TUNED = [f"share{share}-seed{seed}" for share in ("0.5", "0.55-round16") for seed in range(3)] + ["share0.65-seed0", "share0.6-round16-seed0"]


def commands(name: str, weights: Path, epochs: int) -> dict[str, str]:
    """What a command makes -> the command, in order: a run, and its cut and fine-tuning if it is one of TUNED."""
    train = f"--data bccd/data.yaml --imgsz 320 --epochs {epochs} --batch-size 16 --nbs 16 --cache ram --workers 2 --noplots --exist-ok"
    made = {f"runs/train/{name}/gammas.npy": f"train_sparsity.py {RUNS[name]} --weights '{weights}' {train} --name {name}"}
    if name in TUNED:
        share = RUNS[name].split()[1]
        made[f"runs/prune/{name}/pruned_model.pt"] = f"prune.py --weights runs/train/{name}/weights/last.pt --percent {share} --noval --exist-ok --name {name}"
        made[f"runs/train/{name}-tuned/results.csv"] = f"finetune_pruned.py --weights runs/prune/{name}/pruned_model.pt --adam {train} --name {name}-tuned"
    return made


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
    flags, tuned = saved["opt"], folder.with_name(f"{name}-tuned") / "results.csv"
    return {"run": mode, "seed": seed, "share": flags["target_sparsity"] or 0.0, "round_to": flags.get("round_to", 1), "zero": zero,
            "below_0.1": float(last["sparsity/below_1e-1"]), "map50": float(last["metrics/mAP_0.5"]), "map": float(last["metrics/mAP_0.5:0.95"]),
            **after_cuts(folder, model, data, saved["imgsz"], flags.get("round_to", 1)),
            "tuned": float(last_epoch(tuned)["metrics/mAP_0.5:0.95"]) if tuned.is_file() else "",
            "parameters": parameters / full.parameters, "flops": flops / full.flops}


def add_speeds(rows: list[dict[str, Any]], train: Path) -> None:
    """How many times faster than dense each share's first run is without its zeros."""
    first = [r for r in rows if r["run"].startswith("share") and r["seed"] == "0"]
    models = []
    for r in first:
        model = checkpoint.load(train / f"{r['run']}-seed0" / "weights" / "last.pt")
        models.append(slim(model, select(trace(model), model, r["zero"])) if r["zero"] else model)
    ms = speeds(models, 320)  # type: ignore[arg-type]
    for r in rows:
        r |= {"torch": "", "onnxruntime": ""}
    for r, torch_ms, onnx_ms in zip(first, *ms):
        r |= {"torch": ms[0][0] / torch_ms, "onnxruntime": ms[1][0] / onnx_ms}


def after_cuts(folder: Path, model: Model, data: Path, imgsz: int, round_to: int) -> dict[str, float]:
    """mAP50-95 on val of the model right after each of CUTS; kept beside the run."""
    kept = folder / "cuts.json"
    if not kept.is_file():
        loader = validation_loader(read_data(str(data)), "val", imgsz, 32, int(model.stride.max()), workers=2)
        ranked = Selection(trace(model), model, Rules(min_share=MIN_SHARE, round_to=round_to))
        found = {}
        for share in CUTS:
            cut = masked(model, ranked.percent(share))
            assert isinstance(cut, Model)
            found[f"cut_{share:g}"] = evaluate(fused(cut), loader, torch.device("cpu")).ap.map
        write_json(kept, found)
    return json.loads(kept.read_text())


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """mAP50-95 over the FLOPs that are left, a dot a run, a line through the means of each share of zeros."""
    figure = new_figure(7, 4)
    ax = figure.add_subplot()
    dress(ax, "BCCD, yolov5n, 40 epochs: what zeros cost", "FLOPs left, % of dense", "mAP50-95 on val, before fine-tuning")
    for round_to, colour, label in ((1, BLUE, "channel by channel (--round-to 1)"), (16, ORANGE, "in blocks of 16 (default)")):
        own = [r for r in rows if r["round_to"] == round_to or not r["share"]]
        means = [(share, *(np.mean([[100 * r["flops"], r["map"]] for r in own if r["share"] == share], axis=0))) for share in sorted({r["share"] for r in own})]
        ax.plot([x for _, x, _ in means], [y for _, _, y in means], color=colour, label=label)
        ax.scatter([100 * r["flops"] for r in own], [r["map"] for r in own], color=colour, zorder=3, s=14, alpha=0.6)
        for share, x, y in means:
            ax.annotate(f"{share:g}" if share else "dense", (x, y), (0, -26 if round_to == 1 else 14), textcoords="offset points", ha="center",
                        fontsize=8, color=colour)
    ax.set_ylim(bottom=min(r["map"] for r in rows) - 0.06)
    ax.legend(frameon=False, loc="lower right", title="share of zeros (--target-sparsity)")
    save(figure, path)


def main() -> None:
    """Run what is missing, then write the rows and the picture."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--voc", required=True, help="folder of the data set, with Annotations and JPEGImages")
    parser.add_argument("--weights", required=True, help="the official yolov5n.pt")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "sparsity"), help="where the runs are")
    parser.add_argument("--epochs", type=int, default=40, help="epochs a run")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the runs to do now, to share the work among processes; without it the table is written")
    opt = parser.parse_args()
    need_onnxruntime()
    folder = Path(opt.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "bccd" / "data.yaml").exists():
        run(f"data/scripts/voc_to_yolo.py --voc '{Path(opt.voc).resolve()}' --out bccd", folder)
    for number, name in enumerate(RUNS):
        for product, command in commands(name, Path(opt.weights).resolve(), opt.epochs).items():
            if not is_done(folder / product, command) and not (opt.only and number not in opt.only):
                run(command, folder)
    if opt.only:
        return
    train = folder / "runs" / "train"
    rows = [row(train / name, name, folder / "bccd" / "data.yaml") for name in RUNS]
    add_speeds(rows, train)
    write_csv(ROOT / "bench" / "results" / "sparsity.csv", rows)
    picture([r for r in rows if r["run"].startswith("share")], ROOT / "img" / "sparsity.png")
    for mode in dict.fromkeys(r["run"] for r in rows):
        values = np.array([r["map"] for r in rows if r["run"] == mode])
        print(f"{mode}: mAP50-95 {values.mean():.3f} (lowest {values.min():.3f}, highest {values.max():.3f}, {len(values)} runs)")


if __name__ == "__main__":
    run_cli(main)
