"""The experiment on Pascal VOC 2007: 512 px, 100 epochs per stage, the L1 rule and --target-sparsity. For a GPU.

    tar xf VOCtrainval_06-Nov-2007.tar && tar xf VOCtest_06-Nov-2007.tar
    python bench/voc.py --voc VOCdevkit/VOC2007 --weights yolov5s.pt

It trains on trainval and measures on test, as is usual for VOC2007. A run that is done is not run again. Writes
runs/voc/table.csv.
"""
from __future__ import annotations

from argparse import Namespace

from columns import STAGE_COLUMNS, formatted
from common import cut_commands, experiment_parser, measure_stages, run_missing, sparse_command, stage_files

from utils.errors import run_cli
from utils.tables import text_table, write_csv


def commands(opt: Namespace, data: str) -> dict[str, str]:
    """Product of a command -> command, in order. data: flags that val.py takes as well."""
    train = f"{data} --epochs {opt.epochs} --batch-size {opt.batch_size} --adam"
    start, cut = f"--weights '{opt.weights}' {train}", f"--percent {opt.percent:g} --noval"
    convert = f"data/scripts/voc_to_yolo.py --voc '{opt.voc}' --out voc --splits {' '.join(opt.splits)}"
    by_product = {"voc/data.yaml": convert, "runs/train/dense/results.csv": f"train.py {start} --name dense"}
    for name, rule in (("l1", f"--st --sr {opt.sr:g}"), ("target", f"--target-sparsity {opt.percent:g}")):
        by_product |= {**sparse_command(name, f"{rule} {start}"), **cut_commands(name, name, cut, train)}
    return by_product


def main() -> None:
    """Run what is missing, then measure."""
    parser = experiment_parser(__doc__, "voc", weights="yolov5s.pt")
    add = parser.add_argument
    add("--splits", nargs="+", default=["trainval", "test"], help="lists to train and to measure on")
    add("--sr", type=float, default=0.001, help="strength of the L1 rule")
    add("--percent", type=float, default=0.5, help="share of the prunable channels to cut, and of the target")
    add("--epochs", type=int, default=100, help="epochs per stage")
    add("--imgsz", type=int, default=512, help="image size")
    add("--batch-size", type=int, default=16, help="images per batch")
    add("--device", default="", help="cpu, or the number of a GPU")
    opt = parser.parse_args()
    data = f"--data voc/data.yaml --imgsz {opt.imgsz}" + (f" --device {opt.device}" if opt.device else "")
    run_missing(commands(opt, data), opt.folder)
    rows = measure_stages(stage_files("l1", "target"), opt.folder, data)
    write_csv(opt.folder / "table.csv", rows)
    print("\n" + text_table(*formatted(rows, STAGE_COLUMNS)))


if __name__ == "__main__":
    run_cli(main)
