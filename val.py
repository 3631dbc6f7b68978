"""Accuracy and speed of any checkpoint: dense or slim, ours or an official YOLOv5 one.

    python val.py --weights runs/train/exp/weights/best.pt --data data/coco128.yaml --imgsz 640
"""
from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models import backend
from models.backend import Detector
from utils.boxes import nms, scale_boxes, xywh2xyxy
from utils.data_config import DataConfig, read_data
from utils.dataloaders import Batch, DetectionDataset, build_loader
from utils.distributed import gather, main_process, select_device
from utils.errors import UserError, run_cli
from utils.files import new_run_folder, newest, write_json
from utils.metrics import APResult, ConfusionMatrix, ap_per_class, fitness, match
from utils.options import HelpfulParser, add_common, resolve

IOU_THRESHOLDS = torch.linspace(0.5, 0.95, 10)
OnBatch = Callable[[int, Batch, list[Tensor]], None]


@dataclass
class Evaluation:
    """What one pass over a data set found."""

    ap: APResult
    losses: np.ndarray                    # (3,) mean box, objectness and class loss; zeros where no loss was asked for
    ms: dict[str, float]                  # milliseconds an image: preprocess, inference, nms
    images: int
    labels: np.ndarray                    # (classes of ap,) labelled objects
    confusion: ConfusionMatrix | None = None
    predictions: list[dict] = field(default_factory=list)  # COCO style, where they were asked for

    @property
    def fitness(self) -> float:
        return float(fitness(self.ap.mp, self.ap.mr, self.ap.map50, self.ap.map))

    def class_map(self, nc: int) -> np.ndarray:
        """(nc,) mAP50-95 of each class; a class without labels has the mean."""
        values = np.full(nc, self.ap.map)
        values[self.ap.classes.astype(int)] = self.ap.ap.mean(1)
        return values

    def metrics(self) -> dict[str, float]:
        """The four numbers under the names that results.csv uses."""
        return {"metrics/precision": self.ap.mp, "metrics/recall": self.ap.mr,
                "metrics/mAP_0.5": self.ap.map50, "metrics/mAP_0.5:0.95": self.ap.map}


@torch.inference_mode()
def evaluate(model: Detector, loader: DataLoader, device: torch.device, conf: float = 0.001, iou: float = 0.6,
             max_det: int = 300, loss: Callable | None = None, confusion: bool = False, on_batch: OnBatch | None = None,
             single_cls: bool = False, processes: int = 1) -> Evaluation:
    """Detect in every image of `loader` and compare with its labels.

    processes: more than 1 where every process of a training calls this with its own share of the images; all get the result for
    all of them.

    `model` is in eval mode and in its own precision; `loss` is a DetectionLoss for the mean losses. on_batch gets every
    batch with its detections in the batch's pixels (list of (n, 6)). single_cls: all detections count as class 0.
    """
    nc, dtype = 1 if single_cls else len(model.names), model.dtype
    matrix = ConfusionMatrix(nc) if confusion else None
    losses, seconds, images = torch.zeros(3, device=device), np.zeros(3), 0
    hits: list[tuple[Tensor, Tensor, Tensor]] = []
    truth: list[Tensor] = []
    for i, batch in enumerate(tqdm(loader, desc="validating", leave=False, disable=None if main_process() else True)):
        t0 = _now(device)
        x = batch.images.to(device, non_blocking=True).to(dtype, memory_format=torch.channels_last) / 255
        t1 = _now(device)
        decoded, raw = model(x)
        t2 = _now(device)
        if loss is not None:
            losses += loss(raw, batch.targets.to(device))[1]
        t3 = _now(device)
        detections = nms(decoded.float(), conf, iou, agnostic=single_cls, multi_label=nc > 1, max_det=max_det)
        for found in detections if single_cls else ():
            found[:, 5] = 0
        t4 = _now(device)
        seconds += (t1 - t0, t2 - t1, t4 - t3)
        images += len(x)
        for found, labels, shape in zip(detections, labels_per_image(batch), batch.shapes):
            native = scale_boxes(x.shape[2:], found, shape[0], shape[1]).cpu()
            labels[:, 1:] = scale_boxes(x.shape[2:], labels[:, 1:], shape[0], shape[1])
            hits.append((match(native, labels, IOU_THRESHOLDS), native[:, 4], native[:, 5]))
            truth.append(labels[:, 0])
            if matrix is not None:
                matrix.update(native, labels)
        if on_batch is not None:
            on_batch(i, batch, [d.cpu() for d in detections])
    mine = (*(torch.cat(column).numpy() for column in zip(*hits)), torch.cat(truth).numpy()) if hits else None
    shares = gather((mine, losses.cpu().numpy(), len(loader), seconds, images), processes)
    tp, score, predicted, true = (np.concatenate(column) for column in zip(*(share[0] for share in shares if share[0] is not None)))
    summed, took = np.stack([share[1] for share in shares]).sum(0), np.stack([share[3] for share in shares]).sum(0)
    batches, images = sum(share[2] for share in shares), sum(share[4] for share in shares)
    ap = ap_per_class(tp, score, predicted, true)
    return Evaluation(ap, summed / max(batches, 1), dict(zip(("preprocess", "inference", "nms"), (took * 1000 / max(images, 1)).tolist())),
                      images, np.array([(true == c).sum() for c in ap.classes], int), matrix)


