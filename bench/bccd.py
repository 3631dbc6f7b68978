"""The whole pipeline on BCCD, 364 photographs of blood smears: dense, sparse, half of the channels cut, fine-tuned.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python bench/bccd.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt      # about 50 minutes on two cores

It compares three kinds of sparsity training: the L1 rule, with the --sr that did best on val, and --target-sparsity,
channel by channel and in blocks of 16 (its default). A run that is done is not run again. Writes
bench/results/bccd.csv and pictures of README.md in img/.
"""
from __future__ import annotations

import shutil
from argparse import Namespace

import numpy as np
from columns import ROOT, STAGES, Row, as_text, write_results
from common import BEST, CUT, SPARSE, TUNED, bccd_commands, experiment_parser, measure, run_missing, slimming_commands
from PIL import Image

from utils.errors import run_cli
from utils.plots.slimming import plot_gamma_history, plot_gammas, plot_stages

NAMES = ("l1", "target", "blocks")
FILES = {"dense": BEST.format("dense")}
for _name in NAMES:
    for _stage, _file in (("sparse", SPARSE), ("cut", CUT), ("tuned", TUNED)):
        FILES[f"{_name}-{_stage}"] = _file.format(_name)


def ways(opt: Namespace) -> dict[str, tuple[str, float]]:
    """Name of a run -> flags of train_sparsity.py, and --percent of prune.py."""
    return {"l1": (f"--st --sr {opt.sr}", opt.share),
            "target": (f"--target-sparsity {opt.share} --round-to 1", opt.share),
            "blocks": (f"--target-sparsity {opt.block_share}", opt.block_share)}


def commands(opt: Namespace) -> dict[str, str]:
    """Product of a command -> command, in order."""
    train = (f"--data bccd/data.yaml --imgsz 320 --epochs {opt.epochs} --batch-size 16 --nbs 16 --adam "
             "--cache ram --workers 2")
    start = f"--weights '{opt.weights}' {train}"
    made = bccd_commands(opt.voc)
    # train_sparsity.py --no-st is train.py that keeps the history of the gammas.
    made["runs/train/dense/gammas.npy"] = f"train_sparsity.py --no-st {start} --name dense"
    for name, (flags, percent) in ways(opt).items():
        made |= slimming_commands(name, f"{flags} {start}", f"--percent {percent}", train)
    return made


def pictures(rows: list[Row], opt: Namespace) -> None:
    """The pictures of README.md; `rows` are those of the val images."""
    img, train = ROOT / "img", opt.folder / "runs" / "train"
    titles = {"dense": "no penalty"}
    titles |= {name: flags.removeprefix("--st ") for name, (flags, _) in ways(opt).items()}
    history = {name: np.load(train / name / "gammas.npy", allow_pickle=False) for name in ("dense", "l1", "blocks")}
    plot_gamma_history({titles[name]: list(epochs) for name, epochs in history.items()}, img / "gamma_history.png")
    plot_gammas(history["blocks"][-1], img / "gammas.png", compare=history["dense"][-1],
                labels=(titles["blocks"], titles["dense"]),
                title=f"BatchNorm scales after {opt.epochs} epochs on BCCD")
    shown = [row for row in rows if row["stage"].startswith(("dense", "blocks"))]
    plot_stages([{**row, "stage": row["stage"].split("-")[-1]} for row in shown], img / "stages.png")
    shutil.copyfile(opt.folder / "runs/prune/blocks/channels.png", img / "channels.png")
    # A photograph is five times smaller as JPEG than as PNG.
    predictions = Image.open(opt.folder / "runs/val/blocks-tuned-test/val_batch0_pred.png")
    predictions.save(img / "detections.jpg", quality=80)


def main() -> None:
    """Run what is missing, then measure."""
    parser = experiment_parser(__doc__, "bccd")
    add = parser.add_argument
    add("--sr", type=float, default=0.01,
        help="strength of the L1 rule; of 0.01 and 0.1 this was better on val after fine-tuning")
    add("--share", type=float, default=0.5, help="share of the channels to take to 0 and to cut")
    add("--block-share", type=float, default=0.55, help="the same in blocks of 16: about as many FLOPs are left")
    add("--epochs", type=int, default=40, help="epochs per stage")
    opt = parser.parse_args()
    run_missing(commands(opt), opt.folder)
    found: dict[str, list[Row]] = {}
    for split in ("val", "test"):
        rows = measure(FILES, opt.folder, f"--data bccd/data.yaml --task {split} --batch-size 32", f"-{split}")
        found[split] = [{"sr": f"{opt.sr:g}", "split": split, **row} for row in rows]
    write_results("bccd", [*found["val"], *found["test"]])
    pictures(found["val"], opt)
    for split, rows in found.items():
        print(f"\n{split}\n{as_text(rows, STAGES)}")


if __name__ == "__main__":
    run_cli(main)
