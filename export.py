"""Write a model, dense or slim, in the formats that other programs open.

    python export.py --weights runs/train/exp/weights/best.pt --include onnx
    python export.py --weights pruned_model.pt --include yolov5 onnx torchscript openvino ncnn
    python export.py --weights pruned_model.pt --include onnx openvino --int8 --data my.yaml

yolov5 is a .pt that unmodified YOLOv5 validates, detects with and exports further: to every format that it knows.
int8 measures activations on training images, and shows the mAP beside that of fp32. What the formats need beside
requirements.txt: pip install -r requirements-export.txt
"""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from tqdm import tqdm

from models import checkpoint, formats
from models.detector import require_finite
from models.formats import Detector, ExportOptions, Format, Suppression, export_options
from models.formats.format import Decoded
from models.yolo import Model, fused, on_device
from training.settings import trained_data
from utils.data.calibration import CalibrationImages
from utils.data.config import read_data
from utils.data.loader import DetectionLoader, validation_loader
from utils.device import select_device
from utils.errors import UserError, run_cli
from utils.options import WEIGHTS_HELP, add_imgsz_flag, add_seed_flag, weights_or_newest
from utils.parser import Argv, HelpfulParser, at_least, format_name, fraction, from_python
from utils.tables import text_table, write_csv
from val import evaluate, require_same_classes

MOST_OPSET = 20  # of PyTorch's exporter that traces
WARN_BEYOND = 0.01  # mAP50-95 lost by int8
CPU = torch.device("cpu")


def parse(argv: Argv = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__, like="export.py")
    add = parser.add_argument
    add("--weights", help=f"checkpoint: dense or slim, ours or an official one ({WEIGHTS_HELP})")
    add("--include", nargs="+", type=format_name, choices=[*formats.formats(), "all"], default=["onnx"],
        help="formats to write, beside the checkpoint; all: those whose packages are installed")
    add_imgsz_flag(parser, "height and width, or one number for both (the checkpoint's, or 640)", nargs="+")
    add("--batch-size", type=at_least(1), default=1, help="images a batch")
    add("--dynamic", action="store_true", help="onnx, openvino: leave batch, height and width open")
    add("--opset", type=at_least(11, most=MOST_OPSET), default=17, help="onnx: version of the operator set")
    add("--simplify", action="store_true", help="onnx: by onnxslim, where that is installed")
    add("--nms", action="store_true", help="onnx: give boxes instead of all predictions, for runtimes that want these")
    add("--conf-thres", type=fraction(), default=Suppression.conf, help="--nms: least confidence of a detection")
    add("--iou-thres", type=fraction(), default=Suppression.iou, help="--nms: IoU above which two boxes count as one")
    add("--max-det", type=at_least(1), default=Suppression.max_det, help="--nms: detections an image")
    add("--agnostic-nms", action="store_true", help="--nms: over all classes together")
    add("--device", default="cpu", help="where torchscript will run, and the files are checked")
    add("--half", action="store_true", help="fp16, where a format has it")
    add("--int8", action="store_true", help="weights and activations in 8 bits, where a format has it")
    add("--data", help="--int8: data yaml; activations are measured on its train images (the checkpoint's)")
    add("--calibration-images", type=at_least(1), default=100, metavar="N", help="--int8: how many of them")
    add_seed_flag(parser, "--int8: which of them")
    add("--int8-keep", nargs="+", default=[], metavar="PATTERN",
        help="--int8: parts of the model that stay in float, such as model.0 or 'model.2.m.*'")
    add("--int8-sensitivity", action="store_true",
        help="show the mAP with each stage of the model left in float, and write no model")
    add("--noval", action="store_true", help="--int8: do not measure mAP")
    add("--workers", type=at_least(0), default=8, help="most loader processes")
    parser.apart("--half", ["--int8", "--int8-sensitivity"], "a file has one precision, that of {} is another")
    parser.apart("--int8-sensitivity", ["--noval"], "measures mAP, {} forbids it")
    parser.needs(["--data", "--calibration-images", "--seed", "--int8-keep", "--noval", "--workers"],
                 "--int8", "--int8-sensitivity")
    parser.apart("--nms", ["--int8-sensitivity"], "leaves out boxes that the mAP of {} is about")
    parser.needs(["--dynamic", "--opset"], "--include onnx", "--include openvino", "--include all")
    parser.needs(["--simplify", "--nms"], "--include onnx", "--include all")
    parser.needs(["--conf-thres", "--iou-thres", "--max-det", "--agnostic-nms"], "--nms")
    opt = parser.parse_args(argv)
    opt.int8 |= opt.int8_sensitivity
    if opt.int8 and opt.opset < 13:
        raise UserError(f"--opset {opt.opset}: --int8 needs 13 or more, which scale each channel on its own")
    opt.precision = "int8" if opt.int8 else "fp16" if opt.half else "fp32"
    return opt


