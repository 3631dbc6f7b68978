"""Write the tables of README.md and bench/README.md from bench/results/*.csv, between their <!-- table NAME --> marks.

    python bench/readme.py
"""
from __future__ import annotations

import re

import numpy as np
from columns import (
    ENGINE,
    L1,
    PIPELINE,
    PRUNING,
    ROOT,
    SPARSITY,
    STAGES,
    as_markdown,
    l1_rows,
    read_results,
    share_rows,
    spread,
)

from utils.errors import UserError, run_cli
from utils.files import write_text
from utils.options import HelpfulParser

PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
MARK, END = r"<!-- table ([\w ]+) -->\n", "<!-- /table -->"
# Name of a run of bccd.py -> the flags that made it sparse, and the percent of prune.py.
WAYS = {"l1": ("--sr {sr}", 50), "blocks": ("--target-sparsity 0.55", 55),
        "target": ("--target-sparsity 0.5 --round-to 1", 50)}


def bccd(split: str) -> str:
    """The stages of bccd.py on the val or the test images."""
    found = {row["stage"]: row for row in read_results("bccd") if row["split"] == split}
    rows = [found["dense"]]
    for way, (flags, percent) in WAYS.items():
        flags = flags.format(sr=found["dense"]["sr"])
        titles = {"sparse": f"{flags}: sparse", "cut": f"{percent}% of its channels cut", "tuned": "fine-tuned"}
        rows += [{**found[f"{way}-{stage}"], "stage": title} for stage, title in titles.items()]
    return as_markdown(rows, STAGES)


def summary() -> str:
    """The main result of sparsity.py, in a sentence."""
    rows = read_results("sparsity")
    dense = [row for row in rows if row["run"] == "share0"]
    slim = [row for row in rows if row["run"] == "share0.55-round16"]
    flops, parameters = (np.mean([row[key] for row in slim]) for key in ("flops", "parameters"))
    return (f"BCCD, yolov5n at 320 px, mAP50-95 of {len(dense)} runs each: dense {spread(dense, 'map')}; "
            "with `--target-sparsity 0.55`, cut and fine-tuned,\n"
            f"{spread(slim, 'tuned')} with {flops:.0%} of the FLOPs and {parameters:.0%} of the parameters,\n"
            f"{slim[0]['onnxruntime']:.2f} times faster in onnxruntime and {slim[0]['torch']:.2f} times in PyTorch, "
            "on two CPU cores, one image at a time.")


def tables() -> dict[str, str]:
    """Name of a mark -> what stands behind it."""
    sparsity = read_results("sparsity")
    return {"summary": summary(), "demo": as_markdown(read_results("demo"), STAGES),
            "bccd val": bccd("val"), "bccd test": bccd("test"),
            "sparsity": as_markdown(share_rows(sparsity), SPARSITY), "l1": as_markdown(l1_rows(sparsity), L1),
            "pipeline": as_markdown(read_results("pipeline"), PIPELINE),
            "pruning": as_markdown(read_results("pruning"), PRUNING),
            "engine": as_markdown(read_results("engine"), ENGINE)}


def fill(text: str, known: dict[str, str]) -> str:
    """A page with the tables between its marks replaced."""
    return re.sub(f"({MARK}).*?({END})", lambda m: f"{m[1]}{known[m[2]]}\n{m[3]}", text, flags=re.DOTALL)


def main() -> None:
    """Rewrite both pages. UserError where their marks are not those of the tables."""
    HelpfulParser(__doc__).parse_args()
    known = tables()
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    marks = {mark for text in texts.values() for mark in re.findall(MARK, text)}
    if wrong := known.keys() ^ marks:
        raise UserError(f"<!-- table {min(wrong)} -->: a mark without a table, or a table without a mark in a README")
    for page, text in texts.items():
        write_text(page, fill(text, known))


if __name__ == "__main__":
    run_cli(main)
