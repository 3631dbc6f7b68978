"""examples/tutorial.ipynb: its cells parse, its commands exist, it runs."""
from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import pytest

from tests.conftest import ROOT
from tests.forks import Forks, forks
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


class Commands(list):
    """In the place of subprocess.Popen: the commands that were run, and what they printed."""

    def __init__(self, forks: Forks):
        super().__init__()
        self.forks = forks

    def __call__(self, command: list[str], **options: Any) -> Commands:
        done = self.forks.run(command[1:], Path.cwd(), dict(os.environ))
        self.append(done)
        self.stdout, self.returncode = (done.stdout + done.stderr).splitlines(keepends=True), done.returncode
        return self

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.slow
def test_it_runs(tiny, cfg, tmp_path, monkeypatch, capsys):
    """Every cell, on a smaller data set, in a folder of its own; the pictures are there."""
    pictures, commands = [], Commands(forks())
    monkeypatch.chdir(FILE.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "Popen", commands)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(
        Image=lambda filename, width: cv2.imread(filename), display=pictures.append))
    smaller = f"--data '{tiny}' --weights '' --cfg '{cfg}' --imgsz 64 --batch-size 4 --workers 0"
    book = "\n".join(sources("code")).replace(WORK, f"Path({str(tmp_path / 'work')!r})")
    exec(book.replace('run(f"train.py ', f'run(f"train.py {smaller} '), {})
    assert len(commands) == 6 and len(pictures) == 5 and all(picture is not None for picture in pictures)
    printed = capsys.readouterr().out
    assert "equivalence check: largest relative" in printed and re.search(r"tuned  mAP50-95 \d\.\d{3} ", printed)
    assert (tmp_path / "work/runs/train/tuned/weights/best.pt").is_file()
