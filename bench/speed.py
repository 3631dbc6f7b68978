"""How long training, validation and starting take, beside YOLOv5's own scripts.

    python bench/speed.py --data bccd/data.yaml --coco coco128.yaml --weights yolov5n.pt
    python bench/speed.py ... --stock ../yolov5 --stock-python ../yolov5/.venv/bin/python

Both repositories get the same flags and take turns; a figure is the median of --runs processes. YOLOv5 may need an
interpreter of its own. Writes bench/results/speed.csv.

    python bench/speed.py --only overhead        # about two minutes on two cores

What the L1 rule and --target-sparsity add to a training step. Writes bench/results/overhead.csv.
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
from columns import ROOT, Row, publish
from torch import Tensor

import train
from models import checkpoint
from models.formats import yolov5
from models.formats.format import export_options
from models.yolo import Model, on_device
from training.loss import DetectionLoss, scale_gains
from training.optimizer import ModelEMA, build_optimizer
from training.run import Hook, Run
from training.settings import read_hyp
from utils.data.loader import Batch
from utils.errors import UserError, run_cli
from utils.files import scratch
from utils.parser import HelpfulParser
from utils.slimming import Pruner
from utils.slimming.gamma_l1 import GammaL1
from utils.slimming.graph import batch_norms
from utils.slimming.target_sparsity import TargetSparsity

TRAIN = "train.py --data {data} --weights {weights} --imgsz 320 --batch-size 16 --workers {workers} --project {folder}"
VAL = "val.py --data {coco} --weights {weights} --imgsz 640 --batch-size 16 --workers {workers} --project {folder}"
STAGE_MS = re.compile(r"([\d.]+) ?ms (?:pre-?process|inference|nms)", re.IGNORECASE)  # in val.py's line "Speed: ..."
SCRIPTS = ("train", "train_sparsity", "prune", "finetune_pruned", "slim", "val", "detect", "export", "benchmarks")
GROUPS = ("epochs", "steps", "slimming", "validation", "untrained", "starting", "overhead")
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
    process = subprocess.run(command, cwd=Path(command[1]).parent if command[1].endswith(".py") else ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        raise UserError(f"'{shlex.join(command)}' ended with exit code {process.returncode}: {process.stdout[-300:]}")
    return time.perf_counter() - start, process.stdout


def in_turns(commands: dict[str, list[str]], runs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians over `runs` turns: every command's seconds, and the milliseconds an image that val.py prints."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            seconds, text = timed(command)
            samples[name].append((seconds, sum(map(float, STAGE_MS.findall(text)))))
    medians = {name: np.median(values, 0).tolist() for name, values in samples.items()}
    return {name: s for name, (s, _) in medians.items()}, {name: ms for name, (_, ms) in medians.items()}


def sampled(sample: str, argument: str, runs: int) -> list[float]:
    """Medians of internal() in processes of its own."""
    command = [sys.executable, __file__, "--internal", sample, argument]
    return np.median([json.loads(timed(command)[1].splitlines()[-1]) for _ in range(runs)], 0).tolist()


def row(what: str, unit: str, times: dict[str, float]) -> Row:
    """A row of the table. times: "" -> this project's figure; a name -> the figure that it is compared with."""
    line = {"what": what, "unit": unit, "ours": times[""], "beside": "", "other": "", "ratio": ""}
    for beside, other in times.items():
        line |= {"beside": beside, "other": other, "ratio": other / times[""]} if beside else {}
    return line


