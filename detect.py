"""Find objects in images, folders, videos, streams and cameras, with any checkpoint: dense, slim, official, or .onnx.

    python detect.py --weights pruned_model.pt --source photos/
    python detect.py --weights runs/train/exp/weights/best.pt --source 0 --view-img
    python detect.py --weights a.pt b.pt --source https://example.com/bus.jpg      # an ensemble
"""
from __future__ import annotations

import os
import uuid
from argparse import Namespace
from collections import Counter
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models import formats
from models.inference import detect, image_size, require_rgb
from training.settings import data_of_model
from utils.boxes import cut_out, label_rows, nms
from utils.data.config import read_data
from utils.data.sources import Frame, frames
from utils.device import select_device
from utils.errors import UserError, run_cli
from utils.files import UniqueNames, atomic, new_run_folder, printable, safe_name, write_text
from utils.options import WEIGHTS_HELP, add_detection_flags, add_imgsz_flag, add_run_flags, weights_or_newest
from utils.parser import Argv, HelpfulParser, at_least, from_python
from utils.plots.detections import draw_boxes
from utils.tables import write_csv


def parse(argv: Argv = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__, like="detect.py")
    add = parser.add_argument
    add("--weights", nargs="+", help="checkpoint (.pt: dense, slim, official), or a file that export.py wrote; "
                                     f"several: an ensemble ({WEIGHTS_HELP})")
    add("--source", help="image, video, folder, pattern, .txt list, address of an image or a stream, .streams file, "
                         "or a camera's number (not given: the val images of the checkpoint's data)")
    add_imgsz_flag(parser, "longest side in pixels, or height and width (the checkpoint's, or 640)", nargs="+")
    add_detection_flags(parser, conf=0.25, iou=0.45, max_det=1000)
    add("--classes", nargs="+", type=int, help="class numbers to keep (all)")
    add("--agnostic-nms", action="store_true", help="NMS over all classes together")
    add("--view-img", action="store_true", help="show the pictures in a window (needs opencv-python, not -headless)")
    add("--save-txt", action="store_true", help="write labels/*.txt: class x y w h")
    add("--save-conf", action="store_true", help="with --save-txt: a sixth column, the confidence")
    add("--save-format", type=int, choices=[0, 1], default=0,
        help="with --save-txt: 0 = class x y w h as shares of the image, 1 = class x1 y1 x2 y2 in pixels")
    add("--save-csv", action="store_true", help="write predictions.csv: image, class and confidence of every object")
    add("--save-crop", action="store_true", help="write every object as a picture, crops/<class>/*.jpg")
    add("--nosave", action="store_true", help="write no pictures and videos")
    add("--vid-stride", type=at_least(1), default=1, help="look at every so many frames of a video")
    add("--line-thickness", type=at_least(1), help="pixels of a box's line (by the image's size)")
    add("--hide-labels", action="store_true", help="draw boxes without captions")
    add("--hide-conf", action="store_true", help="captions without confidences")
    add_run_flags(parser, "runs/detect")
    parser.needs(["--save-conf", "--save-format"], "--save-txt")
    return parser.parse_args(argv)


