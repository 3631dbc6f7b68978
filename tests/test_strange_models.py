"""The engine on any nn.Module: what it changes (nothing), what it refuses in one sentence, what leaves and enters."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from models.common import Conv
from models.config import read_yaml
from models.yolo import Model
from tests.blocks import NETWORKS, Net, randomised
from utils.slimming import Pruner, Rules, masked, slim, trace
from utils.slimming.cost import profile
from utils.slimming.equivalence import difference, largest_difference

# Nothing of a model changes -------------------------------------------------------------------------------------------

class Careless(nn.Module):
    """Its forward changes a parameter, buffers, attributes, and which module it has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.calls = Conv(16, 16, 1), nn.BatchNorm2d(16), 0
        self.scale = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps.add_(1)
        self.last = self.conv(x)
        return self.last * self.scale.clamp_(0, 1)


def yolo() -> Model:
    return Model({**read_yaml("yolov5n.yaml"), "width_multiple": 0.125}, nc=2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda cls=cls: Net(cls()) for name, cls in NETWORKS.items()}, "Careless": lambda: Net(Careless()),
    "yolov5n": yolo}


def state_of(value: Any) -> Any:
    """What a module holds, as plain data that is equal exactly where nothing was changed."""
    if isinstance(value, Tensor):
        return (id(value), value._version, value.requires_grad, id(value.grad), value.shape, value.flatten().tolist())
    if isinstance(value, dict):
        return [(key, state_of(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [state_of(part) for part in value]
    return (type(value), value) if isinstance(value, (bool, int, float, str)) else id(value)


def everything(model: nn.Module) -> dict[str, Any]:
    """Parameters, buffers, modes, hooks and all other attributes of every module."""
    return {f"{name}/{key}": state_of(value) for name, m in model.named_modules() for key, value in vars(m).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_neither_tracing_nor_a_cut_changes_anything(name):
    torch.manual_seed(0)
    model = randomised(MODELS[name]()).eval()
    parts = list(model.modules())
    for part in parts[1::3]:
        part.training = True
        part.requires_grad_(False)
    parts[2].register_forward_hook(lambda module, inputs, y: None)
    parts[2].register_forward_pre_hook(lambda module, inputs: None)
    before = everything(model)
    trace(model)
    assert everything(model) == before
    if name != "Attention":  # of which nothing may go
        Pruner(model, 64).rank(rules=Rules(coupled=True)).cut(0.3)
        assert everything(model) == before


@pytest.mark.slow
def test_neither_does_a_comparison():
    model = yolo().train()
    before = everything(model)
    assert largest_difference(model, model, sizes=((1, 64, 64),)) == 0
    assert everything(model) == before


# What enters and leaves -----------------------------------------------------------------------------------------------

class Backbone(nn.Module):
    """Features of 16 channels, which another convolution refines; subclasses say what leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Conv(3, 16, 3), Conv(16, 16, 3), Conv(16, 8, 1)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.a(x)
        return features, self.c(self.b(features))

    def forward(self, x: Tensor) -> Any:
        return self.both(x)[1]


@dataclass
class Fields:
    features: Tensor
    y: Tensor


class Pair(NamedTuple):
    features: Tensor
    y: Tensor


def with_forward(forward: Callable) -> nn.Module:
    torch.manual_seed(0)
    return randomised(type("Own", (Backbone,), {"forward": forward})())


LEAVING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda features, y: (features, y), "list": lambda features, y: [features, y],
    "dict": lambda features, y: {"features": features, "y": y},
    "dict in a list in a dict": lambda features, y: {"y": y, "all": [{"features": (features,)}]},
    "dataclass": Fields, "dataclass in a dict": lambda features, y: {"out": Fields(features, y)},
    "named tuple": Pair, "with None": lambda features, y: (features, None, y),
    "with numbers": lambda features, y: (3, features, 0.5, "name", y)}


@pytest.mark.parametrize("kind", LEAVING)
def test_channels_that_leave_stay_whatever_holds_them(kind):
    model = with_forward(lambda self, x: LEAVING[kind](*self.both(x)))
    graph = trace(model)
    assert {name: bool(graph.frozen[ids].all()) for name, ids in graph.norms.items()} == {
        "a.bn": True, "b.bn": False, "c.bn": True}
    assert not graph.notes  # an output is nothing strange
    result = Pruner(model, 64).rank().cut(0.3)
    assert result.difference < 1e-9 and result.achieved == 5 / 16


def test_a_number_that_tells_the_channels_keeps_them():
    model = with_forward(lambda self, x: (lambda features, y: (features.shape[1], y))(*self.both(x)))
    assert trace(model).frozen[trace(model).norms["a.bn"]].all()
    result = Pruner(model, 64).rank().cut(0.3)
    assert result.difference < 1e-9 and "number of channels" in result.notes[0]


def test_outputs_that_are_no_tensors_must_be_equal():
    x = torch.rand(2, 3)
    assert difference([x, None, 3], [x, None, 3]) == 0
    for other in ([x, None, 4], [x, 0, 3], [x, None, 3.0], [x, None], [None, None, 3]):
        assert difference([x, None, 3], other) == float("inf")


def test_inputs_that_need_not_be_given_are_not():
    def forward(self, x: Tensor, targets: Tensor | None = None, times: int = 2, flag: bool = False) -> Any:
        if targets is not None:
            x = x + targets
        return None if flag else self.both(x * times)[1]

    result = Pruner(with_forward(forward), 64).rank().cut(0.3)
    assert result.difference < 1e-9 and result.achieved > 0.29 and not result.notes


# Several inputs -------------------------------------------------------------------------------------------------------

class TwoInputs(Backbone):
    """Images, and a row of numbers for each."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 16))

    def forward(self, x: Tensor, numbers: Tensor, *, which: Tensor | None = None, **other: Any) -> Any:
        y = self.c(self.b(self.a(x) * self.row(numbers)[:, :, None, None]))
        return y if which is None else (y, which)


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_a_model_of_several_inputs_is_cut_by_examples_of_them(named):
    torch.manual_seed(0)
    model = randomised(TwoInputs())
    inputs: Any = (torch.zeros(2, 3, 16, 24), torch.zeros(2, 6))
    if named:
        inputs = dict(zip(("x", "numbers"), inputs), which=torch.tensor([1, 0]))
    pruner = Pruner(model, inputs=inputs).rank()
    for result in (pruner.cut(0.5), pruner.cut(target=("flops", 0.6)), pruner.cut(target=("params", 0.6))):
        assert result.difference < 1e-9 and not result.masks["row.1"].all() and not result.masks["a.bn"].all()
        cost = profile(result.slim, inputs=inputs)
        keep = pruner.graph.kept(result.masks)
        assert pruner.costs.remaining(keep) == (cost.parameters, cost.flops)
    assert pruner.milliseconds([model, result.slim])[0] > 0
    with pytest.raises(ValueError, match="TwoInputs takes 2 inputs .*without numbers; give inputs="):
        Pruner(model, inputs=inputs["x"] if named else inputs[:1])


# Images of one size only ----------------------------------------------------------------------------------------------

class Fixed(Backbone):
    """Its last layer wants maps of 5 x 5."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.last = nn.MaxPool2d(8), nn.Linear(8 * 5 * 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.flatten(self.pool(self.both(x)[1]), 1))


class Asserting(Backbone):
    """It takes images of 40 x 40 only."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[2] == 40, "the height must be 40")
        return super().forward(x)


@pytest.mark.parametrize("cls", [Fixed, Asserting])
def test_a_model_of_one_image_size_is_checked_at_that(cls):
    torch.manual_seed(0)
    model = randomised(cls())
    pruner = Pruner(model, 40).rank()
    for result in (pruner.cut(0.3), pruner.cut(target=("flops", 0.7))):
        assert result.difference < 1e-9 and result.achieved > 0.1
    wrong = Pruner(model, 48).rank()
    for asked in ({"percent": 0.3}, {"target": ("flops", 0.7)}):
        if asked.get("percent") or cls is Fixed:  # nothing is computed for a target, so nothing is asserted
            with pytest.raises(ValueError, match=r"not compute images of the shape \(., 3, 48, 48\) .*give the imgsz="):
                wrong.cut(**asked)


# What can't be cut is refused in one sentence -------------------------------------------------------------------------

def with_weight(make: Callable[[nn.Module], object]) -> nn.Module:
    model = with_forward(Backbone.forward)
    make(model.b.conv)
    return model


def holding(name: str, value: float) -> nn.Module:
    model = with_forward(Backbone.forward)
    model.register_buffer("mask", torch.zeros(4))
    dict((*model.named_parameters(), *model.named_buffers()))[name].detach()[0] = value
    return model


utils = nn.utils
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two inputs": (lambda: with_forward(lambda self, x, y: self.both(x + y)[1]), r"takes 2 inputs \(x, y\)"),
    "a dict": (lambda: with_forward(lambda self, x: self.both(x["image"])[1]), r"called as model\(images\)"),
    "a list": (lambda: with_forward(lambda self, x: self.both(x[0])[1]), r"called as model\(images\)"),
    "other images": (lambda: with_forward(lambda self, x: self.both(x[:, :1])[1]), "channels= that it takes"),
    "no tensor": (lambda: with_forward(lambda self, x: self.both(x)[:0]), "gives no tensor"),
    "a set": (lambda: with_forward(lambda self, x: set(self.both(x))), "can't trace Own"),
    "spectral_norm": (lambda: with_weight(utils.spectral_norm), "b.conv: .*remove_spectral_norm"),
    "weight_norm": (lambda: with_weight(utils.weight_norm), "b.conv: .*remove_weight_norm"),
    "parametrized spectral_norm": (lambda: with_weight(utils.parametrizations.spectral_norm),
                                   "b.conv: .*remove_parametrizations"),
    "parametrized weight_norm": (lambda: with_weight(utils.parametrizations.weight_norm),
                                 "b.conv: .*remove_parametrizations"),
    "prune's mask": (lambda: with_weight(lambda conv: utils.prune.l1_unstructured(conv, "weight", 0.3)),
                     r"b.conv: .*prune\.remove"),
    "a plain tensor": (lambda: with_weight(lambda conv: conv.__dict__.update(weight=conv._parameters.pop("weight"))),
                       "b.conv: its own code"),
    "NaN weights": (lambda: holding("b.conv.weight", float("nan")), "b.conv.weight holds values that are not finite"),
    "infinite weights": (lambda: holding("b.bn.bias", float("inf")), "b.bn.bias holds"),
    "NaN statistics": (lambda: holding("b.bn.running_var", float("nan")), "b.bn.running_var holds"),
    "outputs without bounds": (lambda: with_forward(lambda self, x: self.both(x)[1] / 0), "gives values that are not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_cut_is_said_in_one_line(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        Pruner(make(), 64).rank().cut(0.3)
    assert "\n" not in str(caught.value) and "misreads" not in str(caught.value)


def test_an_infinity_that_is_meant_is_none_of_the_weights():
    assert Pruner(holding("mask", -float("inf")), 64).rank().cut(0.3).difference < 1e-9


def test_a_slim_model_that_does_not_run_fails_the_check():
    model = with_forward(Backbone.forward)
    narrow = slim(model, {"b.bn": torch.arange(16) > 3})
    narrow.c.conv = nn.Conv2d(16, 8, 1)
    with pytest.raises(ValueError, match="holds a block that the channel graph misreads"):
        Pruner(model, 64).check_equivalence(model, narrow)


class Flipped(Backbone):
    """An operation over the channels that the graph does not know, behind every convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).flip(1)).roll(1, 1)).flip(1)


class Late(nn.Module):
    """Its only BatchNorm does not follow the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).roll(1, 1))


class Shortcut(nn.Module):
    """All of its channels are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Conv(3, 8, 1), Conv(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.b(x))


WHY = {"no BatchNorm": (nn.Sequential(nn.Conv2d(3, 8, 1)), Rules(), "no BatchNorm .*before fusing"),
       "strange operations": (Flipped(), Rules(), "operation 'flip'.*operation 'roll'"),
       "a strange operation before": (Late(), Rules(), "operation 'roll'"),
       "outputs": (Conv(3, 8, 1), Rules(), "outputs of the model"),
       "kept": (Backbone(), Rules(keep=("[ab].bn",)), r"kept whole \(\[ab\]\.bn\)"),
       "shortcuts": (Shortcut(), Rules(), "shortcuts couple")}


@pytest.mark.parametrize("name", WHY)
def test_where_nothing_may_go_it_is_said_why(name):
    model, rules, message = WHY[name]
    with pytest.raises(ValueError, match=f"no BatchNorm channel that may be cut: .*{message}"):
        Pruner(model, 64).rank(rules=rules)


# What can't be asked for ----------------------------------------------------------------------------------------------

NORM = "model.0.bn"


@pytest.mark.slow
@pytest.mark.parametrize("ask, words", [
    (lambda m: Pruner(m, 64).cut(0.5), "call rank() first"), (lambda m: Pruner(m, 64).ranking, "call rank() first"),
    (lambda m: Pruner(m, 64).sweep([0.5]), "call rank() first"),
    (lambda m: Pruner(m, 64).safe_threshold(), "call rank() first"),
    (lambda m: Pruner(m, 64).rank("magnitude"), "score must be one of auto, gamma"),
    *[(lambda m, target=target: Pruner(m, 64).rank().cut(target=target), "target must be one of params, flops")
      for target in ("flops", ("flops",), ("macs", 0.5), ("flops", 0), ("flops", 2), ("flops", float("nan")),
                     ("flops", "0.5"), ("params", -1), {"flops": 0.5})],
    *[(lambda m, percent=percent: Pruner(m, 64).rank().cut(percent), "percent must be at least 0")
      for percent in ("0.5", [0.5], torch.tensor(0.5), float("nan"))],
    *[(lambda m, imgsz=imgsz: Pruner(m, imgsz), "imgsz must be a whole number") for imgsz in (0, -1, "64", (64, 64))],
    (lambda m: Pruner(m, 64, channels=0), "channels must be a whole number"),
    (lambda m: Rules(min_channels=1.5), "whole numbers of at least 1"),
    (lambda m: Rules(round_to="8"), "whole numbers"),
    (lambda m: Pruner("best.pt"), "an nn.Module is needed, not str"),
    (lambda m: Pruner(nn.DataParallel(m)), "give the one inside: model.module"),
    (lambda m: Pruner(torch.compile(m)), "give the one inside: model._orig_mod"),
    (lambda m: Pruner(m.to("meta")), "has no values yet"), (lambda m: Pruner(nn.LazyConv2d(8, 1)), "has no values yet"),
    *[(lambda m, mask=mask: slim(m, {NORM: mask}, trace(m)), "a tensor of bool is needed")
      for mask in (torch.ones(8), torch.ones(8).int(), [True] * 8)],
    *[(lambda m, mask=mask: masked(m, {NORM: mask}), "a tensor of bool is needed")
      for mask in (torch.ones(8), torch.ones(8).int(), [True] * 8)],
    (lambda m: masked(m, {NORM: torch.ones(3).bool()}), "has 3 channels, the layer has 8"),
    (lambda m: masked(m, {"model.0.conv": torch.ones(8).bool()}), "no BatchNorm of that name"),
    (lambda m: masked(m, {"nowhere": torch.ones(8).bool()}), "no BatchNorm of that name")])
def test_what_can_not_be_asked_for_is_one_value_error(ask, words):
    """Before, some cut nearly everything (a target that is NaN), some were the AttributeError of an inner function."""
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        ask(yolo())
    assert "\n" not in str(refused.value)


def test_one_pattern_needs_no_tuple():
    assert Rules(keep="model.0.*") == Rules(keep=("model.0.*",))
