"""The pages: links lead somewhere, commands are ones that the scripts know, both READMEs agree, README stays short."""
from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from data.scripts.yolo_layout import TRAIN_COMMAND
from utils.yolov5_flags import FLAGS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench/README.md",
                ROOT / "examples/README.md", *(ROOT / ".github").rglob("*.md")])
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
MOST_LINES = 160
STOCK = ".yolov5.pt"  # commands that open such a file are YOLOv5's own
# YOLOv5's, of which the pages say that they are missing here, and beginnings that stand for the whole.
FOREIGN = {flag for flags in FLAGS.values() for flag in flags} | {"--batch", "--conf", "--iou"}
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def code(text: str) -> Iterator[tuple[str, bool]]:
    """(code, stands in a block of its own) of a page: fenced and indented lines, whole, and spans."""
    fenced = ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = "" if fenced else line
        elif fenced or line.startswith("    "):
            yield line.strip(), True
        else:
            yield from ((span, False) for span in re.findall(r"`([^`]+)`", line))


def prose(text: str) -> str:
    """A page without its code: what is a link there is none."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]+`", "code", "\n".join(x for x in text.splitlines() if not x.startswith("    ")))


def slugs(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


@page
def test_every_link_leads_somewhere(page):
    text = prose(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{page.name}: no heading for {target}"


@cache
def flags_of(script: str) -> frozenset[str]:
    """The flags of one of the repository's scripts: its main() is run as far as its parser."""
    parts = Path(script).with_suffix("").parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT), str(ROOT / "bench"), *sys.path])
        module = importlib.import_module(".".join(parts[1:] if parts[0] == "bench" else parts))
        parser = importlib.import_module("flags").parser_of(module.main)
    return frozenset(flag for action in parser._actions for flag in action.option_strings)


@cache
def known_flags() -> frozenset[str]:
    """Those of all the scripts that a user starts."""
    scripts = [*ROOT.glob("*.py"), *(ROOT / "data/scripts").glob("*_to_yolo.py")]
    return frozenset().union(*(flags_of(script.relative_to(ROOT).as_posix()) for script in scripts
                               if script.name != "hubconf.py"))


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(script, its flags) of every command of a page: python x.py ..., torchrun ... x.py ..., x.py ... in a span."""
    joined = re.sub(r"\\\n\s+", "", text)
    for line, whole in code(joined):
        line = re.sub(r"\s#\s.*", "", line)
        match = re.match(r"(?:\$ )?(python |torchrun )?(.*?)(\S+\.py)(?=\s|$)(.*)", line)
        if not match or STOCK in line or (whole and not match[1]) or (not match[1] and match[2]):
            continue
        script, rest = match[3], match[4]
        if script == "examples/with_attention.py" and rest.strip():  # it starts the script that follows
            script, _, rest = rest.strip().partition(" ")
        flags = re.findall(r"(?<!\S)--[\w-]+", rest)
        if match[1] or flags:
            yield script, flags


@page
def test_every_command_is_one_that_its_script_knows(page):
    found = list(commands(page.read_text(encoding="utf-8")))
    for script, flags in found:
        paths = [path for path in (ROOT / script, ROOT / "bench" / script) if path.is_file()]
        assert paths, f"{page.name}: {script}"
        script = paths[0].relative_to(ROOT).as_posix()
        if flags:
            assert set(flags) <= flags_of(script), f"{page.name}: {script} {sorted(set(flags) - flags_of(script))}"
    assert found or page not in (README, CHINESE)


@page
def test_every_flag_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    named = {match[0] for span, whole in code(text) if not whole and (match := re.match(r"--[a-zA-Z][\w-]*", span))}
    assert named <= known_flags() | FOREIGN, page.name


def test_the_commands_are_found():
    text = ("    python a.py --x 1 --y   # --no\n\n- `b.py --z`, `make c`, `see d.py`\n\n```bash\n"
            "torchrun --nproc_per_node 2 e.py --w\n```\n    python f.py --v \\\n        --u\n")
    assert list(commands(text)) == [("a.py", ["--x", "--y"]), ("b.py", ["--z"]), ("e.py", ["--w"]),
                                    ("f.py", ["--v", "--u"])]
    assert {"--percent", "--target"} <= flags_of("prune.py") and "--sr" not in flags_of("prune.py")
    assert slugs("# A `b.py`: c-d\n## 中文 x\n") == {"a-bpy-c-d", "中文-x"}


def test_both_readmes_have_the_same_commands_and_link_to_each_other():
    texts = [file.read_text(encoding="utf-8") for file in (README, CHINESE)]
    english, chinese = ([re.sub(r"\s+#\s.*", "", line) for line, whole in code(text) if whole] for text in texts)
    assert english == chinese and len(english) > 20
    for text, other in zip(texts, (CHINESE, README)):
        assert f"({other.name})" in text.splitlines()[0]
    marks = [re.findall(r"<!-- table ([\w ]+) -->", text) for text in texts]
    assert marks[0] == marks[1] and "device pairs" in marks[0]


def test_code_fits_the_width_of_github():
    """Of a README's column: about 96 letters."""
    for file in (README, CHINESE):
        assert not [line for line, whole in code(file.read_text(encoding="utf-8")) if whole and len(line) > 96]


