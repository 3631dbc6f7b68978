"""Where a run's numbers go: the screen, results.csv and TensorBoard. One line, one row and one step an epoch."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.tables import read_results, write_csv

LOSSES = ("box_loss", "obj_loss", "cls_loss")
Cell = Callable[[Mapping[str, float]], str]  # an epoch's log -> what its line shows of it


def cell(key: str, form: str) -> Cell:
    """What the log has under `key`, in the format `form`; "-" where it has nothing there."""
    return lambda log: form.format(log[key]) if key in log else "-"


def duration(seconds: float) -> str:
    """'40 s', '12 minutes' or, from two hours on, '2.5 hours'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


class EpochTable:
    """What a run prints: a line an epoch. first, epochs: the epochs to come. columns: further ones, by title."""

    def __init__(self, first: int, epochs: int, columns: Mapping[str, Cell]):
        self.first, self.epochs, self.began = first, epochs, time.monotonic()
        metrics = {"P": "precision", "R": "recall", "mAP50": "mAP_0.5", "mAP50-95": "mAP_0.5:0.95"}
        self.columns = {**{name[:3]: cell(f"train/{name}", "{:.4f}") for name in LOSSES},
                        **{title: cell(f"metrics/{name}", "{:.3f}") for title, name in metrics.items()}, **columns}

    @property
    def seconds(self) -> float:
        """Since the first epoch began."""
        return time.monotonic() - self.began

    def header(self) -> str:
        """The titles of the columns."""
        return f"{'epoch':>8}   {''.join(f'{title:>{max(len(title) + 2, 10)}}' for title in self.columns)}  time left"

    def line(self, epoch: int, log: Mapping[str, float]) -> str:
        """The line of an epoch that is over."""
        cells = "".join(f"{show(log):>{max(len(title) + 2, 10)}}" for title, show in self.columns.items())
        remaining = self.seconds / (epoch + 1 - self.first) * (self.epochs - epoch - 1)
        return f"{epoch + 1:>5}/{self.epochs:<5}{cells}  {duration(remaining)}"


class RunLogger:
    """results.csv and TensorBoard events in a run's folder. `tb` is a SummaryWriter for what hooks add of their own.

    On resume, rows from `start_epoch` on are dropped from both, so that no epoch is lost or doubled. UserError for a
    folder that TensorBoard can't write into.
    """

    def __init__(self, folder: Path, start_epoch: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the main process needs it

        self.path = folder / "results.csv"
        self.rows: list[dict[str, Any]] = []
        if start_epoch and self.path.is_file():
            self.rows = [row for row in read_results(self.path) if row["epoch"] < start_epoch]
        try:
            self.tb = SummaryWriter(str(folder), purge_step=start_epoch)
        except UnicodeEncodeError:
            raise UserError(f"{folder}: has a name that is not UTF-8, TensorBoard can't write there; choose another "
                            "--project") from None

    def epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Write one epoch. Columns that are new get empty cells in the rows before."""
        self.rows.append({"epoch": epoch, **{k: f"{v:.6g}" for k, v in values.items()}})
        columns = dict.fromkeys((k for row in self.rows for k in row), "")
        write_csv(self.path, [{**columns, **row} for row in self.rows])
        for key, value in values.items():
            self.tb.add_scalar(key, value, epoch)
        self.tb.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self.tb.close()
