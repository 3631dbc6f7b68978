"""The repository's own source: nothing in it can execute what a user's file says."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("tests", "runs")
               and not p.relative_to(ROOT).parts[0].startswith("."))
# Calls that turn data into behaviour, and why each is out.
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
             "marshal.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "runpy.run_path",
             "input"}
NEEDS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False),
         "numpy.load": ("allow_pickle", False)}
SUBPROCESS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call",
              "subprocess.check_output"}
# Beside bench/: export runs the program that the pnnx package ships, on a file it has just written.
RUNS_PROGRAMS = {"models/formats/ncnn.py"}


def name(node: ast.AST) -> str:
    """a.b.c of an expression, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_call_executes_data(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called, where = name(node.func), f"{file.relative_to(ROOT)}:{node.lineno}"
        flags = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        assert called not in FORBIDDEN, f"{where}: {called}"
        assert not flags.get("shell"), f"{where}: a shell"
        if called in NEEDS:
            key, value = NEEDS[called]
            assert flags.get(key) is value, f"{where}: {called} without {key}={value}"
        allowed = file.parent.name == "bench" or file.relative_to(ROOT).as_posix() in RUNS_PROGRAMS
        assert called not in SUBPROCESS or allowed, f"{where}: {called}"
        if called.endswith("extractall") and file.name != "downloads.py":
            assert flags.get("filter") == "data", f"{where}: an archive could escape"


def test_only_one_file_unpickles():
    def unpickles(file: Path) -> bool:
        return "torch.load" in file.read_text(encoding="utf-8").replace("touches torch.load", "")

    assert {str(file.relative_to(ROOT)) for file in FILES if unpickles(file)} == {"models/checkpoint.py"}
