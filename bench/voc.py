"""The experiment on Pascal VOC 2007: 512 px, 100 epochs a stage, the L1 rule and --target-sparsity. Made for a GPU.

    tar xf VOCtrainval_06-Nov-2007.tar && tar xf VOCtest_06-Nov-2007.tar
    python bench/voc.py --voc VOCdevkit/VOC2007 --weights yolov5s.pt

A stage that is done is not run again. Trained on trainval, measured on test, as everybody does with VOC2007. Writes runs/voc/table.csv.
"""
from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from common import ROOT, measure, run, show, write_csv

from utils.errors import run_cli
from utils.options import HelpfulParser


def steps(voc: Path, weights: str, train: str, opt: Namespace) -> dict[str, str]:
    """Name of a finished run's file -> the command that makes it, in order."""
    commands = {"voc/data.yaml": f"data/scripts/voc_to_yolo.py --voc '{voc}' --out voc --splits {' '.join(opt.splits)}",
                "runs/train/dense/results.png": f"train.py --weights '{weights}' {train} --name dense"}
    for name, how in (("l1", f"--st --sr {opt.sr:g}"), ("target", f"--target-sparsity {opt.percent:g}")):
        commands[f"runs/train/{name}/gammas.npy"] = f"train_sparsity.py {how} --weights '{weights}' {train} --name {name}"
        commands[f"runs/prune/{name}/pruned_model.pt"] = f"prune.py --weights runs/train/{name}/weights/last.pt --percent {opt.percent:g} --noval --name {name}"
        commands[f"runs/train/{name}-tuned/results.png"] = f"finetune_pruned.py --weights runs/prune/{name}/pruned_model.pt {train} --name {name}-tuned"
    return commands


def main() -> None:
    """Run what is missing, then measure."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--voc", required=True, help="folder with Annotations, ImageSets and JPEGImages")
    parser.add_argument("--weights", default="yolov5s.pt", help="checkpoint to start from")
    parser.add_argument("--splits", nargs="+", default=["trainval", "test"], help="lists to train and to measure on")
    parser.add_argument("--sr", type=float, default=0.001, help="strength of the L1 rule")
    parser.add_argument("--percent", type=float, default=0.5, help="share of the prunable channels to cut, and of the target")
    parser.add_argument("--epochs", type=int, default=100, help="epochs a stage")
    parser.add_argument("--imgsz", type=int, default=512, help="image size")
    parser.add_argument("--batch-size", type=int, default=16, help="images a batch")
    parser.add_argument("--device", default="", help="cpu, or the number of a GPU")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "voc"), help="where the runs are")
    opt = parser.parse_args()
    folder = Path(opt.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    weights = str(Path(opt.weights).resolve()) if Path(opt.weights).is_file() else opt.weights
    device = f"--device {opt.device}" if opt.device else ""
    train = f"--data voc/data.yaml --imgsz {opt.imgsz} --epochs {opt.epochs} --batch-size {opt.batch_size} --adam --exist-ok {device}"
    for product, command in steps(Path(opt.voc).resolve(), weights, train, opt).items():
        if not (folder / product).exists():
            run(f"{command} --exist-ok" if command.startswith("prune") else command, folder)
    stages = {"dense": "runs/train/dense/weights/best.pt"}
    for name in ("l1", "target"):
        stages |= {f"{name} sparse": f"runs/train/{name}/weights/last.pt", f"{name} cut": f"runs/prune/{name}/pruned_model.pt",
                   f"{name} tuned": f"runs/train/{name}-tuned/weights/best.pt"}
    rows = measure({k.replace(" ", "-"): v for k, v in stages.items()}, folder, f"--data voc/data.yaml --imgsz {opt.imgsz} {device}")
    write_csv(folder / "table.csv", rows)
    print("\n" + show(rows))


if __name__ == "__main__":
    run_cli(main)
