"""A data set of images with boxes.

Images and labels are scanned once (see image_files.py); of many images only the headers. A sample is a pure function of
(seed, epoch, index): the number of workers, their order and a resumed run change nothing.
"""
from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import utils.data.augmentations as aug
from utils.boxes import letterbox, xywh2xyxy, xyxy2xywh
from utils.data.image_files import (
    IMAGE_SUFFIXES,
    DamagedImageError,
    decode,
    find_images,
    label_reading,
    path_order,
    scan_image,
    why_unlabelled,
)
from utils.data.label_cache import cache_folder, scan_with_cache
from utils.data.ragged import Paths
from utils.data.scan import MANY, Scan, scan_groups
from utils.device import available_memory
from utils.errors import UserError
from utils.files import write_array

HYP = ("degrees", "translate", "scale", "shear", "perspective", "mosaic", "mixup", "hsv_h", "hsv_s", "hsv_v", "flipud",
       "fliplr", "copy_paste")
MOST_NAMED = 5  # refused images that the summary names
PIXELS = 2          # raise it with every change of what decode() returns
NPY_HEADER = 128    # bytes before the pixels of a .npy file
FEW_BYTES, FEW_SHARE = 1e9, 0.1  # of decoded images: kept in memory without being asked, also as a share of the free
PARTNERS = 7    # other images that a sample may use: three in its mosaic, four in the one that is mixed in

# How an image got from its file into the batch: ((h0, w0) of the file, ((gain_h, gain_w), (pad_w, pad_h)))
Geometry = tuple[tuple[int, int], tuple[tuple[float, float], tuple[float, float]]]
T = TypeVar("T")
R = TypeVar("R")


class Sample(NamedTuple):
    """One image, ready for a batch."""

    image: Tensor      # uint8 (3, h, w), RGB
    targets: Tensor    # float32 (m, 6): 0, class, x, y, w, h normalised
    path: str
    shapes: Geometry   # gain 1 and pad 0 after augmentation, which can't be inverted


