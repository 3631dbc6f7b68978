"""The whole road on BCCD, a set of 364 photographs of blood smears: dense, sparse, half of the channels cut, fine-tuned.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python bench/bccd.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt      # about 50 minutes on two cores

Three ways of becoming sparse are compared: the L1 rule, with the --sr that did best on val, and --target-sparsity, channel by channel and in
blocks of 16 (its default). A stage that is done is not run again. Writes bench/results/bccd.csv and the pictures in img/ that README.md shows.
"""
from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
from common import ROOT, measure, run, show, write_csv
from PIL import Image

from utils.errors import run_cli
from utils.options import HelpfulParser
from utils.plots.slimming import plot_gamma_history, plot_gammas, plot_stages


def ways(opt: Namespace) -> dict[str, tuple[str, float]]:
    """Name of a way to become sparse -> flags of train_sparsity.py, and --percent of prune.py."""
    return {"l1": (f"--st --sr {opt.sr}", opt.share), "target": (f"--target-sparsity {opt.share} --round-to 1", opt.share),
            "blocks": (f"--target-sparsity {opt.block_share}", opt.block_share)}


def steps(voc: Path, weights: Path, opt: Namespace) -> dict[str, str]:
    """Name of a finished run's file -> the command that makes it, in order."""
    train = f"--data bccd/data.yaml --imgsz 320 --epochs {opt.epochs} --batch-size 16 --nbs 16 --adam --cache ram --workers 2"
    start = f"--weights '{weights}'"
    commands = {
        "bccd/data.yaml": f"data/scripts/voc_to_yolo.py --voc '{voc}' --out bccd",
        # train.py with the gammas' history: --no-st switches sparsity off
        "runs/train/dense/gammas.npy": f"train_sparsity.py --no-st {start} {train} --name dense"}
    for name, (flags, percent) in ways(opt).items():
        commands[f"runs/train/{name}/gammas.npy"] = f"train_sparsity.py {flags} {start} {train} --name {name}"
        commands[f"runs/prune/{name}/pruned_model.pt"] = f"prune.py --weights runs/train/{name}/weights/last.pt --percent {percent} --name {name}"
        commands[f"runs/train/{name}-tuned/results.png"] = f"finetune_pruned.py --weights runs/prune/{name}/pruned_model.pt {train} --name {name}-tuned"
    return commands


STAGES = {"dense": "runs/train/dense/weights/best.pt",
          **{f"{name}-{stage}": path.format(name) for name in ("l1", "target", "blocks") for stage, path in (
              ("sparse", "runs/train/{}/weights/last.pt"), ("cut", "runs/prune/{}/pruned_model.pt"), ("tuned", "runs/train/{}-tuned/weights/best.pt"))}}


def pictures(folder: Path, rows: list[dict], opt: Namespace) -> None:
    """The README's pictures, from the runs in `folder`."""
    history = {name: np.load(folder / f"runs/train/{name}/gammas.npy", allow_pickle=False) for name in ("dense", "l1", "blocks")}
    titles = {"dense": "no penalty", **{name: flags.removeprefix("--st ") for name, (flags, _) in ways(opt).items()}}
    plot_gamma_history({titles[name]: list(epochs) for name, epochs in history.items()}, ROOT / "img" / "gamma_history.png")
    plot_gammas(history["blocks"][-1], ROOT / "img" / "gammas.png", compare=history["dense"][-1],
                labels=(titles["blocks"], titles["dense"]), title="BatchNorm scales after 40 epochs on BCCD")
    plot_stages([{**row, "stage": row["stage"].split("-")[-1]} for row in rows if row["stage"] == "dense" or row["stage"].startswith("blocks")],
                ROOT / "img" / "stages.png")
    shutil.copyfile(folder / "runs/prune/blocks/channels.png", ROOT / "img" / "channels.png")
    # Photographs: as JPEG a fifth of the PNG.
    Image.open(folder / "runs/val/blocks-tuned-test/val_batch0_pred.png").save(ROOT / "img" / "detections.jpg", quality=80)


def main() -> None:
    """Run what is missing, then measure."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--voc", required=True, help="folder of the data set, with Annotations and JPEGImages")
    parser.add_argument("--weights", required=True, help="the official yolov5n.pt")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "bccd"), help="where the runs are")
    parser.add_argument("--sr", type=float, default=0.01, help="strength of the L1 rule; of 0.01 and 0.1 this was better after fine-tuning, on val")
    parser.add_argument("--share", type=float, default=0.5, help="share of the channels to take to 0, and to cut")
    parser.add_argument("--block-share", type=float, default=0.55, help="the same in blocks of 16, so that as many FLOPs are left as with single channels")
    parser.add_argument("--epochs", type=int, default=40, help="epochs a stage")
    opt = parser.parse_args()
    folder = Path(opt.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for product, command in steps(Path(opt.voc).resolve(), Path(opt.weights).resolve(), opt).items():
        if not (folder / product).exists():
            run(f"{command} --exist-ok" if "--name" in command else command, folder)
    rows = []
    for split in ("val", "test"):
        for row in measure(STAGES, folder, f"--data bccd/data.yaml --task {split} --batch-size 32", f"-{split}"):
            rows.append({"sr": f"{opt.sr:g}", "split": split, **row})
    write_csv(ROOT / "bench" / "results" / "bccd.csv", rows)
    pictures(folder, [row for row in rows if row["split"] == "val"], opt)
    for split in ("val", "test"):
        print(f"\n{split}\n{show([row for row in rows if row['split'] == split])}")


if __name__ == "__main__":
    run_cli(main)
