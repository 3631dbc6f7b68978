"""Rules of the channel graph: transposed convolutions, operations in space, gates, BatchNorms without a scale."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import Conv
from tests.blocks import Net, randomised
from tests.test_blocks import check_cut, look_trained, random_cut
from utils.slimming import Pruner, trace
from utils.slimming.compensation import absorb
from utils.slimming.equivalence import largest_difference
from utils.slimming.gamma_l1 import GammaL1
from utils.slimming.surgery import resize_like
from utils.slimming.target_sparsity import TargetSparsity

# Transposed convolutions ----------------------------------------------------------------------------------------------

class Up(nn.Module):
    """A transposed convolution between others, with a BatchNorm behind it or without."""

    def __init__(self, c2: int = 24, groups: int = 1, bias: bool = False, norm: bool = True):
        super().__init__()
        self.before = Conv(16, 16, 3)
        self.up = nn.ConvTranspose2d(16, c2, 3, 2, 1, 1, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(c2) if norm else nn.Identity()
        self.after = Conv(c2, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.up(input=self.before(x))))


UPS: dict[str, tuple[dict, set[str]]] = {  # arguments, and the BatchNorms that must stay whole
    "plain": ({}, set()),
    "plain with a bias": ({"bias": True}, set()),
    "without a norm": ({"bias": True, "norm": False}, set()),
    "depthwise": ({"c2": 16, "groups": 16}, set()),
    "depthwise with a bias": ({"c2": 16, "groups": 16, "bias": True}, set()),
    "depthwise with a bias, without a norm": ({"c2": 16, "groups": 16, "bias": True, "norm": False},
                                              {"block.before.bn"}),
    "grouped": ({"groups": 4}, set()),
    "a group for each input": ({"c2": 32, "groups": 16}, set()),
    "one output a group": ({"c2": 8, "groups": 8}, set()),
}


def up(name: str, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return randomised(Net(Up(**UPS[name][0])), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", UPS)
def test_transposed_convolutions_are_cut(name, seed):
    model = up(name, seed)
    graph = trace(model)
    assert {n for n, ids in graph.norms.items() if graph.frozen[ids].any()} == UPS[name][1]
    narrow, _ = check_cut(model, seed, 16)
    check_cut(narrow, seed + 1, 16)
    again = up(name)
    resize_like(again, narrow.state_dict())
    again.load_state_dict(narrow.state_dict())
    assert largest_difference(narrow, again, sizes=((1, 16, 16),)) < 1e-12
    assert bool(np.isfinite(Pruner(model, 16).rank("l1").ranking.scores).all())


def test_a_transposed_convolutions_filters_are_those_of_its_outputs():
    model = up("plain")
    with torch.no_grad():
        model.block.up.weight.mul_(torch.arange(24.0)[:, None, None])  # (in, out, k, k)
    ranking = Pruner(model, 16).rank("l1").ranking
    scores = ranking.scores[ranking.graph.group[ranking.graph.outputs["block.up"]]]
    assert scores[0] == 0 and scores[-1] > 5 * scores[1]


def test_absorb_leaves_a_transposed_convolution_alone():
    """What a constant input adds to its output depends on the pixel."""
    model = up("plain").eval()
    graph = trace(model)
    masks = random_cut(graph, 0)
    assert not masks["block.before.bn"].all()
    repaired = absorb(model, graph, masks, [torch.rand(2, 3, 16, 16)])
    assert torch.equal(repaired.block.norm.running_mean, model.block.norm.running_mean)
    assert not torch.equal(repaired.block.after.bn.running_mean, model.block.after.bn.running_mean)


# Other operations -----------------------------------------------------------------------------------------------------

class Shuffles(nn.Module):
    """Pixels become channels, channels change places, channels become pixels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Conv(64, 32, 1), Conv(32, 32, 1), Conv(8, 16, 1)
        self.down, self.mix, self.up = nn.PixelUnshuffle(2), nn.ChannelShuffle(4), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.mix(self.a(self.down(x))))
        return self.c(torch.channel_shuffle(self.up(x), 2) * torch.pixel_shuffle(x, upscale_factor=2))


