"""Pipelines from yolov5n.pt to half of the FLOPs against dense training of as many epochs, on three data sets.

    python bench/equal.py --voc BCCD_Dataset/BCCD --aquarium aquarium --coco128 coco128 --weights yolov5n.pt  # two days

Every pipeline has the same number of epochs in all, its teacher's included. "narrow" is a narrower model from scratch,
"scratch" the shape that blocks-16 finds with seed 0 in as many epochs, from new weights. A run that is done is not run
again; --seeds, --sets, --budgets and --pipelines choose. Writes bench/results/equal.csv, a row per run, beside those
that it holds already: mAP50-95 on val of the last epoch, the mean of the last five epochs, the best; on test, of the
last epoch, where there are test images; and the FLOPs that are left.
"""
from __future__ import annotations

import csv
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import common
import torch
from columns import PIPELINES, ROOT, Row, publish
from common import CUT, MAP_KEY, SPARSE
from torch import nn

from models import checkpoint
from models.config import read_yaml
from models.pruning import model_pruner
from models.yolo import Model
from utils.data.config import read_data
from utils.errors import UserError, run_cli
from utils.files import write_yaml
from utils.slimming.cost import profile
from utils.text import read_yaml_mapping

SIZES = {"bccd": 320, "aquarium": 416, "coco128": 320}
BUDGETS = {"bccd": (30, 80), "aquarium": (30, 80), "coco128": (120,)}  # epochs in all
SHRINK_FLAGS = "--target flops=0.5 --shrink"
# Of prune.py, in the pipelines that have it.
PRUNE_FLAGS = {"three-commands": "--percent 0.5", "four-commands": "--target flops=0.5"}
SCRATCH = "scratch-{}-{}.pt"  # of a data set and a number of epochs


