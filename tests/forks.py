"""Commands of the repository in forks of a process that has imported what they import: a start takes no seconds.

A fork is a process of its own, with its own arguments, folder, environment, output and exit code, as a user's. What an
interpreter reads when it starts (PYTHON*, OMP_NUM_THREADS) is that of the tests.
"""
from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("train", "train_sparsity", "prune", "finetune_pruned", "val", "detect", "export", "slim", "benchmarks",
            "torch._dynamo", "torch.utils.flop_counter", "torch.utils.tensorboard", "matplotlib.pyplot",
            "pycocotools.cocoeval")


class Forks:
    """The process that forks. It runs one command at a time."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen([sys.executable, "-m", "tests.forks", str(writing)], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, pass_fds=[writing])
        os.close(writing)
        self.answers = open(reading)  # noqa: SIM115  # as long as the process

    def run(self, argv: list[str], cwd: Path, environment: dict[str, str],
            timeout: float) -> subprocess.CompletedProcess:
        """As subprocess.run([python, *argv], capture_output=True, text=True)."""
        assert self.process.stdin is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            request = {"argv": argv, "cwd": str(cwd), "environment": environment, "files": list(map(str, files))}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            pid = int(self.answers.readline())
            if not select.select([self.answers], [], [], timeout)[0]:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(argv, timeout)
            code = int(self.answers.readline())
            return subprocess.CompletedProcess(argv, code, *(file.read_text() for file in files))

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.answers.close()


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
        os.write(answers, f"{pid}\n".encode())
        os.write(answers, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


def become(argv: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """Be the process of this command."""
    for number, (name, flags) in enumerate([(os.devnull, os.O_RDONLY), *((file, os.O_WRONLY | os.O_CREAT)
                                                                         for file in files)]):
        os.dup2(os.open(name, flags, 0o644), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
