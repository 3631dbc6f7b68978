"""The columns of every table of results, and the rows in which several runs are one."""
from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))  # every script of bench/ imports this file first

Row = dict[Any, Any]
Columns = Sequence[tuple[str, Any, Callable[[Any], str]]]  # header, key of the row, format

COUNT, SHARE, TIMES = "{:,}".format, "{:.0%}".format, "{:.2f}x".format
ONE, TWO, THREE = "{:.1f}".format, "{:.2f}".format, "{:.3f}".format  # digits
MAP50, MAP, PARAMETERS = ("mAP50", "map50", THREE), ("mAP50-95", "map", THREE), ("parameters", "parameters", COUNT)
GFLOPS = ("GFLOPs", "flops", lambda flops: f"{flops / 1e9:.3f}")
CUTS = [("cut by 50%", "cut_0.5", THREE), ("cut by 65%", "cut_0.65", THREE)]
SPEED = [("faster, torch", "torch", TIMES), ("faster, onnxruntime", "onnxruntime", TIMES)]

STAGES: Columns = [("model", "stage", str), MAP50, MAP, PARAMETERS, GFLOPS, ("MB", "mb", TWO),
                   ("ms an image", "ms", ONE)]
PRUNING: Columns = [("cut", "cut", str), MAP, ("fine-tuned", "tuned", THREE), ("parameters", "parameters", SHARE),
                    ("FLOPs", "flops", SHARE), *SPEED]
SPARSITY: Columns = [  # of the rows that share_rows() makes
    ("--target-sparsity", "share", str), ("runs", "runs", str), ("mAP50", "map50", str), ("mAP50-95", "map", str),
    ("fine-tuned", "tuned", str), *CUTS, ("parameters left", "parameters", SHARE), ("FLOPs left", "flops", SHARE),
    *SPEED]
L1: Columns = [  # of the rows that l1_rows() makes
    ("optimizer", "optimizer", str), ("--sr", "sr", str), ("gammas at 0", "zero", SHARE),
    ("below 0.1", "below_0.1", SHARE), MAP, *CUTS]
EQUAL: Columns = [  # of the rows that equal_rows() makes
    ("data", "data", str), ("epochs in all", "epochs", str), ("commands", "pipeline", str), ("runs", "runs", str),
    ("mAP50-95 on val", "map", str), ("mean of the last five epochs", "mean5", str), ("on test", "test", str),
    ("FLOPs left", "flops", SHARE)]
EQUAL_MAIN: Columns = [column for column in EQUAL if column[1] not in ("epochs", "mean5")]  # of the READMEs
PIPELINES = {  # of bench/equal.py -> title
    "dense": "train.py", "blocks-8": "train_sparsity.py --target flops=0.5 --shrink --round-to 8",
    "blocks-16": "train_sparsity.py --target flops=0.5 --shrink --round-to 16",
    "flops-35": "train_sparsity.py --target flops=0.35 --shrink --round-to 16",
    "teacher": "slim.py's stages: train.py for a third, the rest with it as teacher",
    "four-commands": "the four commands, a third of the epochs each: --target flops=0.5, with teacher",
    "narrow": "train.py, a narrower model from scratch",
    "scratch": "train.py, the slim shape from scratch",
    "three-commands": "train_sparsity.py --sr 0.0001, prune.py --percent 0.5, finetune_pruned.py"}
ABSORB: Columns = [("channels cut", "share", SHARE), ("largest gamma", "threshold", "{:.1g}".format),
                   ("before", "before", THREE), ("after", "slim", THREE), ("with --absorb", "absorbed", THREE)]
ENGINE: Columns = [("model", "model", str), ("by", "method", str), ("seconds", "seconds", TWO),
                   ("memory, times the weights", "memory", ONE), ("parameters left", "left", SHARE)]
DEVICE: Columns = [("model", "model", str), ("format", "format", str), ("precision", "precision", str),
                   ("MB", "MB", TWO), ("mAP50-95", "mAP50-95", THREE), ("ms an image", "ms", ONE),
                   ("faster", "faster", TIMES)]
