"""Where a run's numbers go: results.csv and TensorBoard. One row and one step an epoch."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import write_text
from utils.tables import read_results


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
        columns = list(dict.fromkeys(k for row in self.rows for k in row))
        lines = [",".join(columns)] + [",".join(str(row.get(c, "")) for c in columns) for row in self.rows]
        write_text(self.path, "\n".join(lines) + "\n")
        for key, value in values.items():
            self.tb.add_scalar(key, value, epoch)
        self.tb.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self.tb.close()
