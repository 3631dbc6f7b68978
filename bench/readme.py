"""Write the tables of README.md and bench/README.md anew from bench/results/*.csv, between their <!-- table NAME --> marks.

    python bench/readme.py
"""
from __future__ import annotations

import csv
import re
from collections.abc import Sequence

import numpy as np
from common import ROOT

HEADER = ("model", "mAP50", "mAP50-95", "parameters", "GFLOPs", "MB", "ms an image")
NAMES = {"dense": "dense", **{f"{way}-{stage}": text for way, flags, percent in (
    ("l1", "--sr {sr}", 50), ("blocks", "--target-sparsity 0.55", 55), ("target", "--target-sparsity 0.5 --round-to 1", 50)) for stage, text in (
        ("sparse", f"{flags}: sparse"), ("cut", f"{percent}% of its channels cut"), ("tuned", "fine-tuned"))}}


def read(name: str) -> list[dict[str, str]]:
    """Rows of bench/results/<name>.csv."""
    with open(ROOT / "bench" / "results" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows that measure() wrote, as a Markdown table."""
    return table(HEADER, [[r["name"], f"{float(r['map50']):.3f}", f"{float(r['map']):.3f}", f"{int(r['parameters']):,}",
                           f"{float(r['flops']) / 1e9:.3f}", f"{float(r['mb']):.2f}", f"{float(r['ms']):.1f}"] for r in rows])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def sparsity() -> str:
    """bench/sparsity.py's rows of --target-sparsity, a line a share: means over seeds, the spread in brackets."""
    rows = [r for r in read("sparsity") if r["run"].startswith("share")]
    lines: list[Sequence[str]] = []
    for round_to, share in sorted({(int(r["round_to"]), float(r["share"])) for r in rows}, key=lambda pair: (pair[1] > 0, -pair[0], pair[1])):
        here = [r for r in rows if (int(r["round_to"]), float(r["share"])) == (round_to, share)]
        cells = []
        for key in ("map50", "map", "tuned"):
            values = np.array([float(r[key]) for r in here if r[key]])
            if not len(values):
                cells.append("")
                continue
            cells.append(f"{values.mean():.3f}" + (f" ({values.min():.3f} to {values.max():.3f})" if len(values) > 1 else ""))
        rest = [f"{np.mean([float(r[key]) for r in here]):.3f}" for key in ("cut_0.5", "cut_0.65")]
        left = [f"{np.mean([float(r[key]) for r in here]):.0%}" for key in ("parameters", "flops")]
        left += [f"{float(here[0][key]):.2f}x" for key in ("torch", "onnxruntime")]
        lines.append([(f"{share:g}" + " --round-to 1" * (round_to == 1)) if share else "none", str(len(here)), *cells, *rest, *left])
    return table(("--target-sparsity", "runs", "mAP50", "mAP50-95", "fine-tuned", "cut by 50%", "cut by 65%", "parameters left", "FLOPs left", "faster, torch",
                  "faster, onnxruntime"), lines)


def summary() -> str:
    """bench/sparsity.py's headline, in a sentence."""
    rows = read("sparsity")
    dense, slim = ([r for r in rows if r["run"] == run] for run in ("share0", "share0.55-round16"))

    def spread(values: Sequence[str]) -> str:
        numbers = np.array([float(v) for v in values])
        return f"{numbers.mean():.3f} ({numbers.min():.3f} to {numbers.max():.3f})"

    return (f"BCCD, yolov5n at 320 px, mAP50-95 of {len(dense)} runs each: dense {spread([r['map'] for r in dense])}; with `--target-sparsity 0.55`, cut and "
            f"fine-tuned,\n{spread([r['tuned'] for r in slim])} with {np.mean([float(r['flops']) for r in slim]):.0%} of the FLOPs and "
            f"{np.mean([float(r['parameters']) for r in slim]):.0%} of the parameters,\n{float(slim[0]['onnxruntime']):.2f} times faster in onnxruntime and "
            f"{float(slim[0]['torch']):.2f} times in PyTorch, on two CPU cores, one image at a time.")


def l1() -> str:
    """bench/sparsity.py's rows of the L1 rule."""
    rows = [r for r in read("sparsity") if "-sr" in r["run"]]
    return table(("optimizer", "--sr", "gammas at 0", "below 0.1", "mAP50-95", "cut by 50%", "cut by 65%"), [
        [*r["run"].split("-sr"), f"{float(r['zero']):.0%}", f"{float(r['below_0.1']):.0%}", *(f"{float(r[k]):.3f}" for k in ("map", "cut_0.5", "cut_0.65"))]
        for r in rows])


def pruning() -> str:
    """bench/pruning.py's rows."""
    return table(("cut", "mAP50-95", "fine-tuned", "parameters", "FLOPs", "faster, torch", "faster, onnxruntime"), [
        [r["cut"], f"{float(r['map']):.3f}", f"{float(r['tuned']):.3f}" if r["tuned"] else "", f"{float(r['parameters']):.0%}", f"{float(r['flops']):.0%}",
         f"{float(r['torch']):.2f}x", f"{float(r['onnxruntime']):.2f}x"] for r in read("pruning")])


def road() -> str:
    """bench/road.py's rows."""
    return table(("model", "mAP50-95", "parameters", "GFLOPs", "of dense", "faster, torch", "faster, onnxruntime"), [
        [r["model"], f"{float(r['map']):.3f}", f"{int(r['parameters']):,}", f"{float(r['flops']) / 1e9:.3f}", f"{float(r['flops_share']):.0%}",
         f"{float(r['torch']):.2f}x", f"{float(r['onnxruntime']):.2f}x"] for r in read("road")])


def engine() -> str:
    """bench/engine.py's rows."""
    return table(("model", "by", "seconds", "memory, times the weights", "parameters left"), [
        [r["model"], r["method"], f"{float(r['seconds']):.2f}", f"{float(r['memory']):.1f}", f"{float(r['left']):.0%}"] for r in read("engine")])


def tables() -> dict[str, str]:
    """Name of a mark -> its table."""
    bccd = read("bccd")
    found = {"demo": markdown([{**r, "name": r["stage"]} for r in read("demo")]), "sparsity": sparsity(), "summary": summary(), "l1": l1(),
             "pruning": pruning(), "road": road(), "engine": engine()}
    for split in ("val", "test"):
        found[f"bccd {split}"] = markdown([{**r, "name": NAMES[stage].format(sr=r["sr"])} for stage in NAMES for r in bccd
                                             if (r["split"], r["stage"]) == (split, stage)])
    return found


def main() -> None:
    """Replace what stands between the marks of README.md and bench/README.md."""
    known, seen = tables(), set()
    for path in (ROOT / "README.md", ROOT / "bench" / "README.md"):
        text = path.read_text(encoding="utf-8")
        for name, rows in known.items():
            marked = re.search(rf"(?<=<!-- table {name} -->\n).*?(?=<!-- /table -->)", text, re.DOTALL)
            if marked:
                seen.add(name)
                text = text[:marked.start()] + rows + "\n" + text[marked.end():]
        path.write_text(text, encoding="utf-8")
    if missing := known.keys() - seen:
        raise SystemExit(f"error: no README has a <!-- table {sorted(missing)[0]} --> mark")


if __name__ == "__main__":
    main()
