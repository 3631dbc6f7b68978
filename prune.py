"""Cut the channels with the smallest BatchNorm scales and write the slim model.

    python prune.py --percent 0.5                                # the newest sparsity run
    python prune.py --weights runs/train/exp/weights/last.pt --percent 0.5 --data data/VOC.yaml

Prints what it cut, proves that the slim model computes what the masked one does, and measures accuracy before and
after. The next step is: python finetune_pruned.py
"""
from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from models import checkpoint
from models.yolo import Model, fused, on_device, read_yaml
from utils.data_config import read_data
from utils.distributed import select_device
from utils.errors import UserError, run_cli
from utils.files import command_line, new_run_folder, write_json
from utils.options import HelpfulParser, add_common, resolve
from utils.slimming.cost import latency, profile
from utils.slimming.graph import ChannelGraph, trace
from utils.slimming.pictures import plot_gammas, plot_kept
from utils.slimming.report import cost_rows, cost_table, layer_rows, layer_table, stage_table
from utils.slimming.selection import Limit, gammas, limit, select
from utils.slimming.surgery import compose, largest_difference, masked, slim
from val import evaluate, validation_loader

OUTPUT = "pruned_model.pt"
PROOF_BOUND = 1e-9


@dataclass
class Cut:
    """A chosen and proven cut."""

    graph: ChannelGraph
    masks: dict[str, torch.Tensor]
    dense: Model
    masked: Model
    slim: Model
    limit: Limit
    threshold: float    # the largest |gamma| that was cut
    achieved: float     # share of the prunable channels that was cut
    proof: float        # largest relative difference of masked and slim


def cut(model: Model, percent: float, min_channels: int) -> Cut:
    """Choose, cut and prove. Raises UserError where nothing can be cut or the proof fails."""
    graph = trace(model)
    prunable = graph.prunable()
    total = sum(int(mask.sum()) for mask in prunable.values())
    if not total:
        raise UserError("this model has no BatchNorm channel that may be cut (a fused or exported model? use the training checkpoint)")
    bound = limit(graph, model)
    masks = select(graph, model, percent, min_channels)
    modules = dict(model.named_modules())
    gone = torch.cat([modules[n].weight.detach().abs()[~m] for n, m in masks.items()])  # type: ignore[operator, union-attr]
    narrow = slim(model, masks)
    assert isinstance(narrow, Model)
    narrow.masks = compose(model.masks, masks)
    zeroed = masked(model, masks)
    assert isinstance(zeroed, Model)
    s = max(int(model.stride.max()), 32)
    proof = largest_difference(zeroed, narrow, model.yaml["ch"], sizes=((2 * s, 2 * s), (2 * s, 3 * s)))
    if not proof < PROOF_BOUND:
        raise UserError(f"the slim model differs from the masked one by {proof:.1e} (relative; rounding is below {PROOF_BOUND:.0e}); nothing was "
                        "written. This model holds a block that the channel graph misreads")
    return Cut(graph, masks, model, zeroed, narrow, bound, float(gone.max()) if len(gone) else 0.0, len(gone) / total, proof)


def describe(result: Cut, opt: Namespace) -> None:
    """Say what the source's rule allows, what was asked for and what came of it."""
    print(f"largest safe gamma: {result.limit.gamma:.4g}; cutting below it is --percent {result.limit.percent:.3f} "
          "(the smallest of the layers' largest gammas: beyond it some layer would lose every channel)")
    if opt.percent > result.limit.percent:
        print(f"warning: --percent {opt.percent:g} is above that limit; every layer keeps at least {opt.min_channels} "
              f"channel{'s' if opt.min_channels > 1 else ''}. Train with a larger --sr, or longer, to move the limit")
    print(f"requested {opt.percent:.1%} of the prunable channels, achieved {result.achieved:.1%}, threshold |gamma| {result.threshold:.4g}")
    everything = torch.cat(list(gammas(result.graph, result.dense).values()))
    if zero := float((everything == 0).float().mean()):
        print(f"{zero:.1%} of the prunable gammas are exactly 0: a --percent up to {zero:.3f} cuts nothing that the model uses")
    for note in result.graph.notes:
        print(f"note: {note}")


def measure(result: Cut, opt: Namespace, device: torch.device) -> list[dict[str, Any]]:
    """mAP of the three stages on the data set's val images."""
    config = read_data(opt.data)
    if config.nc != result.dense.detect.nc and not opt.single_cls:
        raise UserError(f"{opt.weights}: knows {result.dense.detect.nc} classes, {opt.data} names {config.nc}; give its --data, or --noval")
    loader = validation_loader(config, "val", opt.imgsz, opt.batch_size, int(result.dense.stride.max()), opt.workers,
                               cache="ram", single_cls=opt.single_cls)
    rows = []
    for stage, model in (("before", result.dense), ("masked", result.masked), ("slim", result.slim)):
        found = evaluate(on_device(fused(model), device), loader, device).ap
        rows.append({"stage": stage, "P": found.mp, "R": found.mr, "mAP50": found.map50, "mAP50-95": found.map})
    return rows


