"""The least-squares repair of a cut."""
from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from models.common import Conv
from models.yolo import Model
from tests.blocks import randomised
from utils.slimming import Pruner, Rules, slim, trace
from utils.slimming.reconstruction import reconstruct, ridge_regression, sampled_patches
from utils.slimming.surgery import masked


@pytest.mark.parametrize("kernel, stride, padding, dilation",
                         [(1, 1, 0, 1), (3, 2, 1, 1), ((3, 1), (1, 2), (0, 2), 1), (3, 1, 2, 2), (6, 2, 2, 1)])
def test_patches_times_the_filters_are_the_outputs(kernel, stride, padding, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, bias=False)
    x = torch.rand(4, 3, 12, 17)
    with torch.no_grad():
        y = conv(x)
    chosen = torch.randint(y[:, 0].numel(), (50,))
    positions = torch.unravel_index(chosen, y[:, 0].shape)
    patches = sampled_patches(conv, x, positions)
    assert torch.allclose(patches.flatten(1) @ conv.weight.detach().flatten(1).T,
                          y.permute(0, 2, 3, 1)[positions], atol=1e-5)


def test_the_regression_finds_what_made_the_data_and_gives_silent_inputs_nothing():
    torch.manual_seed(0)
    x, truth = torch.randn(2000, 6), torch.randn(6, 3)
    x[:, 4] = 0
    found = ridge_regression(x, x @ truth)
    assert torch.allclose(found[:4], truth[:4], rtol=0.05, atol=0.05) and not found[4].any()


def test_a_channel_that_others_equal_is_not_missed():
    """Channels come in pairs: one of each pair can go without a loss, if the other one takes over."""
    torch.manual_seed(0)
    net = randomised(nn.Sequential(Conv(3, 8, 3), Conv(8, 6, 3), nn.Conv2d(6, 4, 1))).train()
    with torch.no_grad():
        for tensor in (net[0].conv.weight, *net[0].bn.state_dict().values()):
            if tensor.dim():
                tensor[4:] = tensor[:4]
    before = deepcopy(net.state_dict())
    masks, images, other = {"0.bn": torch.arange(8) < 4}, torch.rand(8, 3, 32, 32), torch.rand(4, 3, 32, 32)
    repaired = slim(reconstruct(net, trace(net), masks, images), masks)
    assert net.training and all(value.equal(net.state_dict()[key]) for key, value in before.items())
    net.eval()
    with torch.no_grad():
        truth = net(other)
        lost, left = (float((m(other) - truth).abs().mean()) for m in (masked(net, masks), repaired))
    assert left < 0.05 * lost


@pytest.mark.slow
def test_a_yolov5_is_nearer_to_what_it_was_and_the_cut_stays_exact():
    torch.manual_seed(0)
    model = randomised(Model("yolov5n.yaml", nc=3)).eval()
    pruner = Pruner(model, imgsz=64)
    result = pruner.rank("l1", Rules(min_share=0.25)).cut(0.3)
    images, other = torch.rand(8, 3, 96, 96), torch.rand(4, 3, 96, 96)
    refitted = reconstruct(model, pruner.graph, result.masks, images)
    with torch.no_grad():
        truth = model(other)[0]
        lost, left = (float((m(other)[0] - truth).abs().mean()) for m in (result.masked, refitted))
    assert left < 0.7 * lost
    assert pruner.check_equivalence(refitted, slim(refitted, result.masks, pruner.graph)) < 1e-9


class Reused(nn.Module):
    """A convolution that runs twice, a grouped one and a transposed one, which keep their weights."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = Conv(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.grouped, self.up = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x):
        return self.up(self.grouped(self.twice(self.twice(self.first(x)))))


def test_layers_that_cannot_be_refitted_keep_their_weights():
    net = randomised(Reused()).eval()
    new = reconstruct(net, trace(net), {}, torch.rand(2, 3, 16, 16))
    for name in ("twice", "grouped", "up"):
        assert getattr(new, name).weight.equal(getattr(net, name).weight)
