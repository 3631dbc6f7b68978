"""The pruning engine on random cuts of every yaml of the repository and of the networks of tests/blocks.py.

    python bench/properties.py                   # 1,000 cases, about 15 minutes on two cores

A case cuts random channels: none, any, or all but one of a layer. The slim model must compute what the masked one does,
in float64 at several sizes, and cost what was predicted. It is then cut again, which must give what one cut gives. The
first case that fails ends the script with exit code 1. Writes bench/results/properties.csv.
"""
from __future__ import annotations

import sys
from math import inf

import torch
from columns import RESULTS, ROOT
from torch import nn
from tqdm import tqdm

from models.config import read_yaml
from models.yolo import Model
from tests.blocks import NETWORKS, Net, random_masks, randomised
from utils.errors import run_cli
from utils.options import HelpfulParser
from utils.slimming import compose_masks, masked, slim, trace
from utils.slimming.cost import CostModel, profile
from utils.slimming.equivalence import EQUIVALENCE_BOUND, largest_difference
from utils.tables import write_csv

# With one channel left per group, their channels can go one by one: no single cut of the first model does that.
BECOME_DEPTHWISE = ("Grouped", "Multiplied")


def network(name: str, seed: int) -> tuple[nn.Module, int, int]:
    """(model, side of its images, its largest stride); a yaml is built at a quarter of the width."""
    torch.manual_seed(seed)
    if name in NETWORKS:
        return randomised(Net(NETWORKS[name]()), seed), 32, 16
    model = Model({**read_yaml(name), "width_multiple": 0.25, "depth_multiple": 0.33})
    return randomised(model, seed), 128, max(int(model.stride.max()), 32)  # P34's backbone goes down to 32, too


def check(name: str, seed: int) -> float:
    """The largest relative difference of a case; infinite where the predicted cost or the second cut is wrong."""
    model, side, stride = network(name, seed)
    graph = trace(model)
    masks = random_masks(graph, seed)
    narrow = slim(model, masks)
    cost = profile(narrow, side)
    if CostModel(model, graph, side).remaining(graph.kept(masks)) != (cost.parameters, cost.flops):
        return inf
    again = random_masks(trace(narrow), seed + 1)
    twice = slim(narrow, again)
    if name not in BECOME_DEPTHWISE:
        weights = (m.state_dict().values() for m in (twice, slim(model, compose_masks(masks, again))))
        if not all(torch.equal(a, b) for a, b in zip(*weights, strict=True)):
            return inf
    sizes = ((1, side, side), (3, side, side + stride))
    return max(largest_difference(masked(model, masks), narrow, sizes=sizes, seed=seed),
               largest_difference(masked(narrow, again), twice, sizes=sizes[:1], seed=seed))


def main() -> None:
    """Check all cases; a row per network."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="cases, spread evenly over the networks")
    opt = parser.parse_args()
    names = [*NETWORKS, *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "models").rglob("*.yaml")))]
    found: dict[str, list[float]] = {}
    for i in tqdm(range(opt.cases), disable=None):
        name = names[i % len(names)]
        difference = check(name, i)
        found.setdefault(name, []).append(difference)
        if not difference < EQUIVALENCE_BOUND:
            print(f"{name}, seed {i}: difference {difference:.1e}")
            sys.exit(1)
    write_csv(RESULTS / "properties.csv", [{"network": name, "cases": len(all_of), "worst": f"{max(all_of):.1e}"}
                                           for name, all_of in found.items()])
    worst = max(map(max, found.values()))
    print(f"{opt.cases} cases over {len(names)} networks; largest relative difference {worst:.1e}")


if __name__ == "__main__":
    run_cli(main)
