"""Command-line flags that the scripts share, and where a setting comes from when its flag is not given.

A flag beats the data yaml's `defaults:` section (the built-in set carries its own), and that beats YOLOv5's defaults.
"""
from __future__ import annotations

import math
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from utils.data.config import DataConfig, other_names, read_data
from utils.errors import UserError
from utils.files import ROOT
from utils.parser import HelpfulParser, at_least, fraction, fractions, named_fraction, path_or_none
from utils.slimming.ranking import MIN_SHARE, SCORES
from utils.slimming.targets import TARGETS
from utils.text import read_yaml_mapping

BUILT_IN_DATA = "data/shapes.yaml"
# What holds when neither a flag nor the data yaml says otherwise: YOLOv5's defaults.
DEFAULTS: dict[str, Any] = {"weights": "yolov5s.pt", "cfg": "", "imgsz": 640, "epochs": 100, "batch_size": 16,
                            "nbs": None, "optimizer": "SGD", "cache": "auto", "hyp": None}
FIGURES = ("flops", "params")  # of TARGETS: those that are counted, not measured
MOST_EPOCHS = 100_000
MOST_SEED = 2**63 - 1  # what PyTorch's and numpy's generators take
LEAST = {"imgsz": 32, "epochs": 1, "batch_size": 1, "nbs": 1}
# Optimizer -> its hyper-parameters.
HYP_FOR = {"SGD": "data/hyps/hyp.scratch-low.yaml", "Adam": "data/hyps/hyp.adamw.yaml",
           "AdamW": "data/hyps/hyp.adamw.yaml"}
BELOW_1 = ("momentum", "warmup_momentum")  # hyper-parameters
# They stand in YOLOv5's files, old or new, and have no effect here.
IGNORED_HYP = {"anchors", "label_smoothing", "iou_t", "giou"}


# Flags ----------------------------------------------------------------------------------------------------------------

def add_run_flags(parser: ArgumentParser, project: str) -> None:
    """Flags of every script that writes a run's folder."""
    add = parser.add_argument
    add("--device", default="", help="cpu, or the number of a GPU (the first GPU if there is one)")
    add("--project", default=project, help="folder of the runs")
    add("--name", default="exp", help="name of this run")
    add("--exist-ok", action="store_true", help="write into an existing run folder")


def add_seed_flag(parser: ArgumentParser, help: str) -> None:
    """--seed, within what all random generators take."""
    parser.add_argument("--seed", type=at_least(0, most=MOST_SEED), default=0, help=help)


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
    add("--epochs", type=at_least(LEAST["epochs"], most=MOST_EPOCHS), help="epochs in all (100)")
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
    add_seed_flag(parser, "seed of weights and augmentation")
    add("--deterministic", action="store_true",
        help="on a GPU, too, the same seed gives the same result, as far as PyTorch can; slower")
    parser.apart("--image-weights", ["--rect"], "draws images, {} keeps their order")
    parser.apart("--adam", ["--optimizer SGD", "--optimizer Adam"], "means --optimizer AdamW, not {}")
    parser.apart("--nosave", ["--save-period"], "keeps no checkpoint that {} asks for")
    parser.apart("--noval", ["--patience"], "{} counts the epochs' validations, of which there are none")
    parser.apart("--label-smoothing", ["--single-cls"], "{} leaves no classes to smooth")
    return parser


def add_sparsity_flags(parser: HelpfulParser) -> None:
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
    parser.needs(["--teacher-weight"], "--teacher")
    targets = ["--target-sparsity", "--target"]
    parser.apart("--no-st", [*targets, "--sparsity", "--sr", "--sr-bias", "--shrink", "--round-to"],
                 "trains without sparsity, {} asks for some")
    parser.apart("--sparsity l1", [*targets, "--shrink", "--round-to"], "knows no {}")
    parser.apart("--target", ["--target-sparsity"], "{} says it in another way")
    parser.needs(["--shrink", "--round-to", "--per-flop", "--no-per-flop"], *targets, "--sparsity target")


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
    parser.apart("--percent", ["--target"], "{} finds out how much to cut")
    parser.apart("--percent", ["--sweep"], "{} has percents of its own")
    parser.apart("--sweep", ["--sensitivity"], "shows whole cuts, {} layer by layer")
    for show in ("--sweep", "--sensitivity"):
        parser.apart(show, ["--target", "--strict", "--reconstruct", "--absorb", "--recalibrate"],
                     "only shows, {} is for a cut")
        parser.apart(show, ["--noval"], "measures, {} forbids it")
    parser.needs(["--latency-batch"], "--target latency", "--sweep")
    return parser


