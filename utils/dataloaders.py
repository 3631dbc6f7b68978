"""From image and label files to batches of tensors.

A data set is read once (see image_files.py), headers and labels only. The sampler hands (epoch, index) to the data set,
and a sample is a pure function of (seed, epoch, index): the number of workers, their order and a resumed run change
nothing.
"""
from __future__ import annotations

import hashlib
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from utils.augmentations import (
    Labelled,
    augment_hsv,
    flip_lr,
    flip_ud,
    mixup,
    mosaic,
    random_perspective,
    to_tensor_layout,
)
from utils.boxes import letterbox, xywh2xyxy, xyxy2xywh
from utils.errors import UserError
from utils.files import write_array
from utils.image_files import (
    IMAGE_SUFFIXES,
    Record,
    decode,
    find_images,
    label_path,
    scan_image,
)
from utils.label_cache import cache_folder, scan_with_cache

HYP = ("degrees", "translate", "scale", "shear", "perspective", "mosaic", "mixup", "hsv_h", "hsv_s", "hsv_v", "flipud",
       "fliplr", "copy_paste")

# ((h0, w0) of the file, ((gain_h, gain_w), (pad_w, pad_h))): how an image got from the file into the batch
Geometry = tuple[tuple[int, int], tuple[tuple[float, float], tuple[float, float]]]
T = TypeVar("T")
R = TypeVar("R")


class Sample(NamedTuple):
    """One image, ready for a batch."""

    image: Tensor      # uint8 (3, h, w), RGB
    targets: Tensor    # float32 (m, 6): 0, class, x, y, w, h normalised
    path: str
    shapes: Geometry   # gain 1 and pad 0 where augmentation has moved the pixels: there is no way back from that


@dataclass
class Batch:
    """What the loader yields."""

    images: Tensor     # uint8 (B, 3, h, w), RGB
    targets: Tensor    # float32 (n, 6): image in the batch, class, x, y, w, h normalised
    paths: list[str]
    shapes: list[Geometry]

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (DataLoader calls this)."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.paths, self.shapes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(self.images.to(device, non_blocking=non_blocking),
                     self.targets.to(device, non_blocking=non_blocking), self.paths, self.shapes)