def test_converters_name_the_next_command_of_the_readme():
    assert f"    {TRAIN_COMMAND.format('../datasets/mine/data.yaml')}\n" in README.read_text(encoding="utf-8")


def test_the_dockerfile_copies_what_is_there_and_runs_the_makefile(tmp_path):
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()]
    copied = [name for word, *names, _ in lines if word == "COPY" for name in names]
    assert all((ROOT / name).exists() for name in copied) and "." in copied
    for name in set(copied) - {"."}:  # before the others: what make setup needs
        shutil.copyfile(ROOT / name, tmp_path / name)
    assert ["RUN", "make", "setup"] in lines and ["CMD", '["make",', '"demo"]'] in lines
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"setup", "demo"} <= set(targets)
    if make := shutil.which("make"):
        done = subprocess.run([make, "-n", "setup"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "requirements-dev.txt" in done.stdout, done.stderr


def test_hooks_that_send_figures_elsewhere(monkeypatch):
    """The page's hooks, with stand-ins for both packages."""
    sent: list[tuple[object, ...]] = []

    class StandIn(ModuleType):
        def __getattr__(self, name):
            return lambda *given, **more: sent.append((name, *given, *more.values())) or self

    for name in ("wandb", "mlflow", "train"):
        monkeypatch.setitem(sys.modules, name, StandIn(name))
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "import wandb" in b)
    names: dict[str, Any] = {}
    exec(block, names)
    sent.clear()
    for hook in (names["ToWandb"](), names["ToMlflow"]()):
        for main in (True, False):  # the first process, and another one
            hook.start(SimpleNamespace(world=SimpleNamespace(main=main), folder=Path("exp3"), epoch=6))
            hook.epoch_end({"metrics/mAP_0.5:0.95": 0.5})
            if main:
                hook.end()
    figures = {"metrics/mAP_0.5:0.95": 0.5}
    assert sent == [("init", "slimming", "exp3"), ("log", figures, 7), ("finish",), ("start_run", "exp3"),
                    ("log_metrics", {"metrics/mAP_0.5-0.95": 0.5}, 7), ("end_run",)]


def test_the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    tables = re.findall(r"<!-- table [\w ]+ -->\n(.*?)<!-- /table -->", README.read_text(encoding="utf-8"), re.DOTALL)
    assert tables and all(len(body.splitlines()) <= 2 + 10 for body in tables)


@page
def test_code_in_python_parses(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        compile(block, page.name, "exec")


def test_shell_commands_can_be_split():
    for file in (README, CHINESE):
        for line, whole in code(file.read_text(encoding="utf-8")):
            if whole and line.startswith("python "):
                assert shlex.split(line, comments=True)[0] == "python"
