"""Command-line flags that the scripts share, and where a setting comes from when its flag is not given.

A flag beats the data yaml's `defaults:` section (the built-in set carries its own), and that beats YOLOv5's defaults.
"""
from __future__ import annotations

import math
import re
from argparse import (
    SUPPRESS,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
)
from collections.abc import Callable, Collection
from copy import deepcopy
from pathlib import Path
from typing import Any

from utils.data.config import read_data
from utils.errors import OneLineParser, UserError
from utils.files import ROOT
from utils.slimming.ranking import MIN_SHARE, SCORES
from utils.slimming.targets import TARGETS
from utils.text import read_yaml_mapping

BUILT_IN_DATA = "data/shapes.yaml"
MOST_FRACTIONS = 1000
# What holds when neither a flag nor the data yaml says otherwise: YOLOv5's defaults.
DEFAULTS: dict[str, Any] = {"weights": "yolov5s.pt", "cfg": "", "imgsz": 640, "epochs": 100, "batch_size": 16,
                            "nbs": None, "optimizer": "SGD", "cache": "auto", "hyp": None}
FIGURES = ("flops", "params")  # of TARGETS: those that are counted, not measured
LEAST = {"imgsz": 32, "epochs": 1, "batch_size": 1, "nbs": 1}
# Optimizer -> its hyper-parameters.
HYP_FOR = {"SGD": "data/hyps/hyp.scratch-low.yaml", "Adam": "data/hyps/hyp.adamw.yaml",
           "AdamW": "data/hyps/hyp.adamw.yaml"}
# They stand in YOLOv5's files, old or new, and have no effect here.
IGNORED_HYP = {"anchors", "label_smoothing", "iou_t", "giou"}


class HelpfulParser(OneLineParser):
    """A parser that shows defaults, and refuses a value in one line that names the flag."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ArgumentParser's. `.given` lists the flags that were given, by the names of their values."""
        unset = object()
        opt = super().parse_args(args, Namespace(**{a.dest: unset for a in self._actions if a.dest != "help"}))
        opt.given = [name for name, value in vars(opt).items() if value is not unset]
        for name in [name for name, value in vars(opt).items() if value is unset]:
            setattr(opt, name, deepcopy(self.get_default(name)))
        return opt

    def flags(self, opt: Namespace, leave: Collection[str] = ()) -> list[str]:
        """What was given, as a command line again; but for the values of the names in `leave`."""
        found: list[str] = []
        for action in self._actions:
            if action.dest not in opt.given or action.dest in leave:
                continue
            value, name = getattr(opt, action.dest), action.option_strings[0]
            values = value if isinstance(value, list) else [] if action.nargs == 0 else [value]
            found += [name, *map(str, values)]
        return found

    def error(self, message: str) -> Any:
        """Raise UserError; what a validator below refuses is said in its own words."""
        refused = re.fullmatch(r"argument (--[\w-]+)\S*: (.*: (?:must|give) .*)", message)
        if refused:
            raise UserError(f"{refused[1]} {refused[2]}")
        super().error(message)


