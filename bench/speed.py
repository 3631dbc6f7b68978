"""How long training, validation and starting take, beside YOLOv5's own scripts.

    python bench/speed.py --data bccd/data.yaml --coco coco128.yaml --weights yolov5n.pt
    python bench/speed.py ... --stock ../yolov5 --stock-python ../yolov5/.venv/bin/python

Both repositories get the same flags and take turns; a figure is the median of --runs processes. YOLOv5 may need an
interpreter of its own. Writes bench/results/speed.csv.
"""
from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from columns import RESULTS, ROOT, SPEED_OF_USE, Row, formatted, with_earlier
from torch import Tensor

import train
from models import checkpoint
from models.formats import yolov5
from models.formats.format import export_options
from models.yolo import Model
from training.run import Hook, Run
from utils.data.loader import Batch
from utils.errors import UserError, run_cli
from utils.files import scratch
from utils.options import HelpfulParser
from utils.tables import text_table, write_csv

TRAIN = "train.py --data {data} --weights {weights} --imgsz 320 --batch-size 16 --workers {workers} --project {folder}"
VAL = "val.py --data {coco} --weights {weights} --imgsz 640 --batch-size 16 --workers {workers} --project {folder}"
STAGE_MS = re.compile(r"([\d.]+) ?ms (?:pre-?process|inference|nms)", re.IGNORECASE)  # in val.py's line "Speed: ..."
SCRIPTS = ("train", "train_sparsity", "prune", "finetune_pruned", "slim", "val", "detect", "export", "benchmarks")
GROUPS = ("epochs", "steps", "slimming", "validation", "untrained", "starting")
EPOCHS, LONG = 6, 10
ALONE = 8  # steps of forward and backward after each epoch
# What a training step calls -> its name in the table.
PARTS = {(train, "forward"): "forward and loss", (Tensor, "backward"): "backward",
         (train, "optimizer_step"): "clipping, checks, optimizer, EMA and hooks"}
REST = "waiting for images, progress"


class Meter(Hook):
    """Milliseconds an image of every epoch: in training, in forward and backward alone, and in the PARTS of it."""

    def __init__(self) -> None:
        self.ms: list[list[float]] = []
        self.parts = dict.fromkeys(PARTS, 0.0)
        for owner, name in PARTS:
            setattr(owner, name, self.measured(owner, name))

    def measured(self, owner: Any, name: str) -> Callable:
        """A function that adds up how long it takes."""
        function = getattr(owner, name)

        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            self.parts[owner, name] += time.perf_counter() - start
            return result

        return call

    def start(self, run: Run) -> None:
        self.run, self.began = run, time.perf_counter()

    def extra_loss(self, batch: Batch, outputs: list[Tensor]) -> None:
        if len(batch.images) == self.run.opt.batch_size:
            self.images, self.targets = self.run.images, batch.targets

    def epoch_end(self, log: dict[str, float]) -> None:
        seconds = [time.perf_counter() - self.began, *self.parts.values()]
        training = [1000 * s / len(self.run.loader.dataset) for s in seconds]
        start = time.perf_counter()
        for _ in range(ALONE):
            self.run.loss(self.run.wrapped(self.images), self.targets)[0].backward()
            self.run.optimizer.zero_grad(set_to_none=True)
        self.ms.append([1000 * (time.perf_counter() - start) / (ALONE * len(self.images)), *training])
        self.parts, self.began = dict.fromkeys(PARTS, 0.0), time.perf_counter()


def internal(sample: str, argument: str) -> list[float]:
    """One sample, in this process."""
    if sample == "load":
        start = time.perf_counter()
        checkpoint.load(argument)
        return [time.perf_counter() - start]
    meter = Meter()
    train.main(shlex.split(argument)[1:], [meter])
    return np.median(meter.ms[1:-1], 0).tolist()  # the first epoch warms up, the last one validates


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds of a process, and what it printed. UserError where it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=Path(command[1]).parent if command[1].endswith(".py") else ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"'{shlex.join(command)}' ended with exit code {done.returncode}: {done.stdout[-300:]}")
    return time.perf_counter() - start, done.stdout


