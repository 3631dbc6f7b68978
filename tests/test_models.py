"""The yaml reader and the model: stock's counts, keys and outputs."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from models import checkpoint
from models.common import BLOCKS, block
from models.config import read_yaml
from models.yolo import Model, fused, set_anchors, whole_strides, with_classes
from utils.errors import UserError

# Parameters and entries of the state_dict, as stock YOLOv5 counts them.
STOCK = {"n": (1_872_157, 349), "s": (7_235_389, 349), "m": (21_190_557, 481), "l": (46_563_709, 613),
         "x": (86_749_405, 745)}


@pytest.mark.slow
@pytest.mark.parametrize("size", STOCK)
def test_parameter_and_key_counts_are_stocks(size):
    model = Model(f"yolov5{size}.yaml")
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == STOCK[size]
    assert model.stride.tolist() == [8, 16, 32]
    assert {"model.0.conv.weight", "model.2.cv1.bn.weight", "model.2.m.0.cv1.conv.weight", "model.24.m.0.bias",
            "model.24.anchors"} <= model.state_dict().keys()


@pytest.mark.slow
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


def small(**changes: object) -> dict:
    return {**read_yaml("yolov5n.yaml"), "width_multiple": 0.125, **changes}


def with_row(i: int, *row: object) -> dict:
    """A small model with another row: those of the backbone are numbered first."""
    cfg = small()
    part = cfg["backbone"] if 0 <= i < len(cfg["backbone"]) else cfg["head"]
    part[i if part is cfg["backbone"] or i < 0 else i - len(cfg["backbone"])] = list(row)
    return cfg


def nested(levels: int, width: int) -> list:
    inner: list = [64]
    for _ in range(levels):
        inner = [inner] * width
    return inner


SIX = [[1, 2]] * 6


@pytest.mark.parametrize("cfg, words", [
    # the head, its anchors and its inputs
    (with_row(-1, [17, 20, 23, 22], 1, "Detect", ["nc", "anchors"]), "4 layers are read, there are 3 rows of anchors"),
    (with_row(-1, [17, 20], 1, "Detect", ["nc", "anchors"]), "2 layers are read, there are 3 rows"),
    (with_row(-1, 17, 1, "Detect", ["nc", "anchors"]), "1 layers are read, there are 3 rows"),
    (with_row(-1, [17, 20, 23] * 2, 1, "Detect", ["nc", SIX]), "at most 5"),
    (with_row(-1, [17, 20, 23], 1, "Detect", [7, "anchors"]), "write nc"),
    (with_row(-1, [17, 20, 23], 1, "Detect", ["nc", 10 ** 9]), "up to 100"),
    (small(anchors=[[[10, 13], [16, 30], [33, 23]]] * 3), "a row of anchors is"),
    (small(anchors=[[10, 13, 16]] * 3), "a row of anchors is"),
    (small(anchors=[[10, 13], [16, 30, 33, 23], [30, 61]]), "a row of anchors is"),
    (small(anchors=[[10, 0]] * 3), "a row of anchors is"),
    (small(anchors=[[10, float("nan")]] * 3), "a row of anchors is"),
    (small(anchors=[["a", "b"]] * 3), "a row of anchors is"),
    (small(anchors=[]), "there are 0 rows of anchors"),
    (small(anchors=10 ** 9), "anchors must be a number up to 100"),
    # numbers
    *((small(ch=ch), "ch must be a whole number") for ch in (0, "x", None, True, 10 ** 9)),
    *((small(nc=nc), "nc must be a whole number") for nc in (0, "x", 10 ** 9)),
    *((small(depth_multiple=d), "depth_multiple must be") for d in (0, "x", True, float("nan"), float("inf"))),
    (small(depth_multiple=99), "more than 500 layers"),
    (small(width_multiple=99), "more than 500,000,000 parameters"),
    (with_row(0, -1, 10 ** 9, "Conv", [64, 6, 2, 2]), "more than 500 layers"),
    (with_row(2, -1, 10 ** 9, "C3", [128]), "more than 500 layers"),
    (with_row(11, -1, 10 ** 9, "nn.Upsample", [None, 2, "nearest"]), "more than 500 layers"),
    *((with_row(0, -1, n, "Conv", [64, 6, 2, 2]), r"row 0 must be \[from") for n in (0, -1, True, 1.5)),
    (with_row(1, -1, 1, "Conv", [128, 10 ** 5, 2]), "more than 500,000,000 parameters"),
    (with_row(1, -1, 1, "Conv", [10 ** 400]), "beyond 64 bits"),
    (with_row(11, -1, 1, "nn.Upsample", [None, 1000, "nearest"]), "row 11: adds more than 64 pixels"),
    (with_row(1, -1, 1, "nn.ZeroPad2d", [10 ** 6]), "row 1: adds more than 64 pixels"),
    (with_row(1, -1, 1, "Contract", [10 ** 4]), "channels are too many"),
    # strides
    *((small(backbone=[[-1, 1, "Conv", [64, 3, stride]]], head=[[[0], 1, "Detect", ["nc", [[9, 9]]]]]),
       "needs whole strides") for stride in (3, [2, 1])),
    # activations
    *((small(activation=a), "activation '.*' is not one of") for a in (
        "nn.LeakyReLU(-)", "nn.LeakyReLU(e)", "nn.LeakyReLU(1e999)", "nn.LeakyReLU(0.1", 5, ["nn.SiLU"])),
    (small(activation="nn.GELU(3)"), "do not fit together"),
    # structure
    (small(backbone=nested(40, 8)), "nested too deeply, or without end"),
    (small(backbone=nested(5000, 1)), "nested too deeply, or without end")])
def test_a_yaml_that_is_no_whole_model_is_refused_at_once(cfg, words):
    with pytest.raises(UserError, match=words) as caught:
        Model(cfg)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_yaml_that_holds_itself_is_refused():
    cfg = small()
    cfg["backbone"].append(cfg["backbone"])
    with pytest.raises(UserError, match="without end"):
        Model(cfg)


@pytest.mark.parametrize("name", ["nn.LeakyReLU(.1)", "nn.LeakyReLU(1e-2)", "nn.ReLU()", "nn.SiLU"])
def test_activations_that_are_known(name):
    assert Model(small(activation=name)).stride.tolist() == [8, 16, 32]


def test_a_number_of_anchors_alone_builds():
    model = Model(small(anchors=2))
    assert model.detect.anchors.shape == (3, 2, 2) and bool((model.detect.anchors > 0).all())


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


@pytest.mark.slow
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


@pytest.mark.parametrize("name, divisor", [("yolov5n", 32), ("hub/yolov5-p34", 32), ("hub/yolov5n6", 64)])
def test_images_are_multiples_of_what_the_whole_network_divides_by(name, divisor):
    """P34's head ends at stride 16, its backbone at 32."""
    model = Model({**read_yaml(f"models/{name}.yaml"), "width_multiple": 0.125}).eval()
    assert model.divisor == divisor
    side = whole_strides(100, model.divisor)
    model(torch.zeros(1, 3, side, side + model.divisor))


@pytest.mark.slow
def test_a_yaml_is_shown_layer_by_layer(script, tmp_path):
    """python models/yolo.py was a traceback."""
    said = script("models/yolo.py", "--cfg", "yolov5n.yaml", cwd=tmp_path).stdout.splitlines()
    assert len(said) == 28 and said[2].split()[:5] == ["0", "-1", "1", "1760", "Conv"]
    assert "1,872,157 parameters, 4.5 GFLOPs at 640 px" in said[-1]
    done = script("models/yolo.py", "--cfg", "none.yaml", cwd=tmp_path, code=2)
    assert done.stderr.startswith("error: --cfg none.yaml: no such file") and done.stderr.count("\n") == 1
