"""Killing a training at some instant and going on, and what must be the same in the end."""
from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models import checkpoint
from tests.forks import Forked, forks

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny models: more threads only wait for each other


def start(script: str, flags: list[str], folder: Path) -> Forked:
    """The command in a process of its own, its output in folder/log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    return forks().start([str(ROOT / script), *flags], folder, ENVIRONMENT, log, log)


def finish(script: str, flags: list[str], folder: Path) -> None:
    """The command to its end; RuntimeError with its last words if it fails."""
    if code := start(script, flags, folder).wait(600):
        log = (folder / "log.txt").read_text()[-3000:]
        raise RuntimeError(f"{script} {' '.join(flags)} in {folder}: exit code {code}\n{log}")


def last(folder: Path) -> Path:
    """last.pt of the only run in the folder."""
    return folder / "runs" / "train" / "exp" / "weights" / "last.pt"


def pipeline(folder: Path) -> Path:
    """The only run of slim.py in the folder."""
    return folder / "runs" / "slim" / "exp"


def going_on(flags: list[str], folder: Path, workers: int = 0, device: str = "cpu") -> list[str]:
    """How a user goes on after a crash: --resume, or the same command again where nothing had been saved yet."""
    if (pipeline(folder) / "slim.json").is_file():
        return ["--resume", str(pipeline(folder)), "--workers", str(workers), "--device", device]
    if not last(folder).is_file():
        return [*flags, "--exist-ok"]
    return ["--resume", str(last(folder)), "--workers", str(workers), "--device", device]


def after(seconds: float) -> Callable[[Path], bool]:
    """An instant: so long after the start."""
    end = time.monotonic() + seconds
    return lambda folder: time.monotonic() > end


def while_saving(nth: int) -> Callable[[Path], bool]:
    """An instant: the nth time that a checkpoint is being written."""
    seen: set[tuple[str, int]] = set()

    def now(folder: Path) -> bool:
        for file in folder.glob("runs/*/**/weights/.*.tmp"):
            try:
                seen.add((file.name, file.stat().st_ino))
            except OSError:
                continue
        return len(seen) >= nth

    return now


def when_logged(words: str) -> Callable[[Path], bool]:
    """An instant: as soon as the output holds these words."""
    return lambda folder: words in (folder / "log.txt").read_text()


def kill(script: str, flags: list[str], folder: Path, when: Callable[[Path], bool],
         number: int = signal.SIGKILL) -> bool:
    """Start, send the signal when it is time; False if the run was over before."""
    process = start(script, flags, folder)
    while process.poll() is None and not when(folder):
        time.sleep(0.0005)
    alive = process.poll() is None
    process.send_signal(number)
    process.wait(60)
    return alive


def random_instant(rng: random.Random, seconds: float) -> Callable[[Path], bool]:
    """Any time in the run, or, each third time, in the middle of a save."""
    return while_saving(rng.randint(1, 4)) if rng.random() < 1 / 3 else after(rng.uniform(0.3, seconds))


def is_done(folder: Path, epochs: int) -> bool:
    """Has the run in the folder come to its end?"""
    if (pipeline(folder) / "slim.json").is_file():
        return (pipeline(folder) / "report.json").is_file()
    return last(folder).is_file() and checkpoint.read(last(folder))["training"]["epoch"] >= epochs


def disturb(script: str, flags: list[str], folder: Path, kills: int, epochs: int) -> tuple[int, int, list[str]]:
    """Kill runs, at most four times each, until there were `kills` kills; and let each come to its end.

    Returns (kills, runs, what is not as in a run that nothing disturbed).
    """
    rng, begun, undisturbed = random.Random(0), time.monotonic(), folder / "undisturbed"
    finish(script, [*flags, "--workers", "0"], undisturbed)
    seconds = time.monotonic() - begun
    done, runs, found = 0, 0, []
    while done < kills:
        runs += 1
        here, workers = folder / f"run{runs}", rng.choice([0, 1, 2])
        mine = [*flags, "--workers", str(workers)]
        for _ in range(rng.randint(1, 4)):
            if not kill(script, going_on(mine, here, workers), here, random_instant(rng, seconds)):
                break
            done += 1
        if not is_done(here, epochs):
            finish(script, going_on(mine, here, workers), here)
        compare = pipeline_differences if script == "slim.py" else differences
        found += [f"run {runs}: {what}" for what in compare(undisturbed, here)]
    return done, runs, found


def differences(a: Path, b: Path) -> list[str]:
    """What is not equal, bit for bit, in two runs' folders.

    Weights, average, optimizer, hooks, random numbers, results.csv, TensorBoard's scalars, best.pt.
    """
    found = []
    one, two = (checkpoint.read(last(folder)) for folder in (a, b))
    for key in ("state_dict", "ema"):
        found += [f"{key}: {k}" for k in one[key] if not torch.equal(one[key][k], two[key][k])]
    for key in ("optimizer", "updates", "stopper", "hooks", "rng"):
        if not same(one["training"][key], two["training"][key]):
            found.append(key)
    tables = [(last(folder).parents[1] / "results.csv").read_text() for folder in (a, b)]
    if tables[0] != tables[1]:
        found.append("results.csv")
    if scalars(a) != scalars(b):
        found.append("TensorBoard's scalars")
    best = [checkpoint.read(last(folder).with_name("best.pt"))["state_dict"] for folder in (a, b)]
    if not same(*best):
        found.append("best.pt")
    return found


def pipeline_differences(a: Path, b: Path) -> list[str]:
    """What is not equal, bit for bit, in the slim models of two runs of slim.py."""
    one, two = (checkpoint.read(pipeline(folder) / "slim.pt") for folder in (a, b))
    return [key for key in ("yaml", "masks", "state_dict") if not same(one[key], two[key])]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(last(folder).parents[1]), {"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def same(a: Any, b: Any) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
