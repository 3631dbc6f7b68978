"""Seconds and memory of starting on a large data set: the first scan, and the next start.

    python bench/scale.py                                    # 1,000, 10,000 and 100,000 images
    python bench/scale.py --million --stock ../yolov5        # and a million, beside YOLOv5's own loader

The images are hard links to a few small ones, so that they cost no space; every image has labels. YOLOv5 may need an
interpreter of its own: --stock-python. Every sample is a process of its own: imports do not count. Memory is the
peak of the process beyond what it held before; processes that read images for it are left out. Writes
bench/results/scale.csv, medians of --runs samples, the loaders in turns; rows of other sizes stay in it.
"""
from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from columns import ROOT, Row, publish

from utils.errors import UserError, run_cli
from utils.files import scratch
from utils.parser import HelpfulParser

LINKS = 20_000        # to one file; some file systems allow no more than 65,000
PER_FOLDER = 10_000   # images
CLASSES = 80
# YOLOv5's side of sample(): a program of its own, because both repositories have a package `utils`.
STOCK = """
import json, resource, sys, time
sys.path.insert(0, {stock!r})
from utils.dataloaders import LoadImagesAndLabels
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
count = len(LoadImagesAndLabels({images!r}, img_size=64))
seconds = time.perf_counter() - start
memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps(dict(images=count, seconds=seconds, memory=memory)))
"""


def make_set(folder: Path, count: int) -> Path:
    """`count` images with 0 to 7 boxes each; returns their folder."""
    rng = np.random.default_rng(0)
    sources = []
    for k in range(max(8, -(-count // LINKS))):
        image, labels = folder / "sources" / f"{k}.jpg", folder / "sources" / f"{k}.txt"
        image.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(image), rng.integers(0, 255, (64 + k, 96, 3), dtype=np.uint8))
        boxes = np.column_stack((rng.uniform(0.3, 0.6, (k % 8, 2)), rng.uniform(0.05, 0.3, (k % 8, 2))))
        labels.write_text("".join(f"{rng.integers(CLASSES)} {' '.join(f'{v:.6f}' for v in box)}\n" for box in boxes))
        sources.append((image, labels))
    for i in range(count):
        if i % PER_FOLDER == 0:
            images, texts = (folder / kind / f"{i // PER_FOLDER:03d}" for kind in ("images", "labels"))
            images.mkdir(parents=True)
            texts.mkdir(parents=True)
        image, labels = sources[i % len(sources)]
        os.link(image, images / f"{i:07d}.jpg")
        os.link(labels, texts / f"{i:07d}.txt")
    return folder / "images"


def sample(images: Path) -> Row:
    """One start of this project's data set, in this process."""
    from utils.data.dataset import DetectionDataset

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    count = len(DetectionDataset([images], 64, nc=CLASSES))
    seconds = time.perf_counter() - start
    return {"images": count, "seconds": seconds,
            "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def start(command: list[str], cache: Path) -> Row:
    """A sample in a process of its own."""
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "YOLO_CACHE": str(cache)})
    if process.returncode:
        raise UserError(f"{command[0]}: the loader ended with exit code {process.returncode}; its message is above")
    return json.loads(process.stdout.splitlines()[-1])


def forget(images: Path) -> None:
    """Remove what the loaders have written down: ours in YOLO_CACHE, YOLOv5's beside the labels."""
    for file in [*images.parent.glob("cache/labels/*.npz"), *images.parent.glob("labels*.cache"),
                 *images.parent.glob("labels/*.cache")]:
        file.unlink()


def measure_set(images: Path, count: int, commands: dict[str, list[str]], runs: int) -> list[Row]:
    """A row per loader."""
    cold: dict[str, list[Row]] = {by: [] for by in commands}
    warm: dict[str, list[Row]] = {by: [] for by in commands}
    for _ in range(runs):
        forget(images)
        for samples in (cold, warm):
            for by, command in commands.items():
                samples[by].append(start(command, images.parent / "cache"))
                if samples[by][-1]["images"] != count:
                    raise UserError(f"{by}: found {samples[by][-1]['images']} of {count} images")
    return [{"images": count, "by": by, **{f"{name}_{key}": float(np.median([one[key] for one in samples[by]]))
                                           for name, samples in (("first", cold), ("next", warm))
                                           for key in ("seconds", "memory")}} for by in commands]


def main() -> None:
    """Measure all sizes."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--images", type=int, nargs="+", default=[1000, 10_000, 100_000], help="sizes of the data set")
    add("--million", action="store_true", help="one of 1,000,000 images as well")
    add("--stock", type=Path, help="folder of YOLOv5's repository, to measure its loader beside this one")
    add("--stock-python", default=sys.executable, help="the interpreter that runs it")
    add("--runs", type=int, default=3, help="samples per row")
    add("--folder", type=Path, default=ROOT / "runs" / "scale", help="where the data sets are made, and removed")
    add("--sample", type=Path, metavar="FOLDER", help="internal: print one sample as JSON")
    opt = parser.parse_args()
    if opt.sample:
        print(json.dumps(sample(opt.sample)))
        return
    for count in opt.images + [1_000_000] * opt.million:
        with scratch(opt.folder.resolve()) as folder:
            images = make_set(folder, count)
            commands = {"ours": [sys.executable, __file__, "--sample", str(images)]}
            if opt.stock:
                program = STOCK.format(stock=str(opt.stock.resolve()), images=str(images))
                commands["YOLOv5"] = [opt.stock_python, "-c", program]
            publish("scale", measure_set(images, count, commands, opt.runs), "images", "by",
                    order=lambda row: row["images"])


if __name__ == "__main__":
    run_cli(main)
