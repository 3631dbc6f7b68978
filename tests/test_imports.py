"""What a script imports before it knows what it is to do."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train.py", "train_sparsity.py", "prune.py", "finetune_pruned.py", "val.py", "detect.py", "export.py",
           "data/scripts/coco_to_yolo.py", "data/scripts/voc_to_yolo.py")
# Libraries that take long, each for one task. (Some builds of torch import one of them by themselves.)
LATE = {"torchvision", "triton", "matplotlib", "tensorboard", "pycocotools", "onnx", "onnxruntime", "pandas", "scipy",
        "sympy", "openvino", "nncf", "ncnn", "tensorflow"}
PROGRAM = """
import runpy, sys, torch
before, scripts = set(sys.modules), sys.argv[1:]
for script in scripts:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("EXIT", end.code)
print("FOUND", *{name.partition(".")[0] for name in set(sys.modules) - before})
"""


@pytest.mark.slow
def test_help_imports_no_library_that_takes_long():
    done = subprocess.run([sys.executable, "-c", PROGRAM, *(str(ROOT / name) for name in SCRIPTS)],
                          capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in lines if line.startswith("EXIT")] == ["EXIT 0"] * len(SCRIPTS)
    found = set(lines[-1].split())
    assert {"FOUND", "utils", "models", "cv2"} <= found and not found & LATE
