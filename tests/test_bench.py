"""The bench scripts: what is done is not done again, what was interrupted is; the pages show what the results say."""
from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

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
    english, chinese = (readme.tables(chinese=flag)["device"].splitlines() for flag in (False, True))
    assert len(english) == len(chinese) and chinese[0].startswith("| 模型 | 格式 | 数值精度 | MB |")
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
    assert (found["eager"], found["CUDA graph"], found["CUDA graph slim"]) == (1.0, 1.5, 2.0)


def test_no_phrase_of_the_pages_is_left_half_translated(bench):
    """A title that gets a new word must get its phrase in CHINESE."""
    tables = bench("readme").tables(chinese=True)
    cells = [cell for name in ("equal main", "device pairs") for cell in tables[name].split("|")]
    mixed = re.compile(r"(?=.*[\u4e00-\u9fff]).*\b(the|of|from|an?)\b")
    assert not [cell for cell in cells if mixed.match(cell)]


def test_phrases_are_translated_whole_and_names_of_files_stay(bench):
    translated = bench("readme").translated
    assert translated("train.py, the slim shape from scratch") == "train.py，剪枝后的结构，从头训练"
    assert translated("slim.py") == "slim.py" and translated("slim") == "剪枝后"
    assert translated("commands") == "命令" and translated("0.1 to 0.2") == "0.1～0.2"


def test_a_figure_comes_back_from_a_csv_as_it_was_written(bench, tmp_path, monkeypatch):
    columns = bench("columns")
    monkeypatch.setattr(columns, "RESULTS", tmp_path)
    rows = [{"model": "a", "map": 0.125, "parameters": 1000, "tuned": ""}]
    write_csv(tmp_path / "x.csv", rows)
    assert columns.read_results("x") == rows
    assert columns.formatted(rows, [columns.PARAMETERS, ("fine-tuned", "tuned", columns.SHARE)]) == (
        [["1,000", ""]], ["parameters", "fine-tuned"])


def test_every_fine_tuned_run_of_the_tables_is_among_the_runs(bench):
    sparsity, pruning = bench("sparsity"), bench("pruning")
    assert set(sparsity.TUNED) <= set(sparsity.RUNS)
    assert pruning.SOURCE in sparsity.RUNS
    made = list(sparsity.commands("share0.55-round16-seed1", Path("w.pt"), 40).values())
    assert [command.split()[0] for command in made] == ["train_sparsity.py", "prune.py", "finetune_pruned.py"]
    assert "--percent 0.55 " in made[1]
    assert len(sparsity.commands("SGD-sr0.1-seed0", Path("w.pt"), 40)) == 1


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
