"""What the sparsity hook adds to a training step: the L1 rule and --target-sparsity, relative to forward, loss, backward, optimizer and average.

    python bench/overhead.py                     # about two minutes on two cores

Medians of --runs steps, all parts measured in every one of them. Writes bench/results/overhead.csv.
"""
from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from common import ROOT, write_csv
from tqdm import tqdm

from models.yolo import Model, on_device
from utils.errors import run_cli
from utils.training.loss import DetectionLoss, scale_gains
from utils.training.optimizer import ModelEMA, build_optimizer
from utils.options import HelpfulParser, read_hyp
from utils.slimming.cost import CostModel
from utils.slimming.graph import trace
from utils.slimming.report import table
from utils.slimming.sparsity import GammaL1, TargetSparsity


def timed(work: Callable[[], object], samples: list[float]) -> None:
    """Append the milliseconds that `work` takes."""
    start = time.perf_counter()
    work()
    samples.append((time.perf_counter() - start) * 1000)


def measure(name: str, imgsz: int, batch: int, runs: int) -> dict[str, object]:
    """A row: the step's and the hooks' medians in milliseconds."""
    model = on_device(Model(f"{name}.yaml", nc=3), "cpu").train()
    hyp = read_hyp({})
    loss = DetectionLoss(model, scale_gains(hyp, 3, 3, imgsz))
    optimizer, ema = build_optimizer(model, "AdamW", 1e-3, 0.9, 5e-4), ModelEMA(model)
    graph, modules, averaged = trace(model), dict(model.named_modules()), dict(ema.ema.named_modules())
    names = graph.prunable_norms()
    norms, costs = [modules[n] for n in names], CostModel(model, graph, imgsz).flops_per_channel()
    l1 = GammaL1(norms, 1e-4, 100)
    target = TargetSparsity(norms, 0.5, [averaged[n] for n in names], [costs[n] for n in names], [graph.group[graph.norms[n]] for n in names], 16)
    images = torch.rand(batch, 3, imgsz, imgsz).to(memory_format=torch.channels_last)
    targets = torch.cat([torch.cat((torch.full((6, 1), float(i)), torch.randint(0, 3, (6, 1)).float(), torch.rand(6, 4) * 0.3 + 0.3), 1) for i in range(batch)])
    samples: dict[str, list[float]] = {"step": [], "l1": [], "target": []}

    def backward() -> None:
        optimizer.zero_grad()
        loss(model(images), targets)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)

    def move() -> None:
        optimizer.step()
        ema.update()

    for _ in tqdm(range(runs + 2), desc=name, disable=None, leave=False):
        parts: list[float] = []
        timed(backward, parts)
        timed(lambda: l1.add_to_gradients(1), samples["l1"])
        observed: list[float] = []
        timed(target.observe, observed)
        timed(move, parts)
        timed(lambda: target.shrink(0.4), observed)
        samples["step"].append(sum(parts))
        samples["target"].append(sum(observed))
    row = {key: float(np.median(values[2:])) for key, values in samples.items()}
    return {"model": name, "imgsz": imgsz, "batch": batch, **row, "l1_share": row["l1"] / row["step"], "target_share": row["target"] / row["step"]}


def main() -> None:
    """All models."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--models", nargs="+", default=["yolov5n", "yolov5s"], help="yamls of models/")
    parser.add_argument("--imgsz", type=int, default=320, help="image size")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step")
    parser.add_argument("--runs", type=int, default=15, help="steps")
    opt = parser.parse_args()
    rows = [measure(name, opt.imgsz, opt.batch_size, opt.runs) for name in opt.models]
    write_csv(ROOT / "bench" / "results" / "overhead.csv", rows)
    print(table([(r["model"], f"{r['step']:.0f}", f"{r['l1']:.2f}", f"{r['l1_share']:.2%}", f"{r['target']:.2f}", f"{r['target_share']:.2%}") for r in rows],
                ("model", "step, ms", "--sr, ms", "of a step", "--target-sparsity, ms", "of a step")))


if __name__ == "__main__":
    run_cli(main)