def in_turns(commands: dict[str, list[str]], runs: int) -> dict[str, list[tuple[float, str]]]:
    """Every command `runs` times."""
    found: dict[str, list[tuple[float, str]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            found[name].append(timed(command))
    return found


def row(what: str, unit: str, ours: float, beside: str = "", other: float | None = None) -> Row:
    """A line of the table. `beside`: what `other` is the time of."""
    compared = {"other": "", "ratio": ""} if other is None else {"other": other, "ratio": other / ours}
    return {"group": "", "what": what, "unit": unit, "ours": ours, "beside": beside, **compared}


def commands(command: str, opt: Namespace) -> dict[str, list[str]]:
    """The same command in both repositories."""
    script, *flags = shlex.split(command)
    found = {"": [sys.executable, str(ROOT / script), *flags]}
    return found | {"YOLOv5": [opt.stock_python, str(opt.stock / script), *flags]} if opt.stock else found


def whole(what: str, command: str, opt: Namespace, per_image: str = "") -> list[Row]:
    """Seconds of a command; with `per_image`, the milliseconds of an image that it prints as well."""
    found = in_turns(commands(command, opt), opt.runs)
    seconds = {by: float(np.median([s for s, _ in runs])) for by, runs in found.items()}
    rows = [row(what, "s", *pair(seconds))]
    if per_image:
        ms = {by: float(np.median([sum(map(float, STAGE_MS.findall(text))) for _, text in runs]))
              for by, runs in found.items()}
        rows.append(row(per_image, "ms", *pair(ms)))
    return rows


def epochs_with_validation(command: str, opt: Namespace) -> list[Row]:
    """Seconds of a training, and of an epoch of it: what EPOCHS epochs take beyond two."""
    found = {n: whole(f"train.py, {n} epochs with validation", f"{command} --epochs {n}", opt)[0] for n in (2, EPOCHS)}
    few, many = found.values()
    per_epoch = {key: (many[key] - few[key]) / (EPOCHS - 2) for key in ("ours", "other") if many[key]}
    return [many, row("an epoch with validation", "s", per_epoch["ours"], many["beside"], per_epoch.get("other"))]


def slimming(command: str, opt: Namespace, folder: Path) -> list[Row]:
    """Seconds of trainings that end with half of the FLOPs, with and without a teacher, beside dense training."""
    shrink = f"{command.replace('train.py', 'train_sparsity.py')} --epochs {LONG} --target flops=0.5 --shrink --name"
    found = in_turns({name: commands(each, opt)[""] for name, each in {
        "dense": f"{command} --epochs {LONG} --name dense --exist-ok", "slim": f"{shrink} slim",
        "taught": f"{shrink} taught --teacher {folder / 'dense/weights/last.pt'}"}.items()}, opt.runs)
    dense, slim, taught = (float(np.median([s for s, _ in runs])) for runs in found.values())
    title = f"train_sparsity.py --target flops=0.5 --shrink, {LONG} epochs"
    return [row(title, "s", slim, "train.py", dense), row("the same with --teacher", "s", taught, "train.py", dense)]


def pair(values: dict[str, float]) -> tuple[float, str, float | None]:
    """Ours, and whose is the other one."""
    return values[""], *next(((by, value) for by, value in values.items() if by), ("", None))


def starting(opt: Namespace, large: Path) -> list[Row]:
    """--help of every script beside an import of torch, and loading yolov5x."""
    pairs: dict[str, list[float]] = {}
    for name in SCRIPTS:  # each next to an import of torch, for the machine's speed changes over so many processes
        found = in_turns({"torch": [sys.executable, "-c", "import torch"],
                          "help": [sys.executable, str(ROOT / f"{name}.py"), "--help"]}, 2 * opt.runs - 1)
        pairs[name] = [float(np.median([s for s, _ in runs])) for runs in found.values()]
    slowest = max(SCRIPTS, key=lambda name: pairs[name][1] - pairs[name][0])
    torch_alone, seconds = pairs[slowest]
    loads = [json.loads(timed([sys.executable, __file__, "--internal", "load", str(large)])[1].splitlines()[-1])[0]
             for _ in range(opt.runs)]
    return [row(f"{slowest}.py --help, the slowest one", "s", seconds, "import torch", torch_alone),
            row("loading a checkpoint of yolov5x", "s", float(np.median(loads)))]


def efficiency(command: str, opt: Namespace) -> list[Row]:
    """What a training takes beyond forward and backward, and what each of its parts takes."""
    samples = [json.loads(timed([sys.executable, __file__, "--internal", "train", command])[1].splitlines()[-1])
               for _ in range(opt.runs)]
    alone, training, *parts = np.median(samples, 0).tolist()
    named = {**dict(zip(PARTS.values(), parts)), REST: training - sum(parts)}
    return [row("training, an image", "ms", training, "forward and backward alone", alone),
            *(row(f"of this: {name}", "ms", ms) for name, ms in named.items())]


def make_weights(folder: Path, names: dict[int, str]) -> tuple[Path, Path]:
    """A yolov5n that finds boxes everywhere, for both repositories, and a yolov5x."""
    torch.manual_seed(0)
    model = Model("yolov5n.yaml", nc=len(names), names=names)
    for convolution in model.detect.m:
        torch.nn.init.zeros_(convolution.get_parameter("bias"))
    yolov5.write(model, folder / "untrained.pt", export_options(model, (1, 3, 640, 640)))
    checkpoint.save(folder / "yolov5x.pt", Model("yolov5x.yaml"))
    return folder / "untrained.pt", folder / "yolov5x.pt"


def main() -> None:
    """Measure everything."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="data yaml to train on")
    add("--coco", type=Path, help="data yaml of COCO's classes to validate on")
    add("--weights", type=Path, help="yolov5n.pt")
    add("--workers", type=int, default=2, help="processes that load images")
    add("--stock", type=Path, help="folder of YOLOv5's repository, to measure it as well")
    add("--stock-python", default=sys.executable, help="the interpreter that runs it")
    add("--runs", type=int, default=3, help="processes per figure")
    add("--only", nargs="+", choices=GROUPS, help="measure these, and keep the other rows")
    add("--internal", nargs=2, metavar=("SAMPLE", "ARGUMENT"), help="internal: print one sample as JSON")
    opt = parser.parse_args()
    if opt.internal:
        print(json.dumps(internal(*opt.internal)))
        return
    missing = [f"--{name}" for name in ("data", "coco", "weights") if getattr(opt, name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: needed; see the two lines above the flags of --help")
    with scratch(ROOT / "runs" / "speed") as folder:
        untrained, large = make_weights(folder, checkpoint.load(opt.weights).names)
        values = {"data": opt.data.resolve(), "coco": opt.coco.resolve(), "weights": opt.weights.resolve(),
                  "workers": opt.workers, "folder": folder}
        training, val = TRAIN.format(**values), VAL.format(**values)
        quick, everywhere = f"{training} --epochs {EPOCHS} --noval --nosave --noplots", {**values, "weights": untrained}
        groups = {"epochs": lambda: epochs_with_validation(training, opt),
                  "steps": lambda: efficiency(quick, opt),
                  "slimming": lambda: slimming(training, opt, folder),
                  "validation": lambda: whole("val.py", val, opt, per_image="val.py, an image"),
                  "untrained": lambda: whole("val.py of an untrained model", VAL.format(**everywhere), opt),
                  "starting": lambda: starting(opt, large)}
        rows = [{**found, "group": group} for group in opt.only or GROUPS for found in groups[group]()]
    rows = sorted(with_earlier("speed", rows, "group"), key=lambda found: GROUPS.index(found["group"]))
    write_csv(RESULTS / "speed.csv", rows)
    print(text_table(*formatted(rows, SPEED_OF_USE)))


if __name__ == "__main__":
    run_cli(main)
