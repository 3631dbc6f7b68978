"""The experiments on BCCD, 364 photographs of blood smears: the stages, and what their flags cost and gain.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python bench/bccd.py stages --voc BCCD_Dataset/BCCD --weights yolov5n.pt      # about 50 minutes on two cores

stages: dense, sparse, half of the channels cut, fine-tuned, with three kinds of sparsity training: the L1 rule, and
--target-sparsity channel by channel and in blocks of 16, its default. Makes the pages' pictures in img/ as well.
sparsity: the L1 rule at several strengths, --target-sparsity at several shares and seeds; the last epoch, the model
right after cuts of 50% and 65%, and for some after fine-tuning; cost and speed without the zeros. Two hours in two
processes: --only shares the work. pruning: each flag of prune.py on one sparse model; an hour. absorb: what --absorb
gains where gammas are near 0 and shifts are not; ten minutes. A run that is done is not run again.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
from columns import ROOT, Row, publish
from common import CUT, MAP_KEY, SPARSE
from pictures import plot_shares, plot_stages, plot_two_gammas
from PIL import Image

from models import checkpoint
from models.pruning import model_pruner
from models.yolo import Model
from utils.errors import run_cli
from utils.plots.slimming import plot_gamma_history
from utils.slimming import Rules, masked, slim
from utils.slimming.cost import profile
from utils.slimming.ranking import MIN_SHARE

DATA = "--data bccd/data.yaml --imgsz 320"
TRAIN_FLAGS = f"{DATA} --batch-size 16 --nbs 16 --cache ram --workers 2"
# Share of zeros, --round-to, number of seeds, whether the zeros are cut and what is left is fine-tuned.
SHARES = ((0, 1, 3, False), (0.3, 1, 3, False), (0.5, 1, 3, True), (0.65, 1, 1, True), (0.8, 1, 1, False),
          (0.5, 16, 2, False), (0.55, 16, 3, True), (0.6, 16, 1, True))
SOURCE = "share0.5-seed0"  # what pruning cuts


class Experiment(NamedTuple):
    """sparse: name of a sparse model -> flags of train_sparsity.py.

    cuts: name of a cut -> name of its sparse model, flags of prune.py, flags of finetune_pruned.py (None: it is not
    fine-tuned). train, prune, tune: flags that all of them have.
    """
    sparse: dict[str, str]
    cuts: dict[str, tuple[str, str, str | None]]
    train: str
    prune: str = ""
    tune: str = ""


def share_name(share: float, block: int, seed: int) -> str:
    """Name of a run with --target-sparsity."""
    return f"share{share:g}{'' if block == 1 else f'-round{block}'}-seed{seed}"


# The rates are those of data/hyps, 0.001 with AdamW and 0.01 with SGD.
RUNS = {share_name(share, block, seed):
        (f"--target-sparsity {share} --round-to {block}" if share else "--no-st") + f" --adam --seed {seed}"
        for share, block, seeds, _ in SHARES for seed in range(seeds)}
RUNS |= {f"{name}-sr{sr:g}-seed0": f"--sr {sr} {flag} --seed 0"
         for name, flag in (("AdamW", "--adam"), ("SGD", "--optimizer SGD")) for sr in (1e-4, 1e-2, 3e-2, 1e-1)}
TUNED = {share_name(share, block, seed): share
         for share, block, seeds, tuned in SHARES if tuned for seed in range(seeds)}
# Of pruning. At 50% only zeros go, and most flags make the same model.
CUTS: dict[str, tuple[str, str | None]] = {
    "half": ("--percent 0.5", ""), "half-joint": ("--percent 0.5 --shortcuts joint", ""),
    "half-recalibrate": ("--percent 0.5 --recalibrate 128", None),
    "half-8": ("--percent 0.5 --round-to 8", ""), "half-16": ("--percent 0.5 --round-to 16", ""),
    "more": ("--percent 0.65", ""), "more-at-once": ("--percent 0.65", "--no-gradual --teacher none"),
    "more-gamma": ("--percent 0.65 --score gamma", ""), "more-joint": ("--percent 0.65 --shortcuts joint", ""),
    "more-per-flop": ("--percent 0.65 --per-flop", ""), "more-8": ("--percent 0.65 --round-to 8", ""),
    "more-16": ("--percent 0.65 --round-to 16", ""), "more-absorb": ("--percent 0.65 --absorb", None),
    "more-recalibrate": ("--percent 0.65 --recalibrate 128", None),
    "more-reconstruct": ("--percent 0.65 --reconstruct", "")}

EXPERIMENTS = {
    "stages": Experiment(  # the dense run is train.py's, with the history of the gammas
        {"dense": "--no-st", "l1": "--st --sr 0.01", "target": "--target-sparsity 0.5 --round-to 1",
         "blocks": "--target-sparsity 0.55"},  # in blocks of 16 as many FLOPs are left with 0.55 as without with 0.5
        {"l1": ("l1", "--percent 0.5", ""), "target": ("target", "--percent 0.5", ""),
         "blocks": ("blocks", "--percent 0.55", "")},
        train=f"{TRAIN_FLAGS} --adam --epochs 40", tune=f"{TRAIN_FLAGS} --adam --epochs 40"),
    "sparsity": Experiment(
        RUNS, {name: (name, f"--percent {share}", "") for name, share in TUNED.items()},
        train=f"{TRAIN_FLAGS} --noplots --epochs 40", prune="--score gamma --noval",
        tune=f"{TRAIN_FLAGS} --noplots --epochs 40 --adam --teacher none --no-gradual"),
    "pruning": Experiment(
        {SOURCE: RUNS[SOURCE]}, {name: (SOURCE, *flags) for name, flags in CUTS.items()},
        train=f"{TRAIN_FLAGS} --noplots --epochs 40", prune=f"{DATA} --batch-size 16 --noval",
        tune=f"{TRAIN_FLAGS} --noplots --epochs 20 --adam"),
    "absorb": Experiment(
        {"sgd-sr0.1-bias0": "--sr 0.1 --sr-bias 0 --optimizer SGD"},
        {f"absorb-{share}": ("sgd-sr0.1-bias0", f"--percent {share}", None) for share in (0.3, 0.5, 0.65, 0.8)},
        train=f"{TRAIN_FLAGS} --noplots --epochs 40", prune=f"{DATA} --score gamma --absorb")}


def commands(plan: Experiment, weights: Path) -> list[dict[str, str]]:
    """For each sparse model of an experiment: product of a command -> command, in order."""
    chains = {name: common.sparse_command(name, f"{flags} --weights '{weights}' {plan.train}")
              for name, flags in plan.sparse.items()}
    for name, (sparse, cut, tune) in plan.cuts.items():
        chains[sparse] |= common.cut_commands(sparse, name, f"{cut} {plan.prune}",
                                              None if tune is None else f"{tune} {plan.tune}")
    return list(chains.values())


def stages(folder: Path) -> None:
    """Table and pictures of the stages: the best epoch of the dense and the fine-tuned models, by val.py."""
    rows = []
    for split in ("val", "test"):
        flags = f"--data bccd/data.yaml --task {split} --batch-size 32"
        measurements = common.measure_stages(common.stage_files("l1", "target", "blocks"), folder, flags, f"-{split}")
        rows += [{"sr": "0.01", "split": split, **row} for row in measurements]
    publish("bccd", rows)
    img, runs = ROOT / "img", folder / "runs"
    dense, l1, blocks = (np.load(runs / "train" / name / "gammas.npy", allow_pickle=False)
                         for name in ("dense", "l1", "blocks"))
    plot_gamma_history({"no penalty": list(dense), "--sr 0.01": list(l1), "--target-sparsity 0.55": list(blocks)},
                       img / "gamma_history.png")
    plot_two_gammas({"--target-sparsity 0.55": blocks[-1], "no penalty": dense[-1]},
                    "BatchNorm scales after 40 epochs on BCCD", img / "gammas.png")
    plot_stages([{**row, "stage": row["stage"].split("-")[-1]} for row in rows
                 if row["split"] == "val" and row["stage"].startswith(("dense", "blocks"))], img / "stages.png")
    shutil.copyfile(runs / "prune/blocks/channels.png", img / "channels.png")
    photographs = Image.open(runs / "val/blocks-tuned-test/val_batch0_pred.jpg")
    photographs.save(img / "detections.jpg", quality=80)


def tuned_map(folder: Path, cut: str) -> float:
    """mAP50-95 on val of the last epoch of a fine-tuning."""
    return float(common.last_epoch(folder / f"runs/train/{cut}-tuned/results.csv")[MAP_KEY])


def sparsity_row(folder: Path, name: str) -> tuple[Row, Model]:
    """The row of a run, without its speed, and the model without its zeros."""
    last = common.last_epoch(folder / f"runs/train/{name}/results.csv")
    saved = checkpoint.read(folder / SPARSE.format(name))
    pruner = model_pruner(checkpoint.build(saved), saved["imgsz"])
    zero = float(last["sparsity/zero"])
    zeros, parameters, flops = pruner.rank().preview(zero)
    all_parameters, all_flops = pruner.costs.remaining()
    round_to = {**saved["opt"], **saved.get("sparsity", {})}.get("round_to") or 1
    pruner.rank(rules=Rules(min_share=MIN_SHARE, round_to=round_to))
    cuts = {share: masked(pruner.model, pruner.preview(share)[0]) for share in (0.5, 0.65)}
    run, seed = name.rsplit("-seed", 1)
    row = {"run": run, "seed": int(seed), "share": saved["opt"]["target_sparsity"] or 0.0, "round_to": round_to,
           "zero": zero, "below_0.1": float(last["sparsity/below_1e-1"]),
           "map50": float(last["metrics/mAP_0.5"]), "map": float(last[MAP_KEY]),
           **{f"cut_{share:g}": common.map_on(cut, folder / "bccd/data.yaml") for share, cut in cuts.items()},
           "tuned": tuned_map(folder, name) if name in TUNED else "",
           "parameters": parameters / all_parameters, "flops": flops / all_flops, "torch": "", "onnxruntime": ""}
    return row, slim(pruner.model, zeros)


def sparsity(folder: Path) -> None:
    """A row per run, and the picture. The first run of each share is timed."""
    pairs = [sparsity_row(folder, name) for name in RUNS]
    timed = [(row, model) for row, model in pairs if row["run"].startswith("share") and row["seed"] == 0]
    for (row, _), speed in zip(timed, common.times_faster([model for _, model in timed])):
        row |= speed
    rows = [row for row, _ in pairs]
    publish("sparsity", rows)
    plot_shares([row for row in rows if row["run"].startswith("share")], ROOT / "img" / "sparsity.png")


def pruning(folder: Path) -> None:
    """The sparse model's row, then a row per cut."""
    models = [checkpoint.load(folder / file) for file in (SPARSE.format(SOURCE), *map(CUT.format, CUTS))]
    whole, rows = profile(models[0], 320), []
    for (name, (cut, tune)), model, speed in zip({"": ("none", None), **CUTS}.items(), models,
                                                 common.times_faster(models)):
        cost = profile(model, 320)
        rows.append({"cut": f"{cut}, then {tune}" if tune else cut,
                     "map": common.map_on(model, folder / "bccd/data.yaml"),
                     "tuned": "" if tune is None else tuned_map(folder, name),
                     "parameters": cost.parameters / whole.parameters, "flops": cost.flops / whole.flops, **speed})
    publish("pruning", rows)


