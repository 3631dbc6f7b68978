"""Fine-tune a pruned model: train.py on the slim checkpoint that prune.py wrote.

    python finetune_pruned.py --weights pruned_model.pt --adam --epochs 100

The shape is slim in every checkpoint. Data, image size and hyper-parameters are the checkpoint's unless given. The
teacher is that of the sparsity training, else the model that was cut, where its file is still there; --teacher names
another one, --teacher none takes none.
Where the cut took channels that the model uses, that model makes it once more, gradually, in the first third of the
run; --no-gradual starts with the slim model.
"""
from __future__ import annotations

import os
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import checkpoint
from models.yolo import Model
from train import train
from training.gradual import GradualCut
from training.run import Hook, Run
from training.settings import resolve
from utils.errors import UserError, run_cli
from utils.options import training_parser
from utils.slimming import slim
from utils.slimming.graph import Masks
from utils.slimming.surgery import last_masks


def known_teacher(data: dict[str, Any]) -> str | None:
    """The teacher of the sparsity training, or the model that was cut, if the file is still there."""
    taught = (data.get("opt") or {}).get("teacher")
    files = [file for file in (taught, data.get("parent")) if file]
    found = next((file for file in files if Path(file).is_file()), None)
    if files and not found:
        print(f"note: no teacher, {files[0]} is not there any more; --teacher names one")
    return found


def gradual_cut(data: dict[str, Any], frozen: bool) -> tuple[GradualCut, str | None]:
    """The hook and the checkpoint to start from; a hook that does nothing and None where the cut needs no steps."""
    parent = data.get("parent")
    if not data.get("gradual") or not parent or not Path(parent).is_file():
        return GradualCut(), None
    if frozen:  # a frozen gamma stays as it is, so its channel would be cut while the model uses it
        print("note: --freeze: the channels of frozen layers can't go step by step; starting with the slim model")
        return GradualCut(), None
    wide = checkpoint.load(parent)
    masks = last_masks(wide.masks, data["masks"])
    if not _cut_from(data, wide, masks):
        print(f"note: {parent} is not the model any more that was cut; starting with the slim one")
        return GradualCut(), None
    print(f"starting from {parent}; its channels go in the first third of the run (--no-gradual: all at once)")
    return GradualCut(masks), parent


def _cut_from(data: dict[str, Any], wide: Model, masks: Masks) -> bool:
    """Whether the slim checkpoint has the weights that these masks leave of a model."""
    try:
        again = slim(wide, masks).state_dict()
        return all(again[key].equal(value) for key, value in data["state_dict"].items() if key.endswith(".conv.weight"))
    except (ValueError, KeyError, IndexError):  # a model of another architecture
        return False


def main(argv: list[str] | None = None, hooks: Sequence[Hook] = ()) -> Run:
    """Command line, and further hooks -> fine-tuning."""
    parser = training_parser(__doc__)
    parser.add_argument("--gradual", action=BooleanOptionalAction, default=True,
                        help="where the cut took channels that the model uses, take them again, in steps")
    opt = parser.parse_args(argv)
    opt.script = os.path.basename(__file__)
    if opt.resume:
        return train(opt, [GradualCut(), *hooks])
    opt.weights = opt.weights or "pruned_model.pt"
    if opt.cfg:
        raise UserError("--cfg: not taken here, the slim checkpoint knows its own shape; "
                        "to train a yaml use train.py")
    data = checkpoint.read(opt.weights)
    if not data["masks"]:
        print(f"note: {opt.weights} is a dense model, nothing was cut from it yet (python prune.py)")
    opt.cfg = ""
    opt.teacher = known_teacher(data) if opt.teacher is None else opt.teacher
    hook, wide = gradual_cut(data, opt.freeze != [0]) if opt.gradual else (GradualCut(), None)
    opt.weights = wide or opt.weights
    return train(resolve(opt, data), [hook, *hooks])


if __name__ == "__main__":
    run_cli(main)
