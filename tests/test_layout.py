"""Imports between the repository's files run one way: no circle, nothing against the order of the layers.

Read from the source, nested imports and those for type checkers included.
"""
from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: one order, without exceptions. A file belongs to the layer of the longest pattern that fits it (a
# * stands for folders, too). It may import files of its own layer and of those above it in this list.
LAYERS = (
    ("utils/*.py", "utils/__init__.py"),
    ("utils/data/*", "utils/slimming/*", "utils/plots/*"),
    ("models/*",),
    ("models/formats/*",),
    ("training/*",),
    ("val.py",),
    ("train.py",),
    ("*.py",),
    ("bench/*", "data/*"),
)
# Folders that know nothing of each other.
APART = ("utils/data/", "utils/slimming/", "utils/plots/")
# Files that these patterns fit import nothing else from the repository.
ONLY = {"data/*": ("data/*", "utils/data/*", "utils/errors.py", "utils/files.py", "utils/tables.py",
                   "utils/text.py")}
# ... and nothing of these libraries, which read files and command lines.
WITHOUT = {"utils/slimming/*": ("yaml", "argparse")}

Sources = Mapping[str, str]          # path of a file -> its text
Arrows = Mapping[str, set[str]]      # path of a file -> paths of the files that it imports


def imported_names(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, wherever it stands.

    `import a.b` gives ("a.b", ""), `from a import b` gives ("a", "b").
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "an import relative to the file: write the package out"
            yield from ((str(node.module), alias.name) for alias in node.names)


def file_of(module: str, name: str, files: Sources) -> str | None:
    """The file that an import means: a/b.py or a/b/__init__.py, else that of a; None outside of the repository."""
    base = module.replace(".", "/")
    for candidate in (f"{base}/{name}", base) if name else (base,):
        for file in (f"{candidate}.py", f"{candidate}/__init__.py"):
            if file in files:
                return file
    return None


def arrows(files: Sources) -> dict[str, set[str]]:
    """Who imports whom."""
    return {file: {found for names in imported_names(text) if (found := file_of(*names, files))}
            for file, text in files.items()}


def circle(graph: Arrows) -> list[str]:
    """The files of one circle, in the order of their imports; empty where there is none."""
    done: set[str] = set()

    def visit(file: str, path: list[str]) -> list[str]:
        if file in path:
            return [*path[path.index(file):], file]
        for other in sorted(graph.get(file, ())) if file not in done else ():
            if found := visit(other, [*path, file]):
                return found
        done.add(file)
        return []

    return next(filter(None, (visit(file, []) for file in sorted(graph))), [])


def layer(file: str) -> int:
    """Number of a file's layer, from the bottom up."""
    fitting = [(len(p), number) for number, patterns in enumerate(LAYERS) for p in patterns if fnmatch(file, p)]
    return max(fitting)[1]


def against_the_rules(graph: Arrows) -> list[str]:
    """Imports that the layers, APART or ONLY forbid."""
    found = []
    for file, others in graph.items():
        folder = next((f for f in APART if file.startswith(f)), "")
        allowed = [patterns for pattern, patterns in ONLY.items() if fnmatch(file, pattern)]
        for other in others:
            upwards = layer(other) > layer(file)
            foreign = bool(folder) and other.startswith(APART) and not other.startswith(folder)
            unlisted = any(not any(fnmatch(other, p) for p in patterns) for patterns in allowed)
            if upwards or foreign or unlisted:
                found.append(f"{file} imports {other}")
    return sorted(found)


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """Every Python file but the tests."""
    paths = {path.relative_to(ROOT) for path in ROOT.rglob("*.py")}
    paths = {path for path in paths if path.parts[0] not in ("tests", "runs") and not path.parts[0].startswith(".")}
    return {path.as_posix(): (ROOT / path).read_text(encoding="utf-8") for path in paths}


@pytest.mark.slow
def test_there_is_no_circle(files):
    assert circle(arrows(files)) == []


@pytest.mark.slow
def test_every_import_follows_the_layers(files):
    assert against_the_rules(arrows(files)) == []


def test_the_list_of_layers_is_up_to_date(files):
    patterns = [pattern for group in LAYERS for pattern in group]
    assert [p for p in patterns if not any(fnmatch(file, p) for file in files)] == []
    upstairs = [file for file in files if file.startswith(("utils/", "training/")) and layer(file) >= layer("prune.py")]
    assert upstairs == []


def test_slimming_reads_neither_files_nor_command_lines(files):
    for pattern, libraries in WITHOUT.items():
        for file in (file for file in files if fnmatch(file, pattern)):
            roots = {module.partition(".")[0] for module, _ in imported_names(files[file])}
            assert not roots & set(libraries), file


@pytest.mark.slow
def test_a_pruner_of_ones_own_needs_neither(files):
    """`from utils.slimming import Pruner` reaches no such library, whatever it goes through."""
    graph, reached, waiting = arrows(files), set(), ["utils/slimming/__init__.py"]
    while waiting:
        reached.add(file := waiting.pop())
        waiting += graph[file] - reached
    roots = {module.partition(".")[0] for file in reached for module, _ in imported_names(files[file])}
    assert not roots & {"yaml", "argparse"} and "torch" in roots


@pytest.mark.slow
def test_nothing_imports_from_the_tests(files):
    assert [file for file, text in files.items()
            if any(module.partition(".")[0] == "tests" for module, _ in imported_names(text))] == []


# The reader and the rules themselves, on trees that are made up.

def test_imports_are_found_wherever_they_stand():
    text = """
import os, utils.files
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from models.yolo import Model
def f():
    try:
        from utils import boxes as b
    except ImportError:
        import val
"""
    known = dict.fromkeys(("utils/files.py", "models/yolo.py", "utils/boxes.py", "val.py", "utils/__init__.py"), "")
    assert arrows({"x.py": text, **known})["x.py"] == {"utils/files.py", "models/yolo.py", "utils/boxes.py", "val.py"}
    with pytest.raises(AssertionError, match="relative"):
        list(imported_names("from . import x"))


def test_a_name_that_is_no_module_means_the_package():
    tree = {"a/__init__.py": "", "a/b.py": "", "a/c/__init__.py": ""}
    assert file_of("a", "b", tree) == "a/b.py" and file_of("a", "f", tree) == "a/__init__.py"
    assert file_of("a.c", "f", tree) == file_of("a", "c", tree) == "a/c/__init__.py"
    assert file_of("torch", "nn", tree) is None and file_of("a.b", "", tree) == "a/b.py"


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]
    assert circle({"a": {"a"}}) == ["a", "a"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


@pytest.mark.parametrize("file, other", [
    ("utils/boxes.py", "utils/data/config.py"),
    ("utils/options.py", "utils/slimming/ranking.py"),
    ("utils/plots/style.py", "utils/slimming/report.py"),
    ("models/yolo.py", "models/formats/onnx.py"),
    ("models/yolo.py", "models/formats/speed.py"),
    ("models/autoshape.py", "models/formats/format.py"),
    ("utils/data/loader.py", "training/run.py"),
    ("models/yolo.py", "training/run.py"),
    ("training/run.py", "val.py"),
    ("val.py", "train.py"),
    ("train.py", "prune.py"),
    ("prune.py", "bench/common.py"),
    ("data/scripts/x.py", "utils/options.py"),
    ("data/scripts/x.py", "models/yolo.py")])
def test_the_rules_forbid(file, other):
    assert against_the_rules({file: {other}}) == [f"{file} imports {other}"]


@pytest.mark.parametrize("file, other", [
    ("utils/data/config.py", "utils/boxes.py"),
    ("utils/plots/style.py", "utils/plots/training.py"),
    ("utils/options.py", "utils/parser.py"),
    ("models/yolo.py", "utils/options.py"),
    ("models/formats/speed.py", "models/formats/onnx.py"),
    ("training/run.py", "models/formats/onnx.py"),
    ("train.py", "val.py"),
    ("train_sparsity.py", "train.py"),
    ("bench/voc.py", "prune.py"),
    ("data/scripts/x.py", "utils/data/config.py")])
def test_the_rules_allow(file, other):
    assert against_the_rules({file: {other}}) == []