class Video:
    """A video that is being written. It gets its name when it is finished, and only if it is whole.

    OpenCV says nothing of a full disk, so what it has written is opened again.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float):
        self.path, self.size, self.frames = path, size, 0
        self.half_written = path.with_name(f".{uuid.uuid4().hex}.mp4")  # its ending tells OpenCV the format
        name = str(self.half_written)
        writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*"mp4v"), fps, size) if printable(name) == name else None
        if writer is None or not writer.isOpened():
            raise UserError(f"{path}: OpenCV can't write an mp4 there; --nosave --save-txt writes the boxes only")
        self.writer = writer

    def add(self, image: np.ndarray) -> None:
        """The next frame, (h, w, 3) BGR. OpenCV would drop one of another size, without a word."""
        self.writer.write(image if image.shape[1::-1] == self.size else cv2.resize(image, self.size))
        self.frames += 1

    def close(self) -> None:
        """Finish the file. UserError where frames are missing in it."""
        self.writer.release()
        video = cv2.VideoCapture(str(self.half_written))
        count = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
        video.release()
        if count < self.frames:
            with suppress(OSError):
                self.half_written.unlink()
            raise UserError(f"{self.path}: can't be written ({count} of {self.frames} frames got into it: is the disk "
                            "full?); free some space or choose another --project")
        os.replace(self.half_written, self.path)


class Output:
    """What detect.py writes: pictures and videos with boxes, label files, crops. The folder is made with the first."""

    def __init__(self, names: dict[int, str], opt: Namespace):
        self.names, self.opt = names, opt
        self.made: Path | None = None
        self.videos: dict[Path, Video] = {}
        self.stems, self.classes = UniqueNames(), UniqueNames()
        self.rows: list[dict[str, str]] = []  # of predictions.csv, as YOLOv5 calls its columns

    @property
    def folder(self) -> Path:
        """The run's folder."""
        self.made = self.made or new_run_folder(self.opt.project, self.opt.name, self.opt.exist_ok)
        return self.made

    def add(self, frame: Frame, detections: Tensor) -> None:
        """One frame and its (n, 6) detections in its pixels: x1, y1, x2, y2, confidence, class."""
        own = self.stems(frame.path, frame.path.stem)
        stem = own if frame.number is None else f"{own}_{frame.number}"
        if frame.number is not None and frame.path.is_file():  # an image beside it may be called like a frame
            stem = self.stems((frame.path, frame.number), stem)
        if self.opt.save_txt:
            rows = label_rows(detections, frame.image.shape, self.opt.save_conf, pixels=self.opt.save_format == 1)
            write_text(self.folder / "labels" / f"{stem}.txt", rows)
        if self.opt.save_csv:
            self.rows += [{"Image Name": frame.path.name, "Prediction": self._name(cls), "Confidence": f"{score:.2f}"}
                          for score, cls in detections[:, 4:].tolist()]
        if self.opt.save_crop:
            self._write_crops(stem, detections, frame.image)
        if self.opt.nosave and not self.opt.view_img:
            return
        captions = [self._caption(score, cls) for score, cls in detections[:, 4:].tolist()]
        drawn = draw_boxes(frame.image[..., ::-1], detections[:, :4].numpy(), captions, detections[:, 5].int().tolist(),
                           self.opt.line_thickness)[..., ::-1].copy()  # drawn in RGB, written in BGR
        if not self.opt.nosave:
            self._write_picture(frame, own, drawn)
        if self.opt.view_img:
            self._show(frame, drawn)

    def close(self) -> None:
        """Finish the table and the videos that are open."""
        if self.rows:
            write_csv(self.folder / "predictions.csv", self.rows)
        while self.videos:
            self.videos.popitem()[1].close()

    def _name(self, cls: float) -> str:
        return self.names.get(int(cls), str(int(cls)))

    def _caption(self, score: float, cls: float) -> str:
        if self.opt.hide_labels:
            return ""
        return self._name(cls) if self.opt.hide_conf else f"{self._name(cls)} {score:.2f}"

    def _write_crops(self, stem: str, detections: Tensor, image: np.ndarray) -> None:
        for i, row in enumerate(detections.tolist()):
            crop = cut_out(image, row)
            if crop.size:
                name = self._name(row[5])
                _write_image(self.folder / "crops" / self.classes(name, safe_name(name)) / f"{stem}_{i}.jpg", crop)

    def _write_picture(self, frame: Frame, stem: str, drawn: np.ndarray) -> None:
        if frame.number is None:
            _write_image(self.folder / f"{stem}{frame.path.suffix}", drawn)
            return
        if frame.path not in self.videos:
            if not self.opt.source.endswith(".streams"):  # those come in turns, files one after the other
                self.close()
            self.videos[frame.path] = Video(self.folder / f"{stem}.mp4", (drawn.shape[1], drawn.shape[0]), frame.fps)
        self.videos[frame.path].add(drawn)

    def _show(self, frame: Frame, drawn: np.ndarray) -> None:
        try:
            cv2.imshow(printable(str(frame.path)), drawn)
            cv2.waitKey(1)
        except cv2.error:
            raise UserError("--view-img: this OpenCV has no windows; pip uninstall opencv-python-headless, "
                            "pip install opencv-python, or look into the run's folder without --view-img") from None


