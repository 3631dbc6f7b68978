"""Fine-tune a pruned model: train.py on the slim checkpoint that prune.py wrote.

    python finetune_pruned.py --weights pruned_model.pt --adam --epochs 100

The shape is slim in every checkpoint. Data, image size, optimizer and hyper-parameters are the checkpoint's unless
given. The teacher is the best of three, by the mAP50-95 in their files: the teacher of the sparsity training, the
weights that it started from, the model that was cut. --teacher names another one, --teacher none takes none.
Where the cut took channels that the model uses, that model makes it once more, gradually, in the first third of the
run; --no-gradual starts with the slim model.
"""
from __future__ import annotations

import math
import os
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import checkpoint
from models.schema import is_number
from models.yolo import Model
from train import say_next, train
from training.gradual import GradualCut
from training.run import Hook, Run
from training.settings import resolve
from utils.data.config import other_names
from utils.errors import UserError, run_cli
from utils.options import training_parser
from utils.parser import Argv, from_python
from utils.slimming import slim
from utils.slimming.graph import Masks
from utils.slimming.surgery import last_masks


def known_teacher(data: dict[str, Any]) -> str | None:
    """The best by stored mAP50-95 of the models that this one comes from, as far as their files are still there.

    They are: the teacher of the sparsity training, which counts as the best where its file holds no metrics (a file of
    YOLOv5's); the model that was cut; and the weights that the sparsity training started from, if they hold metrics for
    the same classes.
    """
    opt = data.get("opt") or {}
    teacher, cut, start = opt.get("teacher"), data.get("parent"), None if opt.get("cfg") else opt.get("weights")
    files = [file for file in (teacher, cut, start) if file]
    maps = {file: stored_map(file, data["names"]) for file in files if Path(file).is_file()}
    worth = {file: value if value >= 0 else math.inf if file == teacher else -1.0 for file, value in maps.items()
             if value >= 0 or file in (teacher, cut)}
    if not worth:
        if files:
            print(f"note: no teacher, {files[0]} is not there any more; --teacher names one")
        return None
    best = max(worth, key=worth.__getitem__)
    others = ", ".join(f"{file} ({value:.3f})" for file, value in maps.items() if file != best and value >= 0)
    if others and maps[best] >= 0:
        print(f"mAP50-95 of the model to learn from: {maps[best]:.3f}; not taken: {others}")
    return best


def stored_map(file: str, names: dict[int, str]) -> float:
    """The mAP50-95 that a checkpoint holds; -1 where it holds none, or is of other classes."""
    try:
        saved = checkpoint.read(file)
    except UserError:
        return -1.0
    value = (saved.get("metrics") or {}).get("metrics/mAP_0.5:0.95", -1.0)
    return value if is_number(value) and not other_names(saved["names"], names) else -1.0


def gradual_cut(data: dict[str, Any], frozen: bool) -> tuple[GradualCut, str | None]:
    """The hook and the checkpoint to start from; a hook that does nothing and None where the cut needs no steps."""
    parent = data.get("parent")
    if not data.get("gradual") or not parent or not Path(parent).is_file():
        return GradualCut(), None
    if frozen:  # a frozen gamma stays as it is, so its channel would be cut while the model uses it
        print("note: --freeze: the channels of frozen layers can't go step by step; starting with the slim model")
        return GradualCut(), None
    masks = _last_cut(data, checkpoint.load(parent))
    if masks is None:
        print(f"note: {parent} is no longer the model that was cut; starting with the slim one")
        return GradualCut(), None
    print(f"starting from {parent}; its channels go in the first third of the run (--no-gradual: all at once)")
    return GradualCut(masks), parent


def _last_cut(data: dict[str, Any], wide: Model) -> Masks | None:
    """The masks, over the channels of `wide`, that leave the weights of the slim checkpoint; None where none do."""
    try:
        masks = last_masks(wide.masks, data["masks"])
        again = slim(wide, masks).state_dict()
        return masks if all(again[key].equal(value) for key, value in data["state_dict"].items()
                            if key.endswith(".conv.weight")) else None
    except (ValueError, KeyError, IndexError):  # a model of another architecture
        return None


def settle(opt: Namespace) -> tuple[Namespace, GradualCut]:
    """The flags -> options of a training, and the hook that makes the cut once more."""
    if opt.cfg:
        raise UserError("--cfg: not taken here, the slim checkpoint knows its own shape; "
                        "to train a yaml use train.py")
    weights = opt.weights or "pruned_model.pt"
    saved = checkpoint.read(weights)
    if not saved["masks"]:
        print(f"note: {weights} is a dense model, nothing was cut from it yet (python prune.py)")
    teacher = known_teacher(saved) if opt.teacher is None else opt.teacher
    settled = resolve(Namespace(**{**vars(opt), "cfg": "", "weights": weights, "teacher": teacher}), saved)
    hook, wide = gradual_cut(saved, opt.freeze != [0]) if opt.gradual else (GradualCut(), None)
    return Namespace(**{**vars(settled), "weights": wide or settled.weights}), hook


def main(argv: Argv = None, hooks: Sequence[Hook] = ()) -> Run:
    """Command line, and further hooks -> fine-tuning."""
    parser = training_parser(__doc__)
    parser.add_argument("--gradual", action=BooleanOptionalAction, default=True,
                        help="where the cut took channels that the model uses, take them again, in steps")
    opt = parser.parse_args(argv)
    opt.script = os.path.basename(__file__)
    opt, hook = (opt, GradualCut()) if opt.resume else settle(opt)
    run = train(opt, [hook, *hooks])
    if argv is None:
        say_next(run, "export.py", "--include onnx")
    return run


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
