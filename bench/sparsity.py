"""What sparsity training costs on BCCD: the L1 rule at several strengths, --target-sparsity at several shares.

    python bench/sparsity.py --voc BCCD_Dataset/BCCD --weights yolov5n.pt    # two hours on two cores, in two processes

A run that is done is not run again; --only shares the work among processes. Writes img/sparsity.png and
bench/results/sparsity.csv, a row per run: the last epoch on val, the model right after cuts of 50% and 65%, the cost
and speed of the model without its zeros, and for some runs its accuracy after fine-tuning.
"""
from __future__ import annotations

from pathlib import Path

import common
import numpy as np
from columns import L1, RESULTS, ROOT, SPARSITY, Row, formatted, l1_rows, share_rows
from matplotlib.axes import Axes

from models import checkpoint
from models.pruning import model_pruner
from models.yolo import Model
from utils.errors import run_cli
from utils.plots.style import BLUE, ORANGE, new_chart, save_figure
from utils.slimming import Rules, masked, slim
from utils.slimming.ranking import MIN_SHARE
from utils.tables import text_table, write_csv

# Name of a run -> its flags. The rates are those of data/hyps, 0.001 with AdamW and 0.01 with SGD.
RUNS = {f"share0-seed{seed}": f"--no-st --adam --seed {seed}" for seed in range(3)}
for _share, _round_to, _seeds in ((0.3, 1, 3), (0.5, 1, 3), (0.65, 1, 1), (0.8, 1, 1),
                                  (0.5, 16, 2), (0.55, 16, 3), (0.6, 16, 1)):
    _name = f"share{_share:g}" if _round_to == 1 else f"share{_share:g}-round{_round_to}"
    RUNS |= {f"{_name}-seed{seed}": f"--target-sparsity {_share} --round-to {_round_to} --adam --seed {seed}"
             for seed in range(_seeds)}
for _name, _flag in (("AdamW", "--adam"), ("SGD", "--optimizer SGD")):
    RUNS |= {f"{_name}-sr{sr:g}-seed0": f"--sr {sr} {_flag} --seed 0" for sr in (1e-4, 1e-2, 3e-2, 1e-1)}
# The zeros of these runs are cut, and what is left is fine-tuned for as many epochs.
TUNED = ("share0.5-seed0", "share0.5-seed1", "share0.5-seed2", "share0.55-round16-seed0", "share0.55-round16-seed1",
         "share0.55-round16-seed2", "share0.65-seed0", "share0.6-round16-seed0")


def commands(name: str, weights: Path, epochs: int) -> dict[str, str]:
    """Product of a command -> command, in order: a run, and for one of TUNED its cut and its fine-tuning."""
    train = (f"--data bccd/data.yaml --imgsz 320 --epochs {epochs} --batch-size 16 --nbs 16 "
             "--cache ram --workers 2 --noplots")
    sparsify, share = f"{RUNS[name]} --weights '{weights}' {train}", RUNS[name].split()[1]
    cut, tune = f"--percent {share} --score gamma --noval", f"--adam {train} --teacher none --no-gradual"
    steps = common.slimming_commands(name, sparsify, cut, tune)
    return steps if name in TUNED else dict(list(steps.items())[:1])


