"""Killed at any instant, interrupted, out of disk, out of workers: what was trained goes on to the same end."""
from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models import checkpoint
from models.pruning import model_pruner
from tests import crash
from tests.conftest import ROOT
from tests.forks import forks
from utils.tables import write_csv

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(tiny, cfg, teacher) -> list[str]:
    """Three batches an epoch, three epochs."""
    return ["--data", str(tiny), "--weights", "", "--cfg", str(cfg), "--epochs", "3", "--imgsz", "64",
            "--batch-size", "4", "--nbs", "4", "--workers", "0", "--device", "cpu", "--noplots",
            "--target-sparsity", "0.4", "--teacher", str(teacher)]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    crash.finish("train_sparsity.py", flags, folder)
    return folder


@pytest.mark.parametrize("when, workers", [
    pytest.param(lambda: crash.when_logged("    1/3 "), 2, id="second epoch")])
def test_killed_and_resumed_ends_bit_identical(flags, whole, tmp_path, when, workers):
    assert crash.kill("train_sparsity.py", flags, tmp_path, when())
    crash.finish("train_sparsity.py", crash.going_on(flags, tmp_path, workers), tmp_path)
    assert crash.differences(whole, tmp_path) == []


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 2), (signal.SIGINT, 0)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_in_the_middle_of_an_epoch_and_says_how_to_go_on(flags, whole, tmp_path, number, workers):
    """To the whole group of processes, as a terminal and a scheduler send it: loader workers hear it, too."""
    process = crash.start("train_sparsity.py", [*flags, "--workers", str(workers)], tmp_path)
    while not crash.last(tmp_path).is_file():
        assert process.poll() is None
    os.killpg(process.pid, number)
    assert process.wait(60) == 128 + number
    words = (tmp_path / "log.txt").read_text()
    assert (f"stopped by {number.name}, everything is saved; go on with: "
            "python train_sparsity.py --resume runs/train/exp/weights/last.pt") in words
    assert "Traceback" not in words
    crash.finish("train_sparsity.py", crash.going_on(flags, tmp_path), tmp_path)
    assert "resumed at epoch 1, batch " in (tmp_path / "log.txt").read_text()
    assert crash.differences(whole, tmp_path) == []


def run_with(injection: str, flags: list[str], folder: Path, script: str = "train_sparsity.py") -> tuple[int, str]:
    """(exit code, output) of the script in a process where tests/inject.py does harm."""
    command = [str(ROOT / "tests" / "inject.py"), injection, str(ROOT / script), *flags]
    done = forks().run(command, folder, crash.ENVIRONMENT)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("injection, words", [
    ("full-disk", "last.pt: can't be written"),
    ("full-disk-log", "No space left on device"),
    ("dead-worker", "a loader process died"),
    ("bus-error", "/dev/shm is too small"),
    ("out-of-memory", "out of memory"),
    ("vanished", "put it back")])
def test_what_the_machine_does_ends_in_one_line_and_a_resumable_state(flags, whole, tiny, tmp_path, injection, words):
    data = tmp_path / "data"
    shutil.copytree(tiny.parent, data)
    mine = [str(data / tiny.name) if f == str(tiny) else f for f in flags]
    mine += ["--cache", "none"] if injection == "vanished" else []  # images in memory may vanish from the disk
    workers = mine.index("--workers") + 1
    mine[workers] = "2" if injection in ("dead-worker", "bus-error", "vanished") else "0"
    code, output = run_with(injection, mine, tmp_path)
    assert code == 2 and words in output and "Traceback" not in output, output[-2000:]
    if injection not in ("full-disk", "vanished"):
        return  # the others end in the same way
    if injection == "vanished":
        shutil.copytree(tiny.parent, data, dirs_exist_ok=True)
    crash.finish("train_sparsity.py", crash.going_on(mine, tmp_path), tmp_path)
    assert crash.differences(whole, tmp_path) == []


@pytest.mark.parametrize("injection, words", [
    ("nan-loss", "a loss is not finite in epoch 2"),
    ("nan-statistics", "a running statistic of a BatchNorm is not finite in epoch 2"),
    ("nan-average", "model.0.bn.weight is not finite after epoch 2")])
def test_a_nan_stops_the_step_is_named_and_never_saved(flags, tmp_path, injection, words):
    code, output = run_with(injection, flags, tmp_path)
    assert code == 3 and words in output and "last.pt is whole" in output and "Traceback" not in output, output[-2000:]
    for file in crash.last(tmp_path).parent.glob("*.pt"):
        assert all(torch.isfinite(v).all() for v in checkpoint.load(file).state_dict().values())
    assert checkpoint.read(crash.last(tmp_path))["training"]["epoch"] == 1


def test_a_folder_that_takes_no_files(flags, tmp_path):
    code, output = run_with("nothing", [*flags, "--project", "/proc/runs"], tmp_path)
    assert code == 2 and "/proc/runs/exp: can't be made" in output and "choose another --project" in output
    assert "Traceback" not in output


def test_more_epochs_and_a_finished_run(flags, whole, tmp_path):
    shutil.copytree(whole / "runs", tmp_path / "runs")
    code, output = run_with("nothing", ["--resume"], tmp_path)
    assert code == 2 and "all 3 epochs are done; give more, as in --resume" in output
    code, output = run_with("nothing", ["--resume", "--epochs", "4", "--workers", "0"], tmp_path)
    assert code == 0 and "the learning rate follows the schedule of a run of 4 epochs" in output


def test_prune_on_a_full_disk_leaves_nothing_behind(whole, tmp_path):
    flags = ["--weights", str(crash.last(whole)), "--percent", "0.4", "--noval"]
    code, output = run_with("full-disk-now", flags, tmp_path, "prune.py")
    assert code == 2 and "can't be written" in output and "Traceback" not in output
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# Kills at random instants, each third one in the middle of a save: --kills -------------------------------------------

SCRIPTS = {  # -> flags, beside those of data and model
    "train.py": ["--epochs", "3"],
    "train_sparsity.py": ["--epochs", "3", "--target-sparsity", "0.4", "--shrink"],
    "finetune_pruned.py": ["--epochs", "3"],
    "slim.py": ["--epochs", "9", "--target", "flops=0.6"]}


@pytest.fixture(scope="module")
def outcomes(pytestconfig: pytest.Config) -> Iterator[list[dict[str, object]]]:
    """A row per script; where there are all of them they become a table."""
    rows: list[dict[str, object]] = []
    yield rows
    if len(rows) == len(SCRIPTS):
        write_csv(ROOT / "bench/results/crash.csv", rows)


@pytest.mark.skipif("not config.getoption('kills')", reason="needs --kills, their number")
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_instants_ends_bit_identical(script, tiny, cfg, teacher, tmp_path, pytestconfig, outcomes):
    model = ["--weights", "", "--cfg", str(cfg)]
    if script == "finetune_pruned.py":
        model = ["--weights", str(tmp_path / "slim.pt")]
        pruner = model_pruner(checkpoint.load(teacher), imgsz=64)
        checkpoint.save(tmp_path / "slim.pt", pruner.rank().cut(percent=0.4).slim, imgsz=64)
    flags = ["--data", str(tiny), *model, "--imgsz", "64", "--batch-size", "4", "--nbs", "8", "--device", "cpu",
             "--noplots", *SCRIPTS[script]]
    kills, runs, differences = crash.disturb(script, flags, tmp_path, pytestconfig.getoption("kills"), epochs=3)
    outcomes.append({"script": script, "kills": kills, "runs": runs, "differences": len(differences)})
    assert differences == []
