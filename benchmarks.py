"""Size, accuracy and speed of one model, or of several, in every format that is installed here.

    python benchmarks.py --weights yolov5s.pt --data data/coco128.yaml --imgsz 640
    python benchmarks.py --weights dense.pt pruned_model.pt --data my.yaml --threads 2

Every model is exported in every format and precision into the run's folder, validated, and timed on one image. The
latencies are taken in turns, so that a busy moment of the machine hits all of them.
"""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from export import CPU, megabytes
from models import checkpoint, formats
from models.formats import PRECISIONS, Detector, Format, export_options
from models.yolo import Model, fused, on_device, whole_strides
from training.settings import data_of_model, resolve
from utils.data.calibration import CalibrationImages
from utils.data.config import read_data
from utils.device import select_device
from utils.errors import UserError, first_line, run_cli
from utils.files import new_run_folder
from utils.options import WEIGHTS_HELP, add_common, weights_or_newest
from utils.parser import Argv, HelpfulParser, at_least, fraction, from_python
from utils.plots.slimming import plot_latencies
from utils.slimming.cost import profile
from utils.slimming.timing import medians, synchronize
from utils.tables import text_table, write_csv
from val import dataset_loader, evaluate

TORCH = "torch"


@dataclass
class Entry:
    """A row of the table: a model in a format and a precision."""

    model: str
    format: str
    precision: str
    detector: Detector | None = None
    device: torch.device = CPU
    megabytes: float | None = None
    accuracy: float | None = None      # mAP50-95
    ms: float | None = None            # an image
    reason: str = ""                   # why there is no figure


def parse(argv: Argv = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__, like="benchmarks.py")
    add = parser.add_argument
    add("--weights", nargs="+",
        help=f"checkpoints: dense, slim, official; the first one is the measure ({WEIGHTS_HELP})")
    add_common(parser, "runs/benchmarks")
    add("--include", nargs="+", choices=[TORCH, *formats.runtimes()], help="runtimes (all that are installed)")
    add("--precisions", nargs="+", choices=list(PRECISIONS), help="precisions (all that a format has)")
    add("--half", action="store_true", help="fp16 and nothing else")
    add("--threads", type=at_least(1), help="threads of the CPU (PyTorch's choice)")
    add("--runs", type=at_least(1), default=50, help="turns of the timing")
    add("--calibration-images", type=at_least(1), default=100, metavar="N", help="training images for int8")
    add("--hard-fail", nargs="?", const=True, default=False, type=fraction(zero=False, one=False), metavar="MAP",
        help="end with exit code 2 at the first format that fails, or whose mAP50-95 is not above this number")
    add("--noval", action="store_true", help="do not measure accuracy")
    add("--noplots", action="store_true", help="make no picture")
    parser.apart("--half", ["--precisions"], "fp16 and nothing else, {} says which as well")
    opt = parser.parse_args(argv)
    if opt.noval and opt.hard_fail not in (False, True):
        raise UserError(f"--hard-fail {opt.hard_fail:g}: is about mAP, --noval measures none; leave one of the two out")
    opt.batch_size = opt.batch_size or 1  # as in YOLOv5: a batch of one image
    opt.precisions = ["fp16"] if opt.half else opt.precisions or list(PRECISIONS)
    return opt


def main(argv: Argv = None) -> Path:
    """Command line -> the folder with table, csv and picture."""
    opt = parse(argv)
    if opt.threads:
        torch.set_num_threads(opt.threads)
    opt.weights = opt.weights or [weights_or_newest()]
    read = [checkpoint.read(path) for path in opt.weights]
    if not opt.noval and not opt.data and not (read[0].get("opt") or {}).get("data"):
        opt.data = data_of_model(read[0], opt.weights[0], read[0]["names"], opt.single_cls)
    opt = resolve(opt, read[0])
    device = select_device(opt.device)
    models = {name: checkpoint.build(data, path=path)
              for name, path, data in zip(titles(opt.weights), opt.weights, read)}
    opt.imgsz = whole_strides(opt.imgsz, max(model.divisor for model in models.values()))
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    calibration = Calibration(opt)
    entries: list[Entry] = []
    for name, model in tqdm(models.items(), desc="exporting", leave=False, disable=None):
        entries += export_all(name, model, opt, folder, device, calibration)
    if not entries:
        raise UserError("--include, --precisions: none of these formats has one of these precisions here; "
                        "give others, or install what is missing (pip install -r requirements-export.txt)")
    for entry in tqdm(entries, desc="measuring", leave=False, disable=None):
        measure_accuracy(entry, opt)
    time_in_turns(entries, opt, next(iter(models.values())).yaml["ch"])
    rows = [row(entry, entries[0]) for entry in entries]
    print(text_table(shown(rows), [key for key in rows[0] if key != "reason"] + [""]))
    print(f"{opt.imgsz} px, batch {opt.batch_size}, {device}, {torch.get_num_threads()} threads on the CPU; "
          f"medians of {opt.runs} turns")
    write_csv(folder / "benchmarks.csv", rows)
    if not opt.noplots and any(entry.ms for entry in entries):
        plot_latencies(rows, folder / "benchmarks.png")
    print(f"Results in {folder}")
    return folder


