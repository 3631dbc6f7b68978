"""What prune.py --absorb gains where gammas are near 0 and shifts are not: an L1 run on BCCD without --sr-bias.

    python bench/absorb.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt       # ten minutes

A run that is done is not run again. Writes bench/results/absorb.csv, a row per share that is cut.
"""
from __future__ import annotations

import json
from pathlib import Path

import common
from columns import ABSORB, RESULTS, Row, formatted
from common import SPARSE

from utils.errors import run_cli
from utils.tables import text_table, write_csv

RUN = "sgd-sr0.1-bias0"
SHARES = (0.3, 0.5, 0.65, 0.8)
REPORT = "runs/prune/absorb-{:g}/report.json"


def commands(weights: Path) -> dict[str, str]:
    """Product of a command -> command, in order."""
    data = "--data bccd/data.yaml --imgsz 320"
    made = {f"runs/train/{RUN}/gammas.npy":
            f"train_sparsity.py --sr 0.1 --sr-bias 0 --optimizer SGD --weights '{weights}' --epochs 40 --nbs 16 {data} "
            f"--cache ram --workers 2 --noplots --name {RUN}"}
    for share in SHARES:
        made[REPORT.format(share)] = (f"prune.py --weights {SPARSE.format(RUN)} --percent {share:g} --score gamma "
                                      f"--absorb {data} --name absorb-{share:g}")
    return made


def measure(folder: Path, share: float) -> Row:
    """mAP50-95 before the cut, after it, and with what the cut channels sent on average."""
    report = json.loads((folder / REPORT.format(share)).read_text(encoding="utf-8"))
    found = {row["stage"]: row["mAP50-95"] for row in report["stages"]}
    return {"share": share, "threshold": report["threshold"],
            **{stage: found[stage] for stage in ("before", "slim", "absorbed")}}


def main() -> None:
    """Run what is missing, then write the rows."""
    opt = common.experiment_parser(__doc__, "absorb").parse_args()
    common.run_missing({**common.bccd_commands(opt.voc), **commands(opt.weights)}, opt.folder)
    rows = [measure(opt.folder, share) for share in SHARES]
    write_csv(RESULTS / "absorb.csv", rows)
    print(text_table(*formatted(rows, ABSORB)))


if __name__ == "__main__":
    run_cli(main)
