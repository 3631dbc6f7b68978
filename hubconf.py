"""Models for torch.hub: official, your own, slim, and those that export.py wrote.

    model = torch.hub.load("path/to/this/repository", "custom", path="best.pt", source="local")
    results = model(["a.jpg", "b.jpg"])
    results.print()

`python hubconf.py --model yolov5n` tries one out. torch.hub lists every callable of this file as a model, so modules
are imported, not functions.
"""
from __future__ import annotations

import typing

import torch

from models import autoshape as shaping
from models import checkpoint, formats, schema
from models import yolo as building
from utils import device as devices
from utils import errors, files, parser

dependencies = ["torch", "torchvision", "numpy", "cv2", "PIL", "yaml", "tqdm"]

Device = str | int | torch.device | None
Loaded = torch.nn.Module | formats.Detector


def custom(path: str | list[str] = "path/to/model.pt", autoshape: bool = True, _verbose: bool = True,
           device: Device = None) -> Loaded:
    """A checkpoint (dense, slim, official) or a file that export.py wrote; of several an ensemble.

    autoshape: with letterbox and NMS inside, for images of all kinds (models.autoshape.AutoShape); else the detector
    itself, which takes (B, 3, H, W) in 0..1: of a .pt the Model with its BatchNorms, for training. device: "cpu", 0,
    "cuda:1", a torch.device; None: the first GPU, if there is one. UserError in one line for what can't be loaded.
    """
    chosen = devices.select_device("" if device is None else str(device))
    detector, data = formats.load(path, chosen)
    if not autoshape:
        return checkpoint.build(data, chosen) if isinstance(detector, building.Model) else detector
    model = shaping.AutoShape(detector, chosen, data.get("imgsz"))
    if _verbose:
        print(f"{path}: {len(model.names)} classes, {model.imgsz} px, on {chosen}")
    return model


def _official(name: str) -> typing.Callable[..., Loaded]:
    """The entry point of one of YOLOv5's own sizes."""

    def create(pretrained: bool = True, channels: int = 3, classes: int = 80, autoshape: bool = True,
               _verbose: bool = True, device: Device = None) -> Loaded:
        """A model of YOLOv5's own sizes; arguments as in custom, and:

        pretrained: with the official weights, of <name>.pt in the working directory, which is fetched where it is
        missing. Other numbers of channels or classes than 3 and 80 keep the weights that fit. Such a model, and one
        that is not pretrained, is there to be trained: it is the Model itself, in training mode, as in YOLOv5.
        """
        if pretrained and channels == 3 and classes == 80:
            return custom(f"{name}.pt", autoshape, _verbose, device)
        chosen = devices.select_device("" if device is None else str(device))
        if not schema.whole(1, 100_000).fits(classes):
            raise errors.UserError(f"classes: must be a whole number from 1 on, not {classes!r}")
        model = building.Model(f"{name}.yaml", ch=channels, nc=classes)
        if pretrained:
            checkpoint.load_fitting(model, f"{name}.pt")
            names = checkpoint.read(f"{name}.pt")["names"]
            model.names = names if len(names) == classes else model.names
        return model.to(chosen)

    create.__name__ = create.__qualname__ = name
    return create


yolov5n, yolov5s, yolov5m, yolov5l, yolov5x = (_official(f"yolov5{size}") for size in "nsmlx")
yolov5n6, yolov5s6, yolov5m6, yolov5l6, yolov5x6 = (_official(f"yolov5{size}6") for size in "nsmlx")


def _main() -> None:
    """Load a model and look for objects in a picture of this repository."""
    flags = parser.HelpfulParser(_main.__doc__)
    flags.add_argument("--model", default="yolov5s", help="one of YOLOv5's sizes, or the path of a checkpoint")
    detector: typing.Any = custom(flags.parse_args().model)
    detector(files.ROOT / "img/detections.jpg").print()


if __name__ == "__main__":
    errors.run_cli(_main)
