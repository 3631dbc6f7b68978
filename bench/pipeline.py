"""The whole road, against its alternatives: the slim shape from scratch, a narrower stock model of the same FLOPs, the L1 rule; BCCD and coco128.

    python bench/road.py --voc BCCD_Dataset/BCCD --coco128 coco128 --weights yolov5n.pt    # two hours on two cores, after bench/bccd.py

What is trained from scratch gets as many epochs as the road had after its dense stage. A run that is done is not run again. Writes
bench/results/road.csv and img/road.png: mAP50-95 on val against FLOPs.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from common import ROOT, is_done, map_on_val, need_onnxruntime, run, speeds, write_csv
from torch import nn

from models import checkpoint
from models.yolo import Model, read_yaml
from utils.errors import run_cli
from utils.options import HelpfulParser
from utils.slimming.cost import profile
from utils.plots.style import BLUE, GREY, ORANGE, SKY, VERMILION, dress, new_figure, save
from utils.slimming.report import table
from utils.slimming.surgery import resize_like

TRAIN = "--imgsz 320 --batch-size 16 --nbs 16 --adam --cache ram --workers 2 --noplots --exist-ok"
STAGES = {"sparse": "runs/train/{}/weights/last.pt", "cut": "runs/prune/{}/pruned_model.pt", "fine-tuned": "runs/train/{}-tuned/weights/best.pt",
          "its shape from scratch": "runs/train/scratch-{}/weights/best.pt"}


def rows_of(data: str, prefix: str, name: str, stages: tuple[str, ...] = ("sparse", "cut", "fine-tuned")) -> dict[str, tuple[str, str]]:
    """Row of the table -> (data set, checkpoint) of a model that went through these stages."""
    return {f"{prefix}: {stage}": (data, STAGES[stage].format(name)) for stage in stages}


CHANNELS, BLOCKS, L1 = "50%, one by one", "55%, in blocks of 16", "50%, L1 rule"
# Name of a run on coco128 -> title, flags, epochs of sparsity training. Fine-tuning takes 40, as the dense stage does.
COCO = {"coco-target": ("coco128, 50%, one by one", "--target-sparsity 0.5 --round-to 1", 40),
        "coco-less": ("coco128, 30%, in blocks of 16", "--target-sparsity 0.3", 40),
        "coco-long": ("coco128, 50%, in blocks of 16, 120 epochs", "--target-sparsity 0.5", 120)}
ROWS = {"dense": ("bccd", "runs/train/dense/weights/best.pt"), **rows_of("bccd", BLOCKS, "blocks", tuple(STAGES)),
        **rows_of("bccd", CHANNELS, "target", tuple(STAGES)), "narrower stock from scratch": ("bccd", "runs/train/narrow/weights/best.pt"),
        **rows_of("bccd", L1, "l1", ("cut", "fine-tuned")), "coco128, dense": ("coco128", "runs/train/coco-dense/weights/best.pt")}
for _name, (_title, *_) in COCO.items():
    ROWS |= rows_of("coco128", _title, _name)


def commands(weights: Path) -> dict[str, str]:
    """What a command makes -> the command, in order; those of bench/bccd.py are done already."""
    coco = f"--data coco128/data.yaml {TRAIN}"
    made = {f"runs/train/scratch-{name}/results.csv": (
        f"finetune_pruned.py --weights scratch-{name}.pt --data bccd/data.yaml {TRAIN} --epochs 80 --name scratch-{name}") for name in ("target", "blocks")}
    made |= {"runs/train/narrow/results.csv": f"train.py --weights '' --cfg narrow.yaml --data bccd/data.yaml {TRAIN} --epochs 80 --name narrow",
             "runs/train/coco-dense/results.csv": f"train.py --weights '{weights}' {coco} --epochs 40 --name coco-dense"}
    for name, (_, flags, epochs) in COCO.items():
        made |= {f"runs/train/{name}/gammas.npy": f"train_sparsity.py {flags} --weights '{weights}' {coco} --epochs {epochs} --name {name}",
                 f"runs/prune/{name}/pruned_model.pt": (
                     f"prune.py --weights runs/train/{name}/weights/last.pt --percent {flags.split()[1]} --noval --exist-ok --name {name}"),
                 f"runs/train/{name}-tuned/results.csv":
                     f"finetune_pruned.py --weights runs/prune/{name}/pruned_model.pt {coco} --epochs 40 --name {name}-tuned"}
    return made


def prepare(folder: Path, coco128: Path) -> None:
    """scratch-*.pt (the slim shapes with new weights), narrow.yaml (stock of the same FLOPs), coco128/data.yaml."""
    for name in ("target", "blocks"):
        data = checkpoint.read(folder / STAGES["cut"].format(name))
        slim = checkpoint.build(data)
        wanted = profile(slim, 320).flops
        torch.manual_seed(0)
        fresh = Model(slim.yaml, names=slim.names)
        resize_like(fresh, slim.state_dict())
        for module in fresh.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.reset_parameters()
        fresh.detect.init_biases()
        fresh.masks = slim.masks
        checkpoint.save(folder / f"scratch-{name}.pt", fresh, imgsz=320, data=data["data"])
    cfg = read_yaml("yolov5n.yaml")
    widths = [w / 64 for w in range(4, 17)]
    flops = [profile(Model({**cfg, "width_multiple": w}, nc=len(slim.names)), 320).flops for w in widths]
    width = min(zip(flops, widths), key=lambda pair: abs(pair[0] - wanted))[1]
    (folder / "narrow.yaml").write_text(yaml.safe_dump({**cfg, "width_multiple": width}))
    (folder / "coco128").mkdir(exist_ok=True)
    names = yaml.safe_load((ROOT / "data" / "coco128.yaml").read_text(encoding="utf-8"))["names"]
    where = {"path": str(coco128), "train": "images/train2017", "val": "images/train2017", "names": names}
    (folder / "coco128" / "data.yaml").write_text(yaml.safe_dump(where, sort_keys=False))


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row a model, cost and speed relative to the dense one of its data set."""
    found = []
    for data in ("bccd", "coco128"):
        here = {row: folder / path for row, (of, path) in ROWS.items() if of == data and (folder / path).is_file()}
        models = [checkpoint.load(path) for path in here.values()]
        costs = [profile(model, 320) for model in models]
        torch_ms, onnx_ms = speeds(models, 320)
        for i, (row, path) in enumerate(here.items()):
            found.append({"model": row, "map": map_on_val(path, folder / data / "data.yaml"), "parameters": costs[i].parameters, "flops": costs[i].flops,
                          "flops_share": costs[i].flops / costs[0].flops, "torch": torch_ms[0] / torch_ms[i], "onnxruntime": onnx_ms[0] / onnx_ms[i]})
    return found


