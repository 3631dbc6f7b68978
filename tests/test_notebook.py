"""examples/tutorial.ipynb: its cells parse, its commands exist, it runs."""
from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_docs import flags_of

FILE = ROOT / "examples" / "tutorial.ipynb"
WORK = 'ROOT / "runs" / "tutorial"'  # in the first cell


def sources(kind: str) -> list[str]:
    """The texts of the cells of a kind."""
    return ["".join(cell["source"]) for cell in json.loads(FILE.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == kind]


def test_the_cells_parse_and_hold_no_outputs():
    cells = sources("code")
    assert 5 <= len(cells) <= 12 and WORK in cells[0]
    for cell in cells:
        ast.parse(cell)
    for cell in json.loads(FILE.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


def test_outside_of_a_clone_it_asks_for_the_address_and_clones(tmp_path, monkeypatch, capsys):
    """In Colab there is no clone; the notebook can't know from which address it was opened."""
    cell, ran = sources("code")[0], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert sources("markdown")[0].startswith("*The address of this repository is not known yet")
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(Image=None, display=None))
    exec("\n".join(sources("code")), {})  # all cells: none ends in an error
    assert "give REPOSITORY" in capsys.readouterr().out and not list(tmp_path.iterdir())
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    exec(cell.replace('REPOSITORY = ""', 'REPOSITORY = "https://host/fork"'), {})
    assert [command[:2] for command in ran] == [["git", "clone"], [sys.executable, "-m"]]
    assert "https://host/fork" in ran[0] and Path.cwd() == tmp_path / "yolov5-slimming/runs/tutorial"


def test_the_commands_are_ones_that_the_scripts_know():
    found = re.findall(r'"(\w+\.py) ([^)]*)', "\n".join(sources("code")))
    assert [script for script, _ in found] == ["train.py", "train_sparsity.py", "prune.py", "finetune_pruned.py",
                                               "val.py"]
    for script, rest in found:
        flags = set(re.findall(r"--[\w-]+", rest))
        assert flags and flags <= flags_of(script), script


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(sources("markdown"))):
        assert target.startswith("https:") or (FILE.parent / target).resolve().exists(), target


@pytest.mark.slow
def test_it_runs(tiny, cfg, tmp_path):
    """Every cell, on a smaller data set, in a folder of its own; the pictures are in the outputs."""
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="pip install -r requirements-dev.txt")
    import nbformat

    book: Any = nbformat.read(FILE, as_version=4)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    first.source = first.source.replace(WORK, f"Path({str(tmp_path / 'work')!r})")
    smaller = f"--data '{tiny}' --weights '' --cfg '{cfg}' --imgsz 64 --batch-size 4 --workers 0"
    for cell in book.cells:
        cell.source = cell.source.replace('run(f"train.py ', f'run(f"train.py {smaller} ')
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(FILE.parent)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    pictures = [kind for output in outputs for kind in output.get("data", {}) if kind in ("image/png", "image/jpeg")]
    assert len(pictures) == 5
    printed = "".join(output.get("text", "") for output in outputs)
    assert "equivalence check: largest relative" in printed and re.search(r"tuned  mAP50-95 \d\.\d{3} ", printed)
    assert (tmp_path / "work/runs/train/tuned/weights/best.pt").is_file()
