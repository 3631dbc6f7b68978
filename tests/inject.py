"""Runs a script of the repository in a process in which something goes wrong at a chosen moment.

    python tests/inject.py WHAT SCRIPT flags of the script
"""
from __future__ import annotations

import errno
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

EPOCH = 1  # the harm is done in the second one


def full_disk(whole: int = 2) -> None:
    """The checkpoint after so many whole ones breaks off in the middle."""
    write, calls = torch.save, []

    def save(data: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) > whole:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(data, file)

    torch.save = save


def full_disk_log() -> None:
    """TensorBoard's file can't grow any more."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, calls = RecordWriter.write, []

    def refuse(self: Any, data: bytes) -> None:
        calls.append(1)
        if len(calls) > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out")
        write(self, data)

    RecordWriter.write = refuse


def in_dataset(harm: Any) -> None:
    """Call harm(data set, index) when a training sample of the second epoch is made, by a worker if there are any."""
    from utils.data.dataset import DetectionDataset

    get = DetectionDataset.__getitem__

    def getitem(self: Any, key: tuple[int, int]) -> Any:
        if self.augment and key[0] == EPOCH:
            harm(self, key[1])
        return get(self, key)

    DetectionDataset.__getitem__ = getitem


def vanished() -> None:
    """The images are gone."""
    def remove(dataset: Any, index: int) -> None:
        for path in dataset.images:
            Path(path).unlink(missing_ok=True)

    in_dataset(remove)


def out_of_memory() -> None:
    """What torch says when an allocation fails on the CPU."""
    def fail(dataset: Any, index: int) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
                           "you tried to allocate 1 bytes.")

    in_dataset(fail)


def nan_loss() -> None:
    """The loss of a batch is not a number."""
    from training.loss import DetectionLoss

    call, calls = DetectionLoss.__call__, []

    def poisoned(self: Any, *args: Any) -> Any:
        loss, items = call(self, *args)
        calls.append(torch.is_grad_enabled() and loss.requires_grad)
        return (loss * float("nan") if sum(calls) == 5 and calls[-1] else loss), items

    DetectionLoss.__call__ = poisoned


def after_steps(harm: Any) -> None:
    """Call harm(run) after every optimizer step of the second epoch."""
    import train

    step = train.optimizer_step

    def harmful(run: Any, *args: Any) -> Any:
        shown = step(run, *args)
        if run.epoch == EPOCH:
            harm(run)
        return shown

    train.optimizer_step = harmful


def nan_statistics() -> None:
    """A BatchNorm's running mean breaks although the loss does not show it."""
    after_steps(lambda run: run.model.model[0].bn.running_mean.fill_(np.nan))


def nan_average() -> None:
    """The averaged weights break, which no loss shows."""
    after_steps(lambda run: run.ema.ema.model[0].bn.weight.fill_(np.nan))


def other_rank() -> None:
    """The second process fails."""
    if os.environ.get("RANK") == "1":
        def fail(dataset: Any, index: int) -> None:
            raise ValueError("harm in rank 1")

        in_dataset(fail)


INJECTIONS = {
    "full-disk": full_disk, "full-disk-now": lambda: full_disk(0), "full-disk-log": full_disk_log,
    "vanished": vanished, "out-of-memory": out_of_memory,
    "dead-worker": lambda: in_dataset(lambda *_: os.kill(os.getpid(), signal.SIGKILL)),
    "bus-error": lambda: in_dataset(lambda *_: os.kill(os.getpid(), signal.SIGBUS)),
    "nan-loss": nan_loss, "nan-statistics": nan_statistics, "nan-average": nan_average, "other-rank": other_rank,
    "nothing": lambda: None}

if __name__ == "__main__":
    what, script, *flags = sys.argv[1:]
    INJECTIONS[what]()
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