def picture(found: list[dict[str, Any]], path: Path) -> None:
    """mAP50-95 against FLOPs on BCCD; beside it how much faster than dense the last of each line is under onnxruntime."""
    by_name = {r["model"]: r for r in found}
    figure = new_figure(7.5, 4.3)
    ax = figure.add_subplot()
    dress(ax, "BCCD, yolov5n at 320 px: what half of the FLOPs cost (and speed in onnxruntime)", "GFLOPs", "mAP50-95 on val")
    lines = {
        "--target-sparsity 0.5 --round-to 1: dense, cut, fine-tuned": (("dense", f"{CHANNELS}: cut", f"{CHANNELS}: fine-tuned"), SKY, "-"),
        "--target-sparsity 0.55: dense, cut, fine-tuned": (("dense", f"{BLOCKS}: cut", f"{BLOCKS}: fine-tuned"), BLUE, "-"),
        "the L1 rule: dense, cut, fine-tuned": (("dense", f"{L1}: cut", f"{L1}: fine-tuned"), VERMILION, "--"),
        "slim shapes from scratch": ((f"{CHANNELS}: its shape from scratch", f"{BLOCKS}: its shape from scratch"), ORANGE, ""),
        "narrower stock from scratch": (("narrower stock from scratch",), GREY, "")}
    for label, (names, colour, style) in lines.items():
        points = [by_name[n] for n in names if n in by_name]
        if len(points) != 2:  # the two slim shapes have their models' speeds
            label += f" ({points[-1]['onnxruntime']:.2f}x)"
        ax.plot([p["flops"] / 1e9 for p in points], [p["map"] for p in points], color=colour, linestyle=style or "None", marker="o", markersize=6, label=label)
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, path)


def main() -> None:
    """Run what is missing, then measure."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--voc", required=True, help="folder of BCCD, with Annotations and JPEGImages")
    parser.add_argument("--coco128", required=True, help="folder of coco128, with images and labels")
    parser.add_argument("--weights", required=True, help="the official yolov5n.pt")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "bccd"), help="where the runs are: that of bench/bccd.py")
    opt = parser.parse_args()
    need_onnxruntime()
    folder, weights = Path(opt.folder).resolve(), Path(opt.weights).resolve()
    if not all((folder / STAGES["fine-tuned"].format(name)).is_file() for name in ("l1", "target", "blocks")):
        run(f"bench/bccd.py --voc '{Path(opt.voc).resolve()}' --weights '{weights}' --folder '{folder}'", ROOT)
    prepare(folder, Path(opt.coco128).resolve())
    for product, command in commands(weights).items():
        if not is_done(folder / product, command):
            run(command, folder)
    found = rows(folder)
    write_csv(ROOT / "bench" / "results" / "road.csv", found)
    picture(found, ROOT / "img" / "road.png")
    print(table([(r["model"], f"{r['map']:.3f}", f"{r['parameters']:,}", f"{r['flops'] / 1e9:.3f}", f"{r['flops_share']:.0%}", f"{r['torch']:.2f}",
                  f"{r['onnxruntime']:.2f}") for r in found], ("model", "mAP50-95", "parameters", "GFLOPs", "of dense", "times faster, torch", "onnxruntime")))


if __name__ == "__main__":
    run_cli(main)
