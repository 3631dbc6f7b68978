"""The picture at the top of the README: accuracy against milliseconds of four kinds of models in OpenVINO.

    python bench/front.py --folder runs/equal --epochs 80          # after bench/equal.py; three minutes on two cores

Dense, slim, a narrower model from scratch, and what the three commands of the L1 rule make, each of as many epochs;
fp32 and int8, one image at a time on two threads. The models are those of one seed. Writes bench/results/front.csv and
img/front.png.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import common
from columns import DEVICE, RESULTS, ROOT, Row, formatted, read_results
from equal import SIZES, run_name

import benchmarks
from utils.errors import UserError, run_cli
from utils.files import copy_file
from utils.options import HelpfulParser
from utils.plots.style import BLUE, GREY, INK, ORANGE, VERMILION, new_chart, save_figure
from utils.tables import text_table

# Pipeline of bench/equal.py -> title of its model, colour.
MODELS = {"dense": ("dense", GREY), "blocks-16": ("slim", BLUE), "narrow": ("narrower, from scratch", ORANGE),
          "three-commands": ("L1 rule", VERMILION)}


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other one beats in both accuracy and time, from the fastest on."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: row["ms"]):
        if not best or row["mAP50-95"] > best[-1]["mAP50-95"]:
            best.append(row)
    return best


def picture(rows: Sequence[Row], title: str, path: Path) -> None:
    """mAP50-95 (y) against ms (x): a labelled point per model and precision, a line through the best ones."""
    figure, ax = new_chart(7.5, 4.3, title, "ms an image", "mAP50-95 on val")
    best = frontier(rows)
    ax.plot([row["ms"] for row in best], [row["mAP50-95"] for row in best], color=INK, linewidth=1, alpha=0.4)
    colours = dict(MODELS.values())
    for row in rows:
        place = row["ms"], row["mAP50-95"]
        ax.plot(*place, color=colours[row["model"]], marker="o", markersize=10, linestyle="")
        text = row["model"] + (" int8" if row["precision"] == "int8" else "")
        ax.annotate(text, place, xytext=(9, -4), textcoords="offset points", fontsize=11, color=INK)
    ax.set_xlim(0, 1.3 * max(row["ms"] for row in rows))
    save_figure(figure, path)


def main() -> None:
    """Measure, write the csv, draw."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--folder", type=common.absolute, default=ROOT / "runs" / "equal", help="the folder of bench/equal.py")
    add("--data", choices=SIZES, default="bccd", help="data set")
    add("--epochs", type=int, default=80, help="epochs in all")
    add("--seed", type=int, default=0, help="seed of the runs")
    opt = parser.parse_args()
    files = []
    for pipeline, (title, _) in MODELS.items():
        files.append(opt.folder / "front" / f"{title}.pt")
        files[-1].parent.mkdir(exist_ok=True)
        copy_file(opt.folder / common.SPARSE.format(run_name(opt.data, pipeline, opt.epochs, opt.seed)), files[-1])
    made = benchmarks.main(["--weights", *map(str, files), "--data", str(opt.folder / opt.data / "data.yaml"),
                            "--imgsz", str(SIZES[opt.data]), "--include", "openvino", "--precisions", "fp32", "int8",
                            "--threads", "2", "--noplots", "--project", str(opt.folder / "front")])
    copy_file(made / "benchmarks.csv", RESULTS / "front.csv")
    rows = read_results("front")
    if failed := [row["reason"] for row in rows if row["ms"] == "" or row["mAP50-95"] == ""]:
        raise UserError(f"{made}: not all could be measured, the first: {failed[0]}")
    picture(rows, f"{opt.data.upper()}, yolov5n at {SIZES[opt.data]} px, {opt.epochs} epochs in all; OpenVINO, "
            "2 threads", ROOT / "img" / "front.png")
    print(text_table(*formatted(rows, DEVICE)))


if __name__ == "__main__":
    run_cli(main)
