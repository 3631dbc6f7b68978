"""Fine-tune a pruned model: train.py on the slim checkpoint that prune.py wrote.

    python finetune_pruned.py --weights pruned_model.pt --adam --epochs 100

The shape stays slim in every checkpoint. Data, image size and hyper-parameters are the checkpoint's unless given. The
model that was cut is the teacher where its file is still there; --teacher names another one, --teacher none takes none.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from models import checkpoint
from train import train
from utils.errors import UserError, run_cli
from utils.options import resolve, training_parser
from utils.training.run import Run


def known_teacher(data: dict[str, Any]) -> str | None:
    """The teacher of the sparsity training, or the model that was cut, if the file is still there."""
    taught = (data.get("opt") or {}).get("teacher")
    files = [file for file in (taught, data.get("parent")) if file]
    found = next((file for file in files if Path(file).is_file()), None)
    if files and not found:
        print(f"note: no teacher, {files[0]} is not there any more; --teacher names one")
    return found


def main(argv: list[str] | None = None) -> Run:
    """Command line -> fine-tuning."""
    parser = training_parser(__doc__)
    opt = parser.parse_args(argv)
    opt.script = os.path.basename(__file__)
    if not opt.resume:
        opt.weights = opt.weights or "pruned_model.pt"
        if opt.cfg:
            raise UserError("--cfg: not taken here, the slim checkpoint knows its own shape; "
                            "to train a yaml use train.py")
        data = checkpoint.read(opt.weights)
        if not data["masks"]:
            print(f"note: {opt.weights} is a dense model, nothing was cut from it yet (python prune.py)")
        opt.cfg = ""
        opt.teacher = known_teacher(data) if opt.teacher is None else opt.teacher
        opt = resolve(opt, data)
    return train(opt)


if __name__ == "__main__":
    run_cli(main)
