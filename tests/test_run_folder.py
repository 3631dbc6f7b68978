"""A run's folder: one process has it, what killed processes have left in it goes, what is the user's stays."""
from __future__ import annotations

import os
import pwd
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import slim
import train
from tests.conftest import ROOT
from training.pipeline import Pipeline, Settings
from training.start import move_away
from utils import files
from utils.data import label_cache
from utils.errors import UserError
from utils.options import training_parser

HOLD = """
import os, sys, time
from pathlib import Path
from utils.files import in_use
with in_use(Path(sys.argv[1])):
    if not os.fork():
        time.sleep(60)
    print("mine", flush=True)
    time.sleep(60)
"""
DEAD = 2**22 + 1  # Linux gives no process this number


@pytest.fixture
def holder(tmp_path):
    """A process that has a run's folder, and a fork that lives on, as a loader's workers do for a while."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "exp")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == "mine\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_folder_in_use_is_refused_until_its_process_dies(holder, tmp_path, monkeypatch):
    folder = tmp_path / "exp"
    for _ in range(2):
        with pytest.raises(UserError, match=rf"exp: is in use by process {holder.pid} on .*; wait for its end"):
            with files.in_use(folder):
                pass
    with monkeypatch.context() as windows:
        windows.setattr(files, "fcntl", None)
        with files.in_use(folder):  # where there are no locks nobody is refused
            pass
    holder.kill()
    holder.wait()
    with files.in_use(folder), files.in_use(folder / "dense"):  # slim.py's stages
        pass
    assert list(folder.iterdir()) == [folder / "dense"] and not list((folder / "dense").iterdir())


@pytest.mark.slow
def test_no_second_training_in_a_folder_in_use(holder, tiny, cfg, tmp_path):
    """Neither with --resume nor with --exist-ok, nor slim.py; and nothing is changed."""
    last = tmp_path / "exp/weights/last.pt"
    last.parent.mkdir()
    last.write_bytes(b"of the other process")
    Pipeline(tmp_path / "exp", "", Settings(None, None, "", 64, False, ("flops", 0.5), 9, 1, True)).save()
    start = ["--data", str(tiny), "--weights", "", "--cfg", str(cfg), "--epochs", "1", "--imgsz", "64",
             "--workers", "0", "--project", str(tmp_path), "--exist-ok", "--device", "cpu"]
    for main, flags in ((train.main, ["--resume", str(last)]), (train.main, start),
                        (slim.main, ["--resume", str(tmp_path / "exp")])):
        with pytest.raises(UserError, match=f"is in use by process {holder.pid}"):
            main(flags)
    assert [path.name for path in last.parent.iterdir()] == ["last.pt"]
    assert last.read_bytes() == b"of the other process"


def test_what_killed_processes_left_goes_and_the_users_files_stay(tmp_path):
    machine, old = files._machine(), time.time() - 2 * files.STALE
    names = {
        f".last.pt.slimming-{machine}-{DEAD}-1.tmp": 0,       # of a dead process: goes at once
        f".last.pt.slimming-00000000-{DEAD}-1.tmp": 0,        # another machine's: may be alive
        ".best.pt.slimming-00000000-77-1.tmp": old,           # ... but not after so long
        f".last.pt.slimming-{machine}-{os.getpid()}-1.tmp": 0,
        ".last.pt.77-1.tmp": old,                             # as older versions called them
        ".last.pt.77-2.tmp": 0,
        ".notes.tmp": old, "last.pt.77-1.tmp": old, ".last.pt.77-1.tmp.txt": old, ".last.pt.77.tmp": old}
    for name, changed in names.items():
        (tmp_path / name).write_bytes(b"half")
        if changed:
            os.utime(tmp_path / name, (changed, changed))
    (folder := tmp_path / f".x.slimming-{machine}-{DEAD}-1.tmp").mkdir()
    (link := tmp_path / f".y.slimming-{machine}-{DEAD}-1.tmp").symlink_to(tmp_path / ".notes.tmp")
    files.write_text(tmp_path / "results.csv", "a")
    gone = {name for name in names if not (tmp_path / name).exists()}
    assert gone == {f".last.pt.slimming-{machine}-{DEAD}-1.tmp", ".best.pt.slimming-00000000-77-1.tmp",
                    ".last.pt.77-1.tmp"}
    assert folder.is_dir() and link.is_symlink() and (tmp_path / "results.csv").read_text() == "a"


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "日" * 84 + ".pt", "b\udcff.txt"])
def test_names_as_long_as_they_may_be(tmp_path, name):
    files.write_text(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize("seed", range(20))
def test_earlier_checkpoints_are_moved_and_never_overwritten(tmp_path, seed):
    """Whatever the user has deleted meanwhile."""
    rng, kept = random.Random(seed), {}
    for i in range(8):
        for name in rng.sample(["best.pt", "last.pt"], rng.randint(0, 2)):
            (tmp_path / name).write_text(f"{name} {i}")
            kept[f"{name} {i}"] = None
        move_away(tmp_path)
        assert not (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()
        there = sorted(tmp_path.iterdir())
        if there and rng.random() < 0.5:
            victim = rng.choice(there)
            kept.pop(victim.read_text())
            victim.unlink()
        assert sorted(path.read_text() for path in tmp_path.iterdir()) == sorted(kept)


def test_who_has_no_home_has_no_cache_and_works(tmp_path, monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "YOLO_CACHE"):
        monkeypatch.delenv(name, raising=False)
    folder = label_cache.cache_folder("labels")
    with pytest.raises(UserError, match="can't be written"):  # which scan_with_cache() takes as it comes
        files.write_text(folder / "x", "")
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path))
    assert label_cache.cache_folder("labels") == Path(tmp_path / "labels")


@pytest.mark.parametrize("seed", ["-1", str(10**30), str(2**63), "1.5", "x"])
def test_seeds_that_a_generator_does_not_take_are_refused(seed):
    with pytest.raises(UserError, match="^--seed"):
        training_parser("").parse_args(["--seed", seed])
    assert training_parser("").parse_args(["--seed", str(2**63 - 1)]).seed == 2**63 - 1