def _write_image(path: Path, image: np.ndarray) -> None:
    """cv2.imwrite, whole or not at all, and for names that OpenCV can't handle."""
    suffix = path.suffix.lower() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp") else ".jpg"
    success, data = cv2.imencode(suffix, image)
    if not success:
        raise UserError(f"{path}: {image.shape[1]} x {image.shape[0]} pixels don't fit into a {suffix}; add --nosave")
    with atomic(path.with_suffix(suffix)) as temporary:
        temporary.write_bytes(data.tobytes())


def usual_source(data: dict[str, Any], weights: str, names: dict[int, str]) -> str:
    """What --source means where it is not given: the val images of the data that val.py would take. Says so."""
    try:
        config = read_data(data_of_model(data, weights, names), needed=("val",))
    except UserError as error:
        raise UserError("--source: give an image, a folder, a video or a camera's number, such as --source photos/ "
                        f"(its default is the val images of the checkpoint's data: {error})") from None
    print(f"--source not given: taking the val images of {config.file}")
    return str(config.val[0])


@torch.inference_mode()
def main(argv: Argv = None) -> Path:
    """Command line -> the run's folder."""
    opt = parse(argv)
    device, weights = select_device(opt.device), opt.weights or [weights_or_newest()]
    model, data = formats.load(weights, device, opt.half, opt.augment)
    require_rgb(model, title := " ".join(weights))
    if unknown := set(opt.classes or ()) - set(model.names):
        raise UserError(f"--classes {min(unknown)}: {title} has the classes 0 to {max(model.names)}; "
                        "give some of these")
    opt.source = opt.source or usual_source(data, title, model.names)
    imgsz = image_size(model, opt.imgsz, data.get("imgsz"))
    sides = model.input_shape[2:] if model.input_shape[2] else np.broadcast_to(imgsz, 2).tolist()
    pixels = " x ".join(map(str, dict.fromkeys(sides)))
    suppress = partial(nms, conf=opt.conf_thres, iou=opt.iou_thres, classes=opt.classes, agnostic=opt.agnostic_nms,
                       max_det=opt.max_det)
    output, counts = Output(model.names, opt), dict.fromkeys(model.names, 0)
    seconds, shown, skipped = 0.0, 0, Counter[str]()
    with closing(output):  # Ctrl-C ends a camera's run, and its video is whole
        for frame in tqdm(frames(opt.source, opt.vid_stride, skipped), desc="detecting", disable=None, leave=False):
            result = detect(model, [frame.image], imgsz, device, suppress)
            seconds, shown = seconds + sum(result.seconds), shown + 1
            for cls in result.boxes[0][:, 5].int().tolist():
                counts[cls] = counts.get(cls, 0) + 1
            output.add(frame, result.boxes[0])
    if not shown:
        (reason, times), = skipped.most_common(1)
        raise UserError(f"--source {opt.source}: nothing could be looked at: {reason} ({times} of {skipped.total()})")
    summary = ", ".join(f"{n} {model.names.get(c, c)}" for c, n in counts.items() if n) or "nothing"
    ms = seconds / max(shown, 1) * 1000
    print(f"{shown} pictures: {summary}; {ms:.1f} ms each at {pixels} px. Results in {output.folder}")
    return output.folder


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
