"""YOLOv5's flags with this repository's beside them: a table of docs/faq.md, into which bench/readme.py writes it.

    python bench/flags.py                     # the table, as the parsers are now
    python bench/flags.py --stock ../yolov5   # first compares utils/yolov5_flags.py with a checkout of YOLOv5
"""
from __future__ import annotations

import ast
import importlib
import re
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from columns import Words

from utils.errors import UserError, run_cli
from utils.parser import HelpfulParser
from utils.tables import markdown_table
from utils.text import read_text
from utils.yolov5_flags import FLAGS, LEFT_OUT

HEADER = (["script", "YOLOv5", "here"], ["脚本", "YOLOv5", "本项目"])
SAME = ("the same", "相同")
UNNAMED = ("left out", "没有")
# Values of flags that are the same.
VALUES: dict[str, list[tuple[str, Words]]] = {
    "train.py": [("`--device 0,1`", ("`torchrun --nproc_per_node 2 train.py`",) * 2)],
    "val.py": [("`--task speed`, `study`", ("benchmarks.py, prune.py --sweep", "benchmarks.py、prune.py --sweep"))],
    "export.py": [("`--include` engine, coreml, saved_model, pb, tflite, edgetpu, tfjs, paddle",
                   ("through ONNX or `--include yolov5`: [deploy](deploy.md)",
                    "经由 ONNX 或 `--include yolov5`：见 [deploy](deploy.md)"))]}


class _ParserReached(Exception):
    """Carries a parser out of the main() that has made it."""


def parser_of(main: Callable[[], object]) -> ArgumentParser:
    """The parser of a script: its main() is run as far as that."""
    def stop(parser: ArgumentParser, *_: object) -> None:
        raise _ParserReached(parser)

    with patch.object(ArgumentParser, "parse_args", stop), patch.object(HelpfulParser, "parse_args", stop):
        try:
            main()
        except _ParserReached as caught:
            return caught.args[0]
    raise ValueError(f"{main} makes no parser")


def flags_of(script: str) -> set[str]:
    """The flags of one of this repository's scripts."""
    parser = parser_of(importlib.import_module(Path(script).stem).main)
    return {flag for action in parser._actions for flag in action.option_strings}


def table(chinese: bool = False) -> tuple[list[list[str]], list[str]]:
    """(cells, header): for each of YOLOv5's scripts the flags that are the same, and what stands for the others."""
    def spans(text: str) -> str:
        return text if "`" in text else re.sub(r"(--[a-z][\w-]*)", r"`\1`", text)

    rows = []
    for script, flags in FLAGS.items():
        ours, groups = flags_of(script), dict[Words, list[str]]()
        for flag in flags:
            groups.setdefault(SAME if flag in ours else LEFT_OUT.get(flag, UNNAMED), []).append(flag)
        cells = [(" ".join(f"`{flag}`" for flag in names), why) for why, names in groups.items()]
        rows += [[script, names, spans(why[chinese])] for names, why in [*cells, *VALUES.get(script, [])]]
    return rows, HEADER[chinese]


def stock_flags(file: Path) -> tuple[str, ...]:
    """The flags of a script of YOLOv5's, in their order: of its calls of add_argument(). Nothing of it is run."""
    calls = [node for node in ast.walk(ast.parse(read_text(file, "--stock")))
             if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"]
    return tuple(str(word.value) for call in sorted(calls, key=lambda call: call.lineno) for word in call.args
                 if isinstance(word, ast.Constant))


def main() -> None:
    """Compare, and print the table."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--stock", type=Path, help="a checkout of YOLOv5")
    opt = parser.parse_args()
    for script, flags in FLAGS.items() if opt.stock else ():
        if other := set(stock_flags(opt.stock / script)) ^ set(flags):
            raise UserError(f"--stock: {script}: {', '.join(sorted(other))}; bring utils/yolov5_flags.py up to date")
    print(markdown_table(*table()))


if __name__ == "__main__":
    run_cli(main)
