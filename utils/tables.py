"""Tables: as text on the screen, as Markdown, as CSV, and back from CSV."""
from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import write_text
from utils.text import read_text


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

    An empty cell is "". Rows are in the order of their epochs; of an epoch that is there twice the last one counts.
    UserError, with the line, where it is no such table.
    """
    text = read_text(path)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text), delimiter=separator)
    rows: dict[int, dict[str, Any]] = {}
    try:
        names = [name.strip() for name in next(lines, [])]
        if max(Counter(filter(None, names)).values(), default=0) > 1:  # empty ones are a spreadsheet's
            raise ValueError
        for line in lines:
            cells = [cell.strip() for cell in line]
            if separator == ";":  # where Excel writes these, it writes decimal commas
                cells = [cell.replace(",", ".") for cell in cells]
            row: dict[str, Any] = {**dict.fromkeys(names, ""), **dict(zip(names, cells))}
            if any(cells):
                list(map(float, filter(None, cells)))
                row["epoch"] = int(float(row["epoch"]))
                rows[row["epoch"]] = row
            if len(cells) > len(names):
                raise ValueError
    except (KeyError, ValueError, OverflowError, csv.Error):
        raise UserError(f"{path}: line {max(lines.line_num, 1)} is no row of numbers with an epoch, or a title is "
                        "there twice; mend it, or move the file away") from None
    return [rows[epoch] for epoch in sorted(rows)]
