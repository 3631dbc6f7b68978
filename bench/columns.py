"""The tables of the results: which csv each one is made of, the rows in which several runs are one, the columns."""
from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))  # every script of bench/ imports this file first

from utils.tables import text_table, write_csv  # noqa: E402

Row = dict[Any, Any]
Words = str | tuple[str, str]  # English, and Chinese where a page in Chinese shows it
# (header, key of the row, format); or one text that is header and key, whose values are shown as they are.
Columns = Sequence[str | tuple[Words, str, Callable[[Any], str]]]

COUNT, SHARE, TIMES = "{:,}".format, "{:.0%}".format, "{:.2f}x".format
ONE, TWO, THREE = "{:.1f}".format, "{:.2f}".format, "{:.3f}".format  # digits
PERCENT = "{:.2%}".format
SPREAD = ("{:.3f} ({:.3f} to {:.3f})", "{:.3f} ({:.3f}～{:.3f})")

PIPELINES: dict[str, Words] = {  # of bench/equal.py -> title
    "dense": "train.py", "blocks-8": "train_sparsity.py --target flops=0.5 --shrink --round-to 8",
    "blocks-16": "train_sparsity.py --target flops=0.5 --shrink --round-to 16",
    "flops-35": "train_sparsity.py --target flops=0.35 --shrink --round-to 16",
    "teacher": ("slim.py's stages: train.py for a third, the rest with it as teacher",
                "slim.py 的各阶段：前三分之一轮数用 train.py，其余轮数以该模型为教师模型"),
    "four-commands": "the four commands, a third of the epochs each: --target flops=0.5, with teacher",
    "narrow": ("train.py, a narrower model from scratch", "train.py，更窄的模型，从头训练"),
    "scratch": ("train.py, the slim shape from scratch", "train.py，剪枝后的结构，从头训练"),
    "three-commands": "train_sparsity.py --sr 0.0001, prune.py --percent 0.5, finetune_pruned.py"}
MAIN = ("dense", "blocks-16", "teacher", "narrow", "scratch")  # pipelines of the READMEs: at most ten rows
# Name of a run of bench/bccd.py's stages -> the flags that made it sparse, and the percent of prune.py.
WAYS = {"l1": ("--sr {sr}", 50), "blocks": ("--target-sparsity 0.55", 55),
        "target": ("--target-sparsity 0.5 --round-to 1", 50)}


def spread(runs: Sequence[Row], key: str, texts: tuple[str, str] = SPREAD) -> tuple[str, str]:
    """'mean (lowest to highest)' over the runs that have the figure. texts: may have {} for the number of runs, too."""
    values = [run[key] for run in runs if run[key] != ""]
    if len(values) < 2:
        return (THREE(values[0]), THREE(values[0])) if values else ("", "")
    figures = np.mean(values), min(values), max(values), len(values)
    return texts[0].format(*figures), texts[1].format(*figures)


def grouped(rows: Sequence[Row], *keys: str) -> dict[tuple, list[Row]]:
    """The rows by their values under `keys`."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def stage_rows(split: str, rows: Sequence[Row]) -> list[Row]:
    """bccd.csv's stages on the val or the test images, with titles."""
    by_stage = {row["stage"]: row for row in rows if row["split"] == split}
    table = [by_stage["dense"]]
    for way, (flags, percent) in WAYS.items():
        titles = {"sparse": f"{flags}: sparse", "cut": f"{percent}% of its channels cut", "tuned": "fine-tuned"}
        for stage, title in titles.items():
            row = by_stage[f"{way}-{stage}"]
            table.append({**row, "stage": title.format(**row)})
    return table


