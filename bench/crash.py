"""Kill the training scripts and slim.py at random instants, go on, and compare with undisturbed runs, bit for bit.

    python bench/crash.py                        # 20 kills per script, about ten minutes on two cores

Every third kill comes in the middle of a save. A run goes on until it is complete. Writes bench/results/crash.csv; the
exit code is 1 where anything differs.
"""
from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from columns import RESULTS, Row, with_earlier

from models import checkpoint
from models.config import read_yaml
from models.pruning import model_pruner
from models.yolo import Model
from tests import crash
from utils.data import shapes
from utils.errors import run_cli
from utils.files import write_yaml
from utils.options import HelpfulParser
from utils.tables import write_csv

EPOCHS = 3
TRAIN = f"--epochs {EPOCHS} --imgsz 64 --batch-size 4 --nbs 8 --device cpu --noplots"


def commands(folder: Path) -> dict[str, list[str]]:
    """Script -> its flags. Makes the data, the model yaml and the slim checkpoint that they name."""
    data, yaml, weights = folder / "set.yaml", folder / "model.yaml", folder / "slim.pt"
    shapes.generate(folder / "set", {"train": 14, "val": 6})
    names = dict(enumerate(shapes.NAMES))
    write_yaml(data, {"path": "set", "train": "images/train", "val": "images/val", "names": names})
    cfg = {**read_yaml("yolov5n.yaml"), "width_multiple": 0.125}
    write_yaml(yaml, cfg)
    pruner = model_pruner(Model(cfg, names=names), imgsz=64)
    checkpoint.save(weights, pruner.rank().cut(percent=0.4).slim, imgsz=64)
    train = ["--data", str(data), *TRAIN.split()]
    scratch = [*train, "--weights", "", "--cfg", str(yaml)]
    sparse = [*scratch, "--target-sparsity", "0.4", "--shrink"]
    return {"train.py": scratch, "train_sparsity.py": sparse,
            "finetune_pruned.py": [*train, "--weights", str(weights)],
            "slim.py": [*scratch, "--target", "flops=0.6", "--epochs", "9"]}


def is_done(script: str, folder: Path) -> bool:
    """Has a run come to its end?"""
    if script == "slim.py":
        return (crash.pipeline(folder) / "report.json").is_file()
    last = crash.last(folder)
    return last.is_file() and checkpoint.read(last)["training"]["epoch"] >= EPOCHS


def disturb(script: str, flags: list[str], folder: Path, kills: int, rng: random.Random) -> Row:
    """Kill runs, at most four times each, until there were `kills` kills; the row of a script."""
    start, undisturbed = time.monotonic(), folder / "undisturbed"
    crash.finish(script, [*flags, "--workers", "0"], undisturbed)
    seconds = time.monotonic() - start
    done, runs, found = 0, 0, []
    differences = crash.pipeline_differences if script == "slim.py" else crash.differences
    while done < kills:
        runs += 1
        here, workers = folder / f"run{runs}", rng.choice([0, 1, 2])
        mine = [*flags, "--workers", str(workers)]
        for _ in range(rng.randint(1, 4)):
            instant = crash.random_instant(rng, seconds)
            if not crash.kill(script, crash.going_on(mine, here, workers), here, instant):
                break
            done += 1
        if not is_done(script, here):
            crash.finish(script, crash.going_on(mine, here, workers), here)
        found += [f"run {runs}: {what}" for what in differences(undisturbed, here)]
        print(f"{script}: {done} of {kills} kills", flush=True)
    outcome = f"{len(found)} differences: {'; '.join(found[:5])}" if found else "all bit-identical in the end"
    print(f"{script}: {done} kills in {runs} runs, {outcome}")
    return {"script": script, "kills": done, "runs": runs, "differences": len(found)}


def main() -> None:
    """Disturb all scripts."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills per script")
    parser.add_argument("--scripts", nargs="+", help="only these; the results of the others are kept")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants")
    opt = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = [disturb(script, flags, Path(name) / script, opt.kills, random.Random(opt.seed))
                for script, flags in commands(Path(name)).items() if script in (opt.scripts or [script])]
    write_csv(RESULTS / "crash.csv", with_earlier("crash", rows, "script"))
    sys.exit(any(row["differences"] for row in rows))


if __name__ == "__main__":
    run_cli(main)
