"""The whole pipeline on BCCD, 364 photographs of blood smears: dense, sparse, half of the channels cut, fine-tuned.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python bench/bccd.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt      # about 50 minutes on two cores

Three kinds of sparsity training are compared: the L1 rule, and --target-sparsity channel by channel and in blocks of 16
(its default). A run that is done is not run again. Writes bench/results/bccd.csv and the pages' pictures in img/.
"""
from __future__ import annotations

import shutil
from argparse import Namespace

import numpy as np
from columns import RESULTS, ROOT, STAGES, Row, formatted
from common import bccd_commands, experiment_parser, measure, run_missing, slimming_commands, stage_files
from PIL import Image

from utils.errors import run_cli
from utils.plots.slimming import plot_gamma_history, plot_gammas, plot_stages
from utils.tables import text_table, write_csv


def ways(opt: Namespace) -> dict[str, tuple[str, float]]:
    """Name of a run -> flags of train_sparsity.py, and --percent of prune.py."""
    return {"l1": (f"--st --sr {opt.sr}", opt.share),
            "target": (f"--target-sparsity {opt.share} --round-to 1", opt.share),
            "blocks": (f"--target-sparsity {opt.block_share}", opt.block_share)}


def commands(opt: Namespace) -> dict[str, str]:
    """Product of a command -> command, in order. The dense run is train.py's, with the history of the gammas."""
    train = (f"--data bccd/data.yaml --imgsz 320 --epochs {opt.epochs} --batch-size 16 --nbs 16 --adam "
             "--cache ram --workers 2")
    start = f"--weights '{opt.weights}' {train}"
    made = {**bccd_commands(opt.voc), "runs/train/dense/gammas.npy": f"train_sparsity.py --no-st {start} --name dense"}
    for name, (flags, percent) in ways(opt).items():
        made |= slimming_commands(name, f"{flags} {start}", f"--percent {percent}", train)
    return made


def pictures(rows: list[Row], opt: Namespace) -> None:
    """The pictures of the pages; `rows` are those of the val images."""
    img, runs = ROOT / "img", opt.folder / "runs"
    titles = {"dense": "no penalty", **{name: flags.removeprefix("--st ") for name, (flags, _) in ways(opt).items()}}
    gammas = {name: np.load(runs / "train" / name / "gammas.npy", allow_pickle=False)
              for name in ("dense", "l1", "blocks")}
    plot_gamma_history({titles[name]: list(epochs) for name, epochs in gammas.items()}, img / "gamma_history.png")
    plot_gammas(gammas["blocks"][-1], img / "gammas.png", compare=gammas["dense"][-1],
                labels=(titles["blocks"], titles["dense"]), title=f"BatchNorm scales after {opt.epochs} epochs on BCCD")
    shown = [row for row in rows if row["stage"].startswith(("dense", "blocks"))]
    plot_stages([{**row, "stage": row["stage"].split("-")[-1]} for row in shown], img / "stages.png")
    shutil.copyfile(runs / "prune/blocks/channels.png", img / "channels.png")
    photographs = Image.open(runs / "val/blocks-tuned-test/val_batch0_pred.jpg")
    photographs.save(img / "detections.jpg", quality=80)


def main() -> None:
    """Run what is missing, then measure."""
    parser = experiment_parser(__doc__, "bccd")
    add = parser.add_argument
    add("--sr", type=float, default=0.01, help="strength of the L1 rule; the better of 0.01 and 0.1, on val")
    add("--share", type=float, default=0.5, help="share of the channels to take to 0 and to cut")
    add("--block-share", type=float, default=0.55, help="the same in blocks of 16: as many FLOPs are left")
    add("--epochs", type=int, default=40, help="epochs per stage")
    opt = parser.parse_args()
    run_missing(commands(opt), opt.folder)
    rows = []
    for split in ("val", "test"):
        flags = f"--data bccd/data.yaml --task {split} --batch-size 32"
        found = measure(stage_files(*ways(opt)), opt.folder, flags, f"-{split}")
        rows += [{"sr": f"{opt.sr:g}", "split": split, **row} for row in found]
    write_csv(RESULTS / "bccd.csv", rows)
    pictures([row for row in rows if row["split"] == "val"], opt)
    for split in ("val", "test"):
        print(f"\n{split}\n{text_table(*formatted([row for row in rows if row['split'] == split], STAGES))}")


if __name__ == "__main__":
    run_cli(main)
