"""The yaml reader and the model: stock's counts, keys and outputs."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from models import checkpoint
from models.common import BLOCKS, block
from models.config import read_yaml
from models.yolo import Model, fused, set_anchors, with_classes
from utils.errors import UserError

# Parameters and entries of the state_dict, as stock YOLOv5 counts them.
STOCK = {"n": (1_872_157, 349), "s": (7_235_389, 349), "m": (21_190_557, 481), "l": (46_563_709, 613),
         "x": (86_749_405, 745)}


@pytest.mark.parametrize("size", STOCK)
def test_parameter_and_key_counts_are_stocks(size):
    model = Model(f"yolov5{size}.yaml")
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == STOCK[size]
    assert model.stride.tolist() == [8, 16, 32]
    assert {"model.0.conv.weight", "model.2.cv1.bn.weight", "model.2.m.0.cv1.conv.weight", "model.24.m.0.bias",
            "model.24.anchors"} <= model.state_dict().keys()


def test_official_weights_give_stocks_forward(assets, golden):
    model = checkpoint.load(assets / "yolov5n.pt")
    x = torch.from_numpy(golden["forward/x"])
    with torch.no_grad():
        decoded, raw = model(x)
        again = fused(model)(x)[0]
    for name, mine in (("z", decoded), *((f"raw{i}", r) for i, r in enumerate(raw))):
        theirs = torch.from_numpy(golden[f"forward/{name}"])
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (again - decoded).abs().max() <= 1e-4 * decoded.abs().max()
    model.detect.train()
    assert [r.shape for r in model(x)] == [r.shape for r in raw]


def test_building_leaves_the_batchnorm_statistics_alone():
    norms = [m for m in Model("yolov5n.yaml").modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((m.running_var == 1).all()) and m.eps == 1e-3 and m.momentum == 0.03 for m in norms)


def test_output_shapes_and_number_of_classes():
    model = Model("yolov5n.yaml", nc=3, names={0: "a", 1: "b", 2: "c"})
    maps = model(torch.zeros(2, 3, 64, 96))
    assert [tuple(y.shape) for y in maps] == [(2, 3, 8, 12, 8), (2, 3, 4, 6, 8), (2, 3, 2, 3, 8)]
    assert with_classes(model, {0: "only"}).eval()(torch.zeros(1, 3, 64, 64))[0].shape == (1, 3 * (64 + 16 + 4), 6)


def test_new_anchors_travel_with_the_yaml():
    model = Model("yolov5n.yaml")
    set_anchors(model, torch.arange(1.0, 19).view(3, 3, 2) * 4)
    assert torch.allclose(Model(model.yaml).detect.anchors, model.detect.anchors)


def test_own_block_registers_in_one_line():
    @block()
    class Twice(nn.Module):
        def __init__(self, c1, c2):
            super().__init__()
            self.conv = nn.Conv2d(c1, c2, 1)

        def forward(self, x):
            return self.conv(x) * 2

    try:
        cfg = Model("yolov5n.yaml").yaml
        cfg["backbone"][2] = [-1, 1, "Twice", [128]]
        assert type(Model(cfg).model[2]).__name__ == "Twice"
    finally:
        BLOCKS.pop("Twice")


@pytest.mark.parametrize("change, words", [
    (lambda c: c["backbone"].__setitem__(2, [-1, 1, "os.system", [64]]), "no block named 'os.system'"),
    (lambda c: c["backbone"].__setitem__(2, [40, 1, "Conv", [64]]), "does not come before"),
    (lambda c: c.__setitem__("activation", "__import__('os')"), "activation"),
])
def test_bad_yaml_is_refused_in_one_line(change, words):
    cfg = Model("yolov5n.yaml").yaml
    change(cfg)
    with pytest.raises(UserError, match=words):
        Model(cfg)


@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov5n6.yaml", "yolov5-p7.yaml", "yolov5-p2.yaml",
                                  "yolov5s-transformer.yaml", "yolov3-tiny.yaml"])
def test_strides_are_those_of_a_real_forward_pass(name):
    model = Model({**read_yaml(name), "width_multiple": 0.125}).eval()
    model.detect.train()
    with torch.no_grad():
        sides = [y.shape[-2] for y in model(torch.zeros(1, 3, 512, 512))]
    assert model.stride.tolist() == [512 / side for side in sides]
    model.train().set_strides()
    assert all(module.training for module in model.modules())


def test_silu_works_in_place_in_eval_mode_only():
    """In place in training, autograd copies the input first; the gradients are the same."""
    model, x, gradients = Model("yolov5n.yaml", nc=2), torch.rand(2, 3, 64, 64), []
    for in_place in (True, False):
        model.train()
        activations = [m for m in model.modules() if isinstance(m, nn.SiLU)]
        assert activations and not any(m.inplace for m in activations)
        for m in activations:
            m.inplace = in_place
        model.zero_grad()
        sum(y.square().sum() for y in model(x)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert all(m.inplace for m in model.eval().modules() if isinstance(m, nn.SiLU))
