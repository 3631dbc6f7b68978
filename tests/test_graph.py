"""The channel graph on blocks that are written for this test only: what may go, what must stay, and exact cuts."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from models.config import read_yaml
from models.yolo import Model
from tests.blocks import NETWORKS, Net, SqueezeExcite, random_masks, randomised
from tests.conftest import ROOT
from utils.slimming import compose_masks
from utils.slimming.cost import CostModel, profile
from utils.slimming.equivalence import EQUIVALENCE_BOUND, largest_difference
from utils.slimming.surgery import masked, resize_like, slim
from utils.slimming.tracing import trace
from utils.tables import write_csv

YAMLS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "models").rglob("*.yaml"))]
# With one channel left per group, their channels can go one by one: no single cut of the first model does that.
BECOME_DEPTHWISE = ("Grouped", "Multiplied")


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
    "Linears": (set(), set()),
    "LinearGate": (set(), set()),
    "Shuffled": (set(), set()),
    "Ghost": ({"block.few.bn"}, set()),  # its first six channels and one of the others
    "PerChannel": (set(), {"block.a.bn", "block.b.bn"}),
    "Branching": ({"block.b.bn"}, set()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_may_go_and_what_must_stay(name):
    graph = trace(net(name))
    stays, coupled = EXPECTED[name]
    assert {n for n, ids in graph.norms.items() if graph.frozen[ids].any()} == stays
    assert {n for n, ids in graph.norms.items() if graph.coupled[ids].any() and not graph.frozen[ids].any()} == coupled
    assert bool(graph.notes) == bool(stays)  # what is held back is said


def network(name: str, seed: int) -> tuple[nn.Module, int, int]:
    """(model, side of its images, its largest stride); a yaml is built at a quarter of the width."""
    if name in NETWORKS:
        return net(name, seed), 32, 16
    torch.manual_seed(seed)
    model = Model({**read_yaml(str(ROOT / name)), "width_multiple": 0.25, "depth_multiple": 0.33})
    return randomised(model, seed), 128, model.divisor


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Three random cuts of each network; with --cases so many, spread evenly over the networks and every yaml."""
    if metafunc.function is test_random_cuts:
        count = metafunc.config.getoption("cases")
        names = [*NETWORKS, *YAMLS] if count else list(NETWORKS)
        metafunc.parametrize("name, seed", [(names[i % len(names)], i) for i in range(count or 3 * len(names))])


@pytest.fixture(scope="module")
def differences(pytestconfig: pytest.Config) -> Iterator[dict[str, list[float]]]:
    """Network -> the largest relative difference of each case. Where all of --cases pass they become a table."""
    found: dict[str, list[float]] = {}
    yield found
    if sum(map(len, found.values())) == pytestconfig.getoption("cases"):
        write_csv(ROOT / "bench/results/properties.csv", [{"network": name, "cases": len(all_of),
                                                           "worst": f"{max(all_of):.1e}"}
                                                          for name, all_of in found.items()])


@pytest.mark.slow
def test_random_cuts(name, seed, differences):
    """Slim equals masked, the cost is as predicted, and two cuts equal one."""
    model, side, stride = network(name, seed)
    graph = trace(model)
    masks = random_masks(graph, seed)
    narrow = slim(model, masks)
    cost = profile(narrow, side)
    assert CostModel(model, graph, side).remaining(graph.kept(masks)) == (cost.parameters, cost.flops)
    again = random_masks(trace(narrow), seed + 1)
    twice = slim(narrow, again)
    if name not in BECOME_DEPTHWISE:
        once = slim(model, compose_masks(masks, again))
        for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    sizes = ((1, side, side), (3, side, side + stride))
    worst = max(largest_difference(masked(model, masks), narrow, sizes=sizes, seed=seed),
                largest_difference(masked(narrow, again), twice, sizes=sizes[:1], seed=seed))
    assert worst < EQUIVALENCE_BOUND
    differences.setdefault(name, []).append(worst)


def test_a_gate_with_batchnorm_goes_with_what_it_scales():
    model = randomised(Net(SqueezeExcite(norm=True)))
    graph = trace(model)
    masks = random_masks(graph, 1)
    assert torch.equal(masks["block.conv.bn"], masks["block.excite.bn"]) and not masks["block.conv.bn"].all()
    assert largest_difference(masked(model, masks), slim(model, masks)) < 1e-9


@pytest.mark.slow
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
