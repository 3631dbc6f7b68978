"""From a data set to batches: the order of samples, collation, worker processes."""
from __future__ import annotations

import gc
import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.synchronize import Event

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from utils.data.config import DataConfig
from utils.data.dataset import PARTNERS, DetectionDataset, Geometry, Sample
from utils.data.scan import cores
from utils.device import require_memory
from utils.errors import UserError

NICENESS = 19  # of workers beside a model on the same cores


@dataclass
class Batch:
    """What the loader yields."""

    images: Tensor     # uint8 (B, 3, h, w), RGB
    targets: Tensor    # float32 (n, 6): image in the batch, class, x, y, w, h normalised
    paths: list[str]
    shapes: list[Geometry]
    broken: frozenset[int] = frozenset()  # of the data set's images, those that the batch's process could not decode

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (DataLoader calls this)."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.paths, self.shapes, self.broken)


class EpochBatchSampler(Sampler[list[tuple[int, ...]]]):
    """Batches of (epoch, index) for one process of `world_size`; the order is a pure function of (seed, epoch).

    Shuffled, every process gets the same number of samples; a few are repeated where world_size does not divide `size`.
    Unshuffled, the processes take whole batches in turn and nothing is repeated. even=True repeats the first batches
    until every process has the same number, which training in several processes needs. A batch of fewer than `least`
    is filled up with the first images of the process.

    Set .weights to draw from (size,) weights, with replacement. A key then is (epoch, index, ...) with the PARTNERS
    that the sample may put beside the image, which are drawn from the same weights.
    """

    def __init__(self, size: int, batch_size: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1,
                 even: bool = False, least: int = 1):
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed % 2**63
        self.rank, self.world_size, self.even, self.least = rank, world_size, even, least
        self.epoch = self.skip = 0
        self.weights: np.ndarray | None = None

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch of the next iteration, which leaves out the first `skip` batches."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        batches = self._shuffled() if self.shuffle else self._in_order()
        for batch in batches[self.skip:]:
            missing = max(self.least - len(batch), 0)
            filled = np.concatenate((batch, np.resize(batches[0], (missing, batch.shape[1]))))
            yield [(self.epoch, *row) for row in filled.tolist()]

    def _shuffled(self) -> list[np.ndarray]:
        """Batches of (n, 1) indices; of (n, 1 + PARTNERS) where there are weights."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.weights is None:
            rows = rng.permutation(self.size)[:, None]
        else:
            chances = self.weights / self.weights.sum()
            rows = rng.choice(self.size, self.size, p=chances)[:, None]
            rows = np.hstack((rows, rng.choice(self.size, (self.size, PARTNERS), p=chances)))
        share = math.ceil(self.size / self.world_size)
        mine = np.resize(rows, (share * self.world_size, rows.shape[1]))[self.rank::self.world_size]
        return [mine[i:i + self.batch_size] for i in range(0, share, self.batch_size)]

    def _in_order(self) -> list[np.ndarray]:
        rows = np.arange(self.size)[:, None]
        batches = [rows[i:i + self.batch_size] for i in range(0, self.size, self.batch_size)]
        if self.even and batches:
            missing = -len(batches) % self.world_size
            batches += [batches[i % len(batches)] for i in range(missing)]
        return batches[self.rank::self.world_size]

    def __len__(self) -> int:
        if self.shuffle:
            return math.ceil(math.ceil(self.size / self.world_size) / self.batch_size)
        batches = math.ceil(self.size / self.batch_size)
        return math.ceil((batches if self.even else max(batches - self.rank, 0)) / self.world_size)


class DetectionLoader(DataLoader):
    """A DataLoader of Batch, which names the images that turn out to be broken."""

    dataset: DetectionDataset
    batch_sampler: EpochBatchSampler

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if batch.broken:
                self.dataset.report_broken(batch.broken)
            yield batch


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one shape -> Batch."""
    targets = torch.cat([s.targets for s in samples])
    counts = torch.tensor([len(s.targets) for s in samples])
    targets[:, 0] = torch.repeat_interleave(torch.arange(len(samples)), counts).to(targets.dtype)
    images = torch.stack([s.image for s in samples])
    return Batch(images, targets, [s.path for s in samples], [s.shapes for s in samples])


def _collate_of(dataset: DetectionDataset, samples: Sequence[Sample]) -> Batch:
    """collate() in the process of `dataset`, which knows the broken images that it has met."""
    return replace(collate(samples), broken=frozenset(dataset.broken))


