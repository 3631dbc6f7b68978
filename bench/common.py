"""What the experiments in bench/ share: their flags, running what is not done yet, and measuring checkpoints."""
from __future__ import annotations

import csv
import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from columns import ROOT, Row

from models import checkpoint
from models.formats.onnx import onnx_latency
from models.yolo import Model, fused, on_device
from utils.data.config import read_data
from utils.errors import UserError
from utils.files import write_json
from utils.options import HelpfulParser
from utils.slimming.cost import profile
from utils.slimming.timing import latency
from val import evaluate, validation_loader

MAP = "metrics/mAP_0.5:0.95"  # its name in results.csv and metrics.json
BEST, SPARSE, CUT = "runs/train/{}/weights/best.pt", "runs/train/{}/weights/last.pt", "runs/prune/{}/pruned_model.pt"
TUNED = "runs/train/{}-tuned/weights/best.pt"


def experiment_parser(description: str | None, folder: str, weights: str | None = None) -> HelpfulParser:
    """A parser with the flags of every experiment, whose runs are in runs/<folder> by default."""
    parser = HelpfulParser(description)
    parser.add_argument("--voc", type=absolute, required=True, help="VOC folder, with Annotations and JPEGImages")
    parser.add_argument("--weights", type=absolute, default=weights, required=not weights,
                        help="official checkpoint to start from")
    parser.add_argument("--folder", type=absolute, default=ROOT / "runs" / folder, help="folder of the runs")
    return parser


def absolute(path: str) -> Path:
    """The commands run in another folder."""
    return Path(path).resolve()


# Commands -------------------------------------------------------------------------------------------------------------

def bccd_commands(voc: Path) -> dict[str, str]:
    """What makes bccd/data.yaml: product of the command -> command."""
    return {"bccd/data.yaml": f"data/scripts/voc_to_yolo.py --voc '{voc}' --out bccd"}


def slimming_commands(name: str, sparsify: str, cut: str, tune: str) -> dict[str, str]:
    """The steps from dense to slim, in order: product of a command -> command. The last three are flags of a step."""
    # The picture is the last thing that a training makes; without pictures is_done() reads the table.
    finished = "results.csv" if "--noplots" in tune else "results.png"
    return {
        f"runs/train/{name}/gammas.npy": f"train_sparsity.py {sparsify} --name {name}",
        CUT.format(name): f"prune.py --weights {SPARSE.format(name)} {cut} --name {name}",
        f"runs/train/{name}-tuned/{finished}":
            f"finetune_pruned.py --weights {CUT.format(name)} {tune} --name {name}-tuned"}


def run_missing(commands: dict[str, str], folder: Path) -> None:
    """Run the commands (product under `folder` -> command) that are not done, each in the folder of its first try."""
    folder.mkdir(parents=True, exist_ok=True)
    for product, command in commands.items():
        if not is_done(folder / product, command):
            run(f"{command} --exist-ok" if "--name" in command else command, folder)


def is_done(product: Path, command: str) -> bool:
    """Does a command's product exist? A results.csv must have a row for each of the command's --epochs."""
    if product.suffix != ".csv" or not product.exists():
        return product.exists()
    epochs = int(command.split("--epochs ")[1].split()[0])
    return last_epoch(product)["epoch"] == str(epochs - 1)


def run(command: str, folder: Path) -> None:
    """Run one of the repository's commands in `folder`, and show what it prints."""
    print(f"\n$ python {command}", flush=True)
    script, *flags = shlex.split(command)
    code = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder).returncode
    if code:
        raise UserError(f"'python {command}' ended with exit code {code}; its message is above, "
                        f"its files are in {folder}")


def last_epoch(path: Path) -> dict[str, str]:
    """The last row of a results.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))[-1]


# Measurements ---------------------------------------------------------------------------------------------------------

def need_onnxruntime() -> None:
    """Say at the start what would be missing at the end."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        raise UserError("onnxruntime is missing; pip install -r requirements-export.txt")


def measure(stages: dict[str, str], folder: Path, flags: str = "", suffix: str = "") -> list[Row]:
    """A row per stage (name -> checkpoint under `folder`): accuracy by val.py, cost, milliseconds at batch 1."""
    rows: list[Row] = []
    models = []
    for stage, weights in stages.items():
        name = stage + suffix
        run(f"val.py --weights {weights} --name {name} --exist-ok {flags}", folder)
        metrics = json.loads((folder / "runs" / "val" / name / "metrics.json").read_text(encoding="utf-8"))
        model, imgsz = checkpoint.load(folder / weights), metrics["imgsz"]
        models.append(on_device(fused(model), "cpu"))
        cost = profile(model, imgsz)
        rows.append({"stage": stage, "map50": metrics["metrics/mAP_0.5"], "map": metrics[MAP],
                     "parameters": cost.parameters, "flops": cost.flops, "mb": cost.megabytes})
    for row, ms in zip(rows, latency(models, imgsz, runs=50)):
        row["ms"] = ms
    return rows


def kept(path: Path, weights: Path, find: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `find` returns about a checkpoint, kept in the file `path` as long as the checkpoint does not change."""
    stamp = weights.stat().st_mtime_ns
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known.pop("stamp", None) == stamp:
            return known
    found = find()
    write_json(path, {"stamp": stamp, **found})
    return found


def map_on_val(model: Model, data: Path, imgsz: int = 320) -> float:
    """mAP50-95 on the val images."""
    loader = validation_loader(read_data(str(data)), "val", imgsz, 32, int(model.stride.max()), workers=2)
    return evaluate(on_device(fused(model), "cpu"), loader, torch.device("cpu")).ap.map


def checkpoint_map(weights: Path, data: Path) -> float:
    """mAP50-95 of a checkpoint on the val images, kept beside it."""
    return kept(weights.with_suffix(".map.json"), weights,
                lambda: {"map": map_on_val(checkpoint.load(weights), data)})["map"]


def times_faster(models: Sequence[Model], imgsz: int = 320) -> list[Row]:
    """How many times faster than the first each model is, one image at a time, in PyTorch and in onnxruntime."""
    ready = [on_device(fused(model), "cpu") for model in models]
    onnx_ms = onnx_latency(ready, imgsz, runs=50)
    if onnx_ms is None:
        raise UserError("onnxruntime can't run one of the models; the note above says why")
    torch_ms = latency(ready, imgsz, runs=50)
    return [{"torch": torch_ms[0] / a, "onnxruntime": onnx_ms[0] / b} for a, b in zip(torch_ms, onnx_ms)]
