"""examples/: attention blocks that are defined outside of the package, from the yaml to the slim model."""
from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch import nn

from examples import attention
from models import checkpoint
from models.common import Conv
from models.formats.format import ExportOptions
from models.formats.yolov5 import FORMAT
from models.yolo import Model
from tests.blocks import Net, randomised
from tests.conftest import ROOT
from tests.test_blocks import check_cut
from training.loss import DetectionLoss, scale_gains
from training.settings import read_hyp
from utils.errors import UserError
from utils.slimming import Pruner, Rules, trace

EXAMPLE = ROOT / "examples" / "yolov5n-attention.yaml"
KEPT_WHOLE = {"SE": set(), "CoordAttention": set(), "ECA": {"block.0.bn"}, "CBAM": {"block.0.bn"}}


@cache
def example() -> Model:
    torch.manual_seed(0)
    return randomised(Model({**yaml.safe_load(EXAMPLE.read_text()), "nc": 2, "width_multiple": 0.125}))


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT_WHOLE)
def test_what_a_block_freezes_is_said(name):
    torch.manual_seed(0)
    block = getattr(attention, name)
    model = randomised(Net(nn.Sequential(Conv(16, 16, 3), block(16), Conv(16, 16, 1))))
    graph = trace(model)
    assert {n for n, ids in graph.norms.items() if graph.frozen[ids].any()} == KEPT_WHOLE[name]
    assert not graph.coupled.any() and len(graph.notes) == len(KEPT_WHOLE[name])
    assert all(f"block.1 ({name})" in note for note in graph.notes)
    for seed in range(3):
        narrow, masks = check_cut(model, seed, 16)
        check_cut(narrow, seed + 1, 16)
    assert name not in ("SE", "CoordAttention") or not masks["block.0.bn"].all()


@pytest.mark.slow
def test_the_examples_model_is_cut_exactly(tmp_path):
    model = example()
    result = Pruner(model, 64).rank(rules=Rules(coupled=True)).cut(0.5)
    assert result.difference < 1e-9 and result.achieved > 0.45
    whole = {name for name, mask in result.prunable.items() if not mask.any()}
    assert {"model.2.cv3.bn", "model.11.cv3.bn"} <= whole and not {"model.5.cv3.bn", "model.8.cv3.bn"} & whole
    assert [note.split(":")[0].split(" in ")[1] for note in trace(model).notes] == ["model.3 (ECA)", "model.12 (CBAM)"]
    checkpoint.save(tmp_path / "slim.pt", result.slim)
    again = checkpoint.load(tmp_path / "slim.pt")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), result.slim.state_dict().values()))
    with pytest.raises(UserError, match="no block CBAM, CoordAttention, ECA, SE"):
        FORMAT.write(result.slim, tmp_path / "x.pt", ExportOptions(torch.zeros(1, 3, 64, 64), {}))


def test_a_step_of_training():
    model = deepcopy(example()).train()
    hyp = scale_gains(read_hyp({}), model.detect.nl, 2, 128)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.4], [1, 0, 0.4, 0.6, 0.2, 0.2]])
    loss, items = DetectionLoss(model, hyp)(model(torch.rand(2, 3, 64, 128)), targets)
    loss.backward()
    assert bool(torch.isfinite(items).all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.slow
def test_an_unknown_script_is_refused(script, tmp_path):
    done = script("examples/with_attention.py", "trian.py", cwd=tmp_path, code=2)
    assert "give one of" in done.stderr and "train_sparsity.py" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_from_sparsity_to_a_slim_model(script, tiny, tmp_path):
    narrow = Path(tmp_path / "narrow.yaml")
    narrow.write_text(yaml.safe_dump({**yaml.safe_load(EXAMPLE.read_text()), "width_multiple": 0.125}))
    common = ["--imgsz", 64, "--batch-size", 4, "--workers", 0]
    script("examples/with_attention.py", "train_sparsity.py", "--data", tiny, "--cfg", narrow, "--weights", "",
           "--epochs", 2, *common, "--noplots", "--target-sparsity", 0.4, cwd=tmp_path)
    done = script("examples/with_attention.py", "prune.py", "--percent", 0.4, "--noval", *common, cwd=tmp_path)
    assert "(ECA)" in done.stdout and "(CBAM)" in done.stdout
    slim = checkpoint.load(tmp_path / "pruned_model.pt")
    assert sum(int((~mask).sum()) for mask in slim.masks.values()) > 0
    without = script("prune.py", "--percent", 0.4, *common, cwd=tmp_path, code=2)  # its blocks are not known there
    assert "no block named 'ECA'" in without.stderr
    script("examples/with_attention.py", "finetune_pruned.py", "--epochs", 1, *common, "--noplots", cwd=tmp_path)


# The engine in other projects -----------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_torchvision_detectors_backbone_is_cut(script, tmp_path):
    done = script("examples/torchvision_detector.py", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert "30% cut" in done.stdout and "boxes" in done.stdout


@pytest.mark.slow
def test_an_ultralytics_yolo11_is_slimmed_by_its_own_trainer(tmp_path, monkeypatch):
    pytest.importorskip("ultralytics", reason="pip install ultralytics")
    from examples.ultralytics_yolo11 import YOLO, main

    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"images/{i}.jpg"), pixels)
        (tmp_path / f"labels/{i}.txt").write_text("0 .5 .5 .4 .4\n")
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"path": str(tmp_path), "train": "images", "val": "images", "names": ["a", "b"]}))
    monkeypatch.chdir(tmp_path)
    fine = main("yolo11n.yaml", str(data), epochs=2, imgsz=64, batch=4, nbs=4, workers=0, plots=False, device="cpu",
                project=str(tmp_path / "runs"), optimizer="SGD")
    assert any("attn (Attention)" in note for note in trace(fine.model.float()).notes)  # it stays whole
    sparse = YOLO(tmp_path / "runs/train/weights/last.pt").model
    gammas = torch.cat([m.weight for m in sparse.modules() if isinstance(m, nn.BatchNorm2d)])
    assert (gammas == 0).float().mean() > 0.3
    again = YOLO(fine.trainer.last).model
    counts = [sum(p.numel() for p in model.parameters()) for model in (sparse, again)]
    assert counts[1] < 0.5 * counts[0]
