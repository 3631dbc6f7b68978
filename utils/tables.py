"""Tables: as text on the screen, as Markdown, as CSV."""
from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.files import atomic


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
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:{digits}}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
