"""What the experiments in bench/ share: their flags, running what is not done yet, and measuring checkpoints."""
from __future__ import annotations

import csv
import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from columns import ROOT, Row

from models import checkpoint
from models.formats.speed import runtime_latency
from models.yolo import Model, fused, on_device
from utils.data.config import read_data
from utils.data.loader import validation_loader
from utils.errors import UserError
from utils.parser import HelpfulParser
from utils.slimming.cost import profile
from utils.slimming.timing import latency
from val import evaluate

MAP_KEY = "metrics/mAP_0.5:0.95"  # of mAP50-95 in results.csv and metrics.json
# A run's checkpoints, under the experiment's folder.
BEST, SPARSE, CUT = "runs/train/{}/weights/best.pt", "runs/train/{}/weights/last.pt", "runs/prune/{}/pruned_model.pt"


def experiment_parser(description: str | None, folder: str, weights: str | None = None) -> HelpfulParser:
    """A parser with the flags of every experiment."""
    parser = HelpfulParser(description)
    add = parser.add_argument
    add("--voc", type=absolute, required=True, help="folder with Annotations and JPEGImages")
    add("--weights", type=absolute, default=weights, required=not weights, help="checkpoint to start from")
    add("--folder", type=absolute, default=ROOT / "runs" / folder, help="folder of the runs")
    return parser


def absolute(path: str) -> Path:
    """Commands run in the experiment's folder, so relative paths of this one must not reach them."""
    return Path(path).resolve()


def sparse_command(name: str, flags: str) -> dict[str, str]:
    """What makes a sparse model: product of a command -> command, as everywhere here."""
    return {f"runs/train/{name}/gammas.npy": f"train_sparsity.py {flags} --name {name}"}


def cut_commands(sparse: str, name: str, cut: str, tune: str | None) -> dict[str, str]:
    """What cuts a sparse model, and what fine-tunes what is left; with the flags of each, None for no fine-tuning."""
    by_product = {CUT.format(name): f"prune.py --weights {SPARSE.format(sparse)} {cut} --name {name}"}
    if tune is not None:
        by_product[f"runs/train/{name}-tuned/results.csv"] = (
            f"finetune_pruned.py --weights {CUT.format(name)} {tune} --name {name}-tuned")
    return by_product


def bccd_commands(voc: Path) -> dict[str, str]:
    """What makes bccd/data.yaml."""
    return {"bccd/data.yaml": f"data/scripts/voc_to_yolo.py --voc '{voc}' --out bccd"}


def stage_files(*names: str) -> dict[str, str]:
    """Stage -> checkpoint, of the dense model and of what the commands above make under each name."""
    files = {"dense": BEST.format("dense")}
    for name in names:
        stages = {"sparse": SPARSE.format(name), "cut": CUT.format(name), "tuned": BEST.format(f"{name}-tuned")}
        files |= {f"{name}-{stage}": file for stage, file in stages.items()}
    return files


def run_missing(commands: Mapping[str, str], folder: Path) -> None:
    """Run the commands (product under `folder` -> command) that are not done, each into the folder of its first try."""
    folder.mkdir(parents=True, exist_ok=True)
    for product, command in commands.items():
        if not is_done(folder / product, command):
            run(f"{command} --exist-ok" if "--name" in command else command, folder)


def is_done(product: Path, command: str) -> bool:
    """Whether a command's product exists. A results.csv must have all of the command's --epochs."""
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


def need_onnxruntime() -> None:
    """Say at the start what would be missing at the end."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        raise UserError("onnxruntime is missing; pip install -r requirements-export.txt")


def measure_stages(files: Mapping[str, str], folder: Path, flags: str = "", suffix: str = "") -> list[Row]:
    """A row per stage (stage -> checkpoint): accuracy by val.py, cost, milliseconds of one image, measured in turns."""
    rows: list[Row] = []
    models = []
    for stage, weights in files.items():
        name = stage + suffix
        run(f"val.py --weights {weights} --name {name} --exist-ok {flags}", folder)
        metrics = json.loads((folder / "runs" / "val" / name / "metrics.json").read_text(encoding="utf-8"))
        model, imgsz = checkpoint.load(folder / weights), metrics["imgsz"]
        models.append(on_device(fused(model), "cpu"))
        cost = profile(model, imgsz)
        rows.append({"stage": stage, "map50": metrics["metrics/mAP_0.5"], "map": metrics[MAP_KEY],
                     "parameters": cost.parameters, "flops": cost.flops, "mb": cost.megabytes})
    return [{**row, "ms": ms} for row, ms in zip(rows, latency(models, imgsz, runs=50))]


def map_on(model: Model, data: Path, split: str = "val", imgsz: int = 320) -> float:
    """mAP50-95 on the val or test images."""
    loader = validation_loader(read_data(str(data)), split, imgsz, 32, model.divisor, workers=2)
    return evaluate(on_device(fused(model), "cpu"), loader, torch.device("cpu")).ap.map


def times_faster(models: list[Model]) -> list[Row]:
    """How many times as fast as the first each model is on one image, in PyTorch and in onnxruntime."""
    ready = [on_device(fused(model), "cpu") for model in models]
    onnx_ms = runtime_latency(ready, "onnx", 320, runs=50)
    if onnx_ms is None:
        raise UserError("onnxruntime can't run one of the models; the note above says why")
    torch_ms = latency(ready, 320, runs=50)
    return [{"torch": torch_ms[0] / a, "onnxruntime": onnx_ms[0] / b} for a, b in zip(torch_ms, onnx_ms)]
