"""Find objects in images, folders, videos, streams and cameras, with any checkpoint: dense, slim, official, or .onnx.

    python detect.py --weights pruned_model.pt --source photos/
    python detect.py --weights runs/train/exp/weights/best.pt --source 0 --view-img
"""
from __future__ import annotations

from argparse import Namespace
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models import formats
from models.inference import detect, require_rgb
from models.yolo import whole_strides
from utils.boxes import cut_out, label_rows, nms
from utils.data.sources import Frame, frames
from utils.errors import UserError, run_cli
from utils.files import new_run_folder, write_text
from utils.options import HelpfulParser, add_detection_flags, add_imgsz_flag, add_run_flags, at_least
from utils.plots.detections import draw_boxes
from utils.training.distributed import select_device


def parse(argv: list[str] | None = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint (.pt: dense, slim, official), or a file that export.py wrote")
    add("--source", required=True, help="image, video, folder, pattern, .txt list, stream address, .streams file, "
                                        "or a camera's number")
    add_imgsz_flag(parser, "longest side in pixels (the checkpoint's, or 640)")
    add_detection_flags(parser, conf=0.25, iou=0.45, max_det=1000)
    add("--classes", nargs="+", type=int, help="class numbers to keep (all)")
    add("--agnostic-nms", action="store_true", help="NMS over all classes together")
    add("--view-img", action="store_true", help="show the pictures in a window (needs opencv-python, not -headless)")
    add("--save-txt", action="store_true", help="write labels/*.txt: class x y w h")
    add("--save-conf", action="store_true", help="with --save-txt: a sixth column, the confidence")
    add("--save-crop", action="store_true", help="write every object as a picture, crops/<class>/*.jpg")
    add("--nosave", action="store_true", help="write no pictures and videos")
    add("--vid-stride", type=at_least(1), default=1, help="look at every so many frames of a video")
    add("--hide-labels", action="store_true", help="draw boxes without captions")
    add("--hide-conf", action="store_true", help="captions without confidences")
    add_run_flags(parser, "runs/detect")
    return parser.parse_args(argv)


class Output:
    """What detect.py writes: pictures and videos with boxes, label files, crops."""

    def __init__(self, folder: Path, names: dict[int, str], opt: Namespace):
        self.folder, self.names, self.opt = folder, names, opt
        self.video: tuple[str, Any] | None = None
        self.stems: dict[Path, str] = {}
        self.taken: set[str] = set()

    def add(self, frame: Frame, found: Tensor) -> None:
        """One frame and its (n, 6) detections in its pixels: x1, y1, x2, y2, confidence, class."""
        own = self._own_stem(frame.path)
        stem = own if frame.number is None else f"{own}_{frame.number}"
        if self.opt.save_txt:
            rows = label_rows(found, frame.image.shape, self.opt.save_conf)
            write_text(self.folder / "labels" / f"{stem}.txt", rows)
        if self.opt.save_crop:
            self._write_crops(stem, found, frame.image)
        if self.opt.nosave and not self.opt.view_img:
            return
        captions = [self._caption(score, cls) for score, cls in found[:, 4:].tolist()]
        drawn = draw_boxes(frame.image, found[:, :4].numpy(), captions, found[:, 5].int().tolist())
        if not self.opt.nosave:
            self._write_picture(frame, own, drawn)
        if self.opt.view_img:
            self._show(frame, drawn)

    def close(self) -> None:
        """Finish the video that is open."""
        if self.video:
            self.video[1].release()
            self.video = None

    def _own_stem(self, path: Path) -> str:
        """The name of a file's results, without its ending. A second file of the same name gets a number."""
        if path not in self.stems:
            numbered = (f"{path.stem}_{n}" if n > 1 else path.stem for n in count(1))
            self.stems[path] = next(stem for stem in numbered if stem not in self.taken)
            self.taken.add(self.stems[path])
        return self.stems[path]

    def _name(self, cls: float) -> str:
        return self.names.get(int(cls), str(int(cls)))

    def _caption(self, score: float, cls: float) -> str:
        if self.opt.hide_labels:
            return ""
        return self._name(cls) if self.opt.hide_conf else f"{self._name(cls)} {score:.2f}"

    def _write_crops(self, stem: str, found: Tensor, image: np.ndarray) -> None:
        for i, row in enumerate(found.tolist()):
            crop = cut_out(image, row)
            if crop.size:
                folder = self.folder / "crops" / self._name(row[5]).replace("/", "_")
                folder.mkdir(parents=True, exist_ok=True)
                _write_image(folder / f"{stem}_{i}.jpg", crop)

    def _write_picture(self, frame: Frame, stem: str, drawn: np.ndarray) -> None:
        if frame.number is None:
            _write_image(self.folder / f"{stem}{frame.path.suffix}", drawn)
            return
        target = str(self.folder / f"{stem}.mp4")
        if self.video is None or self.video[0] != target:
            self.close()
            size = drawn.shape[1], drawn.shape[0]
            self.video = target, cv2.VideoWriter(target, cv2.VideoWriter.fourcc(*"mp4v"), frame.fps, size)
            if not self.video[1].isOpened():
                raise UserError(f"{target}: this OpenCV can't write mp4; --nosave --save-txt writes the boxes only")
        self.video[1].write(drawn)

    def _show(self, frame: Frame, drawn: np.ndarray) -> None:
        try:
            cv2.imshow(str(frame.path), drawn)
            cv2.waitKey(1)
        except cv2.error:
            raise UserError("--view-img: this OpenCV has no windows; pip uninstall opencv-python-headless, "
                            "pip install opencv-python, or look into the run's folder without --view-img") from None


def _write_image(path: Path, image: np.ndarray) -> None:
    """cv2.imwrite, also for names that OpenCV can't handle on Windows."""
    suffix = path.suffix.lower() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp") else ".jpg"
    _, data = cv2.imencode(suffix, image)
    path.with_suffix(suffix).write_bytes(data.tobytes())


@torch.inference_mode()
def main(argv: list[str] | None = None) -> Path:
    """Command line -> the run's folder."""
    opt = parse(argv)
    device = select_device(opt.device, half=opt.half)
    model, data = formats.load(opt.weights, device, opt.half, opt.augment)
    require_rgb(model, opt.weights)
    imgsz = whole_strides(opt.imgsz or data.get("imgsz") or 640, model.stride)
    suppress = partial(nms, conf=opt.conf_thres, iou=opt.iou_thres, classes=opt.classes, agnostic=opt.agnostic_nms,
                       max_det=opt.max_det)
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    output, counts = Output(folder, model.names, opt), dict.fromkeys(model.names, 0)
    seconds, shown = 0.0, 0
    with closing(output):  # Ctrl-C ends a camera's run, and its video is whole
        for frame in tqdm(frames(opt.source, opt.vid_stride), desc="detecting", disable=None, leave=False):
            found = detect(model, [frame.image], imgsz, device, suppress)
            seconds, shown = seconds + sum(found.seconds), shown + 1
            for cls in found.boxes[0][:, 5].int().tolist():
                counts[cls] = counts.get(cls, 0) + 1
            output.add(frame, found.boxes[0])
    summary = ", ".join(f"{n} {model.names.get(c, c)}" for c, n in counts.items() if n) or "nothing"
    ms = seconds / max(shown, 1) * 1000
    print(f"{shown} pictures: {summary}; {ms:.1f} ms each at {imgsz} px. Results in {folder}")
    return folder


if __name__ == "__main__":
    run_cli(main)
