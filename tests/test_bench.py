"""The bench scripts: what is done is not done again, what was interrupted is; the pages show what the results say."""
from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_plots import check
from utils.errors import UserError
from utils.tables import write_csv

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch):
    """Imports a script of bench/ by name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    return importlib.import_module


def test_a_run_that_was_interrupted_is_not_taken_for_done(bench, tmp_path):
    is_done, results = bench("common").is_done, tmp_path / "results.csv"
    command = "finetune_pruned.py --weights x.pt --epochs 20 --name y"
    assert not is_done(results, command)
    results.write_text("epoch,map\n0,0.1\n4,0.2\n")
    assert not is_done(results, command)
    results.write_text("epoch,map\n0,0.1\n19,0.2\n")
    assert is_done(results, command)
    (tmp_path / "gammas.npy").touch()
    assert is_done(tmp_path / "gammas.npy", "train_sparsity.py")


def test_only_what_is_missing_runs_and_a_run_goes_into_its_own_folder(bench, tmp_path, monkeypatch):
    common, ran = bench("common"), []
    monkeypatch.setattr(common, "run", lambda command, folder: ran.append(command))
    (tmp_path / "a.npy").touch()
    common.run_missing({"a.npy": "train_sparsity.py --name a", "b.npy": "train_sparsity.py --name b",
                        "data.yaml": "convert.py --out c"}, tmp_path)
    assert ran == ["train_sparsity.py --name b --exist-ok", "convert.py --out c"]


def test_a_shape_from_scratch_starts_from_the_shape_of_its_own_budget_and_data(bench):
    commands = bench("equal").commands
    starts = {re.search(r"--weights '([^']+)'", command)[1] for data in ("bccd", "aquarium") for epochs in (30, 80)
              for command in commands(data, "scratch", epochs, 0, Path("yolov5n.pt")).values()}
    assert len(starts) == 4 and "yolov5n.pt" not in starts


def test_the_pages_show_what_the_results_say(bench):
    """Nothing in a table is typed by hand: writing them again changes nothing."""
    readme = bench("readme")
    pages = {page: page.read_text(encoding="utf-8") for page in readme.PAGES}
    assert readme.filled(pages) == pages
    assert {ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "docs/results.md"} <= pages.keys()


def test_a_mark_without_a_table_and_a_table_without_a_mark_are_refused(bench, monkeypatch):
    readme = bench("readme")
    monkeypatch.setattr(readme, "tables", lambda chinese=False: {"a": "少" if chinese else "little"})
    mark = "<!-- table {} -->\nold\n<!-- /table -->\n"
    filled = readme.filled({Path("a.md"): mark.format("a"), Path("a.zh-CN.md"): mark.format("a")})
    assert ["little" in text for text in filled.values()] == [True, False]
    for text in ("", mark.format("a") + mark.format("b")):
        with pytest.raises(UserError, match="a mark without a table"):
            readme.filled({Path("a.md"): text})


def test_a_table_in_chinese_has_the_same_figures(bench):
    readme = bench("readme")
    english, chinese = (readme.tables(chinese=flag)["device pairs"].splitlines() for flag in (False, True))
    assert len(english) == len(chinese) and chinese[0].startswith("| 格式 | 数值精度 | 稠密：MB |")
    assert [re.findall(r"[\d.]+", row) for row in english] == [re.findall(r"[\d.]+", row) for row in chinese]


def test_a_row_of_pairs_compares_the_models_in_one_format(bench):
    row = {"precision": "fp32", "MB": 2.0, "mAP50-95": 0.5}
    dense, slim = ({**row, "model": model, "format": "ncnn", "ms": ms} for model, ms in (("dense", 9.0), ("slim", 6.0)))
    pair, = bench("columns").device_pairs([dense, slim])
    assert (pair["format"], pair["dense ms"], pair["slim ms"], pair["faster"]) == ("ncnn", 9.0, 6.0, 1.5)


def test_a_row_of_the_gpu_table_has_both_ways_to_run_the_models(bench):
    row = {"model": "yolov5n", "batch": 1, "precision": "fp16"}
    rows = [{**row, "way": "eager", "dense": 4.0, "slim": 4.0}, {**row, "way": "CUDA graph", "dense": 3.0, "slim": 2.0}]
    found, = bench("columns").gpu_rows(rows)
    assert (found["eager faster"], found["CUDA graph faster"], found["CUDA graph slim"]) == (1.0, 1.5, 2.0)


def test_the_tables_of_a_chinese_page_are_in_chinese(bench):
    """A title has its two languages where it is defined. Commands, formats and units are the same in both."""
    tables = bench("readme").tables(chinese=True)
    page = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    cells = [cell.strip() for name in re.findall(bench("readme").MARK, page) for cell in tables[name].split("|")]
    words = re.compile(r"(?<![-\w])(the|of|from|an?|with|on|to|runs|data|commands|format|faster|dense|slim)\b(?!\.py)")
    assert len(cells) > 100 and not [cell for cell in cells if words.search(cell)]


def test_a_figure_of_several_runs_has_its_limits(bench):
    spread, runs = bench("columns").spread, [{"map": 0.1}, {"map": 0.3}, {"map": ""}]
    assert spread(runs, "map") == ("0.200 (0.100 to 0.300)", "0.200 (0.100～0.300)")
    assert spread(runs, "map", ("{} {} {} {}", "")) == ("0.2 0.1 0.3 2", "")
    assert spread(runs[:1], "map") == ("0.100", "0.100") and spread(runs[2:], "map") == ("", "")


def test_a_figure_comes_back_from_a_csv_as_it_was_written(bench, tmp_path, monkeypatch):
    columns = bench("columns")
    monkeypatch.setattr(columns, "RESULTS", tmp_path)
    rows = [{"model": "a", "map": 0.125, "parameters": 1000, "tuned": ""}]
    write_csv(tmp_path / "x.csv", rows)
    assert columns.read_table("x") == rows
    titles = ["model", ("parameters", "parameters", columns.COUNT), (("fine-tuned", "微调后"), "tuned", columns.SHARE)]
    assert columns.formatted(rows, titles) == ([["a", "1,000", ""]], ["model", "parameters", "fine-tuned"])
    assert columns.formatted(rows, titles, chinese=True) == ([["a", "1,000", ""]], ["model", "parameters", "微调后"])


def test_rows_of_other_keys_stay_in_the_results(bench, tmp_path, monkeypatch, capsys):
    columns = bench("columns")
    monkeypatch.setattr(columns, "RESULTS", tmp_path)
    monkeypatch.setattr(columns, "TABLES", {"a": columns.Table("x", ["data"])})
    old, new, other = ({"data": data, "map": value} for data, value in (("a", 1), ("a", 2), ("b", 3)))
    columns.publish("x", [old, other])
    columns.publish("x", [new], "data")
    assert columns.read_table("x") == [other, new]
    columns.publish("x", [new], "data", order=lambda row: row["data"])
    assert columns.read_table("x") == [new, other]
    assert capsys.readouterr().out.split() == ["data", "----", *"ab", "data", "----", *"ba", "data", "----", *"ab"]


def test_the_experiments_on_bccd_make_what_their_tables_show(bench):
    bccd = bench("bccd")
    scripts = {name: [command.split()[0] for made in bccd.commands(plan, Path("w.pt")) for command in made.values()]
               for name, plan in bccd.EXPERIMENTS.items()}
    assert {name: [found.count(script) for script in ("train_sparsity.py", "prune.py", "finetune_pruned.py")]
            for name, found in scripts.items()} == {
        "stages": [4, 3, 3], "sparsity": [25, 8, 8], "pruning": [1, 15, 12], "absorb": [1, 4, 0]}
    made = list(bccd.commands(bccd.EXPERIMENTS["sparsity"], Path("w.pt"))[list(bccd.RUNS).index(
        "share0.55-round16-seed1")].values())
    assert [command.split()[0] for command in made] == ["train_sparsity.py", "prune.py", "finetune_pruned.py"]
    assert "--percent 0.55 " in made[1] and "--target-sparsity 0.55 --round-to 16 --adam --seed 1 " in made[0]
    for name in ("sparsity", "pruning"):
        assert {row.get("run", "share0.5") for row in bench("columns").read_table(name)} <= {
            run.rsplit("-seed")[0] for run in bccd.EXPERIMENTS[name].sparse}


STAGES = [{"stage": "dense", "map50": 0.86, "map": 0.61, "parameters": 1872157, "flops": 4.2e9, "ms": 31.4},
          {"stage": "cut", "map50": 0.0, "map": 0.0, "parameters": 572157, "flops": 1.9e9, "ms": 17.2}]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [STAGES, STAGES[:1], STAGES * 6, [STAGES[0] | {"map50": 0.0, "map": 0.0}],
                                   [STAGES[0] | {"stage": "红 $"}]])
def test_the_picture_of_the_stages(bench, tmp_path, rows):
    bench("pictures").plot_stages(rows, tmp_path / "s.png")
    check(tmp_path / "s.png")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 50, 5000])
def test_the_picture_of_two_models_gammas(bench, tmp_path, size):
    gammas = np.abs(np.random.default_rng(0).normal(1, 0.1, size))
    bench("pictures").plot_two_gammas({"dense": gammas, "sr 红": 0 * gammas}, "title $", tmp_path / "g.png")
    check(tmp_path / "g.png")


def test_a_made_up_data_set_has_what_it_says(bench, tmp_path, monkeypatch):
    scale = bench("scale")
    monkeypatch.setattr(scale, "LINKS", 3)
    monkeypatch.setattr(scale, "PER_FOLDER", 12)
    monkeypatch.setenv("YOLO_CACHE", str(tmp_path / "cache"))
    images = scale.make_set(tmp_path, 31)
    assert scale.sample(images)["images"] == 31 and len(list((tmp_path / "cache/labels").iterdir())) == 1
    assert max(file.stat().st_nlink for file in tmp_path.rglob("*.jpg")) <= 1 + 3
    scale.forget(images)
    assert not list((tmp_path / "cache/labels").iterdir()) and len(list(images.rglob("*.jpg"))) == 31