def labels_per_image(batch: Batch) -> list[Tensor]:
    """The batch's targets as one (m, 5) tensor an image: class, xyxy in the batch's pixels."""
    height, width = batch.images.shape[2:]
    boxes = xywh2xyxy(batch.targets[:, 2:]) * torch.tensor([width, height, width, height])
    rows = torch.cat((batch.targets[:, 1:2], boxes), 1)
    return [rows[batch.targets[:, 0] == i] for i in range(len(batch.images))]


def validation_loader(config: DataConfig, task: str, imgsz: int, batch_size: int, stride: int, workers: int = 8,
                      cache: str | None = None, single_cls: bool = False, rect: bool = True, rank: int = 0, world_size: int = 1,
                      ending: Event | None = None) -> DataLoader:
    """Loader of the train, val or test images without augmentation, in rectangular batches; in several processes every one has its batches."""
    sources = {"train": config.train, "val": config.val, "test": config.test}[task]
    if not sources:
        raise UserError(f"{config.file}: has no '{task}:' entry")
    dataset = DetectionDataset(sources, imgsz, rect=rect, batch_size=batch_size, pad=0.5 if rect else 0.0, stride=stride,
                               cache=cache, single_cls=single_cls, nc=config.nc, prefix=task)
    if (dataset.problems or dataset.refused) and rank == 0:
        print(dataset.summary())
    return build_loader(dataset, batch_size, workers, shuffle=False, rank=rank, world_size=world_size, ending=ending)


def print_table(result: Evaluation, names: dict[int, str], per_class: bool) -> None:
    """The familiar table: Class, Images, Instances, P, R, mAP50, mAP50-95."""
    print(f"{'Class':>22}{'Images':>10}{'Instances':>11}{'P':>9}{'R':>9}{'mAP50':>9}{'mAP50-95':>10}")
    ap = result.ap
    rows = [("all", int(result.labels.sum()), ap.mp, ap.mr, ap.map50, ap.map)]
    if per_class and len(ap.classes) > 1:
        rows += [(names.get(int(c), str(c)), int(n), p, r, a50, a) for c, n, p, r, a50, a in
                 zip(ap.classes, result.labels, ap.p, ap.r, ap.ap50, ap.ap.mean(1))]
    for name, count, *values in rows:
        print(f"{name[:22]:>22}{result.images:>10}{count:>11}" + "".join(f"{v:>9.3f}" for v in values[:3]) + f"{values[3]:>10.3f}")


