"""What a cut and its check copy: little, and nothing that another model holds."""
from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from models.yolo import Model
from tests.blocks import randomised
from utils.modules import deep_copy
from utils.slimming import Pruner, slim
from utils.slimming.equivalence import outputs
from utils.slimming.surgery import masked, masked_view


def small() -> Model:
    torch.manual_seed(0)
    return randomised(Model({**Model("yolov5n.yaml").yaml, "width_multiple": 0.125}, nc=2)).train()


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


@pytest.mark.slow
def test_the_models_of_a_cut_share_no_memory_and_change_nothing():
    model = small()
    before = deepcopy(model.state_dict())
    result = Pruner(model, 64).rank().cut(percent=0.5)
    assert result.masked is result.masked
    parts = [storages(m) for m in (model, result.masked, result.slim)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for m in (model, result.masked, result.slim) for module in m.modules())
    assert all(p.requires_grad for m in (result.masked, result.slim) for p in m.parameters())


@pytest.mark.slow
def test_a_view_of_the_masked_model_has_its_own_gammas_only():
    model = small()
    masks = Pruner(model, 64).rank().preview(0.5)[0]
    view, copied = masked_view(model, masks), masked(model, masks)
    assert all(torch.equal(a, b) for a, b in zip(view.state_dict().values(), copied.state_dict().values()))
    own = storages(view) - storages(model)
    assert own == {t.untyped_storage().data_ptr() for name in masks
                   for t in (view.get_submodule(name).weight, view.get_submodule(name).bias)}
    assert storages(slim(model, masks)).isdisjoint(storages(model))


class _Odd(nn.Module):
    """Uses another module's weights, its own parameter, a type and a buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2, batch_first=True)
        self.w = nn.Parameter(torch.rand(2))
        self.register_buffer("table", torch.rand(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = nn.functional.conv2d(x, self.conv.weight.to(x.dtype), self.conv.bias, 2)
        flat = (y * self.w.softmax(0)[0]).flatten(2).transpose(1, 2).to(self.w.dtype)
        zeros = torch.zeros(flat.shape[1], 8)
        return {"a": self.attention(flat + zeros, flat, flat)[0] * self.table, "b": torch.cat([y, y.relu()], 1)}


@pytest.mark.slow
def test_the_check_computes_what_a_float64_copy_would():
    sizes = ((1, 64, 64), (2, 64, 96))
    for model in (small(), _Odd().train()):
        copied, generator = deepcopy(model).double().eval(), torch.Generator().manual_seed(3)
        before = deepcopy(model.state_dict())
        with torch.no_grad():
            wanted = [copied(torch.rand(n, 3, h, w, dtype=torch.float64, generator=generator)) for n, h, w in sizes]
        flat = [y for out in wanted for y in (out.values() if isinstance(out, dict) else (out[0], *out[1]))]
        found = outputs(model, 3, sizes, 3)
        assert [y.dtype for y in found] == [torch.float64] * len(flat)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12 * float(b.abs().max())) for a, b in zip(found, flat))
        assert all(module.training for module in model.modules())
        assert all(torch.equal(value, before[name]) and value.dtype == before[name].dtype
                   for name, value in model.state_dict().items())


class _Own(nn.Module):
    """A module that says itself how it is copied."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("make", [small, lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.ReLU())])
def test_a_copy_is_that_of_deepcopy(make):
    model = make()
    layer, kept = next(m for m in model.modules() if list(m.parameters(recurse=False))), _Own()
    layer.register_forward_hook(lambda module, args, output: output * 2)
    model.again, model.own, model.none = layer, kept, None  # a layer under two names
    model.note = {"layer": layer, "number": [1, 2]}
    one = deep_copy(model, {})
    assert one.again is one.note["layer"] is not layer and one.own is kept and one.none is None
    assert one.again is dict(one.named_modules())[{m: n for n, m in model.named_modules()}[layer]]
    assert [*one.state_dict()] == [*model.state_dict()] and one.note["number"] is not model.note["number"]
    for key, value in one.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]) and value.data_ptr() != model.state_dict()[key].data_ptr()
    assert one.training == model.training and len(one.again._forward_hooks) == 1
    if make is not small:  # a Model's deepcopy is ours
        two = deepcopy(model)
        assert [(k, type(v)) for k, v in vars(one).items()] == [(k, type(v)) for k, v in vars(two).items()]
    one.again.weight.data.zero_()
    assert bool(layer.weight.any())
