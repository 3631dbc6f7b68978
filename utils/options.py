"""Command-line flags that several scripts share."""
from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction
from typing import Any

from utils.files import newest
from utils.parser import HelpfulParser, at_least, fraction, images_a_batch, path_or_none

BUILT_IN_DATA = "data/shapes.yaml"
STOCK_WEIGHTS = "yolov5s.pt"  # YOLOv5's default, as is coco128
STOCK_DATA = "data/coco128.yaml"
WEIGHTS_HELP = f"not given: the newest best.pt, pruned_model.pt or slim.pt under runs/, else {STOCK_WEIGHTS}"
MOST_EPOCHS = 100_000
CACHES = ("auto", "ram", "disk", "none")
MOST_IMGSZ = 65_536  # a side, also of what a checkpoint may say
MOST_SEED = 2**63 - 1  # what PyTorch's and numpy's generators take
LEAST = {"imgsz": 32, "epochs": 1, "batch_size": 1, "nbs": 1}
# Optimizer -> its hyper-parameters.
HYP_FOR = {"SGD": "data/hyps/hyp.scratch-low.yaml", "Adam": "data/hyps/hyp.adamw.yaml",
           "AdamW": "data/hyps/hyp.adamw.yaml"}


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
    parser.add_argument("--imgsz", "--img", "--img-size", type=at_least(LEAST["imgsz"], most=MOST_IMGSZ), help=help,
                        **options)


def add_common(parser: ArgumentParser, project: str, training: bool = False) -> None:
    """Flags of every script that reads a data set."""
    add = parser.add_argument
    add("--data", help=f"data yaml (not given: the built-in set, {BUILT_IN_DATA}, or the checkpoint's)")
    add_imgsz_flag(parser)
    add("--batch-size", type=images_a_batch if training else at_least(LEAST["batch_size"]),
        help="images a batch, over all processes (16)" + ("; -1: as fit into the GPU's memory" if training else ""))
    add("--workers", type=at_least(0), default=8, help="most loader processes; never more than there are cores")
    add("--single-cls", action=BooleanOptionalAction,
        help="treat all classes as one; --no-single-cls: also where the weights were trained so")
    add_run_flags(parser, project)


def weights_or_newest() -> str:
    """What --weights means where it is not given: the newest model of a run here, else YOLOv5's default. Says so."""
    path = newest("runs/*/*/weights/best.pt", "runs/prune/*/pruned_model.pt", "runs/slim/*/slim.pt")
    print(f"--weights not given: taking {f'the newest, {path}' if path else STOCK_WEIGHTS}")
    return str(path or STOCK_WEIGHTS)


def add_detection_flags(parser: ArgumentParser, conf: float, iou: float, max_det: int) -> None:
    """Flags of the scripts that detect: val.py and detect.py."""
    add = parser.add_argument
    add("--conf-thres", type=fraction(), default=conf, help="least confidence of a detection")
    add("--iou-thres", type=fraction(), default=iou, help="IoU above which NMS takes two boxes for one")
    add("--max-det", type=at_least(1), default=max_det, help="most detections an image")
    add("--half", action="store_true", help="fp16 inference, on a GPU")
    add("--augment", action="store_true", help="test-time augmentation: three sizes, one of them mirrored")


def training_parser(description: str | None, project: str = "runs/train") -> HelpfulParser:
    """The flags of train.py; train_sparsity.py and finetune_pruned.py add theirs."""
    parser = HelpfulParser(description, like="train.py")
    add = parser.add_argument
    add("--weights", help="checkpoint to start from, ours or an official one; '' = from scratch (yolov5s.pt)")
    add("--cfg", help="model yaml; not needed with --weights, a checkpoint knows its own")
    add_common(parser, project, training=True)
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
    add("--cache", nargs="?", const="ram", choices=CACHES,
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
