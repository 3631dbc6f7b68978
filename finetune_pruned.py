"""Fine-tune a pruned model: train.py on the slim checkpoint that prune.py wrote.

    python finetune_pruned.py --weights pruned_model.pt --adam --epochs 100

The shape stays slim in every checkpoint. Data, image size and hyper-parameters are the checkpoint's unless given.
"""
from __future__ import annotations

import os

from models import checkpoint
from train import train
from utils.errors import UserError, run_cli
from utils.options import resolve, training_parser
from utils.training.run import Run


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
        opt = resolve(opt, data)
    return train(opt)


if __name__ == "__main__":
    run_cli(main)
