"""The rest of stock's blocks in a small detector: built as stock builds them, trained, cut, saved, fused, exported."""
from __future__ import annotations

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from models import checkpoint
from models.common import BLOCKS, Contract, Expand, block
from models.experimental import MixConv2d
from models.formats.format import ExportOptions
from models.formats.yolov5 import FORMAT, to_yolov5
from models.yolo import Model, fused
from tests.blocks import randomised
from training.loss import DetectionLoss, scale_gains
from training.settings import read_hyp
from utils.errors import UserError
from utils.slimming import ChannelGraph, Masks, Pruner, Rules, masked, slim, trace
from utils.slimming.cost import CostModel, profile
from utils.slimming.equivalence import largest_difference

# Rows behind two convolutions, which give layer 0 (16 channels, stride 2) and layer 1 (32 channels, stride 4).
ROWS: dict[str, list[list]] = {
    "C3x": [[-1, 2, "C3x", [32]]],
    "C3SPP": [[-1, 1, "C3SPP", [32, [5, 9, 13]]]],
    "BottleneckCSP": [[-1, 2, "BottleneckCSP", [32]]],
    "CrossConv": [[-1, 1, "CrossConv", [32, 3, 1, 1, 1.0, True]]],
    "MixConv2d": [[-1, 1, "MixConv2d", [32, [1, 3], 1]]],
    "Contract": [[-1, 1, "Contract", [2]]],
    "Expand": [[-1, 1, "Expand", [2]]],
    "DWConvTranspose2d": [[-1, 1, "DWConvTranspose2d", [32, 2, 2]]],
    "nn.ConvTranspose2d": [[-1, 1, "nn.ConvTranspose2d", [16, 2, 2]], [[-1, 0], 1, "Concat", [1]]],
    "nn.BatchNorm2d": [[-1, 1, "nn.ConvTranspose2d", [16, 2, 2]], [-1, 1, "nn.BatchNorm2d", []]],
    "nn.BatchNorm2d without scale": [[-1, 1, "nn.BatchNorm2d", [0.001, 0.03, False]]],
}
# Parameters and entries of the state_dict of layer 2, as stock YOLOv5 v7.0 counts them.
STOCK = {"C3x": (5376, 42), "C3SPP": (2864, 30), "BottleneckCSP": (7712, 43), "CrossConv": (6272, 12),
         "MixConv2d": (384, 7), "Contract": (0, 0), "Expand": (0, 0), "DWConvTranspose2d": (160, 2),
         "nn.ConvTranspose2d": (2064, 2)}
KEYS = {"C3x": {"m.1.cv2.conv.weight", "cv3.bn.bias"}, "C3SPP": {"m.cv1.conv.weight", "m.cv2.bn.weight"},
        "BottleneckCSP": {"cv2.weight", "cv3.weight", "cv4.conv.weight", "bn.running_var", "m.1.cv2.bn.weight"},
        "CrossConv": {"cv1.conv.weight", "cv2.bn.weight"}, "MixConv2d": {"m.0.weight", "m.1.weight", "bn.bias"},
        "DWConvTranspose2d": {"weight", "bias"}, "nn.ConvTranspose2d": {"weight", "bias"}}
# BatchNorms that must stay whole.
STAY = {"DWConvTranspose2d": {"model.1.bn"}, "nn.BatchNorm2d without scale": {"model.1.bn"}}


@cache
def build(name: str, seed: int = 0) -> Model:
    """A small model around the rows of `name`, which looks trained. Not to be changed: it is built once."""
    torch.manual_seed(seed)
    anchors = [[10, 13, 16, 30, 33, 23]]
    return look_trained(Model({
        "nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": anchors,
        "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], *ROWS[name]],
        "head": [[-1, 1, "Conv", [32, 3, 2]], [[-1], 1, "Detect", ["nc", "anchors"]]]}), seed)


def look_trained(model, seed: int = 0):
    """randomised() for models with BatchNorms that have no scale."""
    plain = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.weight is None]
    for m in plain:
        m.weight, m.bias = nn.Parameter(torch.ones(m.num_features)), nn.Parameter(torch.zeros(m.num_features))
    randomised(model, seed)
    for m in plain:
        m.weight = m.bias = None
    return model


def random_cut(graph: ChannelGraph, seed: int) -> Masks:
    """Masks at random that leave every convolution a channel: half of the channels, or any share."""
    rng = np.random.default_rng(seed)
    share = 0.5 if seed % 2 == 0 else rng.random()
    keep = (graph.frozen | (rng.random(len(graph.group)) >= share))[graph.group]
    for ids in graph.outputs.values():
        if not keep[ids].any():
            keep[graph.group == graph.group[rng.choice(ids)]] = True
    return graph.masks(keep)