def in_threads(function: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """[function(item) ...] in the items' order; a bar appears when it takes more than a second."""
    with ThreadPool(max(min(8, len(items)), 1)) as pool:
        results: Iterable[R] = pool.imap(function, items, chunksize=8)
        return list(tqdm(results, title, len(items), delay=1.0, leave=False, disable=None))


# ------------------------------------------------------------------------------------------------------- the data set


class DetectionDataset(Dataset[Sample]):
    """Images with boxes; dataset[epoch, index] is a Sample.

    imgsz: longest side in pixels. augment: mosaic and its company, by the gains in `hyp` (YOLOv5's keys, a missing one
    is 0). rect: sorted by aspect ratio, every run of batch_size images gets the smallest shape that fits (plus `pad`
    strides), and no mosaic. cache: "ram" or "disk" keeps decoded images. nc: a label's class must be below it.

    .images, .labels ((m, 5) class xywh normalised) and .shapes ((n, 2) w, h) are in the data set's order; .problems
    counts what was repaired or left out, .refused says which images were, and why; .notes and summary() are for the
    log.
    """

    def __init__(self, sources: Sequence[str | Path], imgsz: int, hyp: Mapping[str, Any] | None = None,
                 augment: bool = False, rect: bool = False, batch_size: int = 16, pad: float = 0.0, stride: int = 32,
                 cache: str | None = None, single_cls: bool = False, nc: int | None = None, seed: int = 0,
                 prefix: str = ""):
        self.imgsz, self.augment, self.rect, self.batch_size, self.prefix = imgsz, augment, rect, batch_size, prefix
        self.hyp = {key: float((hyp or {}).get(key, 0.0)) for key in HYP}
        self.seed = seed % 2**63  # numpy takes no negative seed
        self.notes: list[str] = []
        records = self._scan([Path(s).absolute() for s in sources], nc, single_cls)
        if rect:
            records.sort(key=lambda r: r.size[1] / r.size[0])
        self.images = [r.path for r in records]
        self.labels = [r.labels for r in records]
        self.shapes = np.array([r.size for r in records], int)
        self.orientations = np.array([r.orientation for r in records], np.uint8)
        self.batch_shapes = rect_shapes(self.shapes, batch_size, imgsz, stride, pad) if rect else None
        if not any(map(len, self.labels)):
            self.notes.append(f"no labels at all: looked for {label_path(self.images[0])} and its like")
        if augment and self.hyp["copy_paste"]:
            self.notes.append("copy_paste needs polygons, which are not kept: no effect")
        self._ram: Tensor | None = None
        self._disk: Path | None = None
        if cache == "ram":
            self._fill_ram()
        elif cache == "disk":
            self._fill_disk()

    def _scan(self, sources: Sequence[Path], nc: int | None, single_cls: bool) -> list[Record]:
        """Records of the usable images, sorted by path; fills in problems and refused."""
        found = [image for source in sources for image in find_images(source)]
        where = ", ".join(map(str, sources)) or "no source"
        if not found:
            raise UserError(f"{where}: no images there ({', '.join(sorted(s[1:] for s in IMAGE_SUFFIXES))})")
        scan = partial(scan_image, nc=nc, single_cls=single_cls)
        title = f"{self.prefix} scan".strip()
        records = scan_with_cache(sorted(found), f"{nc} {single_cls}", lambda changed: in_threads(scan, changed, title))
        self.problems: dict[str, int] = dict(sum((r.problems for r in records), Counter()))
        self.refused = [(r.path, r.refused) for r in records if r.refused]
        usable = [r for r in records if not r.refused]
        if not usable:
            path, reason = self.refused[0]
            raise UserError(f"{where}: none of the {len(found)} images can be used; the first: {path} ({reason})")
        return usable

    def summary(self) -> str:
        """What was found, repaired, left out and noted: one line or a few."""
        boxes, background = sum(map(len, self.labels)), sum(not len(x) for x in self.labels)
        lines = [f"{len(self.images)} images, {boxes} boxes, {background} images without any"]
        if self.problems:
            lines[0] += "; " + ", ".join(f"{n} {what}" for what, n in sorted(self.problems.items()))
        if self.refused:
            more = f" and {len(self.refused) - 5} more" if len(self.refused) > 5 else ""
            lines.append("skipped: " + ", ".join(f"{path} ({reason})" for path, reason in self.refused[:5]) + more)
        head = f"{self.prefix}: " if self.prefix else ""
        return "\n".join(head + line for line in lines + self.notes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        if self.augment:
            image, labels = self._augmented(index, np.random.default_rng([self.seed, epoch, index]))
            w, h = self.shapes[index].tolist()
            geometry: Geometry = ((h, w), ((1.0, 1.0), (0.0, 0.0)))
        else:
            image, labels, geometry = self._letterboxed(index)
        height, width = image.shape[:2]
        size = np.array([width, height, width, height], np.float32)
        targets = np.zeros((len(labels), 6), np.float32)
        targets[:, 1] = labels[:, 0]
        targets[:, 2:] = xyxy2xywh(labels[:, 1:].clip(0, size)) / size
        pixels = torch.from_numpy(to_tensor_layout(image))
        return Sample(pixels, torch.from_numpy(targets), str(self.images[index]), geometry)

    # Images and labels (class, xyxy in pixels) on their way

    def _augmented(self, index: int, rng: np.random.Generator) -> Labelled:
        hyp = self.hyp
        if not self.rect and rng.random() < hyp["mosaic"]:
            image, labels = self._mosaic(index, rng)
            if rng.random() < hyp["mixup"]:
                image, labels = mixup(image, labels, *self._mosaic(int(rng.integers(len(self))), rng), rng)
        else:
            image, labels, _ = self._letterboxed(index)
            image, labels = self._warp(image, labels, rng)
        image = augment_hsv(image, rng, hyp["hsv_h"], hyp["hsv_s"], hyp["hsv_v"])
        if rng.random() < hyp["flipud"]:
            image, labels = flip_ud(image, labels)
        if rng.random() < hyp["fliplr"]:
            image, labels = flip_lr(image, labels)
        return image, labels

    def _mosaic(self, index: int, rng: np.random.Generator) -> Labelled:
        """imgsz x imgsz out of `index` and three others, in random places."""
        members = rng.permutation([index, *rng.integers(len(self), size=3)]).tolist()
        tiles = []
        for i in members:
            image = self.load(i)
            tiles.append((image, self._in_pixels(i, image.shape[1], image.shape[0])))
        canvas, labels = mosaic(tiles, rng, self.imgsz)
        return self._warp(canvas, labels, rng, border=-(self.imgsz // 2))

    def _warp(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, border: int = 0) -> Labelled:
        hyp = self.hyp
        return random_perspective(image, labels, rng, hyp["degrees"], hyp["translate"], hyp["scale"], hyp["shear"],
                                  hyp["perspective"], (border, border))

    def _letterboxed(self, index: int) -> tuple[np.ndarray, np.ndarray, Geometry]:
        """The image in the shape of its batch."""
        w0, h0 = self.shapes[index].tolist()
        image = self.load(index)
        h, w = image.shape[:2]
        shape = (self.imgsz, self.imgsz)
        if self.batch_shapes is not None:
            shape = tuple(self.batch_shapes[index // self.batch_size].tolist())
        image, (ratio_w, ratio_h), (pad_w, pad_h) = letterbox(image, shape, auto=False, scale_up=self.augment)
        labels = self._in_pixels(index, ratio_w * w, ratio_h * h)
        labels[:, 1:] += np.array([pad_w, pad_h, pad_w, pad_h], np.float32)
        return image, labels, ((h0, w0), ((ratio_h * h / h0, ratio_w * w / w0), (pad_w, pad_h)))

    def _in_pixels(self, index: int, width: float, height: float) -> np.ndarray:
        """The image's labels as class, xyxy, for a picture of this size."""
        labels = self.labels[index].copy()
        labels[:, 1:] = xywh2xyxy(labels[:, 1:]) * np.array([width, height, width, height], np.float32)
        return labels

    # Decoded images, from the file or a cache

    def load(self, index: int) -> np.ndarray:
        """uint8 (h, w, 3) BGR with the longest side = imgsz. Not to be written into: it may lie in the cache."""
        if self._ram is not None:
            h, w = self._scaled_size(index)
            start = int(self._offsets[index])
            return self._ram[start:start + h * w * 3].numpy().reshape(h, w, 3)
        if self._disk is not None:
            try:
                return self._load_disk(self._disk, index)
            except OSError:
                pass  # the disk has filled up, the cache was deleted: the image itself is still there
        return self._load_file(index)

    def _scaled_size(self, index: int) -> tuple[int, int]:
        """(h, w) after scaling the longest side to imgsz, rounded up, in whole numbers: no rounding noise."""
        w, h = self.shapes[index].tolist()
        longest = max(w, h)
        return -(-h * self.imgsz // longest), -(-w * self.imgsz // longest)

    def _load_file(self, index: int) -> np.ndarray:
        image = decode(self.images[index], int(self.orientations[index]))
        h, w = self._scaled_size(index)
        if image.shape[:2] == (h, w):
            return image
        linear = self.augment or max(h, w) > max(image.shape[:2])
        return cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR if linear else cv2.INTER_AREA)

    def _fill_ram(self) -> None:
        """Decode everything into one buffer: started workers share it, whatever the start method."""
        sizes = np.array([math.prod(self._scaled_size(i)) * 3 for i in range(len(self))], np.int64)
        need, free = int(sizes.sum()), available_memory()
        if free is not None and need > 0.9 * free:
            self.notes.append(f"--cache ram needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: going on without")
            return
        self._offsets = np.concatenate(([0], sizes.cumsum()[:-1]))
        buffer = torch.empty(need, dtype=torch.uint8)

        def fill(i: int) -> None:
            start = self._offsets[i]
            buffer[start:start + sizes[i]] = torch.from_numpy(self._load_file(i).reshape(-1))

        in_threads(fill, range(len(self)), f"{self.prefix} into ram".strip())
        self._ram = buffer

    def _fill_disk(self) -> None:
        """Make the .npy files that are missing."""
        folder = cache_folder("images")

        def fill(i: int) -> bool:
            return self._load_disk(folder, i) is not None

        try:
            folder.mkdir(parents=True, exist_ok=True)
            in_threads(fill, range(len(self)), f"{self.prefix} onto disk".strip())
        except OSError as error:
            self.notes.append(f"--cache disk: {folder} can't be written ({error.strerror}), going on without; "
                              "the variable YOLO_CACHE names another folder")
            return
        self._disk = folder

    def _load_disk(self, folder: Path, index: int) -> np.ndarray:
        """The image from the cache, where it is put if it is not there. OSError if that can't be."""
        path = self.images[index]
        stat = path.stat()
        # Whether we augment is in the key because the interpolation depends on it.
        key = f"{path}|{stat.st_mtime_ns}|{stat.st_size}|{self.imgsz}|{self.augment}"
        file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.npy"
        try:
            image = np.load(file, allow_pickle=False)
            if image.dtype == np.uint8 and image.shape == (*self._scaled_size(index), 3):
                return image
        except (OSError, ValueError, EOFError):
            pass  # not there yet, or cut off: made (again) below
        image = self._load_file(index)
        write_array(file, image)
        return image


def rect_shapes(shapes: np.ndarray, batch_size: int, imgsz: int, stride: int, pad: float) -> np.ndarray:
    """(batches, 2) int h, w for (n, 2) images w, h sorted by h / w: the least multiples of stride that hold a batch."""
    ratios = shapes[:, 1] / shapes[:, 0]
    first = ratios[::batch_size]
    last = ratios[np.minimum(np.arange(len(first)) * batch_size + batch_size, len(ratios)) - 1]
    # All wide: the tallest of them decides the height. All tall: the widest decides the width. Mixed: a square.
    sides = np.stack((np.minimum(last, 1), np.minimum(1 / first, 1)), 1)
    return np.ceil(sides * imgsz / stride + pad).astype(int) * stride


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, or None where the system does not tell."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------ sampler and loader


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process of `world_size`; the order is a pure function of (seed, epoch).

    Shuffled, every process gets equally many samples: a few are repeated where the number does not divide. In order,
    the processes take whole batches in turn and nothing is repeated; even=True repeats the first batches until every
    process has equally many, which training in several processes needs.
    """

    def __init__(self, size: int, batch_size: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1,
                 drop_last: bool = False, even: bool = False):
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed % 2**63
        self.rank, self.world_size, self.drop_last, self.even = rank, world_size, drop_last, even
        self.epoch = self.skip = 0
        self.weights: np.ndarray | None = None  # (size,) chances of the samples; None = each comes once

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch whose order the next iteration gives, without its first `skip` batches."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.shuffle:
            rng = np.random.default_rng([self.seed, self.epoch])
            order = rng.permutation(self.size) if self.weights is None else rng.choice(self.size, self.size, p=self.weights / self.weights.sum())
            share = math.ceil(self.size / self.world_size)
            mine = np.resize(order, share * self.world_size)[self.rank::self.world_size]
            batches = [mine[i:i + self.batch_size] for i in range(0, share, self.batch_size)]
        else:
            batches = [np.arange(i, min(i + self.batch_size, self.size)) for i in range(0, self.size, self.batch_size)]
        if self.drop_last and batches and len(batches[-1]) < self.batch_size:
            batches.pop()
        if not self.shuffle:
            missing = -len(batches) % self.world_size if self.even and batches else 0
            batches += [batches[i % len(batches)] for i in range(missing)]
            batches = batches[self.rank::self.world_size]
        for batch in batches[self.skip:]:
            yield [(self.epoch, int(i)) for i in batch]

    def __len__(self) -> int:
        samples = math.ceil(self.size / self.world_size) if self.shuffle else self.size
        batches = samples // self.batch_size if self.drop_last else math.ceil(samples / self.batch_size)
        if self.shuffle:
            return batches
        return math.ceil((batches if self.even else max(batches - self.rank, 0)) / self.world_size)


def image_weights(labels: Sequence[np.ndarray], class_map: np.ndarray) -> np.ndarray:
    """(images,) chance of each image: the sum over its boxes of (1 - mAP of the class)^2 / boxes of the class.

    labels: (m, 5) an image, class first; class_map (nc,) in 0..1. Images without boxes get the smallest chance there is.
    """
    nc = len(class_map)
    counts = np.stack([np.bincount(rows[:, 0].astype(int), minlength=nc) for rows in labels])
    weights = counts @ ((1 - class_map) ** 2 / np.maximum(counts.sum(0), 1))
    least = weights[weights > 0].min(initial=np.inf)
    return np.maximum(weights, least if np.isfinite(least) else 1.0)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one shape -> Batch."""
    targets = torch.cat([s.targets for s in samples])
    counts = torch.tensor([len(s.targets) for s in samples])
    targets[:, 0] = torch.repeat_interleave(torch.arange(len(samples)), counts).to(targets.dtype)
    images = torch.stack([s.image for s in samples])
    return Batch(images, targets, [s.path for s in samples], [s.shapes for s in samples])


def usable_workers(wanted: int, world_size: int = 1, batches: int | None = None) -> int:
    """As many loader processes as are wanted, but no more than this process's share of the cores, nor than batches."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(wanted, cores // world_size, wanted if batches is None else batches), 0)


def _start_worker(ending: Event | None, _: int) -> None:
    """One thread a worker: the workers are the parallelism.

    Ctrl-C and a scheduler's SIGTERM reach all processes of a training, and the main one decides when to end: it sets `ending`, and what it
    then sends is meant.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if ending is not None:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if ending.is_set() else None)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def build_loader(dataset: DetectionDataset, batch_size: int, workers: int, shuffle: bool, seed: int = 0, rank: int = 0,
                 world_size: int = 1, context: str | None = None, ending: Event | None = None) -> DataLoader:
    """A loader of Batch; call loader.batch_sampler.set_epoch(e) before each epoch.

    context: how workers are started ("fork", "spawn"), the platform's own way by default. ending: set before the main process ends; until then
    workers do not listen to SIGTERM. ValueError for a rectangular
    data set whose batches would be of another size, or be shuffled: its images would not fit together.
    """
    if dataset.rect and (shuffle or batch_size != dataset.batch_size):
        raise ValueError("a rectangular data set keeps its order and its batch size")
    sampler = EpochBatchSampler(len(dataset), batch_size, shuffle, seed, rank, world_size, even=dataset.augment)
    workers = usable_workers(workers, world_size, len(sampler))
    options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": partial(_start_worker, ending),
                               "multiprocessing_context": context} if workers else {}
    # Its own generator: the loader draws a number an epoch, and that should not move the global one.
    generator = torch.Generator().manual_seed(sampler.seed)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, generator=generator,
                      pin_memory=torch.cuda.is_available(), **options)
