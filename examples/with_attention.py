"""Run one of the repository's scripts with the blocks of attention.py known to model yamls.

    python examples/with_attention.py train_sparsity.py --cfg examples/yolov5n-attention.yaml --target-sparsity 0.5
    python examples/with_attention.py prune.py
    python examples/with_attention.py finetune_pruned.py

A checkpoint names its blocks but holds no code, so every script that opens one has to know them.
"""
from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import examples.attention  # noqa: E402, F401  (registers its blocks)
from utils.errors import UserError, run_cli  # noqa: E402


def main() -> None:
    """Command line -> the script's own main with the rest of it."""
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name not in scripts:
        raise UserError(f"with_attention.py: give one of {', '.join(scripts)}, and its flags, not {name}")
    sys.argv = sys.argv[1:]
    importlib.import_module(Path(name).stem).main()


if __name__ == "__main__":
    run_cli(main)