def absorb(folder: Path) -> None:
    """A row per share: mAP50-95 before the cut, after it, and with what the cut channels sent on average."""
    rows = []
    for name in EXPERIMENTS["absorb"].cuts:
        report = json.loads((folder / f"runs/prune/{name}/report.json").read_text(encoding="utf-8"))
        maps = {row["stage"]: row["mAP50-95"] for row in report["stages"]}
        rows.append({"share": float(name.removeprefix("absorb-")), "threshold": report["threshold"],
                     **{stage: maps[stage] for stage in ("before", "slim", "absorbed")}})
    publish("absorb", rows)


def main() -> None:
    """Run what is missing, then measure."""
    parser = common.experiment_parser(__doc__, "bccd")
    parser.add_argument("experiment", choices=EXPERIMENTS, help="what to make")
    parser.add_argument("--only", type=int, nargs="+", help="make these of its sparse models (numbers), and no table")
    opt = parser.parse_args()
    if opt.experiment in ("sparsity", "pruning"):
        common.need_onnxruntime()
    common.run_missing(common.bccd_commands(opt.voc), opt.folder)
    for number, chain in enumerate(commands(EXPERIMENTS[opt.experiment], opt.weights)):
        if not opt.only or number in opt.only:
            common.run_missing(chain, opt.folder)
    if not opt.only:
        {"stages": stages, "sparsity": sparsity, "pruning": pruning, "absorb": absorb}[opt.experiment](opt.folder)


if __name__ == "__main__":
    run_cli(main)
