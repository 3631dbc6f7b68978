"""Write the tables of the READMEs and of docs/ from bench/results/*.csv, between their <!-- table NAME --> marks.

    python bench/readme.py

A page whose name ends in .zh-CN.md gets them in Chinese.
"""
from __future__ import annotations

import re
from argparse import Namespace
from itertools import product
from pathlib import Path

import columns
from columns import ROOT, formatted, read_results, spread

from utils.errors import UserError, run_cli
from utils.files import write_text
from utils.options import HelpfulParser
from utils.tables import markdown_table

PAGES = (ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "bench" / "README.md")
MARK, END = r"<!-- table ([\w ]+) -->\n", "<!-- /table -->"
# Name of a run of bccd.py -> the flags that made it sparse, and the percent of prune.py.
WAYS = {"l1": ("--sr {sr}", 50), "blocks": ("--target-sparsity 0.55", 55),
        "target": ("--target-sparsity 0.5 --round-to 1", 50)}

MAIN = ("dense", "blocks-16", "teacher", "narrow", "scratch")  # pipelines of the READMEs: at most ten rows

# Words of headers and cells; the longest one that fits is taken.
CHINESE = {"ms an image": "每张耗时（毫秒）", "parameters": "参数量", "precision": "数值精度",
           "epochs in all": "总轮数", "mean of the last five epochs": "最后五轮平均",
           "mAP50-95 on val": "验证集 mAP50-95", "on test": "测试集 mAP50-95", "FLOPs left": "剩余 FLOPs",
           "commands": "命令", "runs": "运行次数", " to ": "～",
           "slim.py's stages: train.py for a third, the rest with it as teacher":
               "slim.py 的各阶段：前三分之一轮数用 train.py，其余轮数以该模型为教师模型",
           "the four commands, a third of the epochs each: --target flops=0.5, with teacher":
               "四条命令，每次训练三分之一轮数：--target flops=0.5，使用教师模型",
           "train.py, a narrower model from scratch": "train.py，更窄的模型，从头训练",
           "train.py, the slim shape from scratch": "train.py，剪枝后的结构，从头训练",
           "data": "数据集",
           "format": "格式", "faster": "加速比", "model": "模型", ": sparse": "：稀疏训练后",
           " of its channels cut": " 的通道已剪", "fine-tuned": "微调后", "dense: ": "稠密：", "slim: ": "剪枝后：",
           "dense": "稠密", "slim": "剪枝后"}


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


def summary(chinese: bool = False) -> str:
    """The main result of equal.py and front.py, in three sentences."""
    equal = [row for row in read_results("equal") if row["epochs"] == 80]

    def runs(data: str, pipeline: str) -> str:
        found = [row for row in equal if (row["data"], row["pipeline"]) == (data, pipeline)]
        text = spread(found, "map")
        return (text.replace(" to ", "～").replace(" (", "（").replace(")", f"，{len(found)} 次运行）") if chinese
                else text.replace(")", f", {len(found)} runs)"))

    before, after, before_aquarium, after_aquarium = (
        runs(data, pipeline) for data in ("bccd", "aquarium") for pipeline in ("dense", "blocks-16"))
    points = {(row["model"], row["precision"]): Namespace(map=row["mAP50-95"], times=row["faster"], runs=row["runs"])
              for row in read_results("front")}
    slow, dense8, fp32, int8 = (points[key] for key in product(("dense", "slim"), ("fp32", "int8")))
    if chinese:
        return (f"- yolov5n，BCCD，320 px，总共 80 轮，验证集 mAP50-95：稠密模型 {before}，\n"
                f"  FLOPs 减半后 {after}。\n"
                f"- aquarium，416 px，轮数相同，精度有损失：稠密模型 {before_aquarium}，\n"
                f"  FLOPs 减半后 {after_aquarium}。\n"
                f"- BCCD 上用 OpenVINO 逐张推理正方形图像，两个线程，{slow.runs} 个模型的平均值："
                f"fp32 稠密模型 mAP50-95 {slow.map:.3f}。\n"
                f"  速度与之相比：剪枝模型 fp32 为 {fp32.times:.2f} 倍（{fp32.map:.3f}），int8 为 {int8.times:.2f} 倍"
                f"（{int8.map:.3f}）；稠密模型 int8 为 {dense8.times:.2f} 倍（{dense8.map:.3f}）。")
    return (f"- yolov5n on BCCD, 320 px, 80 epochs in all: mAP50-95 on val {before} dense,\n"
            f"  {after} with half of the FLOPs.\n"
            f"- On aquarium, 416 px, the same number of epochs, it loses accuracy: {before_aquarium} dense,\n"
            f"  {after_aquarium} with half of the FLOPs.\n"
            f"- BCCD in OpenVINO, one square image at a time, two threads, means of {slow.runs} models: mAP50-95 "
            f"{slow.map:.3f} dense.\n  Slim is {fp32.times:.2f} times as fast in fp32 ({fp32.map:.3f}), "
            f"{int8.times:.2f} times in int8 ({int8.map:.3f}); dense in int8 {dense8.times:.2f} times "
            f"({dense8.map:.3f}).")


