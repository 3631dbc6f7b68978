"""Commands of the repository in forks of a process that has imported what they import: a start takes no seconds.

A fork is a process of its own, with its own arguments, folder, environment, output and exit code, as a user's. What an
interpreter reads when it starts (PYTHON*) is that of the tests.
"""
from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("train", "train_sparsity", "prune", "finetune_pruned", "val", "detect", "export", "slim", "benchmarks",
            "torch._dynamo", "torch.utils.flop_counter", "torch.utils.tensorboard", "matplotlib.pyplot",
            "pycocotools.cocoeval")


class Forked:
    """A command on its way. As far as the tests use them its methods are those of subprocess.Popen."""

    def __init__(self, pid: int, answers: int):
        self.pid, self.answers, self.returncode = pid, answers, None

    def poll(self, timeout: float = 0) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None and select.select([self.answers], [], [], timeout)[0]:
            self.returncode = number(self.answers)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit code. TimeoutExpired, and no process any more, where it takes longer than so many seconds."""
        if self.poll(timeout) is None:
            self.end()
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        assert self.returncode is not None
        return self.returncode

    def end(self) -> None:
        """Kill it, with the processes that it has started, where it still runs."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.poll(60)

    def send_signal(self, number: int) -> None:
        """To it alone, where it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Forks:
    """The process that forks. It runs one command at a time."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen([sys.executable, "-m", "tests.forks", str(writing)], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, pass_fds=[writing])
        os.close(writing)
        self.answers = reading
        self.last: Forked | None = None

    def start(self, argv: list[str], cwd: Path, environment: dict[str, str], out: Path, error: Path) -> Forked:
        """A command, in a session of its own. What it prints is appended to the files."""
        if self.last is not None:  # of a test that failed
            self.last.end()
        assert self.process.stdin is not None
        for file in (out, error):
            file.touch()
        request = {"argv": argv, "cwd": str(cwd), "environment": environment, "files": [str(out), str(error)]}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        self.last = Forked(number(self.answers), self.answers)
        return self.last

    def run(self, argv: list[str], cwd: Path, environment: dict[str, str],
            timeout: float = 600) -> subprocess.CompletedProcess:
        """As subprocess.run([python, *argv], capture_output=True, text=True)."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            code = self.start(argv, cwd, environment, *files).wait(timeout)
            return subprocess.CompletedProcess(argv, code, *(file.read_text() for file in files))

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        os.close(self.answers)


@cache
def forks() -> Forks:
    """Those of this process of the tests."""
    atexit.register((found := Forks()).close)
    return found


def number(answers: int) -> int:
    """The next one that the process that forks tells: of a command its process, then its exit code."""
    return struct.unpack("i", os.read(answers, 4))[0]


def serve(answers: int) -> None:
    """Fork for each line of the standard input, a request in JSON."""
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            os.close(answers)
            become(**request)
            return
        os.write(answers, struct.pack("i", pid))
        os.write(answers, struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def become(argv: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """Be the process of this command."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
