"""Memory of long runs: a training of 300 epochs, and val.py on 1,000 and on 20,000 images.

    python bench/memory.py --weights yolov5n.pt                  # 10 minutes on two cores

The training has 8 batches an epoch and validates ten times, twice of them in the first ten epochs; what its process
holds is written down on the way: memory, its workers' too, threads, open files and child processes. val.py runs on hard
links to a few small images. Writes bench/results/memory.csv.
"""
from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from columns import ROOT, Row, publish
from scale import CLASSES, make_set

from train import main as train
from train import validate
from training.run import Hook, Run
from utils.errors import UserError, run_cli
from utils.files import scratch, write_yaml
from utils.parser import HelpfulParser

FIRST = 10  # the epoch after which nothing should grow any more
TRAIN_FLAGS = ["--weights", "", "--cfg", "models/yolov5n.yaml", "--imgsz", "64", "--batch-size", "4", "--workers", "2",
               "--noval", "--noplots", "--noautoanchor", "--patience", "0"]


def children() -> list[int]:
    """Processes that this one has started."""
    pids: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            pids += map(int, (task / "children").read_text().split())
    return pids


def process_megabytes(pid: int) -> float:
    """Memory of a process without its libraries' files; what it shares with its relatives counts in parts."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024


def footprint() -> Row:
    """What this process holds."""
    processes = children()
    return {"MB": sum(map(process_megabytes, [os.getpid(), *processes])), "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")), "processes": len(processes)}


class Watch(Hook):
    """Validates twice up to epoch FIRST and every `period` epochs from there; notes what the process holds."""

    def __init__(self, period: int):
        self.period = period
        self.rows: list[Row] = []

    def start(self, run: Run) -> None:
        self.run = run

    def epoch_end(self, log: dict[str, float]) -> None:
        epochs = self.run.epoch + 1
        if epochs in (FIRST // 2, FIRST) or (epochs > FIRST and (epochs - FIRST) % self.period == 0):
            validate(self.run, dict(log))
            self.rows.append({"part": "training", "what": f"training, epoch {epochs}", **footprint()})


def data_yaml(folder: Path, count: int) -> Path:
    """A data set of `count` images, all for training and validation."""
    images = str(make_set(folder, count))
    write_yaml(folder / "data.yaml", {"train": images, "val": images, "names": [str(i) for i in range(CLASSES)]})
    return folder / "data.yaml"


def soak(folder: Path, epochs: int) -> list[Row]:
    """A training, in this process."""
    data = data_yaml(folder, 32)
    watch = Watch(max((epochs - FIRST) // 8, 1))
    train([*TRAIN_FLAGS, "--data", str(data), "--epochs", str(epochs), "--project", str(folder)], [watch])
    return watch.rows


def validation(folder: Path, count: int, weights: Path) -> Row:
    """val.py on `count` images; the memory is its peak, without its workers."""
    data = data_yaml(folder, count)
    command = [sys.executable, str(ROOT / "val.py"), "--weights", str(weights), "--data", str(data),
               "--imgsz", "96", "--batch-size", "32", "--workers", "2", "--noplots", "--project", str(folder)]
    with subprocess.Popen(command, env={**os.environ, "YOLO_CACHE": str(folder / "cache")}) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"val.py ended with exit code {process.returncode}; its message is above")
    return {"part": "validation", "what": f"val.py, {count:,} images", "MB": usage.ru_maxrss / 1024, "threads": "",
            "files": "", "processes": ""}


def measurements(epochs: int, images: list[int], weights: Path) -> Iterator[list[Row]]:
    """The rows, part by part."""
    if epochs:
        with scratch(ROOT / "runs" / "memory") as folder:
            yield soak(folder, epochs)
    for count in images:
        with scratch(ROOT / "runs" / "memory") as folder:
            yield [validation(folder, count, weights)]


def main() -> None:
    """Measure everything."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="yolov5n.pt")
    add("--epochs", type=int, default=300, help="epochs of the training; 0: keep the rows of the one before")
    add("--images", type=int, nargs="*", default=[1000, 20_000], help="images for val.py")
    opt = parser.parse_args()
    rows = [row for part in measurements(opt.epochs, opt.images, opt.weights.resolve()) for row in part]
    publish("memory", rows, "part", order=lambda row: row["part"])


if __name__ == "__main__":
    run_cli(main)