DEVICE_PAIRS: Columns = [  # of the rows that device_pairs() makes
    ("format", "format", str), ("precision", "precision", str), ("dense: MB", "dense MB", TWO),
    ("mAP50-95", "dense mAP50-95", THREE), ("ms an image", "dense ms", ONE), ("slim: MB", "slim MB", TWO),
    ("mAP50-95", "slim mAP50-95", THREE), ("ms an image", "slim ms", ONE), ("faster", "faster", TIMES)]
INT8: Columns = [("images", "split", str), ("runtime", "runtime", str), ("models", "models", str),
                 ("mAP50-95", "map", THREE), ("against fp32", "loss", "{:+.4f}".format)]  # of int8_rows()
RUNTIMES: Columns = [  # of the rows that runtime_rows() makes
    ("model", "model", str), ("runtime", "runtime", str), ("precision", "precision", str), ("dense", 0, TIMES),
    ("one by one", 1, TIMES), ("blocks of 8", 8, TIMES), ("of 16", 16, TIMES), ("of 32", 32, TIMES)]
GPU: Columns = [  # of the rows that gpu_rows() makes
    ("model", "model", str), ("images at once", "batch", str), ("precision", "precision", str),
    ("eager: dense, ms an image", "eager dense", THREE), ("slim", "eager slim", THREE), ("faster", "eager", TIMES),
    ("CUDA graph: dense, ms an image", "CUDA graph dense", THREE), ("slim", "CUDA graph slim", THREE),
    ("faster", "CUDA graph", TIMES)]
SCALE: Columns = [("images", "images", COUNT), ("by", "by", str), ("first scan, s", "first_seconds", TWO),
                  ("MB", "first_memory", ONE), ("next start, s", "next_seconds", TWO), ("MB", "next_memory", ONE)]
SPEED_OF_USE: Columns = [
    ("", "what", str), ("unit", "unit", str), ("this repository", "ours", "{:.3g}".format),
    ("compared with", "beside", str), ("it takes", "other", "{:.3g}".format), ("ratio", "ratio", TIMES)]
MEMORY: Columns = [("", "what", str), ("MB", "MB", "{:.0f}".format), ("threads", "threads", str),
                   ("open files", "files", str), ("child processes", "processes", str)]
OVERHEAD: Columns = [
    ("model", "model", str), ("step, ms", "step", "{:.0f}".format), ("--sr, ms", "l1", TWO),
    ("of a step", "l1_share", "{:.2%}".format), ("--target-sparsity, ms", "target", TWO),
    ("of a step", "target_share", "{:.2%}".format)]


def formatted(rows: Sequence[Row], columns: Columns) -> tuple[list[list[str]], list[str]]:
    """(cells, header) for text_table and markdown_table. A figure that a row does not have, '', is an empty cell."""
    cells = [["" if row[key] == "" else show(row[key]) for _, key, show in columns] for row in rows]
    return cells, [header for header, _, _ in columns]


def read_results(name: str) -> list[Row]:
    """The rows of bench/results/<name>.csv, numbers as numbers."""
    def value(text: str) -> int | float | str:
        for kind in (int, float):
            with suppress(ValueError):
                return kind(text)
        return text

    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def with_earlier(name: str, rows: Sequence[Row], *keys: str) -> list[Row]:
    """`rows`, behind those of bench/results/<name>.csv that have other values under `keys`."""
    known = read_results(name) if (RESULTS / f"{name}.csv").is_file() else []
    made = {tuple(row[key] for key in keys) for row in rows}
    return [*(row for row in known if tuple(row[key] for key in keys) not in made), *rows]


def spread(runs: Sequence[Row], key: str) -> str:
    """'mean (lowest to highest)' over the runs that have the figure."""
    values = [run[key] for run in runs if run[key] != ""]
    limits = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{limits}" if values else ""