class _Formatter(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default in (None, False, SUPPRESS, "") else super()._get_help_string(action)


# Validators: argparse's type= -----------------------------------------------------------------------------------------

def at_least(least: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """Numbers from `least` on, whole ones unless `kind` is float."""
    def parse(text: str) -> Any:
        if not (value := kind(text)) >= least:
            raise ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def fraction(zero: bool = True, one: bool = True, hint: str = "") -> Callable[[str], float]:
    """Numbers between 0 and 1; whether 0 and 1 themselves are among them."""
    def parse(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
            limits = f"{'at least' if zero else 'above'} 0 and {'at most' if one else 'below'} 1"
            raise ArgumentTypeError(f"{text}: must be {limits}{f' ({hint})' if hint else ''}")
        return value

    parse.__name__ = "float"
    return parse


def fractions(text: str) -> list[float]:
    """'0.1:0.8:0.1', first:last:step, -> [0.1, 0.2, ... 0.8]."""
    try:
        first, last, step = map(float, text.split(":"))
    except ValueError:
        first = last = step = 0.0
    if not 0 < first <= last < 1 or not step > 0:
        raise ArgumentTypeError(f"{text}: give first:last:step between 0 and 1, such as 0.1:0.8:0.1")
    if (last - first) / step > MOST_FRACTIONS:
        raise ArgumentTypeError(f"{text}: give a larger step; at most {MOST_FRACTIONS} values are shown")
    return [round(first + i * step, 6) for i in range(int((last - first) / step + 1e-6) + 1)]


def named_fraction(names: Collection[str], hint: str) -> Callable[[str], tuple[str, float]]:
    """'flops=0.5' -> ("flops", 0.5), for these names and numbers between 0 and 1."""
    def parse(text: str) -> tuple[str, float]:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in names or not 0 < value < 1:
            raise ArgumentTypeError(f"{text}: give {hint}, a number between 0 and 1")
        return name, value

    return parse


def path_or_none(text: str) -> str:
    """An absolute path; '' for 'none'."""
    return "" if text == "none" else str(Path(text).absolute())


# Flags ----------------------------------------------------------------------------------------------------------------

def add_run_flags(parser: ArgumentParser, project: str) -> None:
    """Flags of every script that writes a run's folder."""
    add = parser.add_argument
    add("--device", default="", help="cpu, or the number of a GPU (the first GPU if there is one)")
    add("--project", default=project, help="folder of the runs")
    add("--name", default="exp", help="name of this run")
    add("--exist-ok", action="store_true", help="write into an existing run folder")


def add_imgsz_flag(parser: ArgumentParser, help: str = "image size in pixels (640)", **options: Any) -> None:
    """--imgsz under all names that YOLOv5 has for it."""
    parser.add_argument("--imgsz", "--img", "--img-size", type=at_least(LEAST["imgsz"]), help=help, **options)


def add_common(parser: ArgumentParser, project: str) -> None:
    """Flags of every script that reads a data set."""
    add = parser.add_argument
    add("--data", help=f"data yaml (not given: the built-in set, {BUILT_IN_DATA}, or the checkpoint's)")
    add_imgsz_flag(parser)
    add("--batch-size", type=at_least(LEAST["batch_size"]), help="images a batch, over all processes (16)")
    add("--workers", type=at_least(0), default=8, help="most loader processes; never more than there are cores")
    add("--single-cls", action="store_true", help="treat all classes as one")
    add_run_flags(parser, project)


def add_detection_flags(parser: ArgumentParser, conf: float, iou: float, max_det: int) -> None:
    """Flags of the scripts that detect: val.py and detect.py."""
    add = parser.add_argument
    add("--conf-thres", type=fraction(), default=conf, help="least confidence of a detection")
    add("--iou-thres", type=fraction(), default=iou, help="IoU above which NMS takes two boxes for one")
    add("--max-det", type=at_least(1), default=max_det, help="most detections an image")
    add("--half", action="store_true", help="fp16 inference (GPU)")
    add("--augment", action="store_true", help="test-time augmentation: three sizes, one of them mirrored")


def training_parser(description: str | None, project: str = "runs/train") -> HelpfulParser:
    """The flags of train.py; train_sparsity.py and finetune_pruned.py add theirs."""
    parser = HelpfulParser(description)
    add = parser.add_argument
    add("--weights", help="checkpoint to start from, ours or an official one; '' = from scratch (yolov5s.pt)")
    add("--cfg", help="model yaml; not needed with --weights, a checkpoint knows its own")
    add_common(parser, project)
    add("--hyp", help="hyper-parameter yaml (data/hyps/hyp.scratch-low.yaml; hyp.adamw.yaml with Adam and AdamW)")
    add("--epochs", type=at_least(LEAST["epochs"]), help="epochs in all (100)")
    add("--nbs", type=at_least(LEAST["nbs"]),
        help="nominal batch: gradients are gathered until a step has seen about so many images (64; 32 or 16 where a "
             "run has few batches)")
    add("--rect", action="store_true", help="rectangular batches, no mosaic, no shuffling")
    add("--resume", nargs="?", const=True, default=False,
        help="go on with an interrupted run: its last.pt, or the newest")
    add("--nosave", action="store_true", help="keep only the last epoch's checkpoint")
    add("--noval", action="store_true", help="validate only after the last epoch")
    add("--noautoanchor", action="store_true", help="keep the anchors as they are")
    add("--noplots", action="store_true", help="make no pictures")
    add("--cache", nargs="?", const="ram", choices=["auto", "ram", "disk", "none"],
        help="keep decoded images in ram, or on disk away from the data (auto: in ram, where they are few)")
    add("--amp", choices=["off", "bf16", "fp16"], help="mixed precision (fp16 on a GPU, off on a CPU)")
    add("--optimizer", choices=list(HYP_FOR), help="optimizer (SGD)")
    add("--adam", action="store_true",
        help="short for --optimizer AdamW; its first rate is 0.001 (data/hyps/hyp.adamw.yaml)")
    add("--multi-scale", action="store_true", help="every batch at another size, 0.5 to 1.5 times --imgsz")
    add("--image-weights", action="store_true", help="draw images with rare and badly detected classes more often")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all processes (several GPUs)")
    add("--cos-lr", action="store_true", help="cosine learning-rate schedule instead of a linear one")
    add("--label-smoothing", type=fraction(one=False), default=0.0, help="epsilon of label smoothing")
    add("--patience", type=at_least(0), default=100,
        help="epochs without a better fitness before stopping (0 = never stop)")
    add("--teacher", type=path_or_none, metavar="PT",
        help="also learn from the outputs of this trained model, of the same classes; 'none': of no model")
    add("--teacher-weight", type=at_least(0, float), default=1.0, help="weight of the teacher's part of the loss")
    add("--freeze", nargs="+", type=at_least(0), default=[0],
        help="layers to freeze: a count (10 = backbone) or a list (0 1 2)")
    add("--save-period", type=int, default=-1, help="also keep a checkpoint every so many epochs")
    add("--seed", type=int, default=0, help="seed of weights and augmentation")
    add("--deterministic", action="store_true",
        help="on a GPU, too, the same seed gives the same result, as far as PyTorch can; slower")
    return parser


def add_sparsity_flags(parser: ArgumentParser) -> None:
    """The flags of train_sparsity.py that train.py does not have."""
    add = parser.add_argument
    half = "0.5 takes half of the prunable channels to 0"
    add("--st", action=BooleanOptionalAction, default=True, help="sparsity training; --no-st trains without it")
    add("--sparsity", choices=["l1", "target"],
        help="l1: the penalty of --sr (default); target: --target-sparsity, 0.5 where that is not given")
    add("--sr", type=at_least(0, float),
        help="strength of the L1 penalty on the BN scales (0.0001; 0 with --target-sparsity)")
    add("--sr-bias", type=at_least(0, float), help="strength of the L1 penalty on the BN shifts (10 * sr)")
    add("--target-sparsity", type=fraction(zero=False, one=False, hint=half),
        help="share of the prunable channels that are exactly 0 in the end, 0..1 "
             "(as many as fill up blocks of --round-to)")
    add("--target", type=named_fraction(FIGURES, "flops=0.5 or params=0.5"),
        help="instead of a share of channels: as many as leave this share of the FLOPs, or of the parameters")
    add("--shrink", action="store_true",
        help="with --target-sparsity or --target: cut the zeros in the run, which goes on, faster, with the slim model")
    add("--per-flop", action=BooleanOptionalAction, default=True,
        help="with --target-sparsity: rank channels by importance per FLOP, which makes the slim model faster; "
             "--no-per-flop: by importance")
    add("--round-to", type=at_least(1), metavar="N",
        help="with --target-sparsity: channels go in blocks, so that what is left of a layer is a multiple of N, as "
             "fast kernels want it; 1: one by one (16, or less where layers are too narrow for a choice)")
    add("--shortcuts", choices=["skip", "joint"], default="skip",
        help="channels that shortcuts couple are left alone (skip), or taken as one (joint)")
    add("--keep", nargs="+", default=[], metavar="PATTERN", help="BatchNorms to leave alone, such as 'model.0.*'")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="act on no BatchNorms but these")
    add("--percent", type=fraction(one=False),
        help="the prune.py --percent that every epoch's preview is for (0.5, or --target-sparsity)")
    add("--masked-val", type=at_least(0), default=0, metavar="N",
        help="every N epochs also validate the model without those channels (0: never)")


def pipeline_parser(description: str | None, runtimes: Collection[str], formats: Collection[str]) -> HelpfulParser:
    """The flags of slim.py: those of a training, and what the whole is to reach.

    runtimes: those that it can measure latency in, the default first. formats: those that it can write.
    """
    parser = training_parser(description, "runs/slim")
    add = parser.add_argument
    add("--target", type=named_fraction(TARGETS, "flops=0.5, params=0.5, latency=0.6 or map-drop=0.01"),
        default=("flops", 0.5),
        help="what is to be left: flops=0.5, params=0.5, latency=0.6 (see --runtime), or map-drop=0.01, the mAP50-95 "
             "on val that a cut may cost before fine-tuning")
    add("--runtime", choices=list(runtimes), default=next(iter(runtimes)),
        help="what --target latency and the table's milliseconds are measured in; in 8 bits with --int8")
    add("--rounds", type=at_least(1), default=1, help="become sparse and slim in so many trainings")
    add("--export", nargs="+", choices=list(formats), metavar="FORMAT",
        help="in the end write these formats of export.py, such as onnx")
    add("--int8", action="store_true", help="with --export and --runtime: in 8 bits")
    parser.set_defaults(epochs=None)
    return parser


def pruning_parser(description: str | None, runtimes: Collection[str]) -> HelpfulParser:
    """The flags of prune.py. runtimes: those that it can measure latency in, the default first."""
    parser = HelpfulParser(description)
    add = parser.add_argument
    add("--weights", help="checkpoint to cut (not given: last.pt of the newest sparsity run)")
    add("--percent", type=fraction(one=False, hint="0.5 cuts half of the prunable channels"), default=0.5,
        help="share of the prunable channels (those that --keep and --shortcuts let go) to cut, 0..1")
    add("--cfg", help="model yaml to check the checkpoint against; never needed")
    add_common(parser, "runs/prune")
    add("--target", type=named_fraction(TARGETS, "params=0.5, flops=0.5, latency=0.6 or map-drop=0.01"),
        help="cut as much as this takes, instead of --percent: params=0.5, flops=0.5, latency=0.6 (what is left), "
             "map-drop=0.01")
    add("--runtime", choices=list(runtimes), default=next(iter(runtimes)),
        help="what --target latency and --sweep measure in, and the table as well")
    add("--int8", action="store_true", help="... in 8 bits, where the runtime has it")
    add("--latency-batch", type=at_least(1), default=1, help="with --target latency and --sweep: images a batch")
    add("--sweep", type=fractions,
        help="first:last:step; show what each of these percents would give, and write no model")
    add("--sensitivity", action="store_true",
        help="show what cutting --percent of each layer alone would give, and write no model")
    add("--score", choices=["auto", *SCORES], default="auto",
        help="what channels are ranked by; auto: gamma, and where gammas do not tell channels apart taylor, which is "
             "what the loss on training images would lose")
    add("--per-flop", action="store_true", help="rank by score per FLOP that goes with the channel: faster models")
    add("--min-channels", type=at_least(1), default=1, help="channels that every layer keeps")
    add("--min-share", type=fraction(), default=MIN_SHARE,
        help="share of its channels that every layer keeps at least, unless their score is 0; 0..1")
    add("--round-to", type=at_least(1), help="layers that are cut keep a multiple of this, 8 say; "
                                             "default: what the sparsity training did, else 1")
    add("--shortcuts", choices=["skip", "joint"], help="channels that shortcuts couple stay (skip), or go all "
        "at once (joint); default: what the sparsity training did, else skip")
    add("--keep", nargs="+", default=[], metavar="PATTERN", help="BatchNorms that stay whole, such as 'model.0.*'")
    add("--reconstruct", action="store_true", help="refit the weights that are left by least squares, on training "
        "images: for cuts that take channels that the model uses; includes --absorb")
    add("--absorb", action="store_true", help="move the mean of the cut channels into the layers that read them")
    add("--recalibrate", type=at_least(0), default=0, metavar="N",
        help="measure the BatchNorms' statistics anew on N random training images, augmented as in training")
    add("--strict", action="store_true",
        help="refuse a cut above the limit (the smallest of the layers' largest gammas)")
    add("--noval", action="store_true", help="do not measure accuracy and speed")
    return parser


def resolve(opt: Namespace, checkpoint: dict[str, Any] | None = None) -> Namespace:
    """Fill in what was not given; returns a new Namespace of plain values, in which .hyp is a dict.

    `checkpoint` (read()'s dict) supplies data, image size, optimizer and hyper-parameters to the scripts that go on
    with somebody's training. Raises UserError for settings that can't be.
    """
    opt = Namespace(**{name: value for name, value in vars(opt).items() if name != "given"})
    if getattr(opt, "adam", False):
        opt.optimizer = opt.optimizer or "AdamW"
    _take_from_training(opt, (checkpoint or {}).get("opt") or {})
    opt.data = str(opt.data or ROOT / BUILT_IN_DATA)
    suited = read_data(opt.data, needed=()).defaults  # whoever reads images checks that they are there
    _check_defaults(opt.data, suited)
    # The architecture is one setting in two flags: who names one does not want the other's default.
    if getattr(opt, "weights", None) or getattr(opt, "cfg", None):
        suited = {key: "" if key in ("weights", "cfg") else value for key, value in suited.items()}
    for key, value in {**DEFAULTS, **suited}.items():
        if hasattr(opt, key) and getattr(opt, key) is None:
            setattr(opt, key, value)
    if hasattr(opt, "hyp"):
        opt.hyp = read_hyp(opt.hyp or HYP_FOR[opt.optimizer])
    return opt


def _take_from_training(opt: Namespace, earlier: dict[str, Any]) -> None:
    """Data, image size, optimizer and hyper-parameters of the training that made the checkpoint, where not given."""
    opt.data = opt.data or earlier.get("data")
    opt.imgsz = opt.imgsz or earlier.get("imgsz")
    opt.single_cls = opt.single_cls or earlier.get("single_cls", False)
    if hasattr(opt, "hyp") and not opt.hyp and not opt.optimizer:  # a rate belongs to its optimizer: both or neither
        opt.hyp, opt.optimizer = earlier.get("hyp"), earlier.get("optimizer")


def _check_defaults(data: str, suited: dict[str, Any]) -> None:
    """Refuse settings of a data yaml's `defaults:` that can't be."""
    if unknown := suited.keys() - DEFAULTS.keys():
        raise UserError(f"{data}: defaults has unknown keys {', '.join(sorted(unknown))}; "
                        f"known are {', '.join(DEFAULTS)}")
    weights = str(suited.get("weights") or "")
    if Path(weights).name != weights and not Path(weights).is_file():
        raise UserError(f"{data}: defaults: weights: there is no {weights}; give its name alone to fetch it")
    for key, least in LEAST.items():
        if key in suited and not (isinstance(suited[key], int) and suited[key] >= least):
            raise UserError(f"{data}: defaults: {key} must be a whole number from {least} on, not {suited[key]}")
    if suited.get("optimizer", "SGD") not in HYP_FOR:
        raise UserError(f"{data}: defaults: optimizer must be one of {', '.join(HYP_FOR)}, not {suited['optimizer']}")


def read_hyp(hyp: str | Path | dict) -> dict[str, float]:
    """Hyper-parameters with every key present and numeric. A file name is looked for as given, then in data/hyps/."""
    reference = read_yaml_mapping(ROOT / HYP_FOR["SGD"], "--hyp")
    if not isinstance(hyp, dict):
        path = next((p for p in (Path(hyp), ROOT / hyp, ROOT / "data/hyps" / hyp) if p.is_file()), Path(hyp))
        hyp = read_yaml_mapping(path, "--hyp")
    if unknown := hyp.keys() - reference.keys() - IGNORED_HYP:
        raise UserError(f"--hyp: unknown '{min(map(str, unknown))}'; known are {', '.join(reference)}")
    values = dict(reference)
    for key in hyp.keys() & reference.keys():
        if isinstance(hyp[key], bool) or not isinstance(hyp[key], (int, float)):
            raise UserError(f"--hyp: '{key}' must be a number, not {hyp[key]!r}")
        if not 0 <= hyp[key] < math.inf:
            raise UserError(f"--hyp: '{key}' must not be negative nor infinite, but is {hyp[key]:g}")
        values[key] = float(hyp[key])
    return values
