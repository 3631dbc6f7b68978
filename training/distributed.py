"""One process or many: what torchrun tells, in one value."""
from __future__ import annotations

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

from utils.device import gpu, select_device
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
    return gpu(numbers[local_rank])


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


def broadcast(value: T, size: int) -> T:
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