def both(command: str, opt: Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """in_turns() of the same command in both repositories."""
    script, *flags = shlex.split(command)
    commands = {"": [sys.executable, str(ROOT / script), *flags]}
    if opt.stock:
        commands["YOLOv5"] = [opt.stock_python, str(opt.stock / script), *flags]
    return in_turns(commands, opt.runs)


def epochs_with_validation(command: str, opt: Namespace) -> list[Row]:
    """Seconds of a training, and of an epoch of it: what EPOCHS epochs take beyond two."""
    few, many = (both(f"{command} --epochs {n}", opt)[0] for n in (2, EPOCHS))
    return [row(f"train.py, {EPOCHS} epochs with validation", "s", many),
            row("an epoch with validation", "s", {by: (many[by] - few[by]) / (EPOCHS - 2) for by in many})]


def efficiency(command: str, opt: Namespace) -> list[Row]:
    """What a training takes beyond forward and backward, and what each of its parts takes."""
    alone, training, *parts = sampled("train", command, opt.runs)
    named = {**dict(zip(PARTS.values(), parts)), REST: training - sum(parts)}
    return [row("training, an image", "ms", {"": training, "forward and backward alone": alone}),
            *(row(f"of this: {name}", "ms", {"": ms}) for name, ms in named.items())]


def slimming(command: str, opt: Namespace, folder: Path) -> list[Row]:
    """Seconds of trainings that end with half of the FLOPs, with and without a teacher, beside dense training."""
    shrink = f"{command.replace('train.py', 'train_sparsity.py')} --epochs {LONG} --target flops=0.5 --shrink --name"
    seconds, _ = in_turns({name: [sys.executable, str(ROOT / script), *flags] for name, (script, *flags) in {
        "train.py": shlex.split(f"{command} --epochs {LONG} --name dense --exist-ok"),
        "slim": shlex.split(f"{shrink} slim"),
        "taught": shlex.split(f"{shrink} taught --teacher {folder / 'dense/weights/last.pt'}")}.items()}, opt.runs)
    dense = {"train.py": seconds["train.py"]}
    return [row(f"train_sparsity.py --target flops=0.5 --shrink, {LONG} epochs", "s", {"": seconds["slim"], **dense}),
            row("the same with --teacher", "s", {"": seconds["taught"], **dense})]


def validation(command: str, opt: Namespace) -> list[Row]:
    """Seconds of val.py, and what it prints of an image."""
    seconds, ms = both(command, opt)
    return [row("val.py", "s", seconds), row("val.py, an image", "ms", ms)]


def starting(opt: Namespace, large: Path) -> list[Row]:
    """--help of every script beside an import of torch, and loading yolov5x."""
    pairs = {}
    for name in SCRIPTS:  # each next to an import of torch, for the machine's speed changes over so many processes
        pairs[name], _ = in_turns({"import torch": [sys.executable, "-c", "import torch"],
                                   "": [sys.executable, str(ROOT / f"{name}.py"), "--help"]}, 2 * opt.runs - 1)
    slowest = max(SCRIPTS, key=lambda name: pairs[name][""] - pairs[name]["import torch"])
    return [row(f"{slowest}.py --help, the slowest one", "s", pairs[slowest]),
            row("loading a checkpoint of yolov5x", "s", {"": sampled("load", str(large), opt.runs)[0]})]


def overhead(name: str, imgsz: int = 320, batch: int = 16, steps: int = 15) -> Row:
    """What both rules add to a step of training, as train_sparsity.py sets them up: medians of milliseconds.

    A step is forward, loss, backward, clipping, optimizer and moving average; everything is measured in every step.
    """
    model = on_device(Model(f"{name}.yaml", nc=3), "cpu").train()
    loss = DetectionLoss(model, scale_gains(read_hyp({}), 3, 3, imgsz))
    optimizer, ema = build_optimizer(model, "AdamW", 1e-3, 0.9, 5e-4), ModelEMA(model)
    pruner = Pruner(model, imgsz)
    names, flops = pruner.graph.prunable_norms(), pruner.costs.flops_per_channel()
    norms, copies = (list(batch_norms(m, names).values()) for m in (model, ema.ema))
    groups = [pruner.graph.group[pruner.graph.norms[name]] for name in names]
    l1, target = GammaL1(norms, 1e-4, 100), TargetSparsity(norms, 0.5, copies, [flops[n] for n in names], groups, 16)
    images = torch.rand(batch, 3, imgsz, imgsz).to(memory_format=torch.channels_last)
    targets = torch.rand(6 * batch, 6) * 0.3 + 0.3  # image, class, x, y, w, h
    targets[:, 0], targets[:, 1] = torch.arange(batch).repeat_interleave(6), torch.randint(0, 3, (6 * batch,))

    def backward() -> None:
        optimizer.zero_grad()
        loss(model(images), targets)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)

    def move() -> None:
        optimizer.step()
        ema.update()

    work = (("step", backward), ("l1", lambda: l1.add_to_gradients(1)), ("target", target.observe),
            ("step", move), ("target", lambda: target.shrink(0.4)))
    times = []
    for _ in range(steps + 2):
        ms = dict.fromkeys(("step", "l1", "target"), 0.0)
        for part, call in work:
            start = time.perf_counter()
            call()
            ms[part] += (time.perf_counter() - start) * 1000
        times.append(ms)
    median = {part: float(np.median([ms[part] for ms in times[2:]])) for part in times[0]}  # two steps warm up
    return {"model": name, "imgsz": imgsz, "batch": batch, **median,
            "l1_share": median["l1"] / median["step"], "target_share": median["target"] / median["step"]}