def share_rows(rows: Sequence[Row]) -> list[Row]:
    """sparsity.csv's runs with --target-sparsity, a row per share: means over the seeds. Only the first was timed."""
    table = []
    groups = grouped([row for row in rows if row["run"].startswith("share")], "share", "round_to")
    for share, block in sorted(groups, key=lambda key: (key[0] > 0, -key[1], key[0])):  # dense, then the larger blocks
        runs = groups[share, block]
        title = f"{share:g}{' --round-to 1' if block == 1 else ''}" if share else "none"
        means = {key: np.mean([run[key] for run in runs]) for key in ("cut_0.5", "cut_0.65", "parameters", "flops")}
        spreads = {key: spread(runs, key) for key in ("map50", "map", "tuned")}
        table.append({**runs[0], **means, **spreads, "share": title, "runs": len(runs)})
    return table


def l1_rows(rows: Sequence[Row]) -> list[Row]:
    """sparsity.csv's runs with the L1 rule."""
    names = [(row, row["run"].split("-sr")) for row in rows if "-sr" in row["run"]]
    return [{**row, "optimizer": optimizer, "sr": sr} for row, (optimizer, sr) in names]


def equal_rows(rows: Sequence[Row]) -> list[Row]:
    """equal.csv's runs, a row per pipeline: means over the seeds."""
    sets, pipelines = ("bccd", "aquarium", "coco128"), list(PIPELINES)
    groups = grouped(sorted(rows, key=lambda row: (sets.index(row["data"]), -row["epochs"],
                                                   pipelines.index(row["pipeline"]))), "data", "epochs", "pipeline")
    return [{**runs[0], "pipeline": PIPELINES[runs[0]["pipeline"]], "runs": len(runs),
             **{key: spread(runs, key) for key in ("map", "mean5", "test")},
             "flops": np.mean([run["flops"] for run in runs])} for runs in groups.values()]


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of equal.csv that the READMEs show."""
    return equal_rows([row for row in rows if row["epochs"] == 80 and row["pipeline"] in MAIN])


def side_by_side(rows: Sequence[Row], name: str, *keys: str) -> list[Row]:
    """A row per values of `keys`, whose figures have the names of their rows in front: "dense ms", "slim ms"."""
    return [{**group[0], **{f"{row[name]} {key}": row[key] for row in group for key in row}}
            for group in grouped(rows, *keys).values()]


def runtime_rows(rows: Sequence[Row]) -> list[Row]:
    """runtimes.csv's times, a row per runtime and precision: how many times faster than dense in onnxruntime fp32."""
    first = {row["model"]: row["ms"] for row in rows
             if (row["runtime"], row["precision"], row["block"]) == ("onnxruntime", "fp32", 0)}
    times = [{**row, "model": f"{row['model']}, {row['imgsz']} px", "faster": first[row["model"]] / row["ms"]}
             for row in rows]
    return side_by_side(times, "block", "model", "runtime", "precision")


def device_pairs(rows: Sequence[Row]) -> list[Row]:
    """benchmarks.csv's rows, the dense and the slim model side by side: how much faster slim is in each format."""
    return [{**pair, "faster": pair["dense ms"] / pair["slim ms"]}
            for pair in side_by_side(rows, "model", "format", "precision")]


def gpu_rows(rows: Sequence[Row]) -> list[Row]:
    """gpu.csv's times, a row per model, batch and precision: both ways to run it, and how much faster slim is."""
    return side_by_side([{**row, "faster": row["dense"] / row["slim"]} for row in rows],
                        "way", "model", "batch", "precision")


def int8_rows(rows: Sequence[Row]) -> list[Row]:
    """int8.csv's runs, a row per split and runtime: the mean over the models, and that of the difference to fp32."""
    maps = {key: np.mean([row["map"] for row in runs]) for key, runs in grouped(rows, "split", "runtime").items()}
    return [{"split": split, "runtime": "torch, fp32" if runtime == "torch" else f"{runtime}, int8",
             "models": len(runs), "map": maps[split, runtime], "loss": maps[split, runtime] - maps[split, "torch"]}
            for (split, runtime), runs in grouped(rows, "split", "runtime").items()]


