"""How fast detectors are, in each runtime that is here."""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from models.formats import export_options, formats, runtimes
from models.pruning import torch_latency
from models.yolo import Model
from utils.errors import UserError, first_line
from utils.slimming.timing import medians

BATCHES = (1, 16)


def milliseconds(models: Sequence[Model], imgsz: int, device: torch.device, runtime: str = "torch",
                 precision: str = "fp32") -> dict[str, list[float]]:
    """How measured -> median milliseconds per image of each model, in turns.

    In PyTorch, in onnxruntime where it is installed, and in another one of runtimes(), or another precision, as well.
    """
    found: dict[str, list[float]] = {}
    for batch in BATCHES:
        try:
            found[f"torch, batch {batch}"] = torch_latency(models, imgsz, device, batch, runs=max(20 // batch, 5))
        except torch.OutOfMemoryError:
            print(f"note: batch {batch} does not fit into the memory of {device}, its speed is not measured")
    for batch in BATCHES:
        if ms := runtime_latency(models, "onnx", imgsz, batch, runs=max(20 // batch, 5)):
            found[f"{measured_in('onnxruntime')}, batch {batch}"] = ms
    if runtime != "torch" and (wanted := f"{measured_in(runtime, precision)}, batch 1") not in found:
        try:
            found[wanted] = stopwatch(runtime, imgsz, device, precision=precision)(models)
        except UserError as error:
            print(f"note: {error}")
    return found


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

    def measure(models: Sequence[Model]) -> list[float]:
        found = runtime_latency(models, fmt.name, imgsz, batch, precision=precision)
        if found is None:
            raise UserError(f"--runtime {runtime}: can't run this model; the note above says why")
        return found

    return measure


def runtime_latency(models: Sequence[Model], name: str, imgsz: int, batch: int = 1, runs: int = 20,
                    precision: str = "fp32") -> list[float] | None:
    """Median milliseconds per image of the models in another format (a name of formats()), on the CPU.

    The runtime has as many threads as PyTorch; the models are measured in turns. What int8 is calibrated on is random,
    for speed does not depend on it. None, with a note where it is not for want of a package, if a model can't be
    written or run.
    """
    wanted = formats()[name]
    if wanted.missing(precision):
        return None
    calls: list[Callable[[], object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, model in enumerate(models):
            image = torch.rand(batch, model.yaml["ch"], imgsz, imgsz)
            options = export_options(model, image.shape, precision, calibration=[image[:1].numpy()] * 2)
            try:
                detector = wanted.there_and_back(model, Path(folder) / f"{i}.pt", options, torch.device("cpu"))[1]
                calls.append(partial(detector, image.to(detector.dtype)))
                calls[-1]()
            except Exception as error:  # a user's own block may have no counterpart in a format
                print(f"note: not measured in {name} ({first_line(error, 100)})")
                return None
        return [ms / batch for ms in medians(calls, runs)]
