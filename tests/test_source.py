"""The repository's own source: nothing in it can execute what a user's file says, and text is read in one place."""
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
# Calls that give text its meaning. utils/text.py is the place for them, and utils/tables.py for CSV.
READERS = (".read_text", ".decode", "json.load", "json.loads", "yaml.safe_load", "csv.reader", "csv.DictReader",
           "ElementTree.parse", "np.loadtxt", "np.genfromtxt")
# What reads none of a user's files, and how.
OWN = {"utils/device.py": ".read_text",                  # /proc/meminfo
       "utils/data/scan.py": "json.loads",               # what a scan has written; possible() checks it
       "utils/tables.py": "csv.reader",                   # what utils/text.py has read
       "utils/data/coco.py": "json.loads",               # its own dict, as pycocotools wants it
       "utils/plots/page.py": ".decode",                  # base64
       "utils/files.py": ".decode",                       # names of files
       "data/scripts/voc_to_yolo.py": ".decode",          # the name of an encoding
       "models/formats/torchscript.py": "json.loads"}    # of an archive that is one file
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


def reads_text(node: ast.Call) -> str:
    """What of READERS a call is, or "open" where it opens a file as text; "" for others."""
    called = name(node.func)
    owner, _, method = called.rpartition(".")
    if method == "open" and owner not in ("Image", "os", "tarfile"):
        modes = [*node.args[called == "open":][:1], *(k.value for k in node.keywords if k.arg == "mode")]
        return "" if any("b" in str(getattr(mode, "value", "")) for mode in modes) else "open"
    return "" if owner == "self" else next((reader for reader in READERS if called.endswith(reader)), "")


@pytest.mark.slow
def test_text_files_are_read_in_one_place():
    """A decoding of one's own is how a file of another encoding ends in a traceback, or in wrong names."""
    for file in FILES:
        where = file.relative_to(ROOT).as_posix()
        if where == "utils/text.py" or where.startswith(("bench/", "examples/")):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            read = reads_text(node) if isinstance(node, ast.Call) else ""
            assert read in ("", OWN.get(where)), f"{where}:{node.lineno}: {read}; use utils/text.py"


@pytest.mark.parametrize("call, found", [
    ("path.read_text()", ".read_text"), ("Path(a).read_text(errors='replace')", ".read_text"), ("open(a)", "open"),
    ("open(a, newline='')", "open"), ("open(a, 'rb')", ""), ("open(a, mode='wb')", ""), ("Path(a).open()", "open"),
    ("data.decode()", ".decode"), ("read(a).decode('x')", ".decode"), ("self.decode(x)", ""), ("decode(image)", ""),
    ("json.loads(a)", "json.loads"), ("Image.open(a)", ""), ("os.open(a, b)", ""), ("read_text(a)", ""),
    ("csv.DictReader(a)", "csv.DictReader"), ("path.open()", "open"), ("a.path.open('rb')", "")])
def test_the_calls_are_found(call, found):
    assert reads_text(ast.parse(call).body[0].value) == found


def test_only_one_file_unpickles():
    def unpickles(file: Path) -> bool:
        return "torch.load" in file.read_text(encoding="utf-8").replace("touches torch.load", "")

    assert {str(file.relative_to(ROOT)) for file in FILES if unpickles(file)} == {"models/checkpoint.py"}