def check_cfg(model: Model, path: str) -> None:
    """--cfg is not needed; where it is given it must describe the checkpoint. Shows the first difference if not."""
    given, own = read_yaml(path), model.yaml
    for key in ("depth_multiple", "width_multiple"):
        if given.get(key, 1.0) != own.get(key, 1.0):
            raise UserError(f"--cfg {path}: {key} is {given.get(key, 1.0)}, the checkpoint's is {own.get(key, 1.0)}; leave --cfg out")
    theirs, mine = given["backbone"] + given["head"], own["backbone"] + own["head"]
    for i in range(max(len(theirs), len(mine))):
        a, b = (rows[i] if i < len(rows) else "nothing" for rows in (theirs, mine))
        if str(a) != str(b):
            raise UserError(f"--cfg {path}: row {i} is {a}, the checkpoint's is {b}; leave --cfg out, the checkpoint knows its model")


def newest_sparsity_run() -> Path:
    """last.pt of the newest run that train_sparsity.py made."""
    def made_by_sparsity(weights: Path) -> bool:
        options = weights.parent.parent / "opt.yaml"
        return options.is_file() and (yaml.safe_load(options.read_text(encoding="utf-8")) or {}).get("script") == "train_sparsity.py"

    found = sorted(filter(made_by_sparsity, Path().glob("runs/*/*/weights/last.pt")), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("--weights: no sparsity run under runs/ yet; make one with train_sparsity.py, or give a checkpoint: --weights path/to/last.pt")
    return found[-1]


def write(result: Cut, opt: Namespace, source: dict[str, Any], report: dict[str, Any]) -> Path:
    """The slim checkpoint, the report and its pictures into the run's folder, and a copy of the checkpoint here."""
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    carried = {k: source.get(k) for k in ("opt", "data", "hyp")}
    checkpoint.save(folder / OUTPUT, result.slim, imgsz=opt.imgsz, command=command_line(), **carried,
                    metrics={"proof": result.proof, "percent": result.achieved})
    write_json(folder / "report.json", report)
    before = torch.cat(list(gammas(result.graph, result.dense).values())).numpy()
    plot_gammas(before, folder / "gammas.png", threshold=result.threshold, percent=result.achieved, title="BatchNorm scales before the cut")
    layers = report["layers"]
    plot_kept([r["layer"] for r in layers], [r["original"] for r in layers], [r["remaining"] for r in layers], folder / "channels.png",
              [r["prunable"] for r in layers])
    here = Path(OUTPUT)
    if here.exists():
        print(f"note: {here} was there already and is replaced; every run keeps its own copy ({folder / OUTPUT})")
    try:
        temporary = here.with_name(f".{OUTPUT}.tmp")
        shutil.copyfile(folder / OUTPUT, temporary)
        temporary.replace(here)
    except OSError as error:
        print(f"note: no copy in the working directory ({error.strerror}); use {folder / OUTPUT}")
    return folder


def parse(argv: list[str] | None = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--weights", help="checkpoint to cut (not given: last.pt of the newest sparsity run)")
    add("--percent", type=float, default=0.5, help="share of the prunable channels to cut, 0..1")
    add("--cfg", help="model yaml to check the checkpoint against; never needed")
    add_common(parser, "runs/prune")
    add("--min-channels", type=int, default=1, help="channels that every layer keeps")
    add("--noval", action="store_true", help="do not measure accuracy and speed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    """Command line -> slim checkpoint; returns the run's folder."""
    opt = parse(argv)
    if not 0 <= opt.percent < 1:
        raise UserError(f"--percent {opt.percent}: must be at least 0 and below 1 (0.5 cuts half of the prunable channels)")
    if opt.min_channels < 1:
        raise UserError(f"--min-channels {opt.min_channels}: must be at least 1")
    if not opt.weights:
        opt.weights = str(newest_sparsity_run())
        print(f"--weights not given: taking the newest sparsity run, {opt.weights}")
    source = checkpoint.read(opt.weights)
    model = checkpoint.build(source, path=opt.weights)
    if opt.cfg:
        check_cfg(model, opt.cfg)
    opt = resolve(opt, source)
    device = select_device(opt.device)
    result = cut(model, opt.percent, opt.min_channels)
    describe(result, opt)
    layers = layer_rows(result.masks, result.graph.prunable())
    print("\n" + layer_table(layers) + "\n")
    print(f"proof: largest relative |slim - masked| in float64 is {result.proof:.1e} (must be below {PROOF_BOUND:.0e})\n")
    stages = [] if opt.noval else measure(result, opt, device)
    if stages:
        print(stage_table(stages) + "\n")
    ms = None if opt.noval else latency([on_device(fused(m), device) for m in (result.dense, result.slim)], opt.imgsz)
    costs = cost_rows(profile(result.dense, opt.imgsz), profile(result.slim, opt.imgsz), ms)
    print(cost_table(costs) + "\n")
    report = {"command": command_line(), "weights": str(opt.weights), "data": opt.data, "imgsz": opt.imgsz,
              "requested": opt.percent, "achieved": result.achieved, "threshold": result.threshold,
              "limit": {"gamma": result.limit.gamma, "percent": result.limit.percent}, "proof": result.proof, "stages": stages,
              "cost": costs, "layers": layers, "notes": result.graph.notes}
    folder = write(result, opt, source, report)
    print(f"Slim model: {folder / OUTPUT} (and {OUTPUT}); report and pictures in {folder}")
    return folder


if __name__ == "__main__":
    run_cli(main)