def make_weights(folder: Path, names: dict[int, str]) -> tuple[Path, Path]:
    """A yolov5n that finds boxes everywhere, for both repositories, and a yolov5x."""
    torch.manual_seed(0)
    model = Model("yolov5n.yaml", nc=len(names), names=names)
    for convolution in model.detect.m:
        torch.nn.init.zeros_(convolution.get_parameter("bias"))
    yolov5.write(model, folder / "untrained.pt", export_options(model, (1, 3, 640, 640)))
    checkpoint.save(folder / "yolov5x.pt", Model("yolov5x.yaml"))
    return folder / "untrained.pt", folder / "yolov5x.pt"


def measure_groups(opt: Namespace, groups: list[str]) -> list[Row]:
    """The rows of speed.csv."""
    missing = [f"--{name}" for name in ("data", "coco", "weights") if getattr(opt, name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: needed; see the two lines above the flags of --help")
    with scratch(ROOT / "runs" / "speed") as folder:
        everywhere, large = make_weights(folder, checkpoint.load(opt.weights).names)
        values = {"data": opt.data.resolve(), "coco": opt.coco.resolve(), "weights": opt.weights.resolve(),
                  "workers": opt.workers, "folder": folder}
        training, untrained = TRAIN.format(**values), VAL.format(**{**values, "weights": everywhere})
        quick = f"{training} --epochs {EPOCHS} --noval --nosave --noplots"
        sections = {"epochs": lambda: epochs_with_validation(training, opt),
                    "steps": lambda: efficiency(quick, opt),
                    "slimming": lambda: slimming(training, opt, folder),
                    "validation": lambda: validation(VAL.format(**values), opt),
                    "untrained": lambda: [row("val.py of an untrained model", "s", both(untrained, opt)[0])],
                    "starting": lambda: starting(opt, large)}
        return [{"group": group, **row} for group in groups for row in sections[group]()]


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
    add("--only", nargs="+", choices=GROUPS, default=GROUPS, help="measure these, and keep the other rows")
    add("--internal", nargs=2, metavar=("SAMPLE", "ARGUMENT"), help="internal: print one sample as JSON")
    opt = parser.parse_args()
    if opt.internal:
        print(json.dumps(internal(*opt.internal)))
        return
    if groups := [group for group in opt.only if group != "overhead"]:
        publish("speed", measure_groups(opt, groups), "group", order=lambda row: GROUPS.index(row["group"]))
    if "overhead" in opt.only:
        publish("overhead", [overhead(name) for name in ("yolov5n", "yolov5s")])


if __name__ == "__main__":
    run_cli(main)
