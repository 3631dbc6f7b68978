"""The channel graph on blocks that are written for this test only: what may go, what must stay, and exact cuts."""
from __future__ import annotations

import pytest
import torch

from tests.blocks import NETWORKS, Net, SqueezeExcite, random_masks, randomised
from utils.slimming.cost import CostModel, profile
from utils.slimming.equivalence import largest_difference
from utils.slimming.surgery import masked, resize_like, slim
from utils.slimming.tracing import trace


def net(name: str, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return randomised(Net(NETWORKS[name]()), seed)


# BatchNorms that must stay whole, and those whose channels an addition couples to others.
# The rest goes channel by channel.
EXPECTED: dict[str, tuple[set[str], set[str]]] = {
    "SqueezeExcite": (set(), set()),
    "LeakyGate": ({"block.conv.bn", "block.gate.bn", "block.reader.bn"}, set()),
    "Separable": (set(), set()),
    "C2f": (set(), {"block.cv1.bn", "block.m.0.cv2.bn", "block.m.1.cv2.bn"}),
    "FixedSplit": ({"block.cv1.bn"}, set()),
    "WeightedAdd": (set(), {"block.a.bn", "block.b.bn"}),
    "Attention": ({"stem.bn", "block.qkv.bn", "block.out.bn"}, set()),  # its code asks how many channels there are
    "Unknown": ({"block.a.bn"}, set()),
    "Grouped": (set(), set()),  # but places of the groups go together
    "Multiplied": (set(), set()),  # all channels are one place
    "Cropped": (set(), {"block.a.bn", "block.b.bn"}),
    "Twice": (set(), set()),
    "ByKeyword": (set(), set()),
    "Bare": ({"block.b.bn"}, set()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_may_go_and_what_must_stay(name):
    graph = trace(net(name))
    stays, coupled = EXPECTED[name]
    assert {n for n, ids in graph.norms.items() if graph.frozen[ids].any()} == stays
    assert {n for n, ids in graph.norms.items() if graph.coupled[ids].any() and not graph.frozen[ids].any()} == coupled
    assert bool(graph.notes) == bool(stays)  # what is held back is said


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", NETWORKS)
def test_slim_equals_masked(name, seed):
    model = net(name, seed)
    graph = trace(model)
    masks = random_masks(graph, seed)
    narrow = slim(model, masks)
    assert largest_difference(masked(model, masks), narrow, sizes=((1, 16, 16), (3, 20, 24))) < 1e-9
    cost = profile(narrow, 32)
    assert CostModel(model, graph, 32).remaining(graph.kept(masks)) == (cost.parameters, cost.flops)
    assert slim(narrow, {}) is not narrow and trace(narrow).norms.keys() == graph.norms.keys()  # and can be cut again


def test_a_gate_with_batchnorm_goes_with_what_it_scales():
    model = randomised(Net(SqueezeExcite(norm=True)))
    graph = trace(model)
    masks = random_masks(graph, 1)
    assert torch.equal(masks["block.conv.bn"], masks["block.excite.bn"]) and not masks["block.conv.bn"].all()
    assert largest_difference(masked(model, masks), slim(model, masks)) < 1e-9


@pytest.mark.parametrize("name", ["Grouped", "Multiplied"])
def test_a_grouped_convolution_that_has_become_depthwise_is_rebuilt_from_its_shapes(name):
    """Once one place a group is left its channels go alone; the file knows shapes only."""
    model, narrow = net(name), net(name)
    for seed in range(8):
        masks = random_masks(trace(narrow), seed)
        narrow = slim(narrow, masks)
        again = net(name)
        resize_like(again, narrow.state_dict())
        again.load_state_dict(narrow.state_dict())
        assert largest_difference(narrow, again, sizes=((1, 16, 16),)) < 1e-12
    assert profile(narrow, 32).parameters < profile(model, 32).parameters


def test_groups_keep_equal_counts():
    model = net("Grouped")
    masks = random_masks(trace(model), 4)
    narrow = slim(model, masks)
    grouped = narrow.get_submodule("block.0.conv")
    assert grouped.groups == 4 and grouped.in_channels % 4 == 0 == grouped.out_channels % 4
    assert grouped.out_channels < 24
