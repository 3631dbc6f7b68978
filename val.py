"""Accuracy and speed of any checkpoint: dense or slim, ours or an official YOLOv5 one.

    python val.py --weights runs/train/exp/weights/best.pt --data data/coco128.yaml --imgsz 640
"""
from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models import formats
from models.detector import Detector, require_finite
from models.inference import image_size, require_rgb
from models.yolo import Model, fused, on_device
from training.distributed import gather, main_process
from training.settings import data_of_model, resolve
from utils.boxes import label_rows, nms, scale_boxes, xywh2xyxy
from utils.data.coco import CocoResults
from utils.data.config import other_names, read_data
from utils.data.dataset import DetectionDataset
from utils.data.loader import Batch, DetectionLoader, validation_loader
from utils.device import select_device
from utils.errors import UserError, run_cli
from utils.files import UniqueNames, new_run_folder, write_json, write_text
from utils.metrics import APResult, ConfusionMatrix, ap_per_class, fitness, match
from utils.options import WEIGHTS_HELP, add_common, add_detection_flags, weights_or_newest
from utils.parser import Argv, HelpfulParser, from_python
from utils.slimming.timing import synchronize

IOU_THRESHOLDS = torch.linspace(0.5, 0.95, 10)
OnBatch = Callable[[int, Batch, list[Tensor]], None]


@dataclass
class Evaluation:
    """What one pass over a data set found."""

    ap: APResult
    losses: np.ndarray                    # (3,) mean box, objectness and class loss; zeros where no loss was asked for
    ms: dict[str, float]                  # milliseconds per image: preprocess, inference, nms
    images: int
    labels: np.ndarray                    # (classes of ap,) labelled objects
    confusion: ConfusionMatrix | None = None

    @property
    def fitness(self) -> float:
        return fitness(self.ap.map50, self.ap.map)

    def metrics(self) -> dict[str, float]:
        """The four numbers under the names that results.csv uses."""
        return {"metrics/precision": self.ap.mp, "metrics/recall": self.ap.mr,
                "metrics/mAP_0.5": self.ap.map50, "metrics/mAP_0.5:0.95": self.ap.map}


@torch.inference_mode()
def evaluate(model: Detector, loader: DetectionLoader, device: torch.device, conf: float = 0.001, iou: float = 0.6,
             max_det: int = 300, loss: Callable | None = None, confusion: bool = False, on_batch: OnBatch | None = None,
             single_cls: bool = False, processes: int = 1, amp: torch.dtype | None = None) -> Evaluation:
    """Detect in every image of `loader` and compare with its labels.

    model: in eval mode and in its own precision. loss: a DetectionLoss, for the mean losses. on_batch gets every batch
    with its detections in the batch's pixels (list of (n, 6)). single_cls: all detections count as class 0.
    amp: type of autocast. processes: more than 1 where every process of a training calls this with its own share of
    the images; all of them get the result for all images, but for the confusion matrix, which is of their own.
    NonFiniteError at the first batch whose predictions are not finite.
    """
    nc = 1 if single_cls else len(model.names)
    matrix = ConfusionMatrix(nc) if confusion else None
    losses, seconds, images = torch.zeros(3, device=device), np.zeros(3), 0
    matches: list[tuple[Tensor, ...]] = []  # per image: hits (n, 10), confidence (n,), class (n,), true classes (m,)
    progress = tqdm(loader, desc="validating", leave=False, disable=None if main_process() else True)
    for i, batch in enumerate(progress):
        t0 = _now(device)
        x = batch.images.to(device, non_blocking=True).to(model.dtype, memory_format=torch.channels_last) / 255
        t1 = _now(device)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            decoded, raw = model(x)
        t2 = _now(device)
        decoded = decoded.float()
        require_finite(decoded, model)
        if loss is not None:
            losses += loss(raw, batch.targets.to(device))[1]
        t3 = _now(device)
        detections = nms(decoded, conf, iou, agnostic=single_cls, multi_label=nc > 1, max_det=max_det)
        if single_cls:
            for boxes in detections:
                boxes[:, 5] = 0
        t4 = _now(device)
        seconds += (t1 - t0, t2 - t1, t4 - t3)
        images += len(x)
        for boxes, labels, geometry in zip(detections, labels_per_image(batch), batch.shapes):
            native = scale_boxes(x.shape[2:], boxes, *geometry).cpu()
            labels[:, 1:] = scale_boxes(x.shape[2:], labels[:, 1:], *geometry)
            matches.append((match(native, labels, IOU_THRESHOLDS), native[:, 4], native[:, 5], labels[:, 0]))
            if matrix is not None:
                matrix.update(native, labels)
        if on_batch is not None:
            on_batch(i, batch, [d.cpu() for d in detections])
    columns = [torch.cat(column).numpy() for column in zip(*matches)]
    # Every process's share of the images; from here on the numbers are those of all.
    every_columns = gather(columns, processes)
    tp, score, predicted, true = (np.concatenate(parts) for parts in zip(*filter(None, every_columns)))
    batches, images = np.sum(gather((len(loader), images), processes), 0).tolist()
    summed_losses = np.sum(gather(losses.cpu().numpy(), processes), 0)
    ms = np.sum(gather(seconds, processes), 0) * 1000 / max(images, 1)
    ap = ap_per_class(tp, score, predicted, true)
    labels_per_class = np.array([(true == c).sum() for c in ap.classes], int)
    return Evaluation(ap, summed_losses / max(batches, 1), dict(zip(("preprocess", "inference", "nms"), ms.tolist())),
                      images, labels_per_class, matrix)


