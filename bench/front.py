"""The picture at the top of the README: accuracy against milliseconds of four kinds of models in OpenVINO.

    python bench/front.py --folder runs/equal          # after bench/equal.py; three minutes on two cores

Dense, slim, a narrower model from scratch, and what L1 training, prune.py and finetune_pruned.py make with their
defaults, each of 80 epochs on BCCD; fp32 and int8, one image at a time on two threads. A figure is the mean over the
seeds that are there. Writes bench/results/front.csv and img/front.png.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import common
from columns import ROOT, Row, grouped, publish, read_table
from equal import run_name

import benchmarks
from utils.errors import UserError, run_cli
from utils.files import copy_file
from utils.parser import HelpfulParser
from utils.plots.style import BLUE, GREY, INK, ORANGE, VERMILION, new_chart, save_figure

# Pipeline of bench/equal.py -> title of its model, colour, points from a mark up to its label.
MODELS = {"dense": ("dense", GREY, -20), "blocks-16": ("slim", BLUE, 11), "narrow": ("narrower", ORANGE, 11),
          "three-commands": ("L1 training", VERMILION, -20)}


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
    styles = {title: style for title, *style in MODELS.values()}
    for row in rows:
        place, (colour, up) = (row["ms"], row["mAP50-95"]), styles[row["model"]]
        ax.plot(*place, color=colour, marker="o", markersize=10, linestyle="")
        text = row["model"] + (" int8" if row["precision"] == "int8" else "")
        ax.annotate(text, place, xytext=(0, up), textcoords="offset points", ha="center", fontsize=11, color=INK)
    ax.set_xlim(0, 1.15 * max(row["ms"] for row in rows))
    ax.margins(y=0.15)
    save_figure(figure, path)


def averages(measured: Sequence[Row], titles: dict[str, str]) -> list[Row]:
    """Rows of benchmarks.csv -> a row per title and precision, in order. titles: a model's name -> its title."""
    named = [{**row, "model": titles[row["model"]]} for row in measured]
    means = [{**rows[0], **{key: fmean(row[key] for row in rows) for key in ("MB", "mAP50-95", "ms")},
              "runs": len(rows)} for rows in grouped(named, "model", "precision").values()]
    return [{**row, "faster": means[0]["ms"] / row["ms"]} for row in means]


def main() -> None:
    """Measure, write the csv, draw."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--folder", type=common.absolute, default=ROOT / "runs" / "equal", help="of equal.py")
    opt = parser.parse_args()
    titles = {}  # a model's file -> its title
    for pipeline, (title, *_) in MODELS.items():
        for seed in range(3):
            trained = opt.folder / common.SPARSE.format(run_name("bccd", pipeline, 80, seed))
            if trained.is_file():
                file = opt.folder / "front" / f"{pipeline}-{seed}.pt"
                file.parent.mkdir(exist_ok=True)
                copy_file(trained, file)
                titles[file] = title
        if title not in titles.values():
            raise UserError(f"--folder {opt.folder}: has no run of {pipeline}; bench/equal.py makes it")
    folder = benchmarks.main(["--weights", *map(str, titles), "--data", str(opt.folder / "bccd" / "data.yaml"),
                              "--imgsz", "320", "--include", "openvino", "--precisions", "fp32", "int8",
                              "--threads", "2", "--noplots", "--project", str(opt.folder / "front")])
    rows = read_table(str(folder / "benchmarks"))
    if failed := [row["reason"] for row in rows if row["ms"] == "" or row["mAP50-95"] == ""]:
        raise UserError(f"{folder}: not all could be measured, the first: {failed[0]}")
    rows = averages(rows, {file.stem: title for file, title in titles.items()})
    publish("front", rows)
    picture(rows, "BCCD, yolov5n at 320 px, 80 epochs in all; OpenVINO, 2 threads", ROOT / "img" / "front.png")


if __name__ == "__main__":
    run_cli(main)