def usable_workers(workers: int, world_size: int, batches: int) -> int:
    """The number of worker processes: `workers`, at most this process's share of the cores, at most one per batch."""
    processes = min(int(os.environ.get("LOCAL_WORLD_SIZE") or world_size), world_size)  # torchrun's, on this machine
    return max(min(workers, cores() // processes, batches), 0)


def _start_worker(shutdown: Event | None, polite: bool, _: int) -> None:
    """Set up a worker: one thread, because the workers are the parallelism, and no end before the main process's.

    polite: the model computes on the same cores and goes first. Its threads wait for one another many times in a step,
    so a worker that takes one core stops them all.

    Ctrl-C and a scheduler's SIGTERM reach every process of a training, but the main process decides when to end. It
    sets `shutdown` first, and only from then on SIGTERM ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if shutdown is not None:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if shutdown.is_set() else None)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    if polite and hasattr(os, "nice"):
        os.nice(NICENESS)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """While the block runs, Python's garbage collector leaves alone what exists now.

    Workers are forks: they share this process's memory until one of them writes to it. A full collection writes to
    every object that it looks at. Some time in a long run it would so make each process a copy of its own, in all 75 MB
    with PyTorch imported. See gc.freeze().
    """
    gc.collect()  # or what nobody needs any more, such as an earlier run, would stay as long
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def build_loader(dataset: DetectionDataset, batch_size: int, workers: int, shuffle: bool, seed: int = 0, rank: int = 0,
                 world_size: int = 1, shutdown: Event | None = None, pin_memory: bool = False) -> DetectionLoader:
    """A loader of Batch; call loader.batch_sampler.set_epoch(e) before each epoch.

    shutdown: set before the main process ends; until then workers ignore SIGTERM. pin_memory: for a CUDA device.
    ValueError where a rectangular data set is to be shuffled or cut into batches of another size: the images of a batch
    would differ in shape. UserError where a batch is larger than the memory.
    """
    if dataset.rect and (shuffle or batch_size != dataset.batch_size):
        raise ValueError("a rectangular data set keeps its order and its batch size")
    shapes = [(dataset.imgsz, dataset.imgsz)] if dataset.batch_shapes is None else dataset.batch_shapes.tolist()
    require_memory(min(batch_size, len(dataset)) * max(height * width for height, width in shapes),
                   "cuda" if pin_memory else "cpu")
    # BatchNorm can't be trained on one value a channel: a single image whose last map is one pixel.
    least = 2 if dataset.augment and dataset.imgsz <= dataset.stride else 1
    sampler = EpochBatchSampler(len(dataset), batch_size, shuffle, seed, rank, world_size, dataset.augment, least)
    workers = usable_workers(workers, world_size, len(sampler))
    # The loader draws a number in every epoch. A generator of its own leaves the global one unchanged.
    generator = torch.Generator().manual_seed(sampler.seed)
    return DetectionLoader(dataset, batch_sampler=sampler, num_workers=workers, generator=generator,
                           collate_fn=partial(_collate_of, dataset), pin_memory=pin_memory,
                           worker_init_fn=partial(_start_worker, shutdown, not pin_memory),
                           persistent_workers=workers > 0, prefetch_factor=4 if workers else None)


def validation_loader(config: DataConfig, task: str, imgsz: int, batch_size: int, stride: int, workers: int = 8,
                      cache: str | None = None, single_cls: bool = False, rect: bool = True, rank: int = 0,
                      world_size: int = 1, shutdown: Event | None = None, pin_memory: bool = False,
                      labelled: bool = True) -> DetectionLoader:
    """Loader of the train, val or test images without augmentation, in rectangular batches.

    In several processes every one has its own batches. labelled: UserError where not one image has a label.
    """
    sources = {"train": config.train, "val": config.val, "test": config.test}[task]
    if not sources:
        raise UserError(f"{config.file}: has no '{task}:' entry")
    dataset = DetectionDataset(sources, imgsz, rect=rect, batch_size=batch_size, pad=0.5 if rect else 0.0,
                               stride=stride, cache=cache, single_cls=single_cls, nc=config.nc, prefix=task)
    if (dataset.problems or dataset.refused or dataset.notes) and rank == 0:
        print(dataset.summary())
    if labelled:
        dataset.require_labels()
    return build_loader(dataset, batch_size, workers, shuffle=False, rank=rank, world_size=world_size,
                        shutdown=shutdown, pin_memory=pin_memory)