def check_cut(model: nn.Module, seed: int, size: int = 64) -> tuple[nn.Module, Masks]:
    """Cut at random: slim computes what masked does, costs what was predicted, and can be cut again."""
    graph = trace(model)
    masks = random_cut(graph, seed)
    narrow = slim(model, masks)
    assert largest_difference(masked(model, masks), narrow, sizes=((2, size, size), (1, size, 2 * size))) < 1e-9
    cost = profile(narrow, size)
    assert CostModel(model, graph, size).remaining(graph.kept(masks)) == (cost.parameters, cost.flops)
    assert trace(narrow).norms.keys() == graph.norms.keys()
    return narrow, masks


@pytest.mark.parametrize("name", STOCK)
def test_layers_have_stocks_names_and_size(name):
    layer = build(name).model[2]
    state = layer.state_dict()
    assert (sum(p.numel() for p in layer.parameters()), len(state)) == STOCK[name]
    assert KEYS.get(name, set()) <= state.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_step_of_training(name):
    model = deepcopy(build(name)).train()
    hyp = scale_gains(read_hyp({}), model.detect.nl, 2, 128)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.4], [1, 0, 0.4, 0.6, 0.2, 0.2]])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss, items = DetectionLoss(model, hyp)(model(torch.rand(2, 3, 64, 128)), targets)
    loss.backward()
    assert bool(torch.isfinite(items).all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    optimizer.step()


@pytest.mark.parametrize("name", ROWS)
def test_what_must_stay_is_said(name):
    graph = trace(build(name))
    assert {n for n, ids in graph.norms.items() if graph.frozen[ids].any()} == STAY.get(name, set())
    assert bool(graph.notes) == (name in STAY), graph.notes
    assert all("model.2" in note or "model.3" in note for note in graph.notes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ROWS)
def test_slim_equals_masked(name, seed):
    narrow, _ = check_cut(build(name), seed)
    check_cut(narrow, seed + 1)


@pytest.mark.parametrize("name", ROWS)
def test_half_of_the_channels_go(name):
    model = build(name)
    result = Pruner(model, 64).rank("gamma-l1", Rules(coupled=True)).cut(0.5)
    assert result.difference < 1e-9
    assert 0.2 < result.achieved <= 0.5 and profile(result.slim, 64).parameters < profile(model, 64).parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_slim_checkpoint_comes_back(name, tmp_path):
    narrow, masks = check_cut(build(name), 2)
    checkpoint.save(tmp_path / "slim.pt", narrow)
    again = checkpoint.load(tmp_path / "slim.pt")
    assert again.masks.keys() == masks.keys() and again.state_dict().keys() == narrow.state_dict().keys()
    assert largest_difference(narrow, again, sizes=((1, 64, 64),)) == 0


@pytest.mark.parametrize("name", ROWS)
def test_fused_computes_the_same_and_comes_back(name, tmp_path):
    model = build(name)
    folded = fused(model)
    assert largest_difference(model, folded, sizes=((1, 64, 64),)) < 1e-5
    checkpoint.save(tmp_path / "fused.pt", folded)
    assert largest_difference(folded, checkpoint.load(tmp_path / "fused.pt"), sizes=((1, 64, 64),)) == 0


def test_an_own_conv_that_is_transposed_is_not_fused():
    """Folding a BatchNorm into its weight would take the other dimension."""
    model = deepcopy(build("Contract"))
    model.model[0].conv = nn.ConvTranspose2d(3, 16, 2, 2, bias=False)
    assert largest_difference(model, fused(model), sizes=((1, 64, 64),)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_file_for_yolov5_names_its_classes_and_comes_back(name, tmp_path):
    """What it holds is read as an official checkpoint is, so such files with these blocks are read as well."""
    model, path = check_cut(build(name), 0)[0].eval(), tmp_path / "x.yolov5.pt"
    FORMAT.write(model, path, ExportOptions(torch.zeros(1, 3, 64, 64), {}))
    stored = {type(m) for m in to_yolov5(model).modules()}
    assert {c.__module__ for c in stored if not c.__module__.startswith("torch.")} <= {
        "models.yolo", "models.common", "models.experimental"}
    half = {k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    found = checkpoint.load(path).state_dict()
    assert all(torch.equal(half[key], found[key]) for key in half if not key.endswith("anchors"))


def test_contract_and_expand_have_stocks_order():
    x = torch.rand(2, 12, 8, 12)
    b, c, h, w = x.shape
    cells = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
    assert torch.equal(Contract(2)(x), cells) and torch.equal(Expand(2)(cells), x)
    nine = torch.rand(1, 18, 3, 2)
    spread = nine.view(1, 3, 3, 2, 3, 2).permute(0, 3, 4, 1, 5, 2).reshape(1, 2, 9, 6)
    assert torch.equal(Expand(3)(nine), spread) and torch.equal(Contract(3)(spread), nine)


@pytest.mark.parametrize("name, channels", [("Contract", 128), ("Expand", 8)])
def test_contract_and_expand_are_cut_cell_by_cell(name, channels):
    model = build(name)
    assert model.model[3].conv.in_channels == channels
    graph = trace(model)
    groups = np.unique(graph.group[graph.norms["model.1.bn"]])
    assert len(groups) == (32 if name == "Contract" else 8)  # Expand: the four pixels of a cell go together


@pytest.mark.parametrize("count", [2, 3, 4])
def test_mixed_kernels_share_the_channels_as_stock_does(count):
    kernels = (1, 3, 5, 7)[:count]
    for c2 in (16, 32, 48, 80, 104):
        which = torch.linspace(0, count - 1e-6, c2).floor()
        found = [conv.out_channels for conv in MixConv2d(16, c2, kernels).m]
        assert found == [int((which == i).sum()) for i in range(count)]
    equal_weights = [conv.out_channels for conv in MixConv2d(16, 104, (1, 3, 5), equal_ch=False).m]
    assert equal_weights == [90, 10, 4]


@pytest.mark.parametrize("name", ["BottleneckCSP", "MixConv2d"])
def test_no_convolution_is_left_without_channels(name):
    """Their BatchNorm reads two convolutions: one of them could lose all of its channels and leave the norm some."""
    model = deepcopy(build(name))
    with torch.no_grad():
        model.model[2].bn.weight[:16] = 1e-6
    graph, pruner = trace(model), Pruner(model, 64).rank()
    narrow = pruner.cut(0.9).slim
    assert all(min(m.weight.shape[:2]) > 0 for m in narrow.modules() if isinstance(m, nn.Conv2d))
    keep = np.ones(len(graph.group), bool)
    keep[graph.group[graph.outputs["model.2.cv3" if name == "BottleneckCSP" else "model.2.m.0"]]] = False
    with pytest.raises(ValueError, match="nothing is left"):
        slim(model, graph.masks(keep))


def test_an_own_block_with_such_a_norm_in_a_detector():
    @block()
    class Whitened(nn.Module):
        def __init__(self, c1, c2):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(c1, c2, 3, 1, 1, bias=False), nn.BatchNorm2d(c2, affine=False)

        def forward(self, x):
            return self.bn(self.conv(x))

    try:
        ROWS["Whitened"] = [[-1, 1, "Whitened", [32]]]
        model = build("Whitened")
        result = Pruner(model, 64).rank().cut(0.5)
        assert result.difference < 1e-9 and any("model.2.bn" in note for note in result.notes)
    finally:
        del ROWS["Whitened"]
        BLOCKS.pop("Whitened")


@pytest.mark.parametrize("row", [["Expand", [0]], ["Contract", [0]], ["Contract", ["two"]], ["BottleneckCSP", []],
                                 ["MixConv2d", [32, [0, 1], 1, False]], ["nn.ConvTranspose2d", [32]]])
def test_wrong_arguments_are_one_line(row):
    ROWS["wrong"] = [[-1, 1, *row]]
    try:
        with pytest.raises(UserError, match="model yaml"):
            build("wrong")
    finally:
        del ROWS["wrong"]


def test_every_batchnorm_of_a_model_has_stocks_settings():
    norms = [m for name in ROWS for m in build(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}


def test_a_block_says_how_many_channels_come_out():
    @block(channels=lambda c1, gain=2: c1 * gain)
    class Repeat(nn.Module):
        def __init__(self, gain=2):
            super().__init__()
            self.gain = gain

        def forward(self, x):
            return torch.cat([x] * self.gain, 1)

    @block(channels="input")
    class Scale(nn.Module):
        def __init__(self, c1, factor):
            super().__init__()
            self.norm, self.factor = nn.BatchNorm2d(c1), factor

        def forward(self, x):
            return self.norm(x) * self.factor

    try:
        ROWS["Own"] = [[-1, 2, "Repeat", [3]], [-1, 2, "Scale", [0.5]]]
        model = build("Own")
        assert model.model[3][1].norm.num_features == 32 * 9 == model.model[4].conv.in_channels
        check_cut(model, 0)
    finally:
        del ROWS["Own"]
        for name in ("Repeat", "Scale"):
            BLOCKS.pop(name)