def chosen_formats(opt: Namespace) -> list[Format]:
    """The formats of --include. Those of "all" that can't be written here are named, and left out."""
    every = formats.formats()
    if "all" not in opt.include:
        include = [every[name] for name in dict.fromkeys(opt.include)]
        for fmt in include:
            fmt.need(f"--include {fmt.name}", opt.precision)
            if opt.precision not in fmt.precisions:
                has = [f.name for f in every.values() if opt.precision in f.precisions]
                raise UserError(f"--include {fmt.name}: has no {opt.precision} here; {', '.join(has)} have")
            if opt.dynamic and not fmt.dynamic:
                print(f"{fmt.name}: is of a fixed size; --dynamic has no effect on it")
        return include
    possible = []
    for fmt in every.values():
        if opt.precision not in fmt.precisions:
            print(f"{fmt.name}: left out, it has no {opt.precision} here")
        elif missing := fmt.missing(opt.precision):
            print(f"{fmt.name}: left out; pip install {' '.join(missing)}")
        else:
            possible.append(fmt)
    return possible


def options_of(opt: Namespace, model: Model, trained: dict[str, Any]) -> ExportOptions:
    """What the writers are told. `trained` is read()'s dict. For --int8 the calibration images are read."""
    size, stride = opt.imgsz or [int(trained.get("imgsz") or 640)], model.divisor
    if len(size) > 2 or any(side % stride for side in size):
        raise UserError(f"--imgsz {' '.join(map(str, size))}: one or two multiples of {stride} are needed")
    shape = [opt.batch_size, model.yaml["ch"], size[0], size[-1]]
    nms = Suppression(opt.conf_thres, opt.iou_thres, opt.max_det, opt.agnostic_nms) if opt.nms else None
    options = export_options(model, shape, opt.precision, dynamic=opt.dynamic, opset=opt.opset, suppression=nms,
                             simplify=opt.simplify, device=select_device(opt.device))
    if not opt.int8:
        return options
    opt.single_cls = bool((trained.get("opt") or {}).get("single_cls"))
    if not opt.data:
        own_data = trained_data(trained, opt.weights, opt.single_cls)
        if own_data is None:
            raise UserError(f"--int8: {opt.weights} does not say what it was trained on; "
                            "give the --data whose train images activations are measured on")
        opt.data = str(own_data.file)
    config = read_data(opt.data, needed=("train",))
    if not opt.single_cls:
        require_same_classes(opt, model.names, config.names)
    images = CalibrationImages(config, (size[0], size[-1]), opt.calibration_images, opt.seed, opt.batch_size,
                               opt.single_cls)
    if not len(images):
        raise UserError(f"--data {opt.data}: none of {opt.calibration_images} train images can be decoded to measure "
                        "activations on; replace them")
    return replace(options, calibration=images, keep=tuple(opt.int8_keep))


def output_difference(model: Model, detector: Detector, options: ExportOptions) -> float:
    """Largest |file - PyTorch| over decoded outputs of random images, relative to the largest output.

    NonFiniteError where the file computes NaN or infinity.
    """
    batch, channels, height, width = options.image.shape
    shapes = [(batch, channels, height, width)]
    if not any(detector.input_shape):
        shapes.append((2, channels, height + model.divisor, width))
    reference, worst = Decoded(fused(model)).eval(), 0.0
    for shape in shapes:
        images = torch.rand(shape)
        with torch.no_grad():
            expected = reference(images)
            actual = detector(images.to(options.device, detector.dtype))[0].float().cpu()
        require_finite(actual, detector)
        worst = max(worst, float((actual - expected).abs().max() / expected.abs().max()))
    return worst


def square_val_loader(opt: Namespace, options: ExportOptions, stride: int) -> DetectionLoader:
    """The val images in the shape that the files take."""
    height, width = options.metadata["imgsz"]
    if height != width:
        raise UserError("--int8: mAP is measured on square images; give one --imgsz, or --noval")
    config = read_data(opt.data, needed=("val",))
    return validation_loader(config, "val", height, opt.batch_size, stride, opt.workers, cache="ram",
                             single_cls=opt.single_cls, rect=False)


