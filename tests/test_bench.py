"""The bench scripts: what is done is not done again, what was interrupted is; the READMEs' tables follow from the results."""
from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest

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


def test_the_readmes_show_what_the_results_say(bench, tmp_path, monkeypatch):
    """Nothing in a table is typed by hand: writing them anew changes nothing."""
    readme = bench("readme")
    (tmp_path / "bench").mkdir()
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    for name in ("README.md", "bench/README.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    readme.main()
    for name in ("README.md", "bench/README.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")


def test_every_fine_tuned_run_of_the_tables_is_among_the_runs(bench):
    sparsity, pruning = bench("sparsity"), bench("pruning")
    assert set(sparsity.TUNED) <= set(sparsity.RUNS) and pruning.SPARSE in sparsity.RUNS and set(pruning.TUNED) <= set(pruning.CUTS)
    made = sparsity.commands("share0.55-round16-seed1", Path("w.pt"), 40)
    assert [c.split()[0] for c in made.values()] == ["train_sparsity.py", "prune.py", "finetune_pruned.py"] and "--percent 0.55 " in [*made.values()][1]
