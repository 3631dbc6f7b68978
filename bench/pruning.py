"""What each flag of prune.py does to one sparse model on BCCD: mAP after the cut and after fine-tuning, and speed.

    python bench/pruning.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt       # an hour, after bench/sparsity.py

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
from utils.slimming.cost import profile
from utils.tables import text_table, write_csv

SOURCE = "share0.5-seed0"
# Name of a run -> flags of prune.py, flags of finetune_pruned.py (None: it is not fine-tuned). At 50% only zeros go,
# and most flags make the same model.
CUTS = {"half": ("--percent 0.5", ""), "half-joint": ("--percent 0.5 --shortcuts joint", ""),
        "half-recalibrate": ("--percent 0.5 --recalibrate 128", None),
        "half-8": ("--percent 0.5 --round-to 8", ""), "half-16": ("--percent 0.5 --round-to 16", ""),
        "more": ("--percent 0.65", ""), "more-at-once": ("--percent 0.65", "--no-gradual --teacher none"),
        "more-gamma": ("--percent 0.65 --score gamma", ""), "more-joint": ("--percent 0.65 --shortcuts joint", ""),
        "more-per-flop": ("--percent 0.65 --per-flop", ""), "more-8": ("--percent 0.65 --round-to 8", ""),
        "more-16": ("--percent 0.65 --round-to 16", ""), "more-absorb": ("--percent 0.65 --absorb", None),
        "more-recalibrate": ("--percent 0.65 --recalibrate 128", None),
        "more-reconstruct": ("--percent 0.65 --reconstruct", "")}


def commands(weights: Path) -> dict[str, str]:
    """Product of a command -> command, in order."""
    data = "--data bccd/data.yaml --imgsz 320 --batch-size 16"
    train = f"{data} --nbs 16 --adam --cache ram --workers 2 --noplots"
    made = {f"runs/train/{SOURCE}/gammas.npy":
            f"train_sparsity.py {RUNS[SOURCE]} --weights '{weights}' --epochs 40 {train} --name {SOURCE}"}
    for name, (flags, _) in CUTS.items():
        made[CUT.format(name)] = f"prune.py --weights {SPARSE.format(SOURCE)} {flags} {data} --noval --name {name}"
    for name, (_, tune) in CUTS.items():
        if tune is not None:
            made[f"runs/train/{name}/results.csv"] = (
                f"finetune_pruned.py --weights {CUT.format(name)} --epochs 20 {train} {tune} --name {name}")
    return made


def measure(folder: Path, made: dict[str, str]) -> list[Row]:
    """The sparse model's row, then a row per cut. The figure of a fine-tuning that is not done is empty."""
    titles = {name: f"{cut}, then {tune}" if tune else cut for name, (cut, tune) in CUTS.items()}
    models = [checkpoint.load(folder / file) for file in (SPARSE.format(SOURCE), *map(CUT.format, CUTS))]
    rows: list[Row] = []
    for name, model, speed in zip(("none", *CUTS), models, common.times_faster(models)):
        cost, tuned = profile(model, 320), f"runs/train/{name}/results.csv"
        done = tuned in made and common.is_done(folder / tuned, made[tuned])
        rows.append({"cut": titles.get(name, name), "map": common.map_on(model, folder / "bccd" / "data.yaml"),
                     "tuned": float(common.last_epoch(folder / tuned)[common.MAP_KEY]) if done else "",
                     "parameters": cost.parameters, "flops": cost.flops, **speed})
    whole = {key: rows[0][key] for key in ("parameters", "flops")}
    return [{**row, **{key: row[key] / whole[key] for key in whole}} for row in rows]


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
