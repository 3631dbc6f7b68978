"""What the L1 rule and --target-sparsity add to a training step.

    python bench/overhead.py                     # about two minutes on two cores

A step is forward, loss, backward, clipping, optimizer and moving average; everything is measured in every step. Writes
bench/results/overhead.csv, medians of --runs steps.
"""
from __future__ import annotations

import time

import numpy as np
import torch
from columns import OVERHEAD, RESULTS, Row, formatted
from tqdm import tqdm

from models.yolo import Model, on_device
from training.loss import DetectionLoss, scale_gains
from training.optimizer import ModelEMA, build_optimizer
from utils.errors import run_cli
from utils.options import HelpfulParser, read_hyp
from utils.slimming import Pruner
from utils.slimming.graph import batch_norms
from utils.slimming.sparsity import GammaL1
from utils.slimming.target_sparsity import TargetSparsity
from utils.tables import text_table, write_csv


def measure(name: str, imgsz: int, batch: int, runs: int) -> Row:
    """A row: medians of milliseconds."""
    model = on_device(Model(f"{name}.yaml", nc=3), "cpu").train()
    loss = DetectionLoss(model, scale_gains(read_hyp({}), 3, 3, imgsz))
    optimizer, ema = build_optimizer(model, "AdamW", 1e-3, 0.9, 5e-4), ModelEMA(model)
    l1, target = penalties(model, ema.ema, imgsz)
    images = torch.rand(batch, 3, imgsz, imgsz).to(memory_format=torch.channels_last)
    targets = torch.rand(6 * batch, 6) * 0.3 + 0.3  # image, class, x, y, w, h
    targets[:, 0], targets[:, 1] = torch.arange(batch).repeat_interleave(6), torch.randint(0, 3, (6 * batch,))

    def backward() -> None:
        optimizer.zero_grad()
        loss(model(images), targets)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)

    def move() -> None:
        optimizer.step()
        ema.update()

    work = (("step", backward), ("l1", lambda: l1.add_to_gradients(1)), ("target", target.observe),
            ("step", move), ("target", lambda: target.shrink(0.4)))
    steps = []
    for _ in tqdm(range(runs + 2), desc=name, disable=None, leave=False):
        ms = {"step": 0.0, "l1": 0.0, "target": 0.0}
        for part, call in work:
            start = time.perf_counter()
            call()
            ms[part] += (time.perf_counter() - start) * 1000
        steps.append(ms)
    median = {part: float(np.median([ms[part] for ms in steps[2:]])) for part in steps[0]}  # two steps warm up
    return {"model": name, "imgsz": imgsz, "batch": batch, **median,
            "l1_share": median["l1"] / median["step"], "target_share": median["target"] / median["step"]}


def penalties(model: Model, average: Model, imgsz: int) -> tuple[GammaL1, TargetSparsity]:
    """Both rules as train_sparsity.py sets them up."""
    pruner = Pruner(model, imgsz)
    names, flops = pruner.graph.prunable_norms(), pruner.costs.flops_per_channel()
    norms, copies = (list(batch_norms(m, names).values()) for m in (model, average))
    costs, groups = [flops[name] for name in names], [pruner.graph.group[pruner.graph.norms[name]] for name in names]
    return GammaL1(norms, 1e-4, 100), TargetSparsity(norms, 0.5, copies, costs, groups, 16)


def main() -> None:
    """Measure all models."""
    parser = HelpfulParser(__doc__)
    parser.add_argument("--models", nargs="+", default=["yolov5n", "yolov5s"], help="yamls of models/")
    parser.add_argument("--imgsz", type=int, default=320, help="image size")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--runs", type=int, default=15, help="steps")
    opt = parser.parse_args()
    rows = [measure(name, opt.imgsz, opt.batch_size, opt.runs) for name in opt.models]
    write_csv(RESULTS / "overhead.csv", rows)
    print(text_table(*formatted(rows, OVERHEAD)))


if __name__ == "__main__":
    run_cli(main)
