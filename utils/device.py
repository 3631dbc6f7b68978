"""The device that a script computes on, and the memory beside it."""
from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from utils.errors import UserError

# Bytes a pixel of RGB images: of themselves, and of them in fp32 with the first layer's output in the smallest of
# YOLOv5's models, 16 channels at half the size, before and after its activation. Larger models take more.
IMAGE, LEAST_MODEL = 3, 12 + 2 * 16
UNCHECKED_BYTES = 1e9  # bytes; it is not checked whether fewer fit


def select_device(name: str) -> torch.device:
    """"" (the first GPU if there is one), "cpu", "0", "cuda:1" or "mps" -> device. A GPU becomes the current
    one; a process that computes on a CPU keeps the memory that it frees. UserError for a device that is not there.
    """
    name = str(name or "").strip().lower().removeprefix("cuda:")
    if "," in name:
        count = len(name.split(","))
        raise UserError(f"--device {name}: several GPUs are started with: "
                        f"torchrun --nproc_per_node {count} train.py ... --device {name}")
    device = gpu("0") if name in ("", "cuda") and torch.cuda.is_available() else _named_device(name)
    if device.type == "cpu":
        _keep_freed_memory()
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
        return gpu(name)
    if not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch has no Metal here; use --device cpu")
    return torch.device("mps")


def gpu(number: str) -> torch.device:
    """The GPU of this number, made the current one: tensors without a device of their own go there."""
    if not number.isdigit():
        raise UserError(f"--device {number}: give cpu, mps or the number of a GPU")
    if not torch.cuda.is_available() or int(number) >= torch.cuda.device_count():
        raise UserError(f"--device {number}: this PyTorch sees {torch.cuda.device_count()} GPUs; "
                        "use --device cpu or another number")
    device = torch.device(f"cuda:{number}")
    torch.cuda.set_device(device)
    return device


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not tell."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def require_memory(pixels: float, device: str, flags: str = "--imgsz, --batch-size") -> None:
    """UserError where a batch of so many pixels certainly does not fit into the machine's memory.

    device: the kind that computes; a GPU raises an error of its own. Most systems end a process that takes too much
    memory rather than refuse it, so this is checked before.
    """
    need = pixels * (LEAST_MODEL if device == "cpu" else IMAGE)
    free = available_memory() if need > UNCHECKED_BYTES else None
    if free is not None and need > free:
        raise UserError(f"{flags}: {pixels / 1e6:,.0f} million pixels at once take {need / 1e9:,.0f} GB at the least, "
                        f"{free / 1e9:,.0f} GB are free; give less")
