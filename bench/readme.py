"""Write the tables of the READMEs and of docs/ from bench/results/*.csv, between their <!-- table NAME --> marks.

The table of flags is made of the scripts' parsers (bench/flags.py).

    python bench/readme.py

A page whose name ends in .zh-CN.md gets them in Chinese.
"""
from __future__ import annotations

import re
from pathlib import Path

import flags
from columns import ROOT, TABLES, formatted, grouped, read_table, spread

from utils.errors import UserError, run_cli
from utils.files import write_text
from utils.parser import HelpfulParser
from utils.tables import markdown_table

PAGES = (ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "bench" / "README.md")
MARK, END = r"<!-- table ([\w ]+) -->\n", "<!-- /table -->"
# In English and in Chinese.
SPREAD_OF_RUNS = ("{:.3f} ({:.3f} to {:.3f}, {} runs)", "{:.3f}（{:.3f}～{:.3f}，{} 次运行）")
SUMMARY = ("""\
- **Half of the FLOPs may cost nothing.** BCCD, yolov5n, 320 px, 80 epochs in all: mAP50-95 on val is
  {} dense and {} slim.
- **On other data it costs accuracy.** Aquarium, 416 px, as many epochs:
  {} dense and {} slim.
- **int8 adds to the speed.** BCCD in OpenVINO, one square image at a time, two threads, means of {dense_fp32[runs]} \
models:
  slim is {slim_fp32[faster]:.2f} times as fast in fp32 and {slim_int8[faster]:.2f} times in int8, dense in int8 \
{dense_int8[faster]:.2f} times.
  mAP50-95: {slim_fp32[mAP50-95]:.3f}, {slim_int8[mAP50-95]:.3f} and {dense_int8[mAP50-95]:.3f}; dense in fp32 \
{dense_fp32[mAP50-95]:.3f}.""", """\
- **去掉一半 FLOPs 可以不损失精度。** BCCD，yolov5n，320 px，总共 80 轮，验证集 mAP50-95：
  稠密模型 {}，剪枝模型 {}。
- **换一个数据集就会损失精度。** aquarium，416 px，轮数相同：
  稠密模型 {}，剪枝模型 {}。
- **int8 还能更快。** BCCD 上用 OpenVINO 逐张推理正方形图像，两个线程，{dense_fp32[runs]} 个模型的平均值。
  与 fp32 稠密模型相比，剪枝模型 fp32 的速度为 {slim_fp32[faster]:.2f} 倍，int8 为 {slim_int8[faster]:.2f} 倍；\
稠密模型 int8 为 {dense_int8[faster]:.2f} 倍。
  mAP50-95 依次为 {slim_fp32[mAP50-95]:.3f}、{slim_int8[mAP50-95]:.3f}、{dense_int8[mAP50-95]:.3f}；\
fp32 稠密模型为 {dense_fp32[mAP50-95]:.3f}。""")


def summary(chinese: bool) -> str:
    """The main result of equal.py and front.py, in three sentences."""
    equal = grouped(read_table("equal"), "epochs", "data", "pipeline")
    maps = [spread(equal[80, data, pipeline], "map", SPREAD_OF_RUNS)[chinese]
            for data in ("bccd", "aquarium") for pipeline in ("dense", "blocks-16")]
    points = {f"{row['model']}_{row['precision']}": row for row in read_table("front")}
    return SUMMARY[chinese].format(*maps, **points)


def tables(chinese: bool = False) -> dict[str, str]:
    """Name of a mark -> what stands behind it."""
    cells = {name: formatted(table.rows(read_table(table.results)), table.columns, chinese)
             for name, table in TABLES.items()}
    cells["flags"] = flags.table(chinese)
    return {"summary": summary(chinese), **{name: markdown_table(*table) for name, table in cells.items()}}


def filled(pages: dict[Path, str]) -> dict[Path, str]:
    """The texts of pages with their tables as the results are now.

    UserError for a mark without a table, and for a table that no page shows.
    """
    english, chinese = tables(), tables(chinese=True)
    marks = set(re.findall(MARK, "".join(pages.values())))
    if wrong := english.keys() ^ marks:
        raise UserError(f"<!-- table {min(wrong)} -->: a mark without a table, or a table without a mark in a page")
    return {page: fill(text, chinese if page.name.endswith(".zh-CN.md") else english) for page, text in pages.items()}


def fill(text: str, texts: dict[str, str]) -> str:
    """A page with the tables between its marks replaced."""
    return re.sub(f"({MARK}).*?({END})", lambda m: f"{m[1]}{texts[m[2]]}\n{m[3]}", text, flags=re.DOTALL)


def main() -> None:
    """Rewrite all pages."""
    HelpfulParser(__doc__).parse_args()
    for page, text in filled({page: page.read_text(encoding="utf-8") for page in PAGES}).items():
        write_text(page, text)


if __name__ == "__main__":
    run_cli(main)
