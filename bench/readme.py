"""Write the tables of README.md anew from bench/results/*.csv, between their <!-- table NAME --> marks.

    python bench/readme.py
"""
from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import ROOT

HEADER = ("model", "mAP50", "mAP50-95", "parameters", "GFLOPs", "MB", "ms an image")
NAMES = {"dense": "dense", "l1-sparse": "--sr {sr}: sparse", "l1-cut": "50% of its channels cut", "l1-tuned": "fine-tuned",
         "target-sparse": "--target-sparsity 0.5: sparse", "target-cut": "50% of its channels cut", "target-tuned": "fine-tuned"}


def read(name: str) -> list[dict[str, str]]:
    """Rows of bench/results/<name>.csv."""
    with open(ROOT / "bench" / "results" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows that measure() wrote, as a Markdown table."""
    lines: list[Sequence[str]] = [HEADER, ["---"] * len(HEADER)]
    lines += [[r["name"], f"{float(r['map50']):.3f}", f"{float(r['map']):.3f}", f"{int(r['parameters']):,}",
               f"{float(r['flops']) / 1e9:.3f}", f"{float(r['mb']):.2f}", f"{float(r['ms']):.1f}"] for r in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sparsity() -> str:
    """bench/sparsity.py's rows, a line a share: means over seeds, the spread in brackets."""
    rows = read("sparsity")
    lines: list[Sequence[str]] = [("--target-sparsity", "seeds", "mAP50", "mAP50-95", "parameters left", "GFLOPs left")]
    lines.append(["---"] * len(lines[0]))
    for share in sorted({float(r["share"]) for r in rows}):
        here = [r for r in rows if float(r["share"]) == share]
        cells = []
        for key in ("map50", "map"):
            values = np.array([float(r[key]) for r in here])
            cells.append(f"{values.mean():.3f}" + (f" ({values.min():.3f} to {values.max():.3f})" if len(here) > 1 else ""))
        left = [f"{np.mean([float(r[key]) for r in here]):.0%}" for key in ("parameters", "flops")]
        lines.append([f"{share:g}" if share else "none", str(len(here)), *cells, *left])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables() -> dict[str, str]:
    """Name of a mark -> its table."""
    bccd = read("bccd")
    found = {"demo": markdown([{**r, "name": r["stage"]} for r in read("demo")]), "sparsity": sparsity()}
    for split in ("val", "test"):
        found[f"bccd {split}"] = markdown([{**r, "name": NAMES[r["stage"]].format(sr=r["sr"])} for r in bccd if r["split"] == split])
    return found


def main() -> None:
    """Replace what stands between the marks."""
    path = Path(ROOT / "README.md")
    text = path.read_text(encoding="utf-8")
    for name, table in tables().items():
        marked = re.search(rf"(?<=<!-- table {name} -->\n).*?(?=<!-- /table -->)", text, re.DOTALL)
        if not marked:
            raise SystemExit(f"error: README.md has no <!-- table {name} --> mark")
        text = text[:marked.start()] + table + "\n" + text[marked.end():]
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