def in_threads(function: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """[function(item) ...] in the order of `items`; a progress bar appears after a second."""
    with ThreadPool(max(min(8, len(items)), 1)) as pool:
        results: Iterable[R] = pool.imap(function, items, chunksize=8)
        return list(tqdm(results, title, len(items), delay=1.0, leave=False, disable=None))


class DetectionDataset(Dataset[Sample]):
    """Images with boxes; dataset[epoch, index] is a Sample, and dataset[epoch, index, *partners] one whose mosaic is
    made with these PARTNERS and not with any images.

    imgsz: longest side in pixels. augment: mosaic and the other augmentations, by the gains in `hyp` (YOLOv5's keys; a
    missing one is 0). rect: images are sorted by aspect ratio, every batch_size of them get the smallest shape that
    holds them (plus `pad` strides), and there is no mosaic. cache: "ram" or "disk" keeps decoded images, "auto" keeps
    few in memory. nc: classes must be below it.

    .images (Path), .labels ((m, 5): class, xywh normalised) and .shapes ((n, 2): w, h) are in the data set's order; the
    first two are sequences over one array each, not lists (see ragged.py). .problems counts what was repaired or left
    out, .refused lists (path, reason) of the images that were left out, .notes and summary() are for the log.
    .broken are those that turned out to be broken when they were used: each stays in its place as a grey image without
    labels, because without it the others would have other places, and a resumed training would differ.

    UserError where a source is missing or none of the images can be used.
    """

    def __init__(self, sources: Sequence[str | Path], imgsz: int, hyp: Mapping[str, Any] | None = None,
                 augment: bool = False, rect: bool = False, batch_size: int = 16, pad: float = 0.0, stride: int = 32,
                 cache: str | None = None, single_cls: bool = False, nc: int | None = None, seed: int = 0,
                 prefix: str = ""):
        self.imgsz, self.augment, self.rect, self.batch_size, self.prefix = imgsz, augment, rect, batch_size, prefix
        self.stride = stride
        self.hyp = {key: float((hyp or {}).get(key, 0.0)) for key in HYP}
        self.seed = seed % 2**63  # numpy takes no negative seed
        self.notes: list[str] = []
        self.unlabelled = ""  # why there is not one box
        self.images, scan = self._scan([Path(s).absolute() for s in sources], nc, single_cls)
        if rect:
            order = np.argsort(scan.sizes[:, 1] / scan.sizes[:, 0], kind="stable")
            self.images, scan = self.images.take(order), scan.take(order)
        self.labels, self.shapes, self.orientations = scan.labels, scan.sizes.astype(int), scan.orientations
        self.broken: set[int] = set()
        self._named: set[int] = set()  # of the broken ones
        self.batch_shapes = rect_shapes(self.shapes, batch_size, imgsz, stride, pad) if rect else None
        if augment and self.hyp["copy_paste"]:
            self.notes.append("copy_paste has no effect: it needs polygons, and only boxes are kept")
        self._ram: Tensor | None = None
        self._disk: Path | None = None
        if cache in ("ram", "auto"):
            self._fill_ram(required=cache == "ram")
        elif cache == "disk":
            self._fill_disk()

    def _scan(self, sources: Sequence[Path], nc: int | None, single_cls: bool) -> tuple[Paths, Scan]:
        """The usable images, sorted by path, and what is known of them; sets .problems and .refused."""
        paths = sorted((image for source in sources for image in find_images(source)), key=path_order)
        self.where = where = ", ".join(map(str, sources)) or "no source"
        if not paths:
            raise UserError(f"{where}: no images there ({', '.join(sorted(s[1:] for s in IMAGE_SUFFIXES))})")
        # Decoding is the only proof of an image. Of many it would take too long: a broken one is found when it is used.
        one = partial(scan_image, nc=nc, single_cls=single_cls, whole=len(paths) < MANY)

        def scan_now(groups: Sequence[Sequence[str]]) -> Iterator[Scan]:
            return scan_groups(partial(one, reading=label_reading(paths)), groups, f"{self.prefix} scan".strip())

        scan = scan_with_cache(paths, str(one.keywords), scan_now, 1 if single_cls else nc)
        problems: Counter[str] = Counter()
        reasons: dict[int, str] = {}
        examples: dict[str, str] = {}
        for i, counts, reason in scan.remarks():
            problems.update(counts)
            examples = dict.fromkeys(counts, paths[i]) | examples
            if reason:
                reasons[i] = reason
        self.problems: dict[str, int] = dict(problems)
        self.refused = [(Path(paths[i]), reason) for i, reason in reasons.items()]
        images = Paths(paths)
        if len(reasons) == len(paths):
            reason, times = Counter(reasons.values()).most_common(1)[0]
            path = next(path for path, why in self.refused if why == reason)
            raise UserError(f"{where}: none of the {len(paths)} images can be used; {times}: {reason}, e.g. {path}")
        if reasons:
            usable = np.delete(np.arange(len(paths)), list(reasons))
            images, scan = images.take(usable), scan.take(usable)
        if not scan.labels.counts.any():
            self.unlabelled = f"no image has a usable label: {why_unlabelled(images, self.problems, examples)}"
            self.notes.append(self.unlabelled)
        return images, scan

    def require_labels(self) -> None:
        """UserError where there is not one box: nothing can be learnt from background alone, nor measured on it."""
        if self.unlabelled:
            raise UserError(f"{self.where}: {self.unlabelled}")

    def report_broken(self, indices: Iterable[int]) -> None:
        """Name each image that was found to be broken on stderr, once. UserError where no other is left."""
        for index in sorted(set(indices) - self._named):
            self._named.add(index)
            tqdm.write(f"{self.images[index]}: can't be decoded; a grey image without labels stands in for it "
                       f"({len(self._named)} so far)", file=sys.stderr)
        if len(self._named) == len(self):
            raise UserError(f"{self.where}: none of the {len(self)} images can be decoded")

    def summary(self) -> str:
        """What was found, repaired and left out, and the notes: one line or a few."""
        boxes, background = self.labels.counts.sum(), (self.labels.counts == 0).sum()
        lines = [f"{len(self.images)} images, {boxes} boxes, {background} images without any"]
        if self.problems:
            lines[0] += "; " + ", ".join(f"{n} {what}" for what, n in sorted(self.problems.items()))
        if self.refused:
            named = ", ".join(f"{path} ({reason})" for path, reason in self.refused[:MOST_NAMED])
            rest = len(self.refused) - MOST_NAMED
            lines.append(f"skipped: {named}" + (f" and {rest} more" if rest > 0 else ""))
        head = f"{self.prefix}: " if self.prefix else ""
        return "\n".join(head + line for line in lines + self.notes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, index, *partners = key
        if self.augment:
            image, labels = self._augmented(index, partners, np.random.default_rng([self.seed, epoch, index]))
            w, h = self.shapes[index].tolist()
            geometry: Geometry = ((h, w), ((1.0, 1.0), (0.0, 0.0)))
        else:
            image, labels, geometry = self._letterboxed(index)
        height, width = image.shape[:2]
        size = np.array([width, height, width, height], np.float32)
        targets = np.zeros((len(labels), 6), np.float32)
        targets[:, 1] = labels[:, 0]
        targets[:, 2:] = xyxy2xywh(labels[:, 1:].clip(0, size)) / size
        pixels = torch.from_numpy(aug.to_tensor_layout(image))
        return Sample(pixels, torch.from_numpy(targets), str(self.images[index]), geometry)

    # From here on labels are (m, 5): class, xyxy in pixels of their image.

    def _augmented(self, index: int, partners: Sequence[int], rng: np.random.Generator) -> aug.Labelled:
        hyp = self.hyp
        if not self.rect and rng.random() < hyp["mosaic"]:
            image, labels = self._mosaic(index, partners[:3], rng)
            if rng.random() < hyp["mixup"]:
                second = partners[3] if partners else int(rng.integers(len(self)))
                other, other_labels = self._mosaic(second, partners[4:], rng)
                image, labels = aug.mixup(image, labels, other, other_labels, rng)
        else:
            image, labels, _ = self._letterboxed(index)
            image, labels = self._warp(image, labels, rng)
        image = aug.augment_hsv(image, rng, hyp["hsv_h"], hyp["hsv_s"], hyp["hsv_v"])
        if rng.random() < hyp["flipud"]:
            image, labels = aug.flip_ud(image, labels)
        if rng.random() < hyp["fliplr"]:
            image, labels = aug.flip_lr(image, labels)
        return image, labels

    def _mosaic(self, index: int, partners: Sequence[int], rng: np.random.Generator) -> aug.Labelled:
        """imgsz x imgsz of `index` and three other images (any where there are no `partners`), in random places."""
        members = rng.permutation([index, *(partners or rng.integers(len(self), size=3))]).tolist()
        tiles = []
        for i in members:
            image = self.load(i)
            tiles.append((image, self._in_pixels(i, image.shape[1], image.shape[0])))
        canvas, labels = aug.mosaic(tiles, rng, self.imgsz)
        return self._warp(canvas, labels, rng, border=-(self.imgsz // 2))

    def _warp(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, border: int = 0) -> aug.Labelled:
        hyp = self.hyp
        return aug.random_perspective(image, labels, rng, hyp["degrees"], hyp["translate"], hyp["scale"], hyp["shear"],
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
        """The labels of image `index` for a width and height of it in pixels."""
        labels = self.labels[index][:0] if index in self.broken else self.labels[index].copy()
        labels[:, 1:] = xywh2xyxy(labels[:, 1:]) * np.array([width, height, width, height], np.float32)
        return labels

    # Decoded images, from their files or from a cache

    def load(self, index: int) -> np.ndarray:
        """uint8 (h, w, 3) BGR, longest side = imgsz. Read-only for the caller: it may be a view of the cache."""
        if self._ram is not None:
            h, w = self._scaled_size(index)
            start = int(self._offsets[index])
            return self._ram[start:start + h * w * 3].numpy().reshape(h, w, 3)
        if self._disk is not None:
            try:
                return self._load_disk(self._disk, index)
            except OSError:
                pass  # the disk is full or the cache was deleted: the image file is still there
        return self._load_file(index)

    def _scaled_size(self, index: int) -> tuple[int, int]:
        """(h, w) with the longest side scaled to imgsz, rounded up in integers, so without floating-point error."""
        w, h = self.shapes[index].tolist()
        longest = max(w, h)
        return -(-h * self.imgsz // longest), -(-w * self.imgsz // longest)

    def _load_file(self, index: int) -> np.ndarray:
        h, w = self._scaled_size(index)
        try:
            image = decode(self.images[index], int(self.orientations[index]))
        except DamagedImageError:
            self.broken.add(index)
            return np.full((h, w, 3), aug.FILL, np.uint8)
        if image.shape[:2] == (h, w):
            return image
        linear = self.augment or max(h, w) > max(image.shape[:2])
        return cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR if linear else cv2.INTER_AREA)

    def _fill_ram(self, required: bool) -> None:
        """Decode all images, if they fit, into one tensor, which workers share whatever their start method.

        Where this is not `required` they must be few, and processes of a training on one machine have a copy each.
        """
        sizes = np.array([math.prod(self._scaled_size(i)) * 3 for i in range(len(self))], np.int64)
        need, free = int(sizes.sum()), available_memory()
        copies = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if not required and copies * need > min(FEW_BYTES, FEW_SHARE * (free or math.inf)):
            return
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
        """Write the .npy files that are missing, if they fit."""
        folder = cache_folder("images")

        def fill(i: int) -> None:
            self._load_disk(folder, i)

        try:
            missing = [i for i in range(len(self)) if not self._cache_file(folder, i).is_file()]
            need = sum(math.prod(self._scaled_size(i)) * 3 + NPY_HEADER for i in missing)
            free = shutil.disk_usage(next(p for p in folder.absolute().parents if p.exists())).free
            if need > 0.9 * free:
                raise OSError(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free for {folder}")
            in_threads(fill, missing, f"{self.prefix} onto disk".strip())
        except OSError as error:
            self.notes.append(f"--cache disk: going on without ({error}); the variable YOLO_CACHE names the folder")
            return
        self._disk = folder

    def _cache_file(self, folder: Path, index: int) -> Path:
        """Where the image is cached; another name whenever the image changes. OSError if it is gone."""
        path = self.images[index]
        stat = path.stat()
        # The key includes `augment`, because the interpolation depends on it.
        key = f"{PIXELS} {path}|{stat.st_mtime_ns}|{stat.st_size}|{self.imgsz}|{self.augment}"
        return folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:40]}.npy"

    def _load_disk(self, folder: Path, index: int) -> np.ndarray:
        """The image from the cache; decoded and put there if it is missing. OSError if it can't be written."""
        file = self._cache_file(folder, index)
        try:
            image = np.load(file, allow_pickle=False)
            if image.dtype == np.uint8 and image.shape == (*self._scaled_size(index), 3):
                return image
        except Exception:  # missing: written below; a damaged file raises many kinds
            pass
        image = self._load_file(index)
        try:
            if index not in self.broken:
                write_array(file, image)
        except UserError as error:  # of the cache only: an image that can't be decoded is an error of its own
            raise OSError(str(error)) from error
        return image


def rect_shapes(shapes: np.ndarray, batch_size: int, imgsz: int, stride: int, pad: float) -> np.ndarray:
    """(batches, 2) int h, w: the smallest multiples of stride that hold each batch, plus `pad` strides.

    shapes: (n, 2) w, h of the images, sorted by h / w.
    """
    ratios = shapes[:, 1] / shapes[:, 0]
    first = ratios[::batch_size]
    last = ratios[np.minimum(np.arange(len(first)) * batch_size + batch_size, len(ratios)) - 1]
    # All wide: the tallest of them decides the height. All tall: the widest decides the width. Mixed: a square.
    sides = np.stack((np.minimum(last, 1), np.minimum(1 / first, 1)), 1)
    return np.ceil(sides * imgsz / stride + pad).astype(int) * stride
