"""slim.py on the built-in data set, then the four steps, and a table of their models. This is what `make demo` runs.

    python bench/demo.py             # 20 minutes on two cores, or more
    python bench/demo.py --quick     # two or three epochs per step: shows that everything runs, not how well
"""
from __future__ import annotations

import time

from columns import ROOT, STAGE_COLUMNS, formatted
from common import measure_stages, run
from pictures import plot_stages

from utils.errors import run_cli
from utils.files import new_run_folder
from utils.parser import HelpfulParser
from utils.tables import text_table, write_csv

STAGE_FILES = {"dense": "runs/train/dense/weights/best.pt", "sparse": "runs/train/sparse/weights/last.pt",
               "pruned": "runs/prune/exp/pruned_model.pt", "fine-tuned": "runs/train/tuned/weights/best.pt",
               "slim.py": "runs/slim/exp/slim.pt"}
REPORTS = ("runs/slim/exp/report.html", "runs/prune/exp/report.html")
PICTURES = ("stages.png", "runs/train/dense/train_batch0.jpg", "runs/train/dense/results.png",
            "runs/train/sparse/results.png", "runs/prune/exp/gammas.png", "runs/prune/exp/channels.png",
            "runs/val/fine-tuned/val_batch0_pred.jpg")


def main() -> None:
    """The pipeline in one command and in four, their table."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="two or three epochs per step")
    whole, train, sparse, tune = (3, 2, 2, 2) if parser.parse_args().quick else (60, 45, 45, 30)  # epochs
    folder, started = new_run_folder(ROOT / "runs" / "demo"), time.time()
    run(f"slim.py --epochs {whole}", folder)
    run(f"train.py --epochs {train} --name dense", folder)
    run(f"train_sparsity.py --target-sparsity 0.5 --weights {STAGE_FILES['dense']} --epochs {sparse} --name sparse",
        folder)
    run("prune.py --percent 0.5", folder)
    run(f"finetune_pruned.py --epochs {tune} --name tuned", folder)
    rows = measure_stages(STAGE_FILES, folder, "--batch-size 32")
    print("\n" + text_table(*formatted(rows, STAGE_COLUMNS)))
    write_csv(folder / "table.csv", rows)
    plot_stages(rows, folder / "stages.png")
    print(f"\n{(time.time() - started) / 60:.1f} minutes. Pictures:")
    for picture in PICTURES:
        print(f"  {folder / picture}")
    print(f"Slim model: {folder / STAGE_FILES['slim.py']}")
    print("Reports, each a page that opens in a browser:")
    for page in REPORTS:
        print(f"  {folder / page}")


if __name__ == "__main__":
    run_cli(main)
