"""What each lever of prune.py does, all from one sparse model on BCCD: mAP right after the cut, after 20 epochs of fine-tuning, and speed.

    python bench/pruning.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt           # half an hour on two cores, after bench/sparsity.py

The sparse model is the --target-sparsity 0.5 --round-to 1 run of bench/sparsity.py, seed 0, which is made if it is not there. A run that is done is not run
again. Writes bench/results/pruning.csv, a row a cut.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import ROOT, is_done, last_epoch, map_on_val, need_onnxruntime, run, speeds, write_csv
from sparsity import RUNS

from models import checkpoint
from utils.errors import run_cli
from utils.options import HelpfulParser
from utils.slimming.cost import profile
from utils.slimming.report import table

SPARSE = "share0.5-seed0"
LEVERS = {"default": "", "joint": "--shortcuts joint", "per-flop": "--per-flop", "round-8": "--round-to 8", "round-16": "--round-to 16",
          "absorb": "--absorb", "recalibrate": "--recalibrate 128"}
CUTS = [(lever, percent) for percent in (0.3, 0.5, 0.65, 0.8) for lever in LEVERS]
# Those that are fine-tuned: at 30% and 50% only zeros go, so that most levers make the same model.
TUNED = [("default", 0.5), ("joint", 0.5), ("round-8", 0.5), ("default", 0.65), ("joint", 0.65), ("per-flop", 0.65), ("round-8", 0.65), ("round-16", 0.65),
         ("absorb", 0.65), ("recalibrate", 0.65), ("default", 0.8), ("per-flop", 0.8)]
FLAGS = "--data bccd/data.yaml --imgsz 320 --batch-size 16"


def name(lever: str, percent: float) -> str:
    """Of a cut's run."""
    return f"{lever}-{percent:g}"


def commands(weights: Path) -> dict[str, str]:
    """What a command makes -> the command, in order."""
    train = f"{FLAGS} --nbs 16 --adam --cache ram --workers 2 --noplots --exist-ok"
    made = {f"runs/train/{SPARSE}/gammas.npy": f"train_sparsity.py {RUNS[SPARSE]} --weights '{weights}' --epochs 40 {train} --name {SPARSE}"}
    for lever, percent in CUTS:
        flags = f"--percent {percent:g} {LEVERS[lever]} {FLAGS} --noval --exist-ok --name {name(lever, percent)}"
        made[f"runs/prune/{name(lever, percent)}/pruned_model.pt"] = f"prune.py --weights runs/train/{SPARSE}/weights/last.pt {flags}"
    for lever, percent in TUNED:
        made[f"runs/train/{name(lever, percent)}/results.csv"] = (
            f"finetune_pruned.py --weights runs/prune/{name(lever, percent)}/pruned_model.pt --epochs 20 {train} --name {name(lever, percent)}")
    return made


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row a cut; the first is the sparse model."""
    files = {"sparse": f"runs/train/{SPARSE}/weights/last.pt", **{name(*cut): f"runs/prune/{name(*cut)}/pruned_model.pt" for cut in CUTS}}
    models = {key: checkpoint.load(folder / file) for key, file in files.items()}
    full, found = profile(models["sparse"], 320), []
    for key, model in models.items():
        cost = profile(model, 320)
        tuned = folder / "runs" / "train" / key / "results.csv"
        done = key != "sparse" and tuned.is_file() and last_epoch(tuned)["epoch"] == "19"
        found.append({"cut": key, "map": map_on_val(folder / files[key], folder / "bccd" / "data.yaml"),
                      "tuned": float(last_epoch(tuned)["metrics/mAP_0.5:0.95"]) if done else "",
                      "parameters": cost.parameters / full.parameters, "flops": cost.flops / full.flops})
    torch_ms, onnx_ms = speeds(list(models.values()), 320)
    for row, a, b in zip(found, torch_ms, onnx_ms):
        row |= {"torch": torch_ms[0] / a, "onnxruntime": onnx_ms[0] / b}
    return found


def main() -> None:
    """Run what is missing, then measure."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--voc", required=True, help="folder of the data set, with Annotations and JPEGImages")
    parser.add_argument("--weights", required=True, help="the official yolov5n.pt")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "sparsity"), help="where the runs are: that of bench/sparsity.py")
    parser.add_argument("--cuts-only", action="store_true", help="do not start fine-tunings; those that are done are shown all the same")
    opt = parser.parse_args()
    need_onnxruntime()
    folder = Path(opt.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "bccd" / "data.yaml").exists():
        run(f"data/scripts/voc_to_yolo.py --voc '{Path(opt.voc).resolve()}' --out bccd", folder)
    for product, command in commands(Path(opt.weights).resolve()).items():
        if not is_done(folder / product, command) and not (opt.cuts_only and command.startswith("finetune")):
            run(command, folder)
    found = rows(folder)
    write_csv(ROOT / "bench" / "results" / "pruning.csv", found)
    print(table([(r["cut"], f"{r['map']:.3f}", f"{r['tuned']:.3f}" if r["tuned"] else "", f"{r['parameters']:.0%}", f"{r['flops']:.0%}", f"{r['torch']:.2f}",
                  f"{r['onnxruntime']:.2f}") for r in found], ("cut", "mAP50-95", "tuned", "parameters", "FLOPs", "times faster, torch", "onnxruntime")))
    print(f"{torch.get_num_threads()} threads, batch 1")


if __name__ == "__main__":
    run_cli(main)