def translated(text: str) -> str:
    """A header or a cell in Chinese, as far as CHINESE goes; names of files stay."""
    phrases = "|".join(map(re.escape, sorted(CHINESE, key=len, reverse=True)))
    return re.sub(rf"({phrases})(?!\.py)", lambda found: CHINESE[found[0]], text)


def tables(chinese: bool = False) -> dict[str, str]:
    """Name of a mark -> what stands behind it."""
    sparsity, equal, benchmarks = read_results("sparsity"), read_results("equal"), read_results("benchmarks")
    main = [row for row in equal if row["epochs"] == 80 and row["pipeline"] in MAIN]
    found = {"demo": (read_results("demo"), columns.STAGES), "engine": (read_results("engine"), columns.ENGINE),
             "bccd val": (bccd_rows("val"), columns.STAGES), "bccd test": (bccd_rows("test"), columns.STAGES),
             "sparsity": (columns.share_rows(sparsity), columns.SPARSITY),
             "l1": (columns.l1_rows(sparsity), columns.L1), "pruning": (read_results("pruning"), columns.PRUNING),
             "equal": (columns.equal_rows(equal), columns.EQUAL),
             "equal main": (columns.equal_rows(main), columns.EQUAL_MAIN),
             "absorb": (read_results("absorb"), columns.ABSORB),
             "device": (benchmarks, columns.DEVICE),
             "device pairs": (columns.device_pairs(benchmarks), columns.DEVICE_PAIRS),
             "int8": (columns.int8_rows(read_results("int8")), columns.INT8),
             "runtimes": (columns.runtime_rows(read_results("runtimes")), columns.RUNTIMES),
             "speed": (read_results("speed"), columns.SPEED_OF_USE), "scale": (read_results("scale"), columns.SCALE),
             "memory": (read_results("memory"), columns.MEMORY),
             "gpu": (columns.gpu_rows(read_results("gpu")), columns.GPU)}
    made = {name: formatted(*table) for name, table in found.items()}
    if chinese:
        made = {name: ([[translated(cell) for cell in row] for row in cells], [translated(title) for title in header])
                for name, (cells, header) in made.items()}
    return {"summary": summary(chinese), **{name: markdown_table(*table) for name, table in made.items()}}


def filled(pages: dict[Path, str]) -> dict[Path, str]:
    """The texts of pages with their tables as the results are now.

    UserError for a mark without a table, and for a table that no page shows.
    """
    known, chinese = tables(), tables(chinese=True)
    marks = set(re.findall(MARK, "".join(pages.values())))
    if wrong := known.keys() ^ marks:
        raise UserError(f"<!-- table {min(wrong)} -->: a mark without a table, or a table without a mark in a page")
    return {page: fill(text, chinese if page.name.endswith(".zh-CN.md") else known) for page, text in pages.items()}


def fill(text: str, known: dict[str, str]) -> str:
    """A page with the tables between its marks replaced."""
    return re.sub(f"({MARK}).*?({END})", lambda m: f"{m[1]}{known[m[2]]}\n{m[3]}", text, flags=re.DOTALL)


def main() -> None:
    """Rewrite all pages."""
    HelpfulParser(__doc__).parse_args()
    for page, text in filled({page: page.read_text(encoding="utf-8") for page in PAGES}).items():
        write_text(page, text)


if __name__ == "__main__":
    run_cli(main)