class Table(NamedTuple):
    """results: name of its file in bench/results. rows: makes the rows of the table from those of the file."""
    results: str
    columns: Columns
    rows: Callable[[list[Row]], list[Row]] = list


MAP = ("mAP50-95", "map", THREE)
CUT_COLUMNS = [("cut by 50%", "cut_0.5", THREE), ("cut by 65%", "cut_0.65", THREE)]
FASTER = [("faster, torch", "torch", TIMES), ("faster, onnxruntime", "onnxruntime", TIMES)]
MS = (("ms an image", "每张耗时（毫秒）"), "ms", ONE)
STAGE_COLUMNS: Columns = [("model", "stage", str), ("mAP50", "map50", THREE), MAP, ("parameters", "parameters", COUNT),
                          ("GFLOPs", "flops", lambda flops: f"{flops / 1e9:.3f}"), ("MB", "mb", TWO), MS]
DEVICE: Columns = ["model", "format", "precision", ("MB", "MB", TWO), ("mAP50-95", "mAP50-95", THREE), MS,
                   ("faster", "faster", TIMES)]
EQUAL_MAIN: Columns = [
    (("data", "数据集"), "data", str), (("commands", "命令"), "pipeline", str), (("runs", "运行次数"), "runs", str),
    (("mAP50-95 on val", "验证集 mAP50-95"), "map", str), (("on test", "测试集 mAP50-95"), "test", str),
    (("FLOPs left", "剩余 FLOPs"), "flops", SHARE)]

TABLES: dict[str, Table] = {  # name of a mark in the pages -> table
    "demo": Table("demo", STAGE_COLUMNS),
    "bccd val": Table("bccd", STAGE_COLUMNS, partial(stage_rows, "val")),
    "bccd test": Table("bccd", STAGE_COLUMNS, partial(stage_rows, "test")),
    "sparsity": Table("sparsity", [
        ("--target-sparsity", "share", str), "runs", ("mAP50", "map50", str), ("mAP50-95", "map", str),
        ("fine-tuned", "tuned", str), *CUT_COLUMNS, ("parameters left", "parameters", SHARE),
        ("FLOPs left", "flops", SHARE), *FASTER], share_rows),
    "l1": Table("sparsity", ["optimizer", ("--sr", "sr", str), ("gammas at 0", "zero", SHARE),
                             ("below 0.1", "below_0.1", SHARE), MAP, *CUT_COLUMNS], l1_rows),
    "pruning": Table("pruning", ["cut", MAP, ("fine-tuned", "tuned", THREE), ("parameters", "parameters", SHARE),
                                 ("FLOPs", "flops", SHARE), *FASTER]),
    "absorb": Table("absorb", [
        ("channels cut", "share", SHARE), ("largest gamma", "threshold", "{:.1g}".format), ("before", "before", THREE),
        ("after", "slim", THREE), ("with --absorb", "absorbed", THREE)]),
    "equal": Table("equal", [
        "data", ("epochs in all", "epochs", str), *EQUAL_MAIN[1:4], ("mean of the last five epochs", "mean5", str),
        *EQUAL_MAIN[4:]], equal_rows),
    "equal main": Table("equal", EQUAL_MAIN, main_rows),
    "device": Table("benchmarks", DEVICE),
    "device pairs": Table("benchmarks", [
        (("format", "格式"), "format", str), (("precision", "数值精度"), "precision", str),
        (("dense: MB", "稠密：MB"), "dense MB", TWO), ("mAP50-95", "dense mAP50-95", THREE), (MS[0], "dense ms", ONE),
        (("slim: MB", "剪枝后：MB"), "slim MB", TWO), ("mAP50-95", "slim mAP50-95", THREE), (MS[0], "slim ms", ONE),
        (("faster", "相对速度"), "faster", TIMES)], device_pairs),
    "engine": Table("engine", ["model", ("by", "method", str), ("seconds", "seconds", TWO),
                               ("memory, times the weights", "memory", ONE), ("parameters left", "left", SHARE)]),
    "int8": Table("int8", [("images", "split", str), "runtime", "models", MAP,
                           ("against fp32", "loss", "{:+.4f}".format)], int8_rows),
    "runtimes": Table("runtimes", [
        "model", "runtime", "precision", ("dense", "0 faster", TIMES), ("one by one", "1 faster", TIMES),
        ("blocks of 8", "8 faster", TIMES), ("of 16", "16 faster", TIMES), ("of 32", "32 faster", TIMES)],
        runtime_rows),
    "gpu": Table("gpu", [
        "model", ("images at once", "batch", str), "precision", ("eager: dense, ms an image", "eager dense", THREE),
        ("slim", "eager slim", THREE), ("faster", "eager faster", TIMES),
        ("CUDA graph: dense, ms an image", "CUDA graph dense", THREE), ("slim", "CUDA graph slim", THREE),
        ("faster", "CUDA graph faster", TIMES)], gpu_rows),
    "speed": Table("speed", [
        ("", "what", str), "unit", ("this repository", "ours", "{:.3g}".format), ("compared with", "beside", str),
        ("it takes", "other", "{:.3g}".format), ("ratio", "ratio", TIMES)]),
    "scale": Table("scale", [
        ("images", "images", COUNT), "by", ("first scan, s", "first_seconds", TWO), ("MB", "first_memory", ONE),
        ("next start, s", "next_seconds", TWO), ("MB", "next_memory", ONE)]),
    "memory": Table("memory", [("", "what", str), ("MB", "MB", "{:.0f}".format), "threads",
                               ("open files", "files", str), ("child processes", "processes", str)])}