def labels_per_image(batch: Batch) -> list[Tensor]:
    """The batch's targets as one (m, 5) tensor an image: class, xyxy in the batch's pixels."""
    height, width = batch.images.shape[2:]
    boxes = xywh2xyxy(batch.targets[:, 2:]) * torch.tensor([width, height, width, height])
    rows = torch.cat((batch.targets[:, 1:2], boxes), 1)
    return [rows[batch.targets[:, 0] == i] for i in range(len(batch.images))]


def dataset_loader(model: Detector, opt: Namespace, task: str = "val", square: bool = False,
                   cache: str | None = "ram", labelled: bool = True) -> DetectionLoader:
    """validation_loader for a detector, as the command line's options say.

    square: all images have the shape that a file of fixed size takes. cache: as DetectionDataset takes it; several
    passes over the images pay for memory. Raises UserError where the data yaml's classes are not the detector's.
    """
    require_rgb(model, opt.weights)
    config = read_data(opt.data, needed=(task,))
    if not opt.single_cls:
        require_same_classes(opt, model.names, config.names)
    loader = validation_loader(config, task, opt.imgsz, opt.batch_size, model.divisor, opt.workers,
                               cache=cache, single_cls=opt.single_cls,
                               rect=not square and not model.input_shape[2],
                               pin_memory=torch.cuda.is_available() and opt.device != "cpu", labelled=labelled)
    if model.input_shape[2] != model.input_shape[3]:  # a file of an oblong shape: it takes no other
        loader.dataset.batch_shapes = np.tile(model.input_shape[2:], (len(loader), 1))
    return loader


def require_same_classes(opt: Namespace, names: Mapping[int, str], data_names: Mapping[int, str]) -> None:
    """UserError where the model of opt.weights knows another number of classes than opt.data names.

    Other names make a note only: they may be translations.
    """
    if len(names) != len(data_names):
        raise UserError(f"{opt.weights}: knows {len(names)} classes, {opt.data} names {len(data_names)}; "
                        "give the --data it was trained on")
    if other := other_names(data_names, names):
        print(f"note: {opt.data}: {other} as {opt.weights} does; classes are compared by number")


def accuracy(model: Model, loader: DetectionLoader, opt: Namespace, device: torch.device) -> dict[str, float]:
    """P, R, mAP50 and mAP50-95 of a Model, fused, on `device`."""
    ap = evaluate(on_device(fused(model), device), loader, device, single_cls=opt.single_cls).ap
    return {"P": ap.mp, "R": ap.mr, "mAP50": ap.map50, "mAP50-95": ap.map}