def stages(pipeline: str, epochs: int) -> list[tuple[str, int, str]]:
    """(script, epochs, flags) of a pipeline's trainings, in order; {before} is what the one before made."""
    third = epochs // 3
    return {"dense": [("train.py", epochs, "")],
            "blocks-8": [("train_sparsity.py", epochs, f"{SHRINK_FLAGS} --round-to 8")],
            "blocks-16": [("train_sparsity.py", epochs, f"{SHRINK_FLAGS} --round-to 16")],
            "flops-35": [("train_sparsity.py", epochs, "--target flops=0.35 --shrink --round-to 16")],
            "teacher": [("train.py", third, ""),
                        ("train_sparsity.py", epochs - third, f"{SHRINK_FLAGS} --round-to 16 --teacher {{before}}")],
            "four-commands": [("train.py", third, ""),
                              ("train_sparsity.py", third, "--target flops=0.5 --teacher {before}"),
                              ("finetune_pruned.py", epochs - 2 * third, "")],
            "three-commands": [("train_sparsity.py", epochs // 2, "--sr 0.0001"),
                               ("finetune_pruned.py", epochs - epochs // 2, "")],
            "narrow": [("train.py", epochs, "--cfg narrow.yaml")],
            "scratch": [("train.py", epochs, "")]}[pipeline]


def commands(data: str, pipeline: str, epochs: int, seed: int, weights: Path) -> dict[str, str]:
    """Product of a command -> command, in order. The last is the results.csv of the pipeline."""
    by_product, before = {}, {"narrow": "", "scratch": SCRATCH.format(data, epochs)}.get(pipeline, str(weights))
    parts = stages(pipeline, epochs)
    for number, (script, length, flags) in enumerate(parts, 1):
        name = run_name(data, pipeline, epochs, seed) + (f"-{number}" if number < len(parts) else "")
        if script == "finetune_pruned.py":
            by_product[CUT.format(name)] = f"prune.py --weights {before} {PRUNE_FLAGS[pipeline]} --noval --name {name}"
            before = CUT.format(name)
        by_product[f"runs/train/{name}/results.csv"] = (
            f"{script} --data {data}/data.yaml --imgsz {SIZES[data]} --weights '{before}' --epochs {length} --adam "
            f"--batch-size 16 --seed {seed} --cache ram --workers 2 --noplots {flags.format(before=before)} "
            f"--name {name}")
        before = SPARSE.format(name)
    return by_product


def run_name(data: str, pipeline: str, epochs: int, seed: int) -> str:
    """Name of the folder of a pipeline's last training."""
    return f"{data}-{pipeline}-{epochs}-{seed}"


def result_row(folder: Path, data: str, pipeline: str, epochs: int, seed: int) -> Row:
    """The row of a pipeline that is done."""
    name = run_name(data, pipeline, epochs, seed)
    with open(folder / "runs" / "train" / name / "results.csv", newline="", encoding="utf-8") as file:
        values = [float(row[MAP_KEY]) for row in csv.DictReader(file)]
    saved = checkpoint.read(folder / SPARSE.format(name))
    whole = profile(Model("yolov5n.yaml", nc=len(saved["names"])), SIZES[data]).flops
    pruner = model_pruner(checkpoint.build(saved), SIZES[data]).rank()
    flops = pruner.preview(pruner.ranking.leading_share(pruner.ranking.scores == 0))[2]
    yaml = folder / data / "data.yaml"
    test = common.map_on(checkpoint.build(saved), yaml, "test", SIZES[data]) if read_data(str(yaml)).test else ""
    return {"data": data, "epochs": epochs, "pipeline": pipeline, "seed": seed, "map": values[-1],
            "mean5": sum(values[-5:]) / len(values[-5:]), "best": max(values), "test": test, "flops": flops / whole}


def prepare_folder(opt: Namespace) -> None:
    """A data.yaml per set, and narrow.yaml, with half of the FLOPs, in the experiment's folder."""
    common.run_missing(common.bccd_commands(opt.voc), opt.folder)
    if opt.coco128:  # trained and validated on the same images, as is usual
        names = read_yaml_mapping(ROOT / "data" / "coco128.yaml", "data")["names"]
        write_yaml(opt.folder / "coco128" / "data.yaml",
                   {"path": str(opt.coco128), **dict.fromkeys(("train", "val"), "images/train2017"), "names": names})
    names = read_yaml_mapping(opt.aquarium / "data.yaml", "--aquarium")["names"]
    write_yaml(opt.folder / "aquarium" / "data.yaml",
               {"path": str(opt.aquarium), "train": "images/train", "val": "images/val", "test": "images/test",
                "names": names})
    whole = profile(Model("yolov5n.yaml", nc=len(names)), 320).flops
    write_yaml(opt.folder / "narrow.yaml", narrower_yaml(whole / 2, len(names)))


def narrower_yaml(flops: int | float, nc: int) -> dict[str, Any]:
    """yolov5n's yaml with the width whose FLOPs at 320 px are nearest to these, with `nc` classes."""
    stock = read_yaml("yolov5n.yaml")
    narrower = [{**stock, "width_multiple": width / 64} for width in range(4, 17)]
    return min(narrower, key=lambda cfg: abs(profile(Model(cfg, nc=nc), 320).flops - flops))


def prepare_scratch(folder: Path, data: str, epochs: int) -> None:
    """The start of "scratch", where it is not there yet: the shape of blocks-16's first run, with new weights."""
    sparse = folder / SPARSE.format(run_name(data, "blocks-16", epochs, 0))
    start = folder / SCRATCH.format(data, epochs)
    if not sparse.is_file():
        raise UserError(f"scratch takes the shape of {sparse}, which is not there; run blocks-16 with seed 0 first")
    if start.is_file():
        return
    torch.manual_seed(0)
    saved = checkpoint.read(sparse)
    fresh = checkpoint.build(saved)
    for module in fresh.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()
    fresh.detect.init_biases()
    checkpoint.save(start, fresh, imgsz=saved["imgsz"], data=saved["data"])


def main() -> None:
    """Run what is missing, then write the rows."""
    parser = common.experiment_parser(__doc__, "equal")
    add = parser.add_argument
    add("--aquarium", type=common.absolute, required=True, help="folder with data.yaml, images and labels")
    add("--coco128", type=common.absolute, help="folder with images and labels")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    add("--sets", nargs="+", choices=SIZES, help="data sets to run on (all that are given)")
    add("--budgets", type=int, nargs="+", help="epochs in all (30 and 80; coco128: 120)")
    add("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES), help="pipelines to run")
    opt = parser.parse_args()
    if "coco128" in (opt.sets or ()) and not opt.coco128:
        raise UserError("--sets coco128: needs --coco128, the folder with its images and labels")
    prepare_folder(opt)
    keys, rows = ("data", "epochs", "pipeline", "seed"), []
    for data in opt.sets or [name for name in SIZES if name != "coco128" or opt.coco128]:
        for epochs, pipeline, seed in product(opt.budgets or BUDGETS[data], opt.pipelines, opt.seeds):
            if pipeline == "scratch":
                prepare_scratch(opt.folder, data, epochs)
            common.run_missing(commands(data, pipeline, epochs, seed, opt.weights), opt.folder)
            rows.append(result_row(opt.folder, data, pipeline, epochs, seed))
    publish("equal", rows, *keys, order=lambda row: [row[key] for key in keys])


if __name__ == "__main__":
    run_cli(main)