def resolve(opt: Namespace, checkpoint: dict[str, Any] | None = None) -> Namespace:
    """Fill in what was not given; returns a new Namespace of plain values, in which .hyp is a dict.

    `checkpoint` (read()'s dict) supplies data, image size, optimizer and hyper-parameters to the scripts that go on
    with somebody's training. Paths of files become absolute: who goes on with the run may be in another folder.
    Raises UserError for settings that can't be.
    """
    opt = Namespace(**{name: value for name, value in vars(opt).items() if name != "given"})
    if getattr(opt, "adam", False):
        opt.optimizer = opt.optimizer or "AdamW"
    held, weights = checkpoint or {}, getattr(opt, "weights", None)
    _take_from_training(opt, held.get("opt") or {})
    # Whoever reads images checks that they are there.
    config = read_data(opt.data, needed=()) if opt.data else trained_data(
        held, weights[0] if isinstance(weights, list) else str(weights), opt.single_cls)
    config = config or read_data(ROOT / BUILT_IN_DATA, needed=())
    opt.data, suited = str(config.file), config.defaults
    _check_defaults(opt.data, suited)
    # The architecture is one setting in two flags: who names one does not want the other's default.
    if weights or getattr(opt, "cfg", None):
        suited = {key: "" if key in ("weights", "cfg") else value for key, value in suited.items()}
    for key, value in {**DEFAULTS, **suited}.items():
        if hasattr(opt, key) and getattr(opt, key) is None:
            setattr(opt, key, value)
    if hasattr(opt, "hyp"):
        opt.hyp = read_hyp(opt.hyp or HYP_FOR[opt.optimizer])
    for key in ("weights", "cfg"):
        if isinstance(value := getattr(opt, key, None), str):
            setattr(opt, key, absolute(value))
    return opt


def absolute(text: str) -> str:
    """The absolute path of a file or folder that is there; other text, such as a name to look for, as it is."""
    return str(Path(text).absolute()) if text and Path(text).exists() else text


def trained_data(held: Mapping[str, Any], file: str, single_cls: bool = False) -> DataConfig | None:
    """The data set that a checkpoint (read()'s dict of `file`) was trained on; None where it does not say.

    UserError where its yaml is gone, or names other classes by now, which --single-cls takes as one.
    """
    recorded = (held.get("opt") or {}).get("data")
    if not recorded:
        return None
    # The last one: of a repository that lies elsewhere now.
    places = (Path(recorded), ROOT / recorded, ROOT / "data" / Path(recorded).name)
    data = next((place for place in places if place.is_file()), None)
    if data is None:
        raise UserError(f"{file}: was trained on {recorded}, which is not there any more; give --data")
    config = read_data(data, needed=())
    other = "" if single_cls else other_names(config.names, held.get("names") or config.names)
    if other:
        raise UserError(f"{file}: was trained on {data}, which {other} by now; give the --data it was trained on")
    return config


def _take_from_training(opt: Namespace, earlier: dict[str, Any]) -> None:
    """Image size, optimizer and hyper-parameters of the training that made the checkpoint, where not given."""
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


def hyp_file(hyp: str | Path) -> Path:
    """The file that --hyp means, absolute if it is there. It is looked for as given, then in data/hyps/."""
    places = (Path(hyp), ROOT / hyp, ROOT / "data/hyps" / hyp)
    return next((place.absolute() for place in places if place.is_file()), Path(hyp))


def read_hyp(hyp: str | Path | dict) -> dict[str, float]:
    """Hyper-parameters with every key present and numeric."""
    reference = read_yaml_mapping(ROOT / HYP_FOR["SGD"], "--hyp")
    if not isinstance(hyp, dict):
        hyp = read_yaml_mapping(hyp_file(hyp), "--hyp")
    if unknown := hyp.keys() - reference.keys() - IGNORED_HYP:
        raise UserError(f"--hyp: unknown '{min(map(str, unknown))}'; known are {', '.join(reference)}")
    values = dict(reference)
    for key in hyp.keys() & reference.keys():
        if isinstance(hyp[key], bool) or not isinstance(hyp[key], (int, float)):
            raise UserError(f"--hyp: '{key}' must be a number, not {hyp[key]!r}")
        if not 0 <= hyp[key] < math.inf:
            raise UserError(f"--hyp: '{key}' must not be negative nor infinite, but is {hyp[key]:g}")
        if key in BELOW_1 and hyp[key] >= 1:
            raise UserError(f"--hyp: '{key}' must be below 1, but is {hyp[key]:g}")
        values[key] = float(hyp[key])
    return values