def parse(argv: list[str] | None = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--weights", help="checkpoint, or .onnx (not given: the newest best.pt or pruned_model.pt under runs/)")
    add_common(parser, "runs/val")
    add("--task", choices=["train", "val", "test"], default="val", help="which images of the data yaml")
    add("--conf-thres", type=float, default=0.001, help="least confidence of a detection")
    add("--iou-thres", type=float, default=0.6, help="IoU above which NMS takes two boxes for one")
    add("--max-det", type=int, default=300, help="most detections an image")
    add("--half", action="store_true", help="fp16 inference (GPU)")
    add("--augment", action="store_true", help="test-time augmentation: three sizes, one of them mirrored")
    add("--save-json", action="store_true", help="write predictions.json and ask pycocotools for its figures, for any data set")
    add("--save-txt", action="store_true", help="write labels/*.txt: class x y w h confidence")
    add("--noplots", action="store_true", help="make no pictures")
    add("--verbose", action="store_true", help="show every class even if there are many")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint as the command line says; returns what metrics.json holds."""
    opt = parse(argv)
    for flag, value in (("--conf-thres", opt.conf_thres), ("--iou-thres", opt.iou_thres)):
        if not 0 <= value <= 1:
            raise UserError(f"{flag} {value:g}: must be between 0 and 1")
    if not opt.weights:
        found = newest("runs/*/*/weights/best.pt") or newest("runs/prune/*/pruned_model.pt")
        if found is None:
            raise UserError("--weights: no run here yet; give a checkpoint: --weights path/to/best.pt")
        opt.weights = str(found)
        print(f"--weights not given: taking the newest, {found}")
    device = select_device(opt.device)
    if opt.half and device.type == "cpu":
        raise UserError("--half: fp16 needs a GPU; leave it out on a CPU")
    model, data = backend.load(opt.weights, device, opt.half, opt.augment)
    fixed = model.shape if isinstance(model, backend.OnnxModel) else (0, 0, 0, 0)  # ONNX files may take one size only
    opt.imgsz, opt.batch_size = fixed[2] or opt.imgsz, fixed[0] or opt.batch_size
    opt = resolve(opt, data)
    config = read_data(opt.data)
    if config.nc != len(model.names) and not opt.single_cls:
        raise UserError(f"{opt.weights}: knows {len(model.names)} classes, {opt.data} names {config.nc}; give the --data it was trained on")
    loader = validation_loader(config, opt.task, opt.imgsz, opt.batch_size, int(torch.as_tensor(model.stride).max()), opt.workers,
                               single_cls=opt.single_cls, rect=not fixed[2])
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    names = {0: "object"} if opt.single_cls else config.names
    outputs = Outputs(folder, loader.dataset, names, opt)
    result = evaluate(model, loader, device, opt.conf_thres, opt.iou_thres, opt.max_det, confusion=not opt.noplots,
                      on_batch=outputs.batch, single_cls=opt.single_cls)
    print_table(result, names, opt.verbose or config.nc <= 20)
    total = sum(result.ms.values())
    print("Speed: " + ", ".join(f"{v:.1f} ms {k}" for k, v in result.ms.items()) + f" an image ({total:.1f} ms) at batch {opt.batch_size}, {opt.imgsz} px")
    summary = {"weights": str(opt.weights), "data": opt.data, "task": opt.task, "imgsz": opt.imgsz, **result.metrics(),
               "images": result.images, "ms_per_image": result.ms,
               "per_class": {names.get(int(c), str(c)): {"mAP_0.5": float(a50), "mAP_0.5:0.95": float(a)}
                             for c, a50, a in zip(result.ap.classes, result.ap.ap50, result.ap.ap.mean(1))}}
    summary.update(outputs.finish(result))
    write_json(folder / "metrics.json", summary)
    print(f"Results in {folder}")
    return summary


class Outputs:
    """What val.py writes beside the table: label files, COCO predictions, pictures."""

    def __init__(self, folder: Path, dataset: Any, names: dict[int, str], opt: Namespace):
        self.folder, self.dataset, self.names, self.opt = folder, dataset, names, opt
        self.predictions: list[dict] = []

    def batch(self, i: int, batch: Batch, detections: list[Tensor]) -> None:
        """Called with every batch's detections, in the batch's pixels."""
        size = (batch.images.shape[2], batch.images.shape[3])
        for found, path, shape in zip(detections, batch.paths, batch.shapes):
            native = scale_boxes(size, found, shape[0], shape[1])
            if self.opt.save_txt:
                self._save_txt(native, Path(path), shape[0])
            if self.opt.save_json:
                self.predictions += coco_predictions(native, Path(path))
        if i < 3 and not self.opt.noplots:
            from utils.plots import detections_to_targets, plot_batch

            plot_batch(batch.images, batch.targets, batch.paths, self.names, self.folder / f"val_batch{i}_labels.png")
            plot_batch(batch.images, detections_to_targets(detections, size), batch.paths, self.names, self.folder / f"val_batch{i}_pred.png")

    def finish(self, result: Evaluation) -> dict[str, Any]:
        """Pictures and pycocotools figures after the last batch; returns what goes into metrics.json."""
        if not self.opt.noplots:
            plot_curves(result, self.names, self.folder)
        if not self.opt.save_json:
            return {}
        path = self.folder / "predictions.json"
        write_json(path, self.predictions)
        map50_95, map50 = pycocotools_map(self.dataset, self.predictions, self.names)
        print(f"pycocotools: mAP50 {map50:.3f}, mAP50-95 {map50_95:.3f} ({path})")
        return {"pycocotools": {"mAP_0.5": map50, "mAP_0.5:0.95": map50_95}}

    def _save_txt(self, found: Tensor, path: Path, shape: tuple[int, int]) -> None:
        height, width = shape
        (self.folder / "labels").mkdir(exist_ok=True)
        lines = [f"{int(c)} {(x1 + x2) / 2 / width:.6g} {(y1 + y2) / 2 / height:.6g} {(x2 - x1) / width:.6g} {(y2 - y1) / height:.6g} {p:.6g}"
                 for x1, y1, x2, y2, p, c in found.tolist()]
        (self.folder / "labels" / f"{path.stem}.txt").write_text("".join(f"{line}\n" for line in lines))


def plot_curves(result: Evaluation, names: dict[int, str], folder: Path) -> None:
    """PR, F1, P and R curves and the confusion matrix of an evaluation, as pictures in `folder`."""
    from utils.plots import plot_confusion, plot_metric_curve, plot_pr_curve

    ap = result.ap
    listed = [names.get(int(c), str(c)) for c in ap.classes]
    plot_pr_curve(np.linspace(0, 1, 1000), ap.precision_at_recall, ap.ap50, listed, folder / "PR_curve.png")
    for name, curve in (("F1", ap.f1_curve), ("P", ap.p_curve), ("R", ap.r_curve)):
        plot_metric_curve(ap.px, curve, listed, folder / f"{name}_curve.png", ylabel=name)
    if result.confusion is not None:
        plot_confusion(result.confusion.matrix, names, folder / "confusion_matrix.png")


def image_id(path: Path) -> int | str:
    """COCO's image id: a numeric file name is a number."""
    return int(path.stem) if path.stem.isnumeric() else path.stem


def coco_predictions(found: Tensor, path: Path) -> list[dict]:
    """(n, 6) detections in image pixels -> COCO's list of dicts, rounded as YOLOv5 does."""
    return [{"image_id": image_id(path), "category_id": int(c), "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
             "score": round(p, 5)} for x1, y1, x2, y2, p, c in found.tolist()]


def pycocotools_map(dataset: DetectionDataset, predictions: list[dict], names: dict[int, str]) -> tuple[float, float]:
    """(mAP50-95, mAP50) by pycocotools, with ground truth made from the data set's own labels."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images: list[dict] = []
    annotations: list[dict] = []
    for path, labels, (width, height) in zip(dataset.images, dataset.labels, dataset.shapes.tolist()):
        images.append({"id": image_id(Path(path)), "width": width, "height": height})
        for c, x, y, w, h in labels.tolist():
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            annotations.append({"id": len(annotations) + 1, "image_id": images[-1]["id"], "category_id": int(c), "bbox": box,
                                "area": box[2] * box[3], "iscrowd": 0})
    truth = COCO()
    truth.dataset = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in names.items()]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        if not predictions:
            return 0.0, 0.0
        run = COCOeval(truth, truth.loadRes(json.loads(json.dumps(predictions))), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0]), float(run.stats[1])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    run_cli(main)
