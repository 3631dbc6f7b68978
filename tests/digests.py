"""Whether two checkouts of this repository compute the same, bit for bit, on seeded runs of the built-in data set.

    git worktree add /tmp/before HEAD~10
    python tests/digests.py /tmp/before --save before.json        # some minutes
    python tests/digests.py . --against before.json               # exit code 1 where anything differs

A change that must not change behaviour is checked so. The digests hold for one machine, one PyTorch and one number of
threads: other kernels round differently. Nothing is imported from the checkouts, so that any two versions compare.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

RUN = "--epochs 2 --workers 1 --noplots"
COMMANDS = [
    f"train.py {RUN} --name dense",
    f"train.py {RUN} --name odd --optimizer SGD --nbs 64 --image-weights --multi-scale --cos-lr --amp bf16 --seed 3",
    f"train_sparsity.py {RUN} --name l1 --weights runs/train/dense/weights/best.pt --sr 0.001 --masked-val 1 "
    "--shortcuts joint",
    f"train_sparsity.py {RUN} --name target --weights runs/train/dense/weights/best.pt --target-sparsity 0.5",
    f"train_sparsity.py {RUN} --name joint --weights runs/train/dense/weights/best.pt --target-sparsity 0.5 "
    "--shortcuts joint --round-to 1 --no-per-flop --keep model.0.* --image-weights",
    "prune.py --percent 0.5 --weights runs/train/target/weights/last.pt --name half",
    f"finetune_pruned.py {RUN} --name tuned --weights runs/prune/half/pruned_model.pt",
    "prune.py --target flops=0.7 --weights runs/train/tuned/weights/last.pt --name again --score gamma-l1 --per-flop "
    "--round-to 4",
    "prune.py --target map-drop=0.1 --weights runs/train/l1/weights/last.pt --name drop --min-channels 2 "
    "--min-share 0.1 --strict",
    "prune.py --percent 0.3 --weights runs/train/l1/weights/last.pt --name repaired --score l1 --absorb "
    "--recalibrate 32 --shortcuts skip",
    "prune.py --sweep 0.2:0.6:0.2 --weights runs/train/target/weights/last.pt --name sweep",
    "prune.py --sensitivity --weights runs/train/l1/weights/last.pt --name sensitivity",
    "val.py --weights pruned_model.pt --name val --save-txt --save-json --noplots",
    "detect.py --weights runs/train/tuned/weights/best.pt --source shapes/images/test --name detect --save-txt "
    "--save-conf",
    "export.py --weights runs/train/tuned/weights/best.pt --include onnx torchscript yolov5",
    "val.py --weights runs/train/tuned/weights/best.onnx --name onnx --noplots",
]
# What differs between two runs of one checkout: times, sizes of files with a path in them, paths.
VOLATILE = re.compile(r"\d+(\.\d+)? ?(ms|MB|hours|s|minutes)\b"
                      r"|^(milliseconds|ms an image|Speed|note: pruned_model).*$", re.M)
UNSTABLE_KEYS = {"folder", "command", "ms", "ms_per_image", "device", "threads", "weights", "data", "opt", "hooks",
                 "class_map"}


def short_hash(content: bytes) -> str:
    """The first digits of a hash."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest(value: Any) -> Any:
    """Plain data with every tensor and long list replaced by the first digits of a hash of its bytes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        content = value.flatten().view(torch.uint8).numpy().tobytes()
        return short_hash(f"{value.dtype}{tuple(value.shape)}".encode() + content)
    if isinstance(value, dict):
        stable = {k: v for k, v in value.items() if k not in UNSTABLE_KEYS and not str(v).startswith("ms an image")}
        return {str(k): digest(v) for k, v in stable.items()}
    if isinstance(value, (list, tuple)):
        return [digest(v) for v in value]
    return value


def of_file(path: Path) -> Any:
    """The digest of a file by its kind; None for what says nothing (TensorBoard's events, plots)."""
    if path.suffix == ".pt" and ".yolov5" not in path.name:
        return digest(torch.load(path, map_location="cpu", weights_only=True))
    if path.name in ("report.json", "metrics.json"):
        data = json.loads(path.read_text())
        data["cost"] = [row for row in data.get("cost", []) if not row["figure"].startswith("ms")]
        return digest(data)
    if path.suffix == ".csv":
        rows = [line.split(",") for line in path.read_text().splitlines()]
        timed = {i for i, name in enumerate(rows[0]) if name.strip() == "ms"}
        return short_hash(str([[v for i, v in enumerate(row) if i not in timed] for row in rows]).encode())
    if path.suffix in (".npy", ".txt", ".onnx") or path.name in ("predictions.json", "hyp.yaml"):
        return short_hash(path.read_bytes())
    return None


def record(repository: Path) -> dict[str, Any]:
    """Run all commands of one checkout in an empty folder; what they print and write, as digests by name."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "YOLO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"}
        for command in COMMANDS:
            script, *flags = command.split()
            if script == "detect.py":
                flags[flags.index("shapes/images/test")] = str(repository / "data/shapes/images/test")
            print(command, flush=True)
            done = subprocess.run([sys.executable, str(repository / script), *flags], cwd=folder, env=environment,
                                  capture_output=True, text=True)
            text = VOLATILE.sub("", done.stdout).replace(str(repository), "REPOSITORY").replace(name, "FOLDER")
            found[f"$ {command}"] = {"exit code": done.returncode, "stdout": text.splitlines()}
            if done.returncode:
                print(done.stderr[-2000:])
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "cache" not in path.parts and (value := of_file(path)) is not None:
                found[str(path.relative_to(folder))] = value
    return found


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two trees of plain data differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in [*a, *(k for k in b if k not in a)]
                for d in differences(a.get(k, "(missing)"), b.get(k, "(missing)"), f"{where} / {k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where} [{i}]")]
    return [] if a == b else [f"{where}:\n    {str(a)[:300]}\n    {str(b)[:300]}"]


def main() -> None:
    """Record, save, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="checkout to run")
    parser.add_argument("--save", type=Path, help="write the digests here")
    parser.add_argument("--against", type=Path, help="compare with the digests in this file")
    opt = parser.parse_args()
    found = json.loads(json.dumps(record(opt.repository.resolve())))
    if opt.save:
        opt.save.write_text(json.dumps(found, indent=1))
    if opt.against:
        unlike = differences(json.loads(opt.against.read_text()), found)
        print("\n".join(unlike) or f"all {len(found)} outputs are equal")
        sys.exit(bool(unlike))


if __name__ == "__main__":
    main()