def measure(train: Path, name: str, data: Path) -> tuple[Row, Model]:
    """The row of a run, without its speed, and the model without its zeros."""
    last, saved = common.last_epoch(train / name / "results.csv"), checkpoint.read(train / name / "weights" / "last.pt")
    pruner = model_pruner(checkpoint.build(saved), saved["imgsz"])
    zero = float(last["sparsity/zero"])
    zeros, parameters, flops = pruner.rank().preview(zero)
    all_parameters, all_flops = pruner.costs.remaining()
    round_to = {**saved["opt"], **saved.get("sparsity", {})}.get("round_to") or 1
    pruner.rank(rules=Rules(min_share=MIN_SHARE, round_to=round_to))
    cuts = {share: masked(pruner.model, pruner.preview(share)[0]) for share in (0.5, 0.65)}
    tuned = train / f"{name}-tuned" / "results.csv"
    run, seed = name.rsplit("-seed", 1)
    row = {"run": run, "seed": int(seed), "share": saved["opt"]["target_sparsity"] or 0.0, "round_to": round_to,
           "zero": zero, "below_0.1": float(last["sparsity/below_1e-1"]),
           "map50": float(last["metrics/mAP_0.5"]), "map": float(last[common.MAP_KEY]),
           **{f"cut_{share:g}": common.map_on(cut, data) for share, cut in cuts.items()},
           "tuned": float(common.last_epoch(tuned)[common.MAP_KEY]) if tuned.is_file() else "",
           "parameters": parameters / all_parameters, "flops": flops / all_flops, "torch": "", "onnxruntime": ""}
    return row, slim(pruner.model, zeros)


def picture(rows: list[Row], path: Path) -> None:
    """mAP50-95 against FLOPs left: a dot per run, a line through the means of each share of zeros."""
    figure, ax = new_chart(7, 4, "BCCD, yolov5n, 40 epochs: what zeros cost", "FLOPs left, % of dense",
                           "mAP50-95 on val, before fine-tuning")
    draw_shares(ax, [r for r in rows if r["round_to"] == 1], BLUE, "channel by channel (--round-to 1)", -26)
    draw_shares(ax, [r for r in rows if r["round_to"] == 16 or not r["share"]], ORANGE, "in blocks of 16 (default)", 14)
    ax.set_ylim(bottom=min(r["map"] for r in rows) - 0.06)
    ax.legend(frameon=False, loc="lower right", title="share of zeros (--target-sparsity)")
    save_figure(figure, path)


def draw_shares(ax: Axes, rows: list[Row], colour: str, label: str, offset: float) -> None:
    """The dots and the line of one size of blocks; each share stands `offset` points above its mean."""
    dots = [(100 * r["flops"], r["map"], r["share"]) for r in rows]
    means = [np.mean([dot for dot in dots if dot[2] == share], 0) for share in sorted({share for *_, share in dots})]
    ax.plot([x for x, _, _ in means], [y for _, y, _ in means], color=colour, label=label)
    ax.scatter([x for x, _, _ in dots], [y for _, y, _ in dots], color=colour, zorder=3, s=14, alpha=0.6)
    for x, y, share in means:
        ax.annotate(f"{share:g}" if share else "dense", (x, y), (0, offset), textcoords="offset points", ha="center",
                    fontsize=8, color=colour)


def main() -> None:
    """Run what is missing, then write the rows and the picture."""
    parser = common.experiment_parser(__doc__, "sparsity")
    parser.add_argument("--epochs", type=int, default=40, help="epochs per run")
    parser.add_argument("--only", type=int, nargs="+", help="make these runs (numbers) and no table")
    opt = parser.parse_args()
    common.need_onnxruntime()
    made = common.bccd_commands(opt.voc)
    for number, name in enumerate(RUNS):
        if not opt.only or number in opt.only:
            made |= commands(name, opt.weights, opt.epochs)
    common.run_missing(made, opt.folder)
    if opt.only:
        return
    train, data = opt.folder / "runs" / "train", opt.folder / "bccd" / "data.yaml"
    found = [measure(train, name, data) for name in RUNS]
    timed = [(row, model) for row, model in found if row["run"].startswith("share") and row["seed"] == 0]
    for (row, _), speed in zip(timed, common.times_faster([model for _, model in timed])):
        row |= speed
    rows = [row for row, _ in found]
    write_csv(RESULTS / "sparsity.csv", rows)
    picture([row for row in rows if row["run"].startswith("share")], ROOT / "img" / "sparsity.png")
    print(text_table(*formatted(share_rows(rows), SPARSITY)))
    print("\n" + text_table(*formatted(l1_rows(rows), L1)))


if __name__ == "__main__":
    run_cli(main)
