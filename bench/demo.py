"""The four steps on the built-in data set, and the table of what came of it. This is what `make demo` runs.

    python bench/demo.py             # about ten minutes on two cores
    python bench/demo.py --quick     # two epochs a step: shows that everything runs, not how well
"""
from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models import checkpoint  # noqa: E402  (the repository's root must be on the path first)
from models.yolo import fused, on_device  # noqa: E402
from utils.errors import UserError, run_cli  # noqa: E402
from utils.files import new_run_folder, write_json  # noqa: E402
from utils.options import HelpfulParser  # noqa: E402
from utils.slimming.cost import latency, profile  # noqa: E402
from utils.slimming.pictures import plot_stages  # noqa: E402
from utils.slimming.report import table  # noqa: E402

STAGES = {"dense": "runs/train/dense/weights/best.pt", "sparse": "runs/train/sparse/weights/last.pt",
          "pruned": "runs/prune/exp/pruned_model.pt", "fine-tuned": "runs/train/tuned/weights/best.pt"}


def run(command: str, folder: Path) -> None:
    """Run one of the repository's commands in `folder`, showing what it prints."""
    print(f"\n$ python {command}", flush=True)
    script, *flags = shlex.split(command)
    code = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder).returncode
    if code:
        raise UserError(f"'python {command}' ended with exit code {code}; its message is above, its files are in {folder}")


def main() -> None:
    """Train, sparsity-train, prune, fine-tune, validate; print the table."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="two epochs a step")
    parser.add_argument("--epochs", type=int, nargs=3, default=[45, 45, 30], help="epochs of training, sparsity training, fine-tuning")
    parser.add_argument("--sr", type=float, default=0.05, help="strength of the L1 penalty")
    parser.add_argument("--percent", type=float, default=0.5, help="share of the prunable channels to cut")
    opt = parser.parse_args()
    train, sparse, tune = [2, 2, 2] if opt.quick else opt.epochs
    folder, started = new_run_folder(ROOT / "runs" / "demo"), time.time()
    run(f"train.py --epochs {train} --name dense", folder)
    run(f"train_sparsity.py --st --sr {opt.sr} --weights {STAGES['dense']} --optimizer SGD --epochs {sparse} --name sparse", folder)
    run(f"prune.py --percent {opt.percent}", folder)
    run(f"finetune_pruned.py --adam --epochs {tune} --name tuned", folder)
    rows = []
    models = []
    for stage, weights in STAGES.items():
        run(f"val.py --weights {weights} --batch-size 32 --name {stage}", folder)
        metrics = json.loads((folder / "runs" / "val" / stage / "metrics.json").read_text())
        data = checkpoint.read(folder / weights)
        models.append(checkpoint.build(data))
        cost = profile(models[-1], data["imgsz"])
        rows.append({"stage": stage, "map50": metrics["metrics/mAP_0.5"], "map": metrics["metrics/mAP_0.5:0.95"],
                     "parameters": cost.parameters, "flops": cost.flops, "mb": cost.megabytes})
    milliseconds = latency([on_device(fused(m), "cpu") for m in models], data["imgsz"], runs=50)
    for row, ms in zip(rows, milliseconds):
        row["ms"] = ms
    print("\n" + table([(r["stage"], f"{r['map50']:.3f}", f"{r['map']:.3f}", f"{r['parameters']:,}", f"{r['flops'] / 1e9:.3f}",
                         f"{r['mb']:.2f}", f"{r['ms']:.2f}") for r in rows],
                       ("stage", "mAP50", "mAP50-95", "parameters", "GFLOPs", "MB", "ms per image")))
    write_json(folder / "table.json", rows)
    plot_stages(rows, folder / "stages.png")
    print(f"\n{(time.time() - started) / 60:.1f} minutes. Pictures:")
    for picture in ("stages.png", "runs/train/dense/results.png", "runs/train/sparse/results.png", "runs/prune/exp/gammas.png",
                    "runs/prune/exp/channels.png", "runs/val/fine-tuned"):
        print(f"  {folder / picture}")


if __name__ == "__main__":
    run_cli(main)
