"""The pruning engine on random cuts of every yaml of the repository and of the blocks of tests/blocks.py: slim must equal masked.

    python bench/properties.py                   # 1,000 cases, about ten minutes on two cores

Each case cuts channels at random (nothing, anything, or all but one channel a layer), compares in float64 at several sizes and batch sizes, cuts
the result again, compares that, and checks the predicted cost. Ends with exit code 1 at the first case that fails.
"""
from __future__ import annotations

import sys

import numpy as np
import torch
from common import ROOT, write_csv
from torch import nn
from tqdm import tqdm

from models.yolo import Model, read_yaml
from tests.blocks import BLOCKS, Net, random_masks, randomised
from utils.errors import run_cli
from utils.options import HelpfulParser
from utils.slimming.cost import CostModel, profile
from utils.slimming.graph import trace
from utils.slimming.surgery import compose_masks, keep_ids, largest_difference, masked, slim

BOUND = 1e-9
BECOME_DEPTHWISE = ("Grouped", "Multiplied")  # once one place a group is left: then channels go alone, which no single cut of the first model does


def network(name: str, seed: int) -> tuple[nn.Module, int]:
    """(model, its largest stride) of a block's name or of a yaml, which is built at a quarter of the width."""
    torch.manual_seed(seed)
    if name in BLOCKS:
        return randomised(Net(BLOCKS[name]()), seed), 16
    model = Model({**read_yaml(name), "width_multiple": 0.25, "depth_multiple": 0.33})
    return randomised(model, seed), max(int(model.stride.max()), 32)  # the backbone of P34 goes down to 32 all the same


def check(name: str, seed: int) -> float:
    """The largest difference of a case; infinite where a cost or a second round is wrong."""
    model, stride = network(name, seed)
    graph = trace(model)
    masks = random_masks(graph, seed)
    narrow = slim(model, masks)
    side = 128 if name not in BLOCKS else 32
    sizes = ((1, side, side), (3, side, side + stride))
    worst = largest_difference(masked(model, masks), narrow, sizes=sizes, seed=seed)
    cost = profile(narrow, side)
    if CostModel(model, graph, side).remaining(keep_ids(graph, masks)) != (cost.parameters, cost.flops):
        return float("inf")
    again = random_masks(trace(narrow), seed + 1)
    twice = slim(narrow, again)
    same = True
    if name not in BECOME_DEPTHWISE:
        direct = slim(model, compose_masks(masks, again))
        same = all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), direct.state_dict().values(), strict=True))
    return max(worst, largest_difference(masked(narrow, again), twice, sizes=sizes[:1], seed=seed)) if same else float("inf")


def main() -> None:
    """All cases, a row a network in bench/results/properties.csv."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="cases, spread evenly over the networks")
    opt = parser.parse_args()
    names = [*BLOCKS, *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "models").rglob("*.yaml")))]
    worst: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(opt.cases), disable=None):
        name = names[i % len(names)]
        worst[name].append(check(name, i))
        if not worst[name][-1] < BOUND:
            print(f"{name}, seed {i}: difference {worst[name][-1]:.1e}")
            sys.exit(1)
    write_csv(ROOT / "bench" / "results" / "properties.csv", [{"network": n, "cases": len(v), "worst": f"{max(v):.1e}"} for n, v in worst.items() if v])
    print(f"{opt.cases} cases over {len(names)} networks; largest relative difference {np.max([max(v) for v in worst.values() if v]):.1e}")


if __name__ == "__main__":
    run_cli(main)
