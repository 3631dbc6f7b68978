"""Command-line flags that the scripts share, and where a setting comes from when its flag is not given.

A flag beats the data yaml's `defaults:` section (the built-in set carries its own), and that beats YOLOv5's defaults.
"""
from __future__ import annotations

from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import ROOT, newest, read_yaml_mapping
from utils.optim import OPTIMIZERS

BUILT_IN_DATA = "data/shapes.yaml"
# What holds when neither a flag nor the data yaml says otherwise: YOLOv5's defaults.
DEFAULTS: dict[str, Any] = {"weights": "yolov5s.pt", "cfg": "", "imgsz": 640, "epochs": 100, "batch_size": 16, "nbs": 64,
                            "optimizer": "SGD", "cache": None, "hyp": None}
HYP_FOR = {"SGD": "data/hyps/hyp.scratch-low.yaml", "Adam": "data/hyps/hyp.adamw.yaml", "AdamW": "data/hyps/hyp.adamw.yaml"}


class HelpfulParser(ArgumentParser):
    """An ArgumentParser that shows defaults, and shows none where the default is 'not given'."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)


class _Formatter(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default in (None, False, SUPPRESS, "") else super()._get_help_string(action)


def add_common(parser: ArgumentParser, project: str) -> None:
    """Flags of every script: data, image size, batch, device, where to write."""
    parser.add_argument("--data", help=f"data yaml (not given: the built-in set, {BUILT_IN_DATA}, or the checkpoint's)")
    parser.add_argument("--imgsz", "--img", "--img-size", type=int, help="image size in pixels (640)")
    parser.add_argument("--batch-size", type=int, help="images a batch, over all processes (16)")
    parser.add_argument("--device", default="", help="cpu, or the number of a GPU (the first GPU if there is one)")
    parser.add_argument("--workers", type=int, default=8, help="most loader processes; never more than there are cores")
    parser.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    parser.add_argument("--project", default=project, help="folder of the runs")
    parser.add_argument("--name", default="exp", help="name of this run")
    parser.add_argument("--exist-ok", action="store_true", help="write into an existing run folder")


def training_parser(description: str | None, project: str = "runs/train") -> HelpfulParser:
    """The flags of train.py; train_sparsity.py and finetune_pruned.py add theirs."""
    parser = HelpfulParser(description)
    add = parser.add_argument
    add("--weights", help="checkpoint to start from, ours or an official one; '' = from scratch (yolov5s.pt)")
    add("--cfg", help="model yaml; not needed with --weights, a checkpoint knows its own")
    add_common(parser, project)
    add("--hyp", help="hyper-parameter yaml (data/hyps/hyp.scratch-low.yaml; hyp.adamw.yaml with Adam and AdamW)")
    add("--epochs", type=int, help="epochs in all (100)")
    add("--nbs", type=int, help="nominal batch: gradients are gathered until a step has seen about so many images (64)")
    add("--rect", action="store_true", help="rectangular batches, no mosaic, no shuffling")
    add("--resume", nargs="?", const=True, default=False, help="go on with an interrupted run: its last.pt, or the newest")
    add("--nosave", action="store_true", help="keep only the last epoch's checkpoint")
    add("--noval", action="store_true", help="validate only after the last epoch")
    add("--noautoanchor", action="store_true", help="keep the anchors as they are")
    add("--noplots", action="store_true", help="make no pictures")
    add("--cache", nargs="?", const="ram", choices=["ram", "disk"], help="keep decoded images in ram, or on disk away from the data")
    add("--amp", choices=["off", "bf16", "fp16"], help="mixed precision (fp16 on a GPU, off on a CPU)")
    add("--optimizer", choices=OPTIMIZERS, help="optimizer (SGD)")
    add("--adam", action="store_true", help="short for --optimizer AdamW; its first rate is 0.001 (data/hyps/hyp.adamw.yaml)")
    add("--multi-scale", action="store_true", help="every batch at another size, 0.5 to 1.5 times --imgsz")
    add("--image-weights", action="store_true", help="draw images with rare and badly detected classes more often")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all processes (several GPUs)")
    add("--cos-lr", action="store_true", help="cosine learning-rate schedule instead of a linear one")
    add("--label-smoothing", type=float, default=0.0, help="epsilon of label smoothing")
    add("--patience", type=int, default=100, help="epochs without a better fitness before stopping (0 = never stop)")
    add("--freeze", nargs="+", type=int, default=[0], help="layers to freeze: a count (10 = backbone) or a list (0 1 2)")
    add("--save-period", type=int, default=-1, help="also keep a checkpoint every so many epochs")
    add("--seed", type=int, default=0, help="seed of weights and augmentation")
    return parser


def resolve(opt: Namespace, checkpoint: dict[str, Any] | None = None) -> Namespace:
    """Fill in what was not given. `checkpoint` (read()'s dict) supplies data, image size, optimizer and hyper-parameters
    to the scripts that go on with somebody's training. Returns a new Namespace with plain values only.

    .data is then a DataConfig's file as text, .hyp a dict.
    """
    from utils.data_config import read_data

    opt = Namespace(**vars(opt))
    if getattr(opt, "adam", False):
        opt.optimizer = opt.optimizer or "AdamW"
    earlier = (checkpoint or {}).get("opt") or {}
    if earlier:
        opt.data = opt.data or earlier.get("data")
        opt.imgsz = opt.imgsz or earlier.get("imgsz")
        opt.single_cls = opt.single_cls or earlier.get("single_cls", False)
        if hasattr(opt, "hyp") and not opt.hyp and not opt.optimizer:  # a rate belongs to its optimizer: both or neither
            opt.hyp, opt.optimizer = earlier.get("hyp"), earlier.get("optimizer")
    opt.data = str(opt.data or ROOT / BUILT_IN_DATA)
    suits = read_data(opt.data).defaults
    unknown = suits.keys() - DEFAULTS.keys()
    if unknown:
        raise UserError(f"{opt.data}: defaults has unknown keys {', '.join(sorted(unknown))}; known are {', '.join(DEFAULTS)}")
    for key, value in {**DEFAULTS, **suits}.items():
        if hasattr(opt, key) and getattr(opt, key) is None:
            # The architecture is one setting in two flags: who names one does not want the other's default.
            if key in ("weights", "cfg") and getattr(opt, "weights" if key == "cfg" else "cfg", None) and key in suits:
                value = ""
            setattr(opt, key, value)
    if hasattr(opt, "hyp"):
        opt.hyp = read_hyp(opt.hyp or HYP_FOR[opt.optimizer])
    return check_ranges(opt)


def read_hyp(hyp: str | Path | dict) -> dict[str, float]:
    """Hyper-parameters with every key present and numeric. A file name is looked for as given, then in data/hyps/."""
    reference = read_yaml_mapping(ROOT / HYP_FOR["SGD"], "--hyp")
    if not isinstance(hyp, dict):
        path = next((p for p in (Path(hyp), ROOT / hyp, ROOT / "data/hyps" / hyp) if p.is_file()), Path(hyp))
        hyp = read_yaml_mapping(path, "--hyp")
    for key, value in hyp.items():
        if key in reference and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"--hyp: '{key}' must be a number, not {value!r}")
    unknown = hyp.keys() - reference.keys() - {"anchors", "label_smoothing", "iou_t", "giou"}  # stand in YOLOv5's files, old or new, without effect here
    if unknown:
        raise UserError(f"--hyp: unknown '{sorted(map(str, unknown))[0]}'; known are {', '.join(reference)}")
    values = {**reference, **{k: float(v) for k, v in hyp.items() if k in reference}}
    for key, value in values.items():
        if not 0 <= value < float("inf"):
            raise UserError(f"--hyp: '{key}' must not be negative nor infinite, but is {value:g}")
    return values


def check_ranges(opt: Namespace) -> Namespace:
    """Refuse numbers that can't work, by the flag's name."""
    for name, least in (("imgsz", 32), ("epochs", 1), ("batch_size", 1), ("nbs", 1), ("workers", 0), ("patience", 0)):
        value = getattr(opt, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if not 0 <= getattr(opt, "label_smoothing", 0) < 1:
        raise UserError(f"--label-smoothing {opt.label_smoothing}: must be at least 0 and below 1")
    return opt


def resume_file(opt: Namespace) -> Path:
    """The last.pt that --resume means."""
    if isinstance(opt.resume, str):
        path = Path(opt.resume)
        return path / "weights" / "last.pt" if path.is_dir() else path
    path_or_none = newest(f"{opt.project}/*/weights/last.pt")
    if path_or_none is None:
        raise UserError(f"--resume: no run under {opt.project}; give the file: --resume path/to/last.pt")
    return path_or_none
