"""One process or many: what torchrun tells, in one value."""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from utils.errors import UserError

T = TypeVar("T")


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
    """"" (the first GPU if there is one), "cpu", "0", "cuda:1" or "mps" -> device.

    half: it will compute in fp16. UserError for a device that is not there, or can't.
    """
    device = _named_device(name)
    if half and device.type == "cpu":
        raise UserError("--half: fp16 needs a GPU; leave it out on a CPU")
    return device


def _named_device(name: str) -> torch.device:
    name = str(name or "").strip().lower().removeprefix("cuda:")
    if name in ("", "cuda"):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name in ("cpu", "mps"):
        return torch.device(name)
    if "," in name:
        count = len(name.split(","))
        raise UserError(f"--device {name}: several GPUs are started with: "
                        f"torchrun --nproc_per_node {count} train.py ... (without --device)")
    if not name.isdigit():
        raise UserError(f"--device {name}: give cpu, mps or the number of a GPU")
    if not torch.cuda.is_available() or int(name) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this PyTorch sees {torch.cuda.device_count()} GPUs; "
                        "use --device cpu or another number")
    return torch.device(f"cuda:{name}")


@contextmanager
def process_group(device_name: str = "") -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, and leave it at the end."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(0, 1, select_device(device_name))
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available() and device_name != "cpu"
    device = torch.device(f"cuda:{local}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


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
