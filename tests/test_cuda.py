"""On a CUDA GPU: the figures of the CPU; sparsity and pruning in fp16 with a GradScaler. Skipped without one."""
from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from models import checkpoint
from models.yolo import Model, fused, on_device
from tests import crash
from tests.blocks import randomised
from tests.test_commands import rows
from tests.test_sparsity import _Penalty, one_module_run, step
from utils.slimming.cost import profile
from utils.slimming.reconstruction import reconstruct
from utils.slimming.tracing import trace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

FAST = ["--imgsz", 64, "--batch-size", 4, "--workers", 0, "--noplots"]


@pytest.fixture(scope="module")
def dense(script, tiny, cfg, tmp_path_factory) -> Path:
    """The weights of a short training on the GPU."""
    folder = tmp_path_factory.mktemp("dense")
    done = script("train.py", "--data", tiny, "--weights", "", "--cfg", cfg, "--epochs", 2, *FAST, cwd=folder)
    assert "cuda:0" in done.stdout and "amp fp16" in done.stdout
    return folder / "runs/train/exp/weights/last.pt"


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float16, 2e-2)])
def test_outputs_are_those_of_the_cpu(monkeypatch, dtype, bound):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = fused(randomised(Model("yolov5n.yaml", nc=2))), torch.rand(2, 3, 96, 128)
    gpu = torch.device("cuda:0")
    with torch.inference_mode():
        on_cpu = on_device(model, "cpu")(x)[0]
        on_gpu = on_device(deepcopy(model), gpu).to(dtype)(x.to(gpu, dtype))[0].float().cpu()
    assert (on_gpu - on_cpu).abs().max() <= bound * on_cpu.abs().max()


def test_loss_scaling_does_not_touch_the_penalty():
    m = nn.BatchNorm2d(2).cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=65536.0)
    hook = _Penalty(m)
    scaler.scale((m.weight * 0).sum() + (m.bias * 1e6).sum()).backward()
    step(one_module_run(m, hook, scaler))
    assert torch.allclose(m.weight, torch.full_like(m.weight, 0.9)) and hook.skips == [False]


@pytest.mark.slow
def test_the_model_shrinks_in_fp16_and_opens_on_the_cpu(script, tiny, dense, tmp_path):
    done = script("train_sparsity.py", "--data", tiny, "--weights", dense, "--epochs", 8, "--target", "flops=0.5",
                  "--shrink", "--round-to", 1, "--teacher", dense, *FAST, cwd=tmp_path)
    assert "amp fp16" in done.stdout and "slim from here on" in done.stdout
    made = tmp_path / "runs/train/exp/weights/last.pt"
    left = profile(checkpoint.load(made), 64).flops / profile(checkpoint.load(dense), 64).flops
    assert 0.4 < left <= 0.5
    for device in (0, "cpu"):
        script("val.py", "--weights", made, "--data", tiny, "--device", device, "--imgsz", 64, cwd=tmp_path)
    script("val.py", "--weights", made, "--data", tiny, "--half", "--imgsz", 64, cwd=tmp_path)
    script("detect.py", "--weights", made, "--source", tiny.parent / "images/val", "--half", cwd=tmp_path)


@pytest.mark.slow
def test_the_l1_rule_prune_and_fine_tune(script, tiny, dense, tmp_path):
    script("train_sparsity.py", "--st", "--sr", 0.01, "--data", tiny, "--weights", dense, "--epochs", 2, *FAST,
           cwd=tmp_path)
    done = script("prune.py", "--percent", 0.5, "--reconstruct", cwd=tmp_path)
    assert "equivalence check" in done.stdout
    script("finetune_pruned.py", "--epochs", 3, *FAST, cwd=tmp_path)
    assert len(rows(tmp_path / "runs/train/exp2/results.csv")) == 3
    done = script("prune.py", "--weights", dense, "--score", "taylor", "--target", "flops=0.8", "--data", tiny,
                  "--noval", cwd=tmp_path)
    assert "equivalence check" in done.stdout


@pytest.mark.slow
def test_benchmarks_time_fp32_and_fp16(script, tiny, dense, tmp_path):
    script("benchmarks.py", "--weights", dense, "--data", tiny, "--imgsz", 64, "--include", "torch", "--runs", 3,
           cwd=tmp_path)
    table = rows(tmp_path / "runs/benchmarks/exp/benchmarks.csv")
    assert [row["precision"] for row in table] == ["fp32", "fp16"] and all(float(row["ms"]) > 0 for row in table)


@pytest.mark.slow
def test_killed_and_resumed_ends_bit_identical(tiny, dense, tmp_path):
    flags = [str(flag) for flag in ("--data", tiny, "--weights", dense, "--epochs", 3, "--target-sparsity", 0.4,
                                    "--deterministic", "--device", 0, *FAST)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    crash.finish("train_sparsity.py", flags, whole)
    assert crash.kill("train_sparsity.py", flags, killed, crash.when_logged("    2/3 "))
    crash.finish("train_sparsity.py", crash.going_on(flags, killed, device="0"), killed)
    assert crash.differences(whole, killed) == []


def test_refitting_runs_on_the_gpu():
    model = randomised(Model("yolov5n.yaml", nc=2)).eval()
    graph, images = trace(model), torch.rand(2, 3, 64, 64)
    masks = {"model.1.bn": torch.arange(32) % 2 == 0}
    on_cpu, on_gpu = (reconstruct(deepcopy(model).to(device), graph, masks, images.to(device)).cpu()
                      for device in ("cpu", "cuda:0"))
    with torch.inference_mode():
        wanted, found = on_cpu(images)[0], on_gpu(images)[0]
    assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()
