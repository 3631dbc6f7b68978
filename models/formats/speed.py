"""How fast detectors are, in each runtime that is here."""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from models.formats import Format, export_options, formats, runtimes
from models.pruning import torch_latency
from models.yolo import Model, fused, on_device
from utils.errors import UserError, first_line
from utils.slimming.timing import medians, prepared

BATCHES = (1, 16)


def milliseconds(models: Sequence[Model], imgsz: int, device: torch.device, runtime: str = "torch",
                 precision: str = "fp32") -> dict[str, list[float]]:
    """How they were measured -> median milliseconds per image of each model, timed in turns.

    In PyTorch, in onnxruntime where it is installed, and in another one of runtimes(), or another precision, as well.
    """
    times: dict[str, list[float]] = {}
    for batch in BATCHES:
        try:
            times[f"torch, batch {batch}"] = torch_latency(models, imgsz, device, batch, runs=max(20 // batch, 5))
        except torch.OutOfMemoryError:
            print(f"note: batch {batch} does not fit into the memory of {device}, its speed is not measured")
    for batch in BATCHES:
        if ms := runtime_latency(models, "onnx", imgsz, batch, runs=max(20 // batch, 5)):
            times[f"{measured_in('onnxruntime')}, batch {batch}"] = ms
    if runtime != "torch" and (how := f"{measured_in(runtime, precision)}, batch 1") not in times:
        try:
            times[how] = stopwatch(runtime, imgsz, device, precision=precision)(models)
        except UserError as error:
            print(f"note: {error}")
    return times


def measured_in(runtime: str, precision: str = "fp32") -> str:
    """What milliseconds() calls a runtime."""
    name = f"{runtime} {precision}"
    return {"torch fp32": "torch", "onnxruntime fp32": "onnxruntime on the CPU"}.get(name, name)


def stopwatch(runtime: str, imgsz: int, device: torch.device, batch: int = 1,
              precision: str = "fp32") -> Callable[[Sequence[Model]], list[float]]:
    """A function that gives the milliseconds per image of models in "torch", or in one of runtimes().

    UserError where the runtime has no such precision, or is not installed. The function raises it for a model that
    the runtime can't run.
    """
    if runtime == "torch":
        if precision == "int8":
            raise UserError("--int8: --runtime torch has none; give --runtime " +
                            " or ".join(name for name, f in runtimes().items() if "int8" in f.precisions))
        return lambda models: torch_latency(models, imgsz, device, batch)
    fmt = runtimes()[runtime]
    if precision not in fmt.precisions:
        raise UserError(f"--int8: --runtime {runtime} has none here")
    fmt.need(f"--runtime {runtime}", precision)

    def ms_per_image(models: Sequence[Model]) -> list[float]:
        ms = runtime_latency(models, fmt.name, imgsz, batch, precision=precision)
        if ms is None:
            raise UserError(f"--runtime {runtime}: can't run this model; the note above says why")
        return ms

    return ms_per_image


def runtime_latency(models: Sequence[Model], name: str, imgsz: int, batch: int = 1, runs: int = 20,
                    precision: str = "fp32") -> list[float] | None:
    """Median milliseconds per image of the models in another format (a name of formats()), on the CPU.

    The runtime has as many threads as PyTorch; the models are measured in turns. None if a package is missing, or,
    with a note, if a model can't be written or run.
    """
    fmt = formats()[name]
    if fmt.missing(precision):
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            calls = [_call(Timed(model, imgsz, fmt, precision), Path(folder) / f"{i}.pt", torch.device("cpu"), batch)
                     for i, model in enumerate(models)]
        except Exception as error:  # a user's own block may have no counterpart in a format
            print(f"note: not measured in {name} ({first_line(error, 100)})")
            return None
        return [ms / batch for ms in medians(calls, runs)]


class Timed(NamedTuple):
    """What is timed: a model, on square images of imgsz pixels, in a format's runtime, or in PyTorch."""

    model: Model
    imgsz: int
    format: Format | None = None
    precision: str = "fp32"


def in_turns(timed: Sequence[Timed], device: torch.device, runs: int = 20) -> list[float]:
    """Median milliseconds per image of each, timed in turns; on `device` in PyTorch, else on the CPU."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        return medians([_call(one, Path(folder) / f"{i}.pt", device) for i, one in enumerate(timed)], runs)


def _call(timed: Timed, path: Path, device: torch.device, batch: int = 1) -> Callable[[], object]:
    """A call that computes a random batch, and has done so once. path: where a file may be written.

    What int8 is calibrated on is random, for speed does not depend on it.
    """
    model, imgsz, fmt, precision = timed
    image = torch.rand(batch, model.yaml["ch"], imgsz, imgsz)
    if fmt is None:
        return prepared(on_device(fused(model), device), image.to(device))
    options = export_options(model, image.shape, precision, calibration=[image[:1].numpy()] * 2)
    detector = fmt.there_and_back(model, path, options, torch.device("cpu"))[1]
    call = partial(detector, image.to(detector.dtype))
    call()
    return call
