"""SIGINT (Ctrl-C) and SIGTERM (a scheduler's) in a training: stop at a point from which the run can be resumed."""
from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from utils.errors import Interrupted
from utils.files import command_script


class Listener:
    """Remembers the first signal, for the loop to look at; a second one ends the process at once.

    With several processes the first one ends it at once: they would not agree on a step, and last.pt is whole as of the
    end of the last epoch.
    """

    def __init__(self, processes: int):
        self.processes = processes
        self.requested = ""  # the signal that asks the run to stop
        # Loader workers receive the signals of the whole process group. They end when this is set, and not before.
        self.shutdown = multiprocessing.Event()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        name = signal.Signals(number).name
        if self.requested or self.processes > 1:
            raise Interrupted(f"stopped by {name} at once; a training goes on with: python {command_script()} --resume",
                              128 + number)
        self.requested, self.number = name, number
        print(f"\n{name}: stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def stop_if_requested(self, folder: Path) -> None:
        """Everything is saved: end here if a signal asked for it."""
        if self.requested:
            raise Interrupted(f"stopped by {self.requested}, everything is saved; go on with: "
                              f"python {command_script()} --resume {folder / 'weights' / 'last.pt'}", 128 + self.number)


@contextmanager
def listen(processes: int = 1) -> Iterator[Listener]:
    """Receive SIGINT and SIGTERM while the block runs (in the main thread: Python lets no other)."""
    listener = Listener(processes)
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, listener.receive) for number in numbers}
    try:
        yield listener
    finally:
        listener.shutdown.set()
        for number, handler in before.items():
            signal.signal(number, handler)