def share_rows(rows: Sequence[Row]) -> list[Row]:
    """sparsity.csv's runs with --target-sparsity, a row per share: means over the seeds. Only the first was timed."""
    groups: dict[tuple[bool, int, float], list[Row]] = {}  # dense comes first, then the larger blocks
    for row in rows:
        if row["run"].startswith("share"):
            groups.setdefault((row["share"] > 0, -row["round_to"], row["share"]), []).append(row)
    found = []
    for runs in (groups[key] for key in sorted(groups)):
        first = runs[0]
        share = f"{first['share']:g}" if first["share"] else "none"
        if first["share"] and first["round_to"] == 1:
            share += " --round-to 1"
        means = {key: np.mean([run[key] for run in runs]) for key in ("cut_0.5", "cut_0.65", "parameters", "flops")}
        spreads = {key: spread(runs, key) for key in ("map50", "map", "tuned")}
        found.append({**first, **means, **spreads, "share": share, "runs": len(runs)})
    return found


def l1_rows(rows: Sequence[Row]) -> list[Row]:
    """sparsity.csv's runs with the L1 rule."""
    names = [(row, row["run"].split("-sr")) for row in rows if "-sr" in row["run"]]
    return [{**row, "optimizer": optimizer, "sr": sr} for row, (optimizer, sr) in names]


def equal_rows(rows: Sequence[Row]) -> list[Row]:
    """equal.csv's runs, a row per pipeline: means over the seeds."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    sets, pipelines = ("bccd", "aquarium", "coco128"), list(PIPELINES)
    for row in sorted(rows, key=lambda row: (sets.index(row["data"]), -row["epochs"],
                                             pipelines.index(row["pipeline"]))):
        groups.setdefault((row["data"], row["epochs"], row["pipeline"]), []).append(row)
    return [{**runs[0], "pipeline": PIPELINES[runs[0]["pipeline"]], "runs": len(runs),
             **{key: spread(runs, key) for key in ("map", "mean5", "test")},
             "flops": np.mean([run["flops"] for run in runs])} for runs in groups.values()]


def runtime_rows(rows: Sequence[Row]) -> list[Row]:
    """runtimes.csv's times, a row per runtime and precision: how many times faster than dense in onnxruntime fp32."""
    first = {row["model"]: row["ms"] for row in rows
             if (row["runtime"], row["precision"], row["block"]) == ("onnxruntime", "fp32", 0)}
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row["model"], row["runtime"], row["precision"]
        line = found.setdefault(key, {"model": f"{row['model']}, {row['imgsz']} px", "runtime": row["runtime"],
                                      "precision": row["precision"]})
        line[row["block"]] = first[row["model"]] / row["ms"]
    return list(found.values())


def device_pairs(rows: Sequence[Row]) -> list[Row]:
    """benchmarks.csv's rows, the dense and the slim model side by side: how much faster slim is in each format."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        pair = found.setdefault((row["format"], row["precision"]), {key: row[key] for key in ("format", "precision")})
        pair |= {f"{row['model']} {key}": row[key] for key in ("MB", "mAP50-95", "ms")}
    return [{**pair, "faster": pair["dense ms"] / pair["slim ms"]} for pair in found.values()]


def gpu_rows(rows: Sequence[Row]) -> list[Row]:
    """gpu.csv's times, a row per model, batch and precision: both ways to run it, and how much faster slim is."""
    keys = ("model", "batch", "precision")
    found: dict[tuple, Row] = {}
    for row in rows:
        line = found.setdefault(tuple(row[key] for key in keys), {key: row[key] for key in keys})
        way = row["way"]
        line |= {f"{way} dense": row["dense"], f"{way} slim": row["slim"], way: row["dense"] / row["slim"]}
    return list(found.values())


def int8_rows(rows: Sequence[Row]) -> list[Row]:
    """int8.csv's runs, a row per split and runtime: the mean over the models, and that of the difference to fp32."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["split"], row["runtime"]), []).append(row["map"])
    return [{"split": split, "runtime": "torch, fp32" if runtime == "torch" else f"{runtime}, int8",
             "models": len(maps), "map": np.mean(maps), "loss": np.mean(maps) - np.mean(found[split, "torch"])}
            for (split, runtime), maps in found.items()]
