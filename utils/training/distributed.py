"""One process or many: what torchrun tells, in one value."""
from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError

T = TypeVar("T")
# Processes wait for one another so long: the main one alone scans images, draws pictures and writes files.
TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """This process's rank among all processes (alone: rank 0 of 1) and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Does this process write files and print?"""
        return self.rank == 0


def select_device(name: str, half: bool = False) -> torch.device:
    """"" (the first GPU if there is one), "cpu", "0", "cuda:1" or "mps" -> device. A GPU becomes the current
    one; a process that computes on a CPU keeps the memory that it frees.

    half: it will compute in fp16. UserError for a device that is not there, or can't.
    """
    name = str(name or "").strip().lower().removeprefix("cuda:")
    if "," in name:
        count = len(name.split(","))
        raise UserError(f"--device {name}: several GPUs are started with: "
                        f"torchrun --nproc_per_node {count} train.py ... --device {name}")
    device = _gpu("0") if name in ("", "cuda") and torch.cuda.is_available() else _named_device(name)
    if device.type == "cpu":
        _keep_freed_memory()
    if half and device.type == "cpu":
        raise UserError("--half: fp16 needs a GPU; leave it out on a CPU")
    return device


def _keep_freed_memory() -> None:
    """Keep what is freed for what comes next, which glibc else gives back to the system page by page.

    Where the C library is another one nothing happens. See mallopt(3).
    """
    trim_threshold, mmap_threshold, old_maximum = -1, -3, 2**25
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        if not mallopt(mmap_threshold, 2**30):
            mallopt(mmap_threshold, old_maximum)


def _named_device(name: str) -> torch.device:
    if name in ("", "cuda", "cpu"):
        return torch.device("cpu")
    if name != "mps":
        return _gpu(name)
    if not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch has no Metal here; use --device cpu")
    return torch.device("mps")


def _gpu(number: str) -> torch.device:
    """The GPU of this number, made the current one: what is not told a device goes there."""
    if not number.isdigit():
        raise UserError(f"--device {number}: give cpu, mps or the number of a GPU")
    if not torch.cuda.is_available() or int(number) >= torch.cuda.device_count():
        raise UserError(f"--device {number}: this PyTorch sees {torch.cuda.device_count()} GPUs; "
                        "use --device cpu or another number")
    device = torch.device(f"cuda:{number}")
    torch.cuda.set_device(device)
    return device


def device_of_rank(name: str, local_rank: int) -> torch.device:
    """The device of one of torchrun's processes: its GPU out of --device ("2,3"), or of all; or the CPU."""
    name = str(name or "").strip().lower()
    if name == "cpu" or not torch.cuda.is_available():
        return select_device("cpu")
    numbers = [n.strip() for n in name.split(",") if n.strip()] or [str(i) for i in range(torch.cuda.device_count())]
    if local_rank >= len(numbers):
        processes = os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)
        raise UserError(f"torchrun --nproc_per_node {processes}: there are {len(numbers)} GPUs ({', '.join(numbers)}); "
                        f"start {len(numbers)} processes, or use --device cpu")
    return _gpu(numbers[local_rank])


def device_of_before(name: str) -> str:
    """The --device of a run that goes on, with a note where this machine has none: "" then, which is what it has."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        for number in str(name).lower().split(",") if several else [str(name)]:
            select_device(number)
    except UserError as error:
        if first_process():
            print(f"note: the device of the run is not here ({error}); going on with what is")
        return ""
    return name


def first_process() -> bool:
    """Is this torchrun's first process, or the only one? Known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ.get("RANK") == "0"


@contextmanager
def process_group(device_name: str = "") -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, and leave it at the end."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(0, 1, select_device(device_name))
        return
    device = device_of_rank(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(int(os.environ["RANK"]), size, device)
    finally:
        dist.destroy_process_group()


def wrapped(model: nn.Module, world: World) -> nn.Module:
    """The model, in DistributedDataParallel where there are several processes."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device.index] if world.device.type == "cuda" else None)


def main_process() -> bool:
    """Is this the process that shows progress?"""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def barrier(size: int) -> None:
    """Wait for all processes."""
    if size > 1:
        dist.barrier()


def broadcast(value: object, size: int) -> object:
    """The main process's `value` (plain data), on every process."""
    if size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share_buffers(models: Iterable[nn.Module], size: int) -> None:
    """The main process's BatchNorm statistics (and other buffers), on every process.

    Each process has seen other images since the last synchronisation.
    """
    if size == 1:
        return
    for model in models:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather(value: T, size: int) -> list[T]:
    """Every process's `value` (plain data and arrays), in the order of their ranks, on every process."""
    if size == 1:
        return [value]
    box: list[T] = [value] * size
    dist.all_gather_object(box, value)
    return box