UNSHOWN = {  # tables that no page shows
    "front": Table("front", DEVICE),
    "classifiers": Table("classifiers", ["model", ("by", "method", str), ("seconds", "seconds", TWO),
                                         ("parameters left", "left", SHARE), ("not cut", "error", str)]),
    "overhead": Table("overhead", [
        "model", ("step, ms", "step", "{:.0f}".format), ("--sr, ms", "l1", TWO), ("of a step", "l1_share", PERCENT),
        ("--target-sparsity, ms", "target", TWO), ("of a step", "target_share", PERCENT)])}


def formatted(rows: Sequence[Row], columns: Columns, chinese: bool = False) -> tuple[list[list[str]], list[str]]:
    """(cells, header) for text_table and markdown_table. A figure that a row does not have, '', is an empty cell."""
    def cell(text: Any, show: Callable[[Any], str] = str) -> str:
        return text[chinese] if isinstance(text, tuple) else "" if text == "" else show(text)

    whole = [(column, column, str) if isinstance(column, str) else column for column in columns]
    return [[cell(row[key], show) for _, key, show in whole] for row in rows], [cell(header) for header, *_ in whole]


def read_table(name: str) -> list[Row]:
    """The rows of bench/results/<name>.csv, numbers as numbers."""
    def value(text: str) -> int | float | str:
        for kind in (int, float):
            with suppress(ValueError):
                return kind(text)
        return text

    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def publish(name: str, rows: Sequence[Row], *keys: str, order: Callable[[Row], Any] | None = None) -> None:
    """Write bench/results/<name>.csv, and print the tables that are made of it.

    keys: rows of the file that have other values under these stay in it, in front of the new ones. order: sorts all.
    """
    if keys and (RESULTS / f"{name}.csv").is_file():
        groups = grouped(rows, *keys)
        rows = [*(row for row in read_table(name) if tuple(row[key] for key in keys) not in groups), *rows]
    rows = sorted(rows, key=order) if order else list(rows)
    write_csv(RESULTS / f"{name}.csv", rows)
    for table in (table for table in {**TABLES, **UNSHOWN}.values() if table.results == name):
        print("\n" + text_table(*formatted(table.rows(rows), table.columns)), flush=True)
