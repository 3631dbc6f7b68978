"""Write the tables of README.md and bench/README.md from bench/results/*.csv, between their <!-- table NAME --> marks.

    python bench/readme.py
"""
from __future__ import annotations

import re

import columns
import numpy as np
from columns import ROOT, formatted, read_results, spread

from utils.errors import UserError, run_cli
from utils.files import write_text
from utils.options import HelpfulParser
from utils.tables import markdown_table

PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
MARK, END = r"<!-- table ([\w ]+) -->\n", "<!-- /table -->"
# Name of a run of bccd.py -> the flags that made it sparse, and the percent of prune.py.
WAYS = {"l1": ("--sr {sr}", 50), "blocks": ("--target-sparsity 0.55", 55),
        "target": ("--target-sparsity 0.5 --round-to 1", 50)}


def bccd_rows(split: str) -> list[columns.Row]:
    """The stages of bccd.py on the val or the test images, with titles."""
    found = {row["stage"]: row for row in read_results("bccd") if row["split"] == split}
    rows = [found["dense"]]
    for way, (flags, percent) in WAYS.items():
        titles = {"sparse": f"{flags}: sparse", "cut": f"{percent}% of its channels cut", "tuned": "fine-tuned"}
        for stage, title in titles.items():
            row = found[f"{way}-{stage}"]
            rows.append({**row, "stage": title.format(**row)})
    return rows


def summary() -> str:
    """The main result of sparsity.py, in a sentence."""
    rows = read_results("sparsity")
    dense, slim = ([row for row in rows if row["run"] == run] for run in ("share0", "share0.55-round16"))
    flops, parameters = (np.mean([row[key] for row in slim]) for key in ("flops", "parameters"))
    return (f"BCCD, yolov5n at 320 px, mAP50-95 of {len(dense)} runs each: dense {spread(dense, 'map')}; "
            f"with `--target-sparsity 0.55`, cut and fine-tuned,\n{spread(slim, 'tuned')} with {flops:.0%} "
            f"of the FLOPs and {parameters:.0%} of the parameters,\n"
            f"{slim[0]['onnxruntime']:.2f} times faster in onnxruntime and "
            f"{slim[0]['torch']:.2f} times in PyTorch, on two CPU cores, one image at a time.")


def tables() -> dict[str, str]:
    """Name of a mark -> what stands behind it."""
    sparsity = read_results("sparsity")
    found = {"demo": (read_results("demo"), columns.STAGES), "engine": (read_results("engine"), columns.ENGINE),
             "bccd val": (bccd_rows("val"), columns.STAGES), "bccd test": (bccd_rows("test"), columns.STAGES),
             "sparsity": (columns.share_rows(sparsity), columns.SPARSITY),
             "l1": (columns.l1_rows(sparsity), columns.L1), "pruning": (read_results("pruning"), columns.PRUNING),
             "pipeline": (read_results("pipeline"), columns.PIPELINE),
             "absorb": (read_results("absorb"), columns.ABSORB),
             "device": (read_results("benchmarks"), columns.DEVICE),
             "int8": (columns.int8_rows(read_results("int8")), columns.INT8),
             "runtimes": (columns.runtime_rows(read_results("runtimes")), columns.RUNTIMES)}
    return {"summary": summary(), **{name: markdown_table(*formatted(*table)) for name, table in found.items()}}


def fill(text: str, known: dict[str, str]) -> str:
    """A page with the tables between its marks replaced."""
    return re.sub(f"({MARK}).*?({END})", lambda m: f"{m[1]}{known[m[2]]}\n{m[3]}", text, flags=re.DOTALL)


def main() -> None:
    """Rewrite both pages. UserError where their marks are not those of the tables."""
    HelpfulParser(__doc__).parse_args()
    known = tables()
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    if wrong := known.keys() ^ set(re.findall(MARK, "".join(texts.values()))):
        raise UserError(f"<!-- table {min(wrong)} -->: a mark without a table, or a table without a mark in a README")
    for page, text in texts.items():
        write_text(page, fill(text, known))


if __name__ == "__main__":
    run_cli(main)
