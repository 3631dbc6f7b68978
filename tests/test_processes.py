"""Two processes under torchrun (gloo): they follow one, share the validation, and end together."""
from __future__ import annotations

import csv
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models import checkpoint
from models.yolo import Model, fused, on_device
from tests import crash, trajectory
from tests.conftest import ROOT
from utils.data.config import read_data
from utils.data.loader import validation_loader
from utils.slimming import Pruner
from val import evaluate

pytestmark = pytest.mark.slow
PORTS = itertools.count(29531)


def torchrun(folder: Path, *command: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """Two processes of a script, one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                "--master_port", str(next(PORTS))]
    return subprocess.run([*launcher, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=timeout,
                          env=crash.ENVIRONMENT)


def flags(tiny: Path, folder: Path, *more: object) -> list[str]:
    """Three steps an epoch, six epochs; a large rate, so that a difference would show."""
    return ["--data", str(tiny), "--epochs", "6", "--nbs", "4", "--project", str(folder), "--device", "cpu",
            *map(str, more)]


@pytest.fixture(scope="module")
def slim_file(cfg, tmp_path_factory) -> Path:
    model = Model(str(cfg), nc=2, names={0: "square", 1: "circle"})
    result = Pruner(model, 64).rank().cut(percent=0.4)
    checkpoint.save(path := tmp_path_factory.mktemp("slim") / "slim.pt", result.slim.eval(), imgsz=64)
    return path


@pytest.mark.parametrize("script, mode", [
    pytest.param("train_sparsity", ["--target-sparsity", "0.4", "--shrink"], id="shrink"),
    pytest.param("finetune_pruned", ["--teacher"], id="finetune with a teacher")])
def test_two_processes_follow_one(tiny, cfg, slim_file, teacher, tmp_path, script, mode):
    """Every step's gammas are equal, up to float32 sums in another order.

    With the same images a step, BatchNorm in eval mode and a loss that adds up over images.
    """
    start = ["--weights", slim_file] if script == "finetune_pruned" else ["--weights", "", "--cfg", cfg]
    mode = [*mode, teacher] if "--teacher" in mode else mode
    one, increments = trajectory.go(flags(tiny, tmp_path / "one", *start, *mode), 4, script=script)
    done = torchrun(tmp_path, ROOT / "tests" / "trajectory.py", tmp_path / "out", 4, script,
                    *flags(tiny, tmp_path / "two", *start, *mode))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0][0], ranks[1][0])  # bit-equal gammas on both ranks, every step
    assert ranks[0][0].shape == one.shape == (18, one.shape[1]) and not torch.equal(one[0], one[-1])
    assert torch.allclose(ranks[0][0], one, rtol=0, atol=1e-5)
    assert torch.allclose(ranks[0][1], increments, rtol=0, atol=1e-6)


def tiny_run(tiny: Path, cfg: Path) -> list[str]:
    """Flags of a training from scratch."""
    return ["--data", str(tiny), "--weights", "", "--cfg", str(cfg), "--imgsz", "64", "--workers", "0",
            "--device", "cpu", "--noplots"]


def test_validation_is_shared_and_gives_the_same_map(tiny, cfg, tmp_path):
    """With 10 images a batch the last batch has one image a process, and the second process has nothing to validate."""
    done = torchrun(tmp_path, ROOT / "train_sparsity.py", *tiny_run(tiny, cfg), "--epochs", 1,
                    "--batch-size", 10, "--masked-val", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs/train/exp"
    # Only one process writes.
    assert not (tmp_path / "runs/train/exp2").exists() and len(list(folder.glob("events.out*"))) == 1
    assert done.stdout.count("now: python prune.py") == 1
    with open(folder / "results.csv", newline="") as file:
        row, = csv.DictReader(file)
    model = on_device(fused(checkpoint.load(folder / "weights/last.pt")), "cpu")
    loader = validation_loader(read_data(tiny), "val", 64, 10, 32, workers=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two processes: an untrained model's mAP hangs on the last digit
    alone = evaluate(model, loader, torch.device("cpu")).metrics()
    torch.set_num_threads(threads)
    for key, value in alone.items():
        assert float(row[key]) == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_an_exception_in_one_process_ends_both_soon_and_the_run_goes_on(tiny, cfg, tmp_path):
    mine = [*tiny_run(tiny, cfg), "--epochs", "3", "--batch-size", "4"]
    start = time.monotonic()
    done = torchrun(tmp_path, ROOT / "tests" / "inject.py", "other-rank", ROOT / "train.py", *mine, timeout=120)
    assert done.returncode != 0 and "harm in rank 1" in done.stderr
    assert time.monotonic() - start < 90  # start-up included
    assert checkpoint.read(crash.last(tmp_path))["training"]["epoch"] == 1
    crash.finish("train.py", crash.going_on(mine, tmp_path), tmp_path)
    assert checkpoint.read(crash.last(tmp_path))["training"]["epoch"] == 3
