"""Tables: as text on the screen, as Markdown, as CSV, and back from CSV."""
from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import write_text
from utils.text import read_lines


def text_table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Plain text; the first column is left-aligned, the others are right-aligned."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for first, *rest in cells:
        lines.append("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """GitHub's Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], digits: str = ".6g") -> None:
    """Rows of equal keys as CSV, written atomically; floats in the format `digits`."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:{digits}}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(path, file.getvalue())


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.csv, also as a spreadsheet saves it: "epoch" -> int, each other column -> text of a number.

    An empty cell is "". UserError, with the line, where it is no such table.
    """
    lines = read_lines(path)
    separator = max(",;\t", key=(lines or [""])[0].count)
    if separator == ";":  # where Excel writes these, it writes decimal commas
        lines[1:] = [line.replace(",", ".") for line in lines[1:]]
    rows = []
    for number, line in enumerate(lines, 1):
        cells = [cell.strip().strip('"') for cell in line.split(separator)]
        if number == 1:
            names = cells
            continue
        row: dict[str, Any] = {**dict.fromkeys(names, ""), **dict(zip(names, cells))}
        try:
            row["epoch"] = int(float(row["epoch"]))
            fits = len(cells) <= len(names) and all(float(cell or 0) is not None for cell in cells)
        except (KeyError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise UserError(f"{path}: line {number} is no row of numbers with an epoch; mend it, or move the file away")
        rows.append(row)
    return rows
