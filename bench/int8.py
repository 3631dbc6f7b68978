"""What int8 costs in accuracy, on val and on test images, in every runtime that has it.

    python bench/int8.py --weights slim0.pt slim1.pt slim2.pt --data bccd/data.yaml     # a minute a model

The models should be runs of one command with several seeds: the table shows their mean. Activations are measured on 100
training images. Writes bench/results/int8.csv.
"""
from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from columns import Row, publish

import export
from models import checkpoint, formats
from models.yolo import fused, on_device
from utils.data.config import read_data
from utils.data.loader import validation_loader
from utils.errors import run_cli
from utils.parser import HelpfulParser
from val import evaluate

CPU = torch.device("cpu")


def measure_files(weights: str, data: str, folder: Path, images: int) -> list[Row]:
    """mAP50-95 of a checkpoint, a row per split and runtime; "torch" is fp32."""
    trained = checkpoint.read(weights)
    model = checkpoint.build(trained)
    opt = export.parse(["--weights", weights, "--int8", "--data", data, "--calibration-images", str(images)])
    options = export.options_of(opt, model, trained)
    detectors: dict[str, formats.Detector] = {"torch": on_device(fused(model), CPU)}
    for runtime, fmt in formats.runtimes().items():
        if "int8" in fmt.precisions and not fmt.missing("int8"):
            detectors[runtime] = fmt.there_and_back(model, folder / "m.pt", options, CPU)[1]
    rows = []
    for split in ("val", "test"):
        loader = validation_loader(read_data(data), split, options.metadata["imgsz"][0], 1, model.divisor,
                                   workers=2, rect=False)
        rows += [{"weights": Path(weights).parent.parent.name or Path(weights).stem, "split": split, "runtime": runtime,
                  "map": evaluate(detector, loader, CPU).ap.map} for runtime, detector in detectors.items()]
    return rows


def main() -> None:
    """Measure, write the csv, print the table."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, help="checkpoints")
    add("--data", required=True, help="data yaml with train, val and test")
    add("--calibration-images", type=int, default=100, help="training images")
    opt = parser.parse_args()
    rows = []
    for weights in opt.weights:
        with TemporaryDirectory() as folder:
            rows += measure_files(weights, opt.data, Path(folder), opt.calibration_images)
    publish("int8", rows)


if __name__ == "__main__":
    run_cli(main)
