"""Every table of the results: its columns, its rows, and how it is read, written and shown."""
from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.tables import markdown_table, text_table, write_csv  # noqa: E402  (the root must be on the path first)

RESULTS = ROOT / "bench" / "results"
Row = dict[str, Any]
Columns = Sequence[tuple[str, str, Callable[[Any], str]]]  # header, key of the row, format

COUNT, SHARE, TIMES = "{:,}".format, "{:.0%}".format, "{:.2f}x".format
ONE_DIGIT, TWO_DIGITS, THREE_DIGITS = "{:.1f}".format, "{:.2f}".format, "{:.3f}".format


def gflops(flops: float) -> str:
    """2.5e9 -> '2.500'."""
    return f"{flops / 1e9:.3f}"


ACCURACY = ("mAP50-95", "map", THREE_DIGITS)
CUTS = [("cut by 50%", "cut_0.5", THREE_DIGITS), ("cut by 65%", "cut_0.65", THREE_DIGITS)]
SPEEDS = [("faster, torch", "torch", TIMES), ("faster, onnxruntime", "onnxruntime", TIMES)]

STAGES: Columns = [  # demo.py, bccd.py and voc.py
    ("model", "stage", str), ("mAP50", "map50", THREE_DIGITS), ACCURACY, ("parameters", "parameters", COUNT),
    ("GFLOPs", "flops", gflops), ("MB", "mb", TWO_DIGITS), ("ms an image", "ms", ONE_DIGIT)]
SPARSITY: Columns = [  # the rows of share_rows()
    ("--target-sparsity", "share", str), ("runs", "runs", str), ("mAP50", "map50", str), ("mAP50-95", "map", str),
    ("fine-tuned", "tuned", str), *CUTS, ("parameters left", "parameters", SHARE), ("FLOPs left", "flops", SHARE),
    *SPEEDS]
L1: Columns = [  # the rows of l1_rows()
    ("optimizer", "optimizer", str), ("--sr", "sr", str), ("gammas at 0", "zero", SHARE),
    ("below 0.1", "below_0.1", SHARE), ACCURACY, *CUTS]
PRUNING: Columns = [
    ("cut", "cut", str), ACCURACY, ("fine-tuned", "tuned", THREE_DIGITS), ("parameters", "parameters", SHARE),
    ("FLOPs", "flops", SHARE), *SPEEDS]
PIPELINE: Columns = [
    ("model", "model", str), ACCURACY, ("parameters", "parameters", COUNT), ("GFLOPs", "flops", gflops),
    ("of dense", "flops_share", SHARE), *SPEEDS]
ENGINE: Columns = [
    ("model", "model", str), ("by", "method", str), ("seconds", "seconds", TWO_DIGITS),
    ("memory, times the weights", "memory", ONE_DIGIT), ("parameters left", "left", SHARE)]
OVERHEAD: Columns = [
    ("model", "model", str), ("step, ms", "step", "{:.0f}".format),
    ("--sr, ms", "l1", TWO_DIGITS), ("of a step", "l1_share", "{:.2%}".format),
    ("--target-sparsity, ms", "target", TWO_DIGITS), ("of a step", "target_share", "{:.2%}".format)]


def read_results(name: str) -> list[Row]:
    """The rows of bench/results/<name>.csv, numbers as numbers."""
    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def write_results(name: str, rows: Sequence[Row]) -> None:
    """Write bench/results/<name>.csv."""
    write_csv(RESULTS / f"{name}.csv", rows)


def as_text(rows: Sequence[Row], columns: Columns) -> str:
    """The table for the screen."""
    return text_table(_cells(rows, columns), [header for header, _, _ in columns])


def as_markdown(rows: Sequence[Row], columns: Columns) -> str:
    """The table for a README."""
    return markdown_table(_cells(rows, columns), [header for header, _, _ in columns])


def _cells(rows: Sequence[Row], columns: Columns) -> list[list[str]]:
    return [["" if row[key] == "" else show(row[key]) for _, key, show in columns] for row in rows]


# Rows of sparsity.csv -> rows of a table ------------------------------------------------------------------------------

def share_rows(rows: Sequence[Row]) -> list[Row]:
    """The runs with --target-sparsity, a row per share: means over the seeds."""
    groups: dict[tuple[bool, int, float], list[Row]] = {}  # dense first, then the larger blocks
    for row in rows:
        if row["run"].startswith("share"):
            groups.setdefault((row["share"] > 0, -row["round_to"], row["share"]), []).append(row)
    return [_mean_row(groups[key]) for key in sorted(groups)]


def _mean_row(runs: list[Row]) -> Row:
    """Runs of one share, which differ in their seed, in one row. Only the first of them was timed."""
    first = runs[0]
    suffix = " --round-to 1" if first["round_to"] == 1 else ""
    share = f"{first['share']:g}{suffix}" if first["share"] else "none"
    spreads = {key: spread(runs, key) for key in ("map50", "map", "tuned")}
    means = {key: np.mean([run[key] for run in runs]) for key in ("cut_0.5", "cut_0.65", "parameters", "flops")}
    return {"share": share, "runs": len(runs), **spreads, **means,
            "torch": first["torch"], "onnxruntime": first["onnxruntime"]}


def spread(runs: Sequence[Mapping[str, Any]], key: str) -> str:
    """'mean (lowest to highest)' over the runs that have the figure."""
    values = [run[key] for run in runs if run[key] != ""]
    if not values:
        return ""
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else mean


def l1_rows(rows: Sequence[Row]) -> list[Row]:
    """The runs with the L1 rule."""
    found = []
    for row in rows:
        if "-sr" in row["run"]:
            optimizer, sr = row["run"].split("-sr")
            found.append({**row, "optimizer": optimizer, "sr": sr})
    return found