def titles(paths: list[str]) -> list[str]:
    """Short names of checkpoints that tell them apart: the files' names, or as many folders as that takes."""
    parts = [Path(path).with_suffix("").absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("--weights: the same file twice")


class Calibration:
    """The training images for int8. They are read once, when the first format asks for them."""

    def __init__(self, opt: Namespace):
        self.opt = opt
        self.images: CalibrationImages | None = None

    def __call__(self) -> CalibrationImages:
        if self.images is None:
            opt = self.opt
            config = read_data(opt.data, needed=("train",))
            self.images = CalibrationImages(config, (opt.imgsz, opt.imgsz), opt.calibration_images,
                                            batch=opt.batch_size, single_cls=opt.single_cls)
        return self.images


def export_all(name: str, model: Model, opt: Namespace, folder: Path, device: torch.device,
               calibration: Calibration) -> list[Entry]:
    """The model in PyTorch, and in every format and precision that was asked for. What fails has a reason."""
    entries = []
    wanted = opt.include or [TORCH, *formats.runtimes()]
    if TORCH in wanted:
        ready, size = on_device(fused(model), device), profile(model, opt.imgsz, model.yaml["ch"]).megabytes
        entries.append(Entry(name, TORCH, "fp32", ready, device, size))
        if "fp16" in opt.precisions and device.type == "cuda":
            entries.append(Entry(name, TORCH, "fp16", on_device(fused(model), device).half(), device, size / 2))
    for runtime, fmt in formats.runtimes().items():
        for precision in fmt.precisions if runtime in wanted else ():
            if precision in opt.precisions and (opt.include or not fmt.missing(precision)):
                entry = Entry(name, runtime, precision)
                attempt(entry, partial(export, entry, model, fmt, opt, folder, device, calibration), opt.hard_fail)
                entries.append(entry)
    return entries


def export(entry: Entry, model: Model, fmt: Format, opt: Namespace, folder: Path, device: torch.device,
           calibration: Calibration) -> None:
    """Write a model in a format, and load it again."""
    shape = (opt.batch_size, model.yaml["ch"], opt.imgsz, opt.imgsz)
    options = export_options(model, shape, entry.precision,
                             calibration=calibration() if entry.precision == "int8" else ())
    weights, entry.device = folder / f"{entry.model.replace('/', '-')}.pt", device
    path, entry.detector = fmt.there_and_back(model, weights, options, device)
    entry.megabytes = megabytes(path)


def attempt(entry: Entry, step: Callable[[], None], hard_fail: bool | float) -> None:
    """Take a step. Where it fails the row tells the reason, and the others go on."""
    try:
        step()
    except Exception as error:  # formats and their runtimes fail in all ways
        if hard_fail:
            raise UserError(f"{entry.model}, {entry.format} {entry.precision}: {first_line(error)}") from error
        entry.reason, entry.detector = first_line(error, 60), None


def measure_accuracy(entry: Entry, opt: Namespace) -> None:
    """mAP50-95 on the val images, all of them letterboxed to the same square."""
    if opt.noval or entry.detector is None:
        return

    def step() -> None:
        assert entry.detector is not None
        loader = dataset_loader(entry.detector, opt, square=True)  # the shape that files of fixed size take
        entry.accuracy = evaluate(entry.detector, loader, entry.device, single_cls=opt.single_cls).ap.map
        if opt.hard_fail not in (False, True) and not entry.accuracy > opt.hard_fail:
            raise UserError(f"mAP50-95 is {entry.accuracy:.4g}, not above --hard-fail {opt.hard_fail:g}")

    attempt(entry, step, opt.hard_fail)


def time_in_turns(entries: list[Entry], opt: Namespace, channels: int) -> None:
    """Median milliseconds per image of all rows, one call of each in turn."""
    def call(entry: Entry, images: torch.Tensor) -> None:
        assert entry.detector is not None
        entry.detector(images)
        synchronize(entry.device)

    running = [entry for entry in entries if entry.detector is not None]
    calls = []
    for entry in running:
        assert entry.detector is not None
        images = torch.rand(opt.batch_size, channels, opt.imgsz, opt.imgsz)
        images = images.to(entry.device, entry.detector.dtype)
        if entry.format == TORCH:
            images = images.contiguous(memory_format=torch.channels_last)
        calls.append(partial(call, entry, images))
    with torch.inference_mode():
        for entry, ms in zip(running, medians(calls, opt.runs, seconds=120.0)):
            entry.ms = ms / opt.batch_size


def row(entry: Entry, first: Entry) -> dict[str, Any]:
    """An entry as a row of the csv; what is not known is empty. `faster`: times faster than the first entry."""
    faster = first.ms / entry.ms if first.ms and entry.ms else ""
    figures = {"MB": entry.megabytes, "mAP50-95": entry.accuracy, "ms": entry.ms, "faster": faster}
    return {"model": entry.model, "format": entry.format, "precision": entry.precision,
            **{key: "" if value is None else value for key, value in figures.items()}, "reason": entry.reason}


def shown(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows as cells of the table on the screen; a reason stands behind its row."""
    formats_of = {"MB": "{:.2f}", "mAP50-95": "{:.3f}", "ms": "{:.1f}", "faster": "{:.2f}x"}
    return [[formats_of.get(key, "{}").format(value) if value != "" else "" for key, value in row.items()]
            for row in rows]


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