def print_accuracy(model: Model, files: dict[str, Path], loader: DetectionLoader, keep: list[str]) -> None:
    """Print the mAP of the int8 files beside that of the model, and a warning for those that lose too much."""
    rows = [("fp32", *_accuracy(on_device(fused(model), CPU), loader))]
    rows += [(f"{name} int8", *_accuracy(formats.load(path, CPU)[0], loader)) for name, path in files.items()]
    whole = rows[0][2]
    print(f"on square images of {loader.dataset.imgsz} px, which these files take (val.py has rectangles):")
    print(text_table([[name, f"{map50:.3f}", f"{mean:.3f}", f"{mean - whole:+.3f}"] for name, map50, mean in rows],
                     ["", "mAP50", "mAP50-95", "against fp32"]))
    for name, _, mean in rows[1:]:
        warn_of_loss(name, whole - mean, keep)


def warn_of_loss(name: str, lost: float, keep: Sequence[str] = ()) -> None:
    """Say where a file of int8 lost more mAP50-95 than is usual. keep: what was left in float already."""
    if lost > WARN_BEYOND:
        more = "" if keep else "; --int8-sensitivity shows which part of the model to leave in float (--int8-keep)"
        print(f"warning: {name} loses {lost:.3f} mAP50-95{more}")


def _accuracy(detector: Detector, loader: DetectionLoader) -> tuple[float, float]:
    """(mAP50, mAP50-95)."""
    ap = evaluate(detector, loader, CPU).ap
    return ap.map50, ap.map


def int8_sensitivity(model: Model, chosen: list[Format], options: ExportOptions, loader: DetectionLoader,
                     weights: Path) -> list[Path]:
    """Quantize with each stage of the model left in float, and show which one costs the mAP. Returns the csv."""
    stages = {f"model.{i} ({type(layer).__name__})": f"model.{i}" for i, layer in enumerate(model.model)
              if any(True for _ in layer.parameters())}
    whole = _accuracy(on_device(fused(model), CPU), loader)[1]
    rows = []
    with TemporaryDirectory() as folder:
        for fmt in chosen:
            path = fmt.path(Path(folder) / "stage.pt", "int8")
            for title, pattern in tqdm({"(none)": "", **stages}.items(), desc=fmt.name, leave=False, disable=None):
                fmt.write(model, path, replace(options, keep=options.keep + ((pattern,) if pattern else ())))
                mean = _accuracy(formats.load(path, CPU)[0], loader)[1]
                rows.append({"format": fmt.name, "in float": title, "mAP50-95": mean, "against fp32": mean - whole})
    table = [[r["format"], r["in float"], f"{r['mAP50-95']:.3f}", f"{r['against fp32']:+.3f}"] for r in rows]
    print(text_table(table, list(rows[0])))
    write_csv(csv := weights.with_name(f"{weights.with_suffix('').name}_int8_sensitivity.csv"), rows)
    print(f"Results in {csv}")
    return [csv]


def main(argv: Argv = None) -> list[Path]:
    """Command line -> the files written."""
    opt = parse(argv)
    opt.weights = opt.weights or weights_or_newest()
    trained = checkpoint.read(opt.weights)
    model = checkpoint.build(trained, path=opt.weights)
    model.file = opt.weights
    chosen, weights = chosen_formats(opt), Path(opt.weights)
    options, stride = options_of(opt, model, trained), model.divisor
    with torch.inference_mode():
        require_finite(fused(model)(options.image)[0], model)
    if opt.int8_sensitivity:
        return int8_sensitivity(model, chosen, options, square_val_loader(opt, options, stride), weights)
    loader = square_val_loader(opt, options, stride) if opt.int8 and not opt.noval and not opt.nms else None
    files = {}
    for fmt in chosen:
        path = files[fmt.name] = fmt.path(weights, opt.precision)
        try:
            fmt.write(model, path, options)
        except OSError as error:  # of what is written on the way
            raise UserError(f"{path}: can't be written ({error.strerror}); free some space there and in {gettempdir()}"
                            ) from None
        print(f"{fmt.name}: {path} ({megabytes(path):.2f} MB)")
        if fmt.name == "onnx" and opt.nms:
            print(f"{fmt.name}: gives ({opt.batch_size}, {opt.max_det}, 6): x1 y1 x2 y2 in pixels, confidence, class")
        elif fmt.load is not None and not opt.int8:
            worst = output_difference(model, formats.load(path, options.device)[0], options)
            print(f"{fmt.name}: largest difference to torch {worst:.1e} (relative to the largest output)")
    if loader is not None:
        print_accuracy(model, files, loader, opt.int8_keep)
    return list(files.values())


def megabytes(path: Path) -> float:
    """Size of a file or of a folder's files."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
