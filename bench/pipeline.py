"""The whole pipeline against its alternatives: the slim shape from scratch, a narrower stock model, the L1 rule.

    python bench/pipeline.py --voc BCCD_Dataset/BCCD --coco128 coco128 --weights yolov5n.pt    # after bench/bccd.py

It takes two hours on two cores. What is trained from scratch gets as many epochs as sparsity training and fine-tuning
have together. A run that is done is not run again. Writes bench/results/pipeline.csv, a row per model on BCCD or
coco128, and img/pipeline.png, mAP50-95 on val against FLOPs.
"""
from __future__ import annotations

from pathlib import Path

import common
from columns import PIPELINE, RESULTS, ROOT, Row, formatted
from common import BEST, CUT, SPARSE

from models import checkpoint
from utils.errors import run_cli
from utils.files import write_yaml
from utils.plots.style import BLUE, GREY, ORANGE, SKY, VERMILION, new_chart, save_figure
from utils.slimming.cost import profile
from utils.tables import text_table, write_csv

CHANNELS, BLOCKS, L1, SCRATCH = "50%, one by one", "55%, in blocks of 16", "50%, L1 rule", "its shape from scratch"
# Name of a run on coco128 -> title, flags, epochs of sparsity training. Fine-tuning takes 40, as the dense stage does.
COCO = {"coco-target": ("coco128, 50%, one by one", "--target-sparsity 0.5 --round-to 1", 40),
        "coco-less": ("coco128, 30%, in blocks of 16", "--target-sparsity 0.3", 40),
        "coco-long": ("coco128, 50%, in blocks of 16, 120 epochs", "--target-sparsity 0.5", 120)}


def stages(title: str, name: str) -> dict[str, str]:
    """Title of a row -> checkpoint, for the stages of a run."""
    files = {"sparse": SPARSE.format(name), "cut": CUT.format(name), "fine-tuned": BEST.format(f"{name}-tuned")}
    return {f"{title}: {stage}": file for stage, file in files.items()}


def rows() -> dict[str, dict[str, str]]:
    """Data set -> title of a row -> checkpoint. A data set's first row is what its others are compared with."""
    bccd = {"dense": BEST.format("dense")}
    for title, name in ((BLOCKS, "blocks"), (CHANNELS, "target")):
        bccd |= {**stages(title, name), f"{title}: {SCRATCH}": BEST.format(f"scratch-{name}")}
    bccd |= {"narrower stock from scratch": BEST.format("narrow"), **stages(L1, "l1")}
    del bccd[f"{L1}: sparse"]
    coco = {"coco128, dense": BEST.format("coco-dense")}
    for name, (title, _, _) in COCO.items():
        coco |= stages(title, name)
    return {"bccd": bccd, "coco128": coco}


def commands(weights: Path) -> dict[str, str]:
    """Product of a command -> command, in order; what bench/bccd.py makes is there already."""
    train = "--imgsz 320 --batch-size 16 --nbs 16 --adam --cache ram --workers 2 --noplots"
    bccd, coco = f"--data bccd/data.yaml {train} --epochs 80", f"--data coco128/data.yaml {train} --epochs"
    made = {f"runs/train/scratch-{name}/results.csv":
            f"finetune_pruned.py --weights scratch-{name}.pt {bccd} --name scratch-{name}"
            for name in ("target", "blocks")}
    made["runs/train/narrow/results.csv"] = f"train.py --weights '' --cfg narrow.yaml {bccd} --name narrow"
    made["runs/train/coco-dense/results.csv"] = f"train.py --weights '{weights}' {coco} 40 --name coco-dense"
    for name, (_, flags, epochs) in COCO.items():
        made |= common.slimming_commands(name, f"{flags} --weights '{weights}' {coco} {epochs}",
                                         f"--percent {flags.split()[1]} --noval", f"{coco} 40")
    return made


def prepare(folder: Path, coco128: Path) -> None:
    """Write scratch-*.pt (slim shapes with new weights), narrow.yaml (with as many FLOPs) and coco128/data.yaml."""
    for name in ("target", "blocks"):
        fresh = common.save_with_new_weights(folder / CUT.format(name), folder / f"scratch-{name}.pt")
    write_yaml(folder / "narrow.yaml", common.narrower_yaml(profile(fresh, 320).flops, len(fresh.names)))
    common.write_coco128(folder, coco128)


def picture(found: list[Row], path: Path) -> None:
    """mAP50-95 against FLOPs on BCCD; behind a label, the speed in onnxruntime of the last model of its line."""
    channels, blocks, l1 = (["dense", f"{way}: cut", f"{way}: fine-tuned"] for way in (CHANNELS, BLOCKS, L1))
    shapes = [f"{CHANNELS}: {SCRATCH}", f"{BLOCKS}: {SCRATCH}"]
    lines = (("--target-sparsity 0.5 --round-to 1: dense, cut, fine-tuned", channels, SKY, "-"),
             ("--target-sparsity 0.55: dense, cut, fine-tuned", blocks, BLUE, "-"),
             ("the L1 rule: dense, cut, fine-tuned", l1, VERMILION, "--"),
             ("slim shapes from scratch", shapes, ORANGE, "None"),
             ("narrower stock from scratch", ["narrower stock from scratch"], GREY, "None"))
    by_title = {row["model"]: row for row in found}
    figure, ax = new_chart(7.5, 4.3, "BCCD, yolov5n at 320 px: what half of the FLOPs cost (and speed in onnxruntime)",
                           "GFLOPs", "mAP50-95 on val")
    for label, titles, colour, style in lines:
        points = [by_title[title] for title in titles]
        if titles != shapes:  # they are as fast as the slim models
            label += f" ({points[-1]['onnxruntime']:.2f}x)"
        ax.plot([p["flops"] / 1e9 for p in points], [p["map"] for p in points], color=colour, linestyle=style,
                marker="o", markersize=6, label=label)
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def main() -> None:
    """Run what is missing, then measure."""
    parser = common.experiment_parser(__doc__, "bccd")
    parser.add_argument("--coco128", type=common.absolute, required=True, help="folder with images and labels")
    opt = parser.parse_args()
    common.need_onnxruntime()
    if not all((opt.folder / BEST.format(f"{name}-tuned")).is_file() for name in ("l1", "target", "blocks")):
        common.run(f"bench/bccd.py --voc '{opt.voc}' --weights '{opt.weights}' --folder '{opt.folder}'", ROOT)
    prepare(opt.folder, opt.coco128)
    common.run_missing(commands(opt.weights), opt.folder)
    found: list[Row] = []
    for data, files in rows().items():
        models = {title: checkpoint.load(opt.folder / file) for title, file in files.items()}
        here = common.compare(models, opt.folder / data / "data.yaml")
        found += [{**row, "flops_share": row["flops"] / here[0]["flops"]} for row in here]
    write_csv(RESULTS / "pipeline.csv", found)
    picture(found, ROOT / "img" / "pipeline.png")
    print(text_table(*formatted(found, PIPELINE)))


if __name__ == "__main__":
    run_cli(main)
