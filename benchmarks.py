"""Size, accuracy and speed of one model, or of several, in every format that is installed here.

    python benchmarks.py --weights yolov5s.pt --data data/coco128.yaml --imgsz 640
    python benchmarks.py --weights dense.pt pruned_model.pt --data my.yaml --threads 2

Every model is exported in every format and precision into the run's folder, validated, and timed on one image. The
latencies are taken in turns, so that a busy moment of the machine hits all of them.
"""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

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
    imgsz: int = 0                     # pixels; 0: as the command says
    megabytes: float | None = None
    accuracy: float | None = None      # mAP50-95
    ms: float | None = None            # an image
    reason: str = ""                   # why there is no figure

    def summary(self) -> str:
        """What is known of it before the timing, in a line."""
        parts = [f"{self.megabytes:.2f} MB"] if self.megabytes else []
        parts += [f"mAP50-95 {self.accuracy:.3f}"] if self.accuracy is not None else []
        return f"{self.model}, {self.format} {self.precision}: {self.reason or ', '.join(parts)}"


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
    saved = [checkpoint.read(path) for path in opt.weights]
    if not opt.noval and not opt.data and not (saved[0].get("opt") or {}).get("data"):
        opt.data = data_of_model(saved[0], opt.weights[0], saved[0]["names"], opt.single_cls)
    opt = resolve(opt, saved[0])
    device = select_device(opt.device)
    models = {name: checkpoint.build(data, path=path)
              for name, path, data in zip(titles(opt.weights), opt.weights, saved)}
    opt.imgsz = whole_strides(opt.imgsz, max(model.divisor for model in models.values()))
    if not (kinds := chosen(opt, device)):
        raise UserError("--include, --precisions: none of these formats has one of these precisions here; "
                        "give others, or install what is missing (pip install -r requirements-export.txt)")
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    calibration = Calibration(opt)
    rows = measured_rows((entry_of(name, model, *kind, opt, folder, device, calibration)
                          for name, model in models.items() for kind in kinds), opt)
    print(table(rows))
    print(f"{opt.imgsz} px, batch {opt.batch_size}, {device}, {torch.get_num_threads()} threads on the CPU; "
          f"medians of {opt.runs} turns")
    write_csv(folder / "benchmarks.csv", rows)
    if not opt.noplots and any(row["ms"] for row in rows):
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


def chosen(opt: Namespace, device: torch.device) -> list[tuple[str, str]]:
    """Format and precision of every row of a model. PyTorch's fp32 is always there: the others are compared with it."""
    names = opt.include or [TORCH, *formats.runtimes()]
    kinds = [(TORCH, "fp32")] if TORCH in names else []
    if kinds and device.type == "cuda" and "fp16" in opt.precisions:
        kinds.append((TORCH, "fp16"))
    return kinds + [(runtime, precision) for runtime, fmt in formats.runtimes().items() if runtime in names
                    for precision in fmt.precisions
                    if precision in opt.precisions and (opt.include or not fmt.missing(precision))]


def entry_of(name: str, model: Model, kind: str, precision: str, opt: Namespace, folder: Path, device: torch.device,
             calibration: Calibration) -> Entry:
    """The model in one format and precision. Where that fails the entry has a reason."""
    if kind == TORCH:
        return in_torch(name, model, opt.imgsz, device, precision)
    entry = Entry(name, kind, precision)
    attempt(entry, partial(export, entry, model, formats.runtimes()[kind], opt, folder, device, calibration),
            opt.hard_fail)
    return entry


def in_torch(name: str, model: Model, imgsz: int, device: torch.device, precision: str = "fp32") -> Entry:
    """The model in PyTorch, fused."""
    ready, size = on_device(fused(model), device), profile(model, imgsz, model.yaml["ch"]).megabytes
    half = precision == "fp16"
    return Entry(name, TORCH, precision, ready.half() if half else ready, device, imgsz, size / 2 if half else size)


def measured_rows(entries: Iterable[Entry], opt: Namespace) -> list[dict[str, Any]]:
    """Rows with accuracy and time. Prints the accuracy of each as soon as it is known: all may take minutes."""
    ready = []
    for entry in entries:
        measure_accuracy(entry, opt)
        print(entry.summary(), flush=True)
        ready.append(entry)
    time_in_turns(ready, opt)
    return [row(entry, ready[0]) for entry in ready]


def measured_files(models: Mapping[str, tuple[Model, int]], files: Sequence[Path], precision: str,
                   flags: Argv) -> list[dict[str, Any]]:
    """Rows of models in PyTorch, and of files that export.py has made of the last one.

    models: by name, each with the pixels that it is for. precision: what the files were written in. flags: main()'s.
    """
    opt = parse(flags)
    device, (*_, name) = select_device(opt.device), models

    def entries() -> Iterator[Entry]:
        for title, (model, imgsz) in models.items():
            yield in_torch(title, model, imgsz, device)
        for path in files:
            fmt = formats.format_of(path)
            assert fmt is not None, path
            stored = precision if fmt.load else "fp16"  # YOLOv5's checkpoints are
            entry = Entry(name, fmt.runtime or fmt.name, stored, device=device, megabytes=megabytes(path))
            attempt(entry, partial(load, entry, path), opt.hard_fail)
            yield entry

    return measured_rows(entries(), opt)


def load(entry: Entry, path: Path) -> None:
    """Open a file that is there."""
    entry.detector = formats.load(path, entry.device)[0]


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
        sized = Namespace(**{**vars(opt), "imgsz": entry.imgsz or opt.imgsz})
        loader = dataset_loader(entry.detector, sized, square=True)  # the shape that files of fixed size take
        entry.accuracy = evaluate(entry.detector, loader, entry.device, single_cls=opt.single_cls).ap.map
        if opt.hard_fail not in (False, True) and not entry.accuracy > opt.hard_fail:
            raise UserError(f"mAP50-95 is {entry.accuracy:.4g}, not above --hard-fail {opt.hard_fail:g}")

    attempt(entry, step, opt.hard_fail)


def time_in_turns(entries: list[Entry], opt: Namespace) -> None:
    """Median milliseconds per image of all rows, one call of each in turn."""
    def call(entry: Entry, images: torch.Tensor) -> None:
        assert entry.detector is not None
        entry.detector(images)
        synchronize(entry.device)

    running = [entry for entry in entries if entry.detector is not None]
    calls = []
    for entry in running:
        assert entry.detector is not None
        side = entry.imgsz or opt.imgsz
        images = torch.rand(opt.batch_size, entry.detector.input_shape[1] or 3, side, side)
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


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text; a reason stands behind its row."""
    forms = {"MB": "{:.2f}", "mAP50-95": "{:.3f}", "ms": "{:.1f}", "faster": "{:.2f}x"}
    cells = [[forms.get(key, "{}").format(value) if value != "" else "" for key, value in row.items()] for row in rows]
    return text_table(cells, [key for key in rows[0] if key != "reason"] + [""])


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
