"""What the scripts in bench/ share: running the repository's commands, and the table of the stages of a model."""
from __future__ import annotations

import csv
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models import checkpoint  # noqa: E402  (the repository's root must be on the path first)
from models.formats.onnx import onnx_latency  # noqa: E402
from models.yolo import Model, fused, on_device  # noqa: E402
from utils.data.config import read_data  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.slimming.cost import latency, profile  # noqa: E402
from utils.slimming.report import table  # noqa: E402
from val import evaluate, validation_loader  # noqa: E402


def run(command: str, folder: Path) -> None:
    """Run one of the repository's commands in `folder`, showing what it prints."""
    print(f"\n$ python {command}", flush=True)
    script, *flags = shlex.split(command)
    code = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder).returncode
    if code:
        raise UserError(f"'python {command}' ended with exit code {code}; its message is above, its files are in {folder}")


def measure(stages: dict[str, str], folder: Path, flags: str = "", suffix: str = "") -> list[dict[str, Any]]:
    """One row a stage, {name: checkpoint under `folder`}: accuracy by val.py, cost, and milliseconds an image at batch 1.

    The models' latencies are measured in turns, so that a busy moment of the machine hits all of them.
    """
    rows: list[dict[str, Any]] = []
    models: list[torch.nn.Module] = []
    imgsz = 0
    for stage, weights in stages.items():
        run(f"val.py --weights {weights} --name {stage}{suffix} --exist-ok {flags}", folder)
        metrics = json.loads((folder / "runs" / "val" / f"{stage}{suffix}" / "metrics.json").read_text())
        data = checkpoint.read(folder / weights)
        imgsz = data["imgsz"]
        model = checkpoint.build(data)
        models.append(on_device(fused(model), "cpu"))
        cost = profile(model, imgsz)
        rows.append({"stage": stage, "map50": metrics["metrics/mAP_0.5"], "map": metrics["metrics/mAP_0.5:0.95"],
                     "parameters": cost.parameters, "flops": cost.flops, "mb": cost.megabytes})
    for row, ms in zip(rows, latency(models, imgsz, runs=50)):
        row["ms"] = ms
    return rows


def last_epoch(path: Path) -> dict[str, str]:
    """The last row of a results.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))[-1]


def is_done(product: Path, command: str) -> bool:
    """Whether a command need not be run again: what it makes is there, and a results.csv has all of its --epochs."""
    if product.suffix != ".csv" or not product.exists():
        return product.exists()
    return last_epoch(product)["epoch"] == str(int(command.split("--epochs ")[1].split()[0]) - 1)


def need_onnxruntime() -> None:
    """Say at the start what would be missing at the end."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        raise UserError("onnxruntime is missing; pip install -r requirements-export.txt")


def map_on_val(weights: Path, data: Path, imgsz: int = 320) -> float:
    """mAP50-95 of a checkpoint on the val images; kept beside the file, as long as that does not change."""
    kept = weights.with_suffix(".map.json")
    stamp = weights.stat().st_mtime_ns
    if kept.is_file() and (found := json.loads(kept.read_text()))["stamp"] == stamp:
        return float(found["map"])
    model = on_device(fused(checkpoint.load(weights)), "cpu")
    loader = validation_loader(read_data(str(data)), "val", imgsz, 32, int(model.stride.max()), workers=2)
    value = evaluate(model, loader, torch.device("cpu")).ap.map
    write_json(kept, {"stamp": stamp, "map": value})
    return value


def speeds(models: list[Model], imgsz: int) -> tuple[list[float], list[float]]:
    """Median milliseconds an image at batch 1, under torch and under onnxruntime, each in turns."""
    ready = [on_device(fused(model), "cpu") for model in models]
    onnx_ms = onnx_latency(ready, imgsz, runs=50)
    if onnx_ms is None:
        raise UserError("onnxruntime can't run one of the models; the note above says why")
    return latency(list(ready), imgsz, runs=50), onnx_ms


def show(rows: list[dict[str, Any]]) -> str:
    """The table of measure()'s rows."""
    return table([(r["stage"], f"{r['map50']:.3f}", f"{r['map']:.3f}", f"{r['parameters']:,}", f"{r['flops'] / 1e9:.3f}",
                   f"{r['mb']:.2f}", f"{r['ms']:.2f}") for r in rows],
                 ("stage", "mAP50", "mAP50-95", "parameters", "GFLOPs", "MB", "ms per image"))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """measure()'s rows as CSV, floats with five digits after the point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