class Gates(nn.Module):
    """A gate from a sum of two calls of one convolution, and a gate that is the same for all channels."""

    def __init__(self):
        super().__init__()
        self.before, self.hidden, self.gate = Conv(16, 16, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.place, self.after = Conv(16, 1, 1), Conv(16, 16, 1)

    def weights(self, x: Tensor) -> Tensor:
        return self.gate(self.hidden(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        pooled = x.amax((2, 3), keepdim=True), x.mean(3, keepdim=True).mean(2, keepdim=True)
        gated = x * (self.weights(pooled[0]) + self.weights(pooled[1])).sigmoid()
        return self.after(gated * self.place(x).sigmoid())


class Turned(nn.Module):
    """Rows and columns pooled, laid in a row, taken apart again (as in coordinate attention)."""

    def __init__(self):
        super().__init__()
        self.before, self.both, self.after = Conv(16, 16, 3), Conv(16, 12, 1), Conv(12, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        h, w = x.shape[2:]
        rows, columns = x.mean(3, keepdim=True), x.mean(-2, keepdim=True).permute(0, 1, 3, 2)
        rows, columns = self.both(torch.cat((rows, columns), 2)).split([h, w], 2)
        return self.after(rows * columns.transpose(-1, -2))


class Mixed(nn.Module):
    """A concat of channels that a BatchNorm can make 0 and of others that none can, without mixing the two up."""

    def __init__(self):
        super().__init__()
        self.norm, self.bare, self.after = Conv(16, 16, 1), nn.Conv2d(16, 16, 1), Conv(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cat((self.norm(x), self.bare(x)), 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("network", [Shuffles, Gates, Turned, Mixed])
def test_rules_of_the_graph(network, seed):
    torch.manual_seed(seed)
    model = randomised(Net(network()), seed)
    graph = trace(model)
    one_channel = {"block.place.bn"} & graph.norms.keys()
    assert {n for n, ids in graph.norms.items() if graph.frozen[ids].any()} == one_channel
    assert not graph.notes and not graph.coupled.any()
    check_cut(model, seed, 16)


def test_one_block_has_one_note_which_says_where_it_is():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = Conv(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            return x.flip(1) + x.roll(1, 1) * x.cumsum(1)

    note, = trace(Net(Strange())).notes
    assert "'flip'" in note and "block (Strange)" in note


# BatchNorm without scale and shift ------------------------------------------------------------------------------------

class Unscaled(nn.Module):
    """A BatchNorm that can't make a channel 0, behind a convolution and behind a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16, affine=False)
        self.again, self.second, self.after = Conv(16, 16, 3), nn.BatchNorm2d(16, affine=False), Conv(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.second(self.again(self.norm(self.conv(x)))))


def unscaled() -> Net:
    torch.manual_seed(0)
    return look_trained(Net(Unscaled()))


def test_a_batchnorm_without_scale_keeps_what_it_reads_and_says_so():
    graph = trace(unscaled())
    assert set(graph.norms) == {"stem.bn", "block.again.bn", "block.after.bn"}
    assert {n for n, ids in graph.norms.items() if graph.frozen[ids].any()} == {"block.again.bn"}
    assert len(graph.notes) == 2 and all("scale" in note for note in graph.notes)
    assert "block.norm" in graph.notes[0] and "block.second" in graph.notes[1]


@pytest.mark.parametrize("seed", range(2))
def test_the_rest_of_such_a_model_is_cut(seed):
    check_cut(unscaled(), seed, 16)


def test_such_a_model_through_sparsity_ranking_and_cut():
    model = unscaled()
    pruner = Pruner(model, 16).rank("gamma-l1")
    names = pruner.graph.prunable_norms()
    assert names == ["stem.bn", "block.after.bn"]
    norms = [pruner.norms[name] for name in names]
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    GammaL1(norms, 0.01, 1).add_to_gradients(0)
    target = TargetSparsity(norms, 0.5)
    target.observe()
    target.shrink(1.0)
    result = Pruner(model, 16).rank().cut(0.5)
    assert result.difference < 1e-9 and result.achieved == 0.5 and len(result.notes) == 2


def test_absorb_does_not_look_through_a_batchnorm_without_scale():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1, bias=False)
            self.first, self.second = nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.conv(x)))

    model = look_trained(Net(Both())).eval()
    graph = trace(model)
    masks = {"stem.bn": torch.arange(16) > 7}
    repaired = absorb(model, graph, masks, [torch.rand(2, 3, 16, 16)])
    assert torch.equal(repaired.block.second.running_mean, model.block.second.running_mean)


# BatchNorms and convolutions of others --------------------------------------------------------------------------------

class Renamed(nn.BatchNorm2d):
    """PyTorch's under another name."""


class NormAct(nn.BatchNorm2d):
    """BatchNorm, dropout, activation."""

    def __init__(self, channels: int, act: nn.Module | None = None):
        super().__init__(channels)
        self.drop, self.act = nn.Dropout2d(0.1), act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Written(NormAct):
    """The same, with PyTorch's own lines written out, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "images")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        x = F.batch_norm(x, *statistics, self.weight, bias=self.bias, training=self.training, eps=self.eps)
        return self.act(self.drop(x))


class Scaled(nn.BatchNorm2d):
    """A second scale."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain[:, None, None]


class Centred(nn.BatchNorm2d):
    """The scale is 1 + gamma: a gamma of 0 makes no channel 0."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight + 1, self.bias, self.training)


class Swapped(nn.BatchNorm2d):
    """It multiplies by what is called its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight, self.training)


class Branching(nn.BatchNorm2d):
    """It can't be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else x


class RenamedConv(nn.Conv2d):
    """PyTorch's under another name."""


class Standardised(nn.Conv2d):
    """It convolves with a function of its weights."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Padded(nn.Conv2d):
    """It can't be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1)) if x.shape[-1] % 2 else x)


class Own(nn.Module):
    """A convolution and a BatchNorm between others."""

    def __init__(self, conv: type[nn.Conv2d] = nn.Conv2d, norm: nn.Module | None = None):
        super().__init__()
        self.before, self.conv, self.norm = Conv(16, 16, 1), conv(16, 12, 1), norm or nn.BatchNorm2d(12)
        self.after = Conv(12, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.conv(self.before(x))))


# Name -> the block, and the BatchNorms of before and norm that can be cut.
OWN: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "renamed": (lambda: Own(norm=Renamed(12)), {"before.bn", "norm"}),
    "with an activation": (lambda: Own(norm=NormAct(12)), {"before.bn", "norm"}),
    "written out": (lambda: Own(norm=Written(12)), {"before.bn", "norm"}),
    "with a gate": (lambda: Own(norm=NormAct(12, nn.Sigmoid())), {"before.bn"}),
    "with a strange activation": (lambda: Own(norm=Written(12, nn.Softplus())), {"before.bn"}),
    "with two scales": (lambda: Own(norm=Scaled(12)), {"before.bn", "norm"}),
    "with 1 + gamma": (lambda: Own(norm=Centred(12)), {"before.bn"}),
    "swapped": (lambda: Own(norm=Swapped(12)), {"before.bn"}),
    "with a branch": (lambda: Own(norm=Branching(12)), {"before.bn"}),
    "renamed convolution": (lambda: Own(RenamedConv), {"before.bn", "norm"}),
    "standardised convolution": (lambda: Own(Standardised), set()),
    "convolution with a branch": (lambda: Own(Padded), set())}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", OWN)
def test_layers_of_others_are_cut_where_that_is_exact_and_stay_whole_elsewhere(name, seed):
    make, free = OWN[name]
    torch.manual_seed(seed)
    model = randomised(Net(make()), seed)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = trace(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {n.removeprefix("block.") for n, ids in graph.norms.items() if not graph.frozen[ids].any()} == {
        *free, "stem.bn", "after.bn"}
    assert bool(graph.notes) == ("norm" not in free)
    narrow, _ = check_cut(model, seed, 16)
    check_cut(narrow, seed + 1, 16)
