"""What each flag of prune.py does to one sparse model on BCCD: mAP after the cut and after fine-tuning, and speed.

    python bench/pruning.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt       # half an hour, after bench/sparsity.py

The sparse model is a run of bench/sparsity.py, which is made if it is missing. A run that is done is not run again.
Writes bench/results/pruning.csv, a row per cut.
"""
from __future__ import annotations

from pathlib import Path

import common
import torch
from columns import PRUNING, RESULTS, Row, formatted
from common import CUT, SPARSE
from sparsity import RUNS

from models import checkpoint
from utils.errors import run_cli
from utils.tables import text_table, write_csv

SOURCE = "share0.5-seed0"
FLAGS = {"default": "", "joint": "--shortcuts joint", "per-flop": "--per-flop", "round-8": "--round-to 8",
         "round-16": "--round-to 16", "absorb": "--absorb", "recalibrate": "--recalibrate 128"}
# Name of a cut -> its flags.
CUTS = {f"{name}-{percent:g}": f"--percent {percent:g} {flags}"
        for percent in (0.3, 0.5, 0.65, 0.8) for name, flags in FLAGS.items()}
# The cuts that are fine-tuned. At 30% and 50% only zeros go, and most flags make the same model.
TUNED = ("default-0.5", "joint-0.5", "round-8-0.5", "default-0.65", "joint-0.65", "per-flop-0.65", "round-8-0.65",
         "round-16-0.65", "absorb-0.65", "recalibrate-0.65", "default-0.8", "per-flop-0.8")


def commands(weights: Path) -> dict[str, str]:
    """Product of a command -> command, in order."""
    data = "--data bccd/data.yaml --imgsz 320 --batch-size 16"
    train = f"{data} --nbs 16 --adam --cache ram --workers 2 --noplots"
    made = {f"runs/train/{SOURCE}/gammas.npy":
            f"train_sparsity.py {RUNS[SOURCE]} --weights '{weights}' --epochs 40 {train} --name {SOURCE}"}
    for name, flags in CUTS.items():
        made[CUT.format(name)] = f"prune.py --weights {SPARSE.format(SOURCE)} {flags} {data} --noval --name {name}"
    for name in TUNED:
        made[f"runs/train/{name}/results.csv"] = (
            f"finetune_pruned.py --weights {CUT.format(name)} --epochs 20 {train} --name {name}")
    return made


def measure(folder: Path, made: dict[str, str]) -> list[Row]:
    """The sparse model's row, then a row per cut. The figure of a fine-tuning that is not done is empty."""
    files = {"sparse": SPARSE.format(SOURCE), **{name: CUT.format(name) for name in CUTS}}
    models = {name: checkpoint.load(folder / file) for name, file in files.items()}
    found = common.compare(models, folder / "bccd" / "data.yaml")
    rows = []
    for row in found:
        tuned = f"runs/train/{row['model']}/results.csv"
        done = tuned in made and common.is_done(folder / tuned, made[tuned])
        rows.append({"cut": row["model"], "map": row["map"],
                     "tuned": float(common.last_epoch(folder / tuned)[common.MAP_KEY]) if done else "",
                     **{key: row[key] / found[0][key] for key in ("parameters", "flops")},
                     **{key: row[key] for key in ("torch", "onnxruntime")}})
    return rows


def main() -> None:
    """Run what is missing, then measure."""
    parser = common.experiment_parser(__doc__, "sparsity")
    parser.add_argument("--cuts-only", action="store_true", help="start no fine-tuning; the table shows what is done")
    opt = parser.parse_args()
    common.need_onnxruntime()
    made = {**common.bccd_commands(opt.voc), **commands(opt.weights)}
    common.run_missing({product: command for product, command in made.items()
                        if not (opt.cuts_only and command.startswith("finetune"))}, opt.folder)
    rows = measure(opt.folder, made)
    write_csv(RESULTS / "pruning.csv", rows)
    print(text_table(*formatted(rows, PRUNING)))
    print(f"{torch.get_num_threads()} threads, batch 1")


if __name__ == "__main__":
    run_cli(main)