@torch.inference_mode()
def pictures(models: Sequence[Model], loader: DetectionLoader, device: torch.device,
             count: int = 10) -> list[tuple[str, list[np.ndarray]]]:
    """The first `count` images of a loader with what each model finds in them: (name, [(H, W, 3) uint8 RGB]).

    They are cut to the picture, without the grey around it. Small ones are enlarged, so that captions are readable.
    """
    from utils.plots.detections import MIN_CONFIDENCE, draw_boxes

    ready, shown = [on_device(fused(model), device) for model in models], []
    for batch in loader:
        x = batch.images.to(device, torch.float32, memory_format=torch.channels_last) / 255
        predictions = [nms(model(x)[0].float(), MIN_CONFIDENCE, 0.45) for model in ready]
        for i, file in enumerate(batch.paths):
            (h0, w0), (ratios, pad) = batch.shapes[i]
            left, top = (round(side - 0.1) for side in pad)  # as letterbox() pads
            height, width = (round(side * ratio) for side, ratio in zip((h0, w0), ratios))
            image = batch.images[i, :, top:top + height, left:left + width].permute(1, 2, 0).numpy()
            times, drawn = max(480 // width, 1), []
            image = image.repeat(times, 0).repeat(times, 1)
            for model, detections in zip(ready, predictions):
                native = scale_boxes(x.shape[2:], detections[i], image.shape, ((1 / times, 1 / times), (left, top)))
                boxes, classes = native[:, :4].cpu().numpy(), native[:, 5].int().tolist()
                labels = [f"{model.names[c]} {score:.2f}" for score, c in zip(detections[i][:, 4].tolist(), classes)]
                drawn.append(draw_boxes(image, boxes, labels, classes))
            shown.append((Path(file).name, drawn))
            if len(shown) == count:
                return shown
    return shown


def print_table(result: Evaluation, names: dict[int, str], per_class: bool) -> None:
    """The familiar table: Class, Images, Instances, P, R, mAP50, mAP50-95."""
    ap = result.ap
    rows = [("all", int(result.labels.sum()), ap.mp, ap.mr, ap.map50, ap.map)]
    if per_class and len(ap.classes) > 1:
        for c, count, *values in zip(ap.classes, result.labels, ap.p, ap.r, ap.ap50, ap.ap.mean(1)):
            rows.append((names.get(int(c), str(c)), int(count), *values))
    print(f"{'Class':>22}{'Images':>10}{'Instances':>11}{'P':>9}{'R':>9}{'mAP50':>9}{'mAP50-95':>10}")
    for name, count, p, r, map50, map50_95 in rows:
        print(f"{name[:22]:>22}{result.images:>10}{count:>11}{p:>9.3f}{r:>9.3f}{map50:>9.3f}{map50_95:>10.3f}")


def parse(argv: Argv = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__, like="val.py")
    add = parser.add_argument
    add("--weights", nargs="+",
        help=f"checkpoint, or a file that export.py wrote; several: an ensemble ({WEIGHTS_HELP})")
    add_common(parser, "runs/val")
    add_detection_flags(parser, conf=0.001, iou=0.6, max_det=300)
    add("--task", choices=["train", "val", "test"], default="val", help="which images of the data yaml")
    add("--save-json", action="store_true",
        help="write predictions.json and ask pycocotools for its figures, for any data set; COCO's get COCO's ids")
    add("--anns", type=Path, metavar="JSON", help="with --save-json (which it implies): COCO annotations to take the "
                                                  "ids of images and categories from, and to measure against")
    add("--save-txt", action="store_true", help="write labels/*.txt: class x y w h")
    add("--save-conf", action="store_true", help="with --save-txt: a sixth column, the confidence")
    add("--noplots", action="store_true", help="make no pictures")
    add("--verbose", action="store_true", help="show every class even if there are many")
    parser.needs(["--save-conf"], "--save-txt")
    return parser.parse_args(argv)


def main(argv: Argv = None, timed: bool = True) -> dict[str, Any]:
    """Evaluate a checkpoint as the command line says; returns what metrics.json holds. timed: say how fast it was."""
    opt = parse(argv)
    device, weights = select_device(opt.device), opt.weights or [weights_or_newest()]
    model, data = formats.load(weights, device, opt.half, opt.augment)
    opt.weights = " ".join(weights)
    if not opt.data and not (data.get("opt") or {}).get("data"):
        opt.data = data_of_model(data, opt.weights, model.names, opt.single_cls)
    opt.imgsz = image_size(model, opt.imgsz, None) if any(model.input_shape[2:]) else opt.imgsz
    opt.batch_size = model.input_shape[0] or opt.batch_size
    opt = resolve(opt, data)
    # Without labels predictions may be what is wanted: of COCO's test images, or where --anns has the labels.
    loader = dataset_loader(model, opt, opt.task, cache=None,
                            labelled=not (opt.save_txt or opt.save_json or opt.anns))
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    names = {0: "object"} if opt.single_cls else read_data(opt.data, needed=()).names
    outputs = Outputs(folder, loader.dataset, names, opt)
    result = evaluate(model, loader, device, opt.conf_thres, opt.iou_thres, opt.max_det, confusion=not opt.noplots,
                      on_batch=outputs.add, single_cls=opt.single_cls)
    print_table(result, names, opt.verbose or len(names) <= 20)
    if timed:
        speeds = ", ".join(f"{ms:.1f} ms {stage}" for stage, ms in result.ms.items())
        print(f"Speed: {speeds} an image ({sum(result.ms.values()):.1f} ms) at batch {opt.batch_size}, {opt.imgsz} px")
    per_class = {names.get(int(c), str(c)): {"mAP_0.5": float(a50), "mAP_0.5:0.95": float(a)}
                 for c, a50, a in zip(result.ap.classes, result.ap.ap50, result.ap.ap.mean(1))}
    summary = {"weights": str(opt.weights), "data": opt.data, "task": opt.task, "imgsz": opt.imgsz, **result.metrics(),
               "images": result.images, "ms_per_image": result.ms, "per_class": per_class, **outputs.finish(result)}
    write_json(folder / "metrics.json", summary)
    print(f"Results in {folder}")
    return summary


class Outputs:
    """What val.py writes beside the table: label files, COCO predictions, pictures."""

    def __init__(self, folder: Path, dataset: DetectionDataset, names: dict[int, str], opt: Namespace):
        self.folder, self.dataset, self.names, self.opt = folder, dataset, names, opt
        self.stems = UniqueNames()
        for path in dataset.images if opt.save_txt else ():  # in their order: a second run gives the same names
            self.stems(path, path.stem)
        self.coco = CocoResults(names, opt.anns, dataset.images) if opt.save_json or opt.anns else None

    def add(self, i: int, batch: Batch, detections: list[Tensor]) -> None:
        """Every batch's detections, in the batch's pixels."""
        size = (batch.images.shape[2], batch.images.shape[3])
        for boxes, file, geometry in zip(detections, batch.paths, batch.shapes):
            native, path = scale_boxes(size, boxes, *geometry), Path(file)
            if self.opt.save_txt:
                rows = label_rows(native, geometry[0], self.opt.save_conf)
                write_text(self.folder / "labels" / f"{self.stems(path, path.stem)}.txt", rows)
            if self.coco is not None:
                self.coco.add(native, path)
        if i < 3 and not self.opt.noplots:
            from utils.plots.detections import detections_to_targets, plot_batch

            predicted = detections_to_targets(detections, size)
            for kind, targets in (("labels", batch.targets), ("pred", predicted)):
                plot_batch(batch.images, targets, batch.paths, self.names, self.folder / f"val_batch{i}_{kind}.jpg")

    def finish(self, result: Evaluation) -> dict[str, Any]:
        """Pictures and pycocotools figures after the last batch; returns what goes into metrics.json."""
        if not self.opt.noplots:
            plot_curves(result, self.names, self.folder)
        if self.coco is None:
            return {}
        path = self.folder / "predictions.json"
        write_json(path, self.coco.rows)
        if self.coco.unknown:
            print(f"{self.coco.unknown} images are not in {self.opt.anns} and left out of {path}")
        map50_95, map50 = self.coco.figures(self.dataset)
        print(f"pycocotools: mAP50 {map50:.3f}, mAP50-95 {map50_95:.3f} ({path})")
        return {"pycocotools": {"mAP_0.5": map50, "mAP_0.5:0.95": map50_95}}


def plot_curves(result: Evaluation, names: dict[int, str], folder: Path) -> None:
    """PR, F1, P and R curves and the confusion matrix of an evaluation, as pictures in `folder`."""
    from utils.plots.detections import plot_confusion, plot_metric_curve, plot_pr_curve

    ap = result.ap
    labels = [names.get(int(c), str(c)) for c in ap.classes]
    plot_pr_curve(np.linspace(0, 1, 1000), ap.precision_at_recall, ap.ap50, labels, folder / "PR_curve.png")
    for name, curve, label in (("F1", ap.f1_curve, "F1"), ("P", ap.p_curve, "precision"), ("R", ap.r_curve, "recall")):
        plot_metric_curve(ap.px, curve, labels, folder / f"{name}_curve.png", ylabel=label)
    if result.confusion is not None:
        plot_confusion(result.confusion.matrix, names, folder / "confusion_matrix.png")


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
