"""Every yaml of the repository: stock's size, a cut that is exact, and blocks that can't be cut kept whole."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.config import MODEL_FOLDER, read_yaml
from models.pruning import model_pruner
from models.yolo import Model
from tests.blocks import randomised
from training.loss import DetectionLoss, scale_gains
from training.settings import read_hyp
from utils.slimming import Pruner, trace
from utils.slimming.cost import profile
from utils.slimming.graph import batch_norms
from utils.slimming.target_sparsity import TargetSparsity

# Parameters and entries of the state_dict, as stock YOLOv5 counts them.
STOCK = {"yolov3-spp": (62998749, 445), "yolov3-tiny": (8852366, 71), "yolov3": (61949149, 439),
         "yolov5-bifpn": (46825853, 613), "yolov5-fpn": (41117565, 547), "yolov5-p2": (47493372, 711),
         "yolov5-p34": (5331518, 311), "yolov5-p6": (76770172, 795), "yolov5-p7": (144281723, 977),
         "yolov5-panet": (46563709, 613), "yolov5l6": (76770172, 795), "yolov5m6": (35731932, 627),
         "yolov5n6": (3246940, 459), "yolov5s-LeakyReLU": (7235389, 349), "yolov5s-ghost": (3897605, 529),
         "yolov5s-transformer": (7235645, 348), "yolov5s-v5.0": (7276605, 361), "yolov5s6": (12626620, 459),
         "yolov5x6": (140794780, 963)}
# One width of each kind: tests/test_graph.py --cases cuts all of them.
FILES = [MODEL_FOLDER / "yolov5n.yaml", *sorted((MODEL_FOLDER / "hub").glob("*.yaml"))]
NAMES = [f.stem for f in FILES]


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_hub_models_have_stocks_size(name):
    model = Model(f"{name}.yaml")
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == STOCK[name]


@pytest.mark.slow
def test_every_yaml_of_the_hub_is_counted():
    assert {f.stem for f in (MODEL_FOLDER / "hub").glob("*.yaml")} == STOCK.keys()


@pytest.fixture(scope="module", params=FILES, ids=NAMES)
def narrow(request: pytest.FixtureRequest) -> tuple[Path, Model]:
    """The yaml's model at a quarter of the width (an eighth where that is its own), one class."""
    torch.manual_seed(0)
    cfg = read_yaml(request.param)
    cfg |= {"width_multiple": 0.125, "depth_multiple": min(cfg["depth_multiple"], 0.33)}
    return request.param, randomised(Model(cfg, nc=2))


@pytest.mark.slow
def test_half_of_the_channels_go_exactly(narrow):
    path, model = narrow
    side = 2 * model.divisor
    pruner = model_pruner(model, side).rank()
    graph, result = pruner.graph, pruner.cut(percent=0.5)
    assert result.difference < 1e-9
    prunable = sum(int(m.sum()) for m in graph.prunable().values())
    gone = sum(int((~m).sum()) for m in result.masks.values())
    assert prunable > 0.4 * sum(len(ids) for ids in graph.norms.values()) and gone >= 0.45 * prunable
    cost = profile(result.slim, side)
    assert pruner.preview(0.5)[1:] == (cost.parameters, cost.flops)
    assert cost.parameters < 0.8 * profile(model, side).parameters or "transformer" in path.stem
    # What is not understood is said, and only attention is not.
    assert bool(graph.notes) == ("transformer" in path.stem), graph.notes


@pytest.mark.slow
def test_one_step_of_training_and_sparsity(narrow):
    """Loss, gradients in every parameter, the penalty on what is prunable: what train_sparsity.py does."""
    model = Model(narrow[1].yaml, nc=2).train()
    hyp = scale_gains(read_hyp({}), model.detect.nl, 2, 128)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.4], [1, 0, 0.4, 0.6, 0.8, 0.7]])
    side = max(model.divisor, 64)
    loss, items = DetectionLoss(model, hyp)(model(torch.rand(2, 3, side, 2 * side)), targets)
    loss.backward()
    assert bool(torch.isfinite(items).all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    norms = list(batch_norms(model, trace(model).prunable_norms()).values())
    target = TargetSparsity(norms, 0.5)
    target.observe()
    target.shrink(1.0)
    total = sum(m.num_features for m in norms)
    assert sum(int((m.weight == 0).sum()) for m in norms) == pytest.approx(0.5 * total, abs=0.05 * total)


@pytest.mark.slow
def test_attention_is_kept_whole():
    model = randomised(Model({**read_yaml("yolov5s-transformer.yaml"), "width_multiple": 0.25}, nc=2))
    masks = Pruner(model, 64).rank().preview(0.9)[0]
    assert masks["model.8.cv1.bn"].all() and masks["model.8.cv2.bn"].all()
    assert not masks["model.8.cv3.bn"].all() and not masks["model.6.cv3.bn"].all()
