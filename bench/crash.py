"""Kill the training scripts at random instants, go on, and compare with a run that nothing disturbed, bit for bit.

    python bench/crash.py                        # 20 kills for each of three scripts, about a quarter of an hour on two cores

Every third kill comes in the middle of a save. A round ends when a run has got to its end, however often it was killed.
Writes bench/results/crash.csv; exit code 1 where anything differs.
"""
from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import yaml
from common import ROOT, write_csv
from tqdm import tqdm

from models import checkpoint
from models.yolo import Model, read_yaml
from tests import crash
from utils.errors import run_cli
from utils.options import HelpfulParser
from utils.slimming.graph import trace
from utils.slimming.ranking import select
from utils.slimming.surgery import slim

COMMON = "--epochs 3 --imgsz 64 --batch-size 4 --nbs 8 --device cpu --noplots"


def small_set(folder: Path) -> Path:
    """14 training and 6 validation images of squares; returns the data yaml."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 14), ("val", 6)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (72, 96, 3), dtype=np.uint8)
            x, y, r = int(rng.integers(20, 76)), int(rng.integers(20, 52)), int(rng.integers(8, 18))
            cv2.rectangle(pixels, (x - r, y - r), (x + r, y + r), (40, 40, 255), -1)
            cv2.imwrite(str(folder / "images" / split / f"{i}.png"), pixels)
            (folder / "labels" / split / f"{i}.txt").write_text(f"0 {x / 96:.6f} {y / 72:.6f} {2 * r / 96:.6f} {2 * r / 72:.6f}\n")
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [square]\n")
    return folder / "data.yaml"


def commands(folder: Path) -> dict[str, list[str]]:
    """Script -> its flags."""
    cfg = {**read_yaml("yolov5n.yaml"), "width_multiple": 0.125}
    (folder / "model.yaml").write_text(yaml.safe_dump(cfg))
    model = Model(cfg, nc=1, names={0: "square"})
    masks = select(trace(model), model, 0.4)
    small = slim(model, masks).eval()
    assert isinstance(small, Model)
    small.masks = masks
    checkpoint.save(folder / "slim.pt", small, imgsz=64)
    data, scratch = ["--data", str(small_set(folder / "set"))], ["--weights", "", "--cfg", str(folder / "model.yaml")]
    return {"train.py": [*data, *scratch, *COMMON.split()], "train_sparsity.py": [*data, *scratch, "--target-sparsity", "0.4", *COMMON.split()],
            "finetune_pruned.py": [*data, "--weights", str(folder / "slim.pt"), *COMMON.split()]}


def torture(script: str, flags: list[str], folder: Path, kills: int, rng: random.Random) -> dict[str, object]:
    """`kills` kills in as many rounds as that takes; a row of the table."""
    start = time.monotonic()
    whole = folder / "whole"
    crash.finish(script, [*flags, "--workers", "0"], whole)
    seconds = time.monotonic() - start
    done, rounds, found = 0, 0, []
    bar = tqdm(total=kills, desc=script, disable=None)
    while done < kills:
        rounds += 1
        here, workers = folder / f"round{rounds}", rng.choice([0, 1, 2])
        mine = [*flags, "--workers", str(workers)]
        for _ in range(rng.randint(1, 4)):
            killed = crash.kill(script, crash.going_on(mine, here, workers), here, crash.random_instant(rng, seconds))
            done += killed
            bar.update(killed)
            if not killed:
                break
        if not crash.last(here).is_file() or checkpoint.read(crash.last(here))["training"]["epoch"] < 3:
            crash.finish(script, crash.going_on(mine, here, workers), here)
        found += [f"round {rounds}: {what}" for what in crash.differences(whole, here)]
    bar.close()
    print(f"{script}: {done} kills in {rounds} runs, " + (f"{len(found)} differences: {'; '.join(found[:5])}" if found else "all bit-identical in the end"))
    return {"script": script, "kills": done, "runs": rounds, "differences": len(found)}


def main() -> None:
    """All scripts."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills a script")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants")
    opt = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = [torture(script, flags, Path(name) / script, opt.kills, random.Random(opt.seed)) for script, flags in commands(Path(name)).items()]
    write_csv(ROOT / "bench" / "results" / "crash.csv", rows)
    sys.exit(any(row["differences"] for row in rows))


if __name__ == "__main__":
    run_cli(main)
