"""Cut the channels with the smallest BatchNorm scales and write the slim model.

    python prune.py --percent 0.5                                # the newest sparsity run
    python prune.py --weights runs/train/exp/weights/last.pt --target flops=0.5 --shortcuts joint
    python prune.py --sweep 0.1:0.8:0.1                          # only shows what each percent would give
    python prune.py --sensitivity                                # ... what each layer would

Prints what it cut, proves that the slim model computes what the masked one does, and measures accuracy before and
after. The next step is: python finetune_pruned.py
"""
from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from models import checkpoint
from models.onnx_file import onnx_latency
from models.yolo import Model, fused, on_device, read_yaml
from utils.data_config import read_data
from utils.distributed import select_device
from utils.errors import UserError, run_cli
from utils.files import command_line, new_run_folder, write_json, write_text
from utils.metrics import APResult
from utils.options import HelpfulParser, add_common, resolve
from utils.slimming.cost import CostModel, latency, profile
from utils.slimming.explore import sensitivity, sweep
from utils.slimming.graph import ChannelGraph, trace
from utils.slimming.pictures import plot_gammas, plot_kept, plot_sensitivity, plot_sweep
from utils.slimming.report import cost_rows, cost_table, layer_rows, layer_table, stage_table, uneven
from utils.slimming.selection import MIN_SHARE, SCORES, Limit, Masks, Rules, Selection, gammas, knee, limit
from utils.slimming.surgery import absorb, compose, keep_ids, largest_difference, masked, recalibrate, slim
from val import evaluate, validation_loader

OUTPUT = "pruned_model.pt"
PROOF_BOUND = 1e-9


@dataclass
class Cut:
    """A chosen and proven cut."""

    graph: ChannelGraph
    gammas: torch.Tensor  # |gamma| of all channels that may be cut
    masks: dict[str, torch.Tensor]
    dense: Model
    masked: Model
    slim: Model
    limit: Limit
    threshold: float    # the largest |gamma| that was cut
    achieved: float     # share of the prunable channels that was cut
    proof: float        # largest relative difference of masked and slim

    @property
    def notes(self) -> list[str]:
        """What whoever cut this should know of the graph and of the slim model."""
        return [*self.graph.notes, *uneven(self.slim)]


def rank(model: Model, opt: Namespace) -> Selection:
    """The model's channels, ranked as the flags say."""
    graph = trace(model)
    costs = CostModel(model, graph, opt.imgsz, model.yaml["ch"]).freed() if opt.per_flop else None
    rules = Rules(opt.min_channels, opt.min_share, opt.round_to, opt.shortcuts == "joint", tuple(opt.keep))
    none = "this model has no BatchNorm channel that may be cut (a fused or exported model? give the file from before fusing)"
    if not graph.norms:
        raise UserError(none)
    try:
        ranked = Selection(graph, model, rules, opt.score, costs)
    except ValueError as error:
        raise UserError(f"--keep: {error}; the names are in the table that prune.py prints") from None
    if not ranked.total:
        raise UserError(none)
    return ranked


def choose(model: Model, ranked: Selection, opt: Namespace, device: torch.device) -> Masks:
    """The masks of --percent, or those that just reach --target; what was reached is said."""
    if not opt.target:
        return ranked.percent(opt.percent)
    kind, wanted = opt.target
    costs = CostModel(model, ranked.graph, opt.imgsz, model.yaml["ch"])
    full = costs.remaining(np.ones(len(ranked.graph.group), bool))
    if kind == "map-drop":
        loader = val_loader(model, opt)
        before = accuracy(model, loader, opt, device).map

    @cache
    def left(groups: int) -> float:
        """What the target speaks of, for a cut of so many groups; the smaller, the more is cut."""
        masks = ranked.cut(groups)
        if kind == "latency":
            return speed(model, masks, opt, device)
        if kind == "map-drop":
            return accuracy(masked(model, masks), loader, opt, device).map - before
        parameters, flops = costs.remaining(keep_ids(ranked.graph, masks))
        return parameters / full[0] if kind == "params" else flops / full[1]

    if kind == "map-drop":  # one group less than the first cut that costs more than this
        groups, reached = ranked.until(lambda groups: left(groups) < -wanted)
        groups -= int(reached and groups > 0)
        print(f"target map-drop={wanted:g}: mAP50-95 falls by {-left(groups):.4f} without the cut channels, before any fine-tuning")
        return ranked.cut(groups)
    groups, reached = ranked.until(lambda groups: left(groups) <= wanted)
    masks = ranked.cut(groups)
    print(f"target {kind}={wanted:g}: {left(groups):.3f} of the {kind} are left"
          + (f" as predicted, {speed(model, masks, opt, device):.3f} as measured again" if kind == "latency" else "")
          + ("" if reached else "; there is no smaller cut, every layer keeps its --min-channels and --min-share, and what shortcuts tie"))
    return masks


def speed(model: Model, masks: Masks, opt: Namespace, device: torch.device) -> float:
    """Milliseconds of the model after the cut, relative to before."""
    before, after = latency([on_device(fused(m), device) for m in (model, slim(model, masks))], opt.imgsz)  # type: ignore[arg-type]
    return after / before


def cut(model: Model, ranked: Selection, masks: Masks) -> Cut:
    """Cut and prove. Raises UserError where the proof fails."""
    graph, total = ranked.graph, ranked.total
    bound = limit(graph, model, ranked.prunable)
    modules = dict(model.named_modules())
    gone = torch.cat([modules[n].weight.detach().abs()[~m] for n, m in masks.items()])  # type: ignore[operator, union-attr]
    narrow = slim(model, masks)
    assert isinstance(narrow, Model)
    narrow.masks = compose(model.masks, masks)
    zeroed = masked(model, masks)
    assert isinstance(zeroed, Model)
    s = max(int(model.stride.max()), 32)
    proof = largest_difference(zeroed, narrow, model.yaml["ch"], sizes=((1, 2 * s, 2 * s), (3, 2 * s, 3 * s)))
    if not proof < PROOF_BOUND:
        raise UserError(f"the slim model differs from the masked one by {proof:.1e} (relative; rounding is below {PROOF_BOUND:.0e}); nothing was "
                        "written. This model holds a block that the channel graph misreads")
    everything = torch.cat([torch.zeros(0), *gammas(graph, model, ranked.prunable).values()])
    return Cut(graph, everything, masks, model, zeroed, narrow, bound, float(gone.max()) if len(gone) else 0.0, len(gone) / total, proof)


def describe(result: Cut, opt: Namespace) -> None:
    """Say what the threshold rule allows, what was asked for and what came of it. UserError above the limit with --strict."""
    print(f"largest safe gamma: {result.limit.gamma:.4g}; cutting below it is --percent {result.limit.percent:.3f} "
          "(the smallest of the layers' largest gammas: beyond it some layer would lose every channel)")
    if (asked := result.achieved if opt.target else opt.percent) > result.limit.percent:
        if opt.strict:
            raise UserError(f"--strict: {asked:.3f} of the channels is above the limit of {result.limit.percent:.3f}; give less, or train to more sparsity")
        print(f"warning: {asked:.3f} is above that limit; every layer keeps at least {opt.min_channels} "
              f"channel{'s' if opt.min_channels > 1 else ''} and {opt.min_share:.0%} of its own. Train with a larger --sr, or longer, to move the limit")
    requested = f"{opt.target[0]}={opt.target[1]:g}" if opt.target else f"{opt.percent:.1%} of the prunable channels"
    print(f"requested {requested}, achieved {result.achieved:.1%}, threshold |gamma| {result.threshold:.4g}")
    if zero := float((result.gammas == 0).float().mean()):
        print(f"{zero:.1%} of the prunable gammas are exactly 0: a --percent up to {zero:.3f} cuts nothing that the model uses")
    for note in result.notes:
        print(f"note: {note}")


def val_loader(model: Model, opt: Namespace) -> DataLoader:
    """The data set's val images."""
    config = read_data(opt.data)
    if config.nc != model.detect.nc and not opt.single_cls:
        raise UserError(f"{opt.weights}: knows {model.detect.nc} classes, {opt.data} names {config.nc}; give its --data, or --noval")
    return validation_loader(config, "val", opt.imgsz, opt.batch_size, int(model.stride.max()), opt.workers, cache="ram", single_cls=opt.single_cls)


def accuracy(model: nn.Module, loader: DataLoader, opt: Namespace, device: torch.device) -> APResult:
    """Precision, recall and mAP of a Model, fused, on `device`."""
    assert isinstance(model, Model)
    return evaluate(on_device(fused(model), device), loader, device, single_cls=opt.single_cls).ap


def repair(result: Cut, opt: Namespace, device: torch.device) -> dict[str, Model]:
    """--absorb and --recalibrate: the slim model, repaired with what training images show; the last one is what is written."""
    stages: dict[str, Model] = {"before": result.dense, "masked": result.masked, "slim": result.slim}
    count = opt.recalibrate or 64 * opt.absorb
    if not count:
        return stages
    config, dense = read_data(opt.data), on_device(result.dense, device)
    loader = validation_loader(config, "train", opt.imgsz, opt.batch_size, int(dense.stride.max()), opt.workers, single_cls=opt.single_cls)
    images = [batch.images.to(device, torch.float32) / 255 for batch, _ in zip(loader, range(-(-count // opt.batch_size)))]
    if opt.absorb:
        stages["absorbed"] = slim(absorb(dense, result.masks, images), result.masks)  # type: ignore[assignment]
    if opt.recalibrate:
        stages["recalibrated"] = recalibrate(on_device([*stages.values()][-1], device), images)  # type: ignore[assignment]
    final = [*stages.values()][-1]
    final.masks, result.slim = result.slim.masks, final
    return stages


def measure(stages: dict[str, Model], opt: Namespace, device: torch.device) -> list[dict[str, Any]]:
    """mAP of each stage on the data set's val images."""
    loader = val_loader(stages["before"], opt)
    rows = []
    for stage, model in stages.items():
        found = accuracy(model, loader, opt, device)
        rows.append({"stage": stage, "P": found.mp, "R": found.mr, "mAP50": found.map50, "mAP50-95": found.map})
    return rows


def milliseconds(result: Cut, opt: Namespace, device: torch.device) -> dict[str, list[float]]:
    """How measured -> milliseconds an image, before and after."""
    models = [on_device(fused(m), device) for m in (result.dense, result.slim)]
    ms = {}
    for b in (1, 16):
        try:
            ms[f"torch, batch {b}"] = latency(list(models), opt.imgsz, b, runs=max(20 // b, 5))
        except torch.OutOfMemoryError:
            print(f"note: batch {b} does not fit into the memory of {device}, its speed is not measured")
    on_cpu = [on_device(m, "cpu") for m in models]
    found = {f"onnxruntime on the CPU, batch {b}": onnx_latency(on_cpu, opt.imgsz, b, runs=max(20 // b, 5)) for b in (1, 16)}
    return ms | {how: values for how, values in found.items() if values}


def first_model(before: Model, after: Model) -> str:
    """After several rounds: what is left of the channels of the first model; nothing in the first round."""
    if not before.masks:
        return ""
    kept, total = (sum(count(m) for m in after.masks.values()) for count in (lambda m: int(m.sum()), len))
    return (f"of the first model {kept:,} of {total:,} channels are left ({kept / total:.1%}); before this cut there were "
            f"{sum(int(m.sum()) for m in before.masks.values()):,}")


def explore(model: Model, ranked: Selection, opt: Namespace, device: torch.device) -> Path:
    """--sweep and --sensitivity: what cuts would give, as a table, a csv and a picture, without writing a model; returns the folder."""
    loader, costs = val_loader(model, opt), CostModel(model, ranked.graph, opt.imgsz, model.yaml["ch"])

    def maps(candidate: nn.Module) -> dict[str, float]:
        found = accuracy(candidate, loader, opt, device)
        return {"mAP50": found.map50, "mAP50-95": found.map}

    if opt.sweep:
        name, (rows, models) = "sweep", sweep(model, ranked, costs, [0.0, *opt.sweep], maps)
        for row, ms in zip(rows, latency([on_device(fused(m), device) for m in models], opt.imgsz)):  # type: ignore[arg-type]
            row["ms"] = ms
        best = knee(np.array([r["percent"] for r in rows]), np.array([r["mAP50-95"] for r in rows]))
        print(stage_table([row | {"percent": f"{row['percent']:.2f}", "": "<- knee" if i == best else ""} for i, row in enumerate(rows)]))
    else:
        name, rows = "sensitivity", sensitivity(model, ranked, costs, opt.percent, maps)
        print(stage_table(rows))
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    lines = [",".join(v if isinstance(v, str) else f"{v:.6g}" for v in row.values()) for row in rows]
    write_text(folder / f"{name}.csv", "\n".join([",".join(rows[0]), *lines]) + "\n")
    if opt.sweep:
        plot_sweep(rows, folder / "sweep.png", best)
    else:
        plot_sensitivity(rows, folder / "sensitivity.png", opt.percent)
    print(f"mAP is that right after the cut, before any fine-tuning. Results in {folder}")
    return folder


def percents(text: str) -> list[float]:
    """'0.1:0.8:0.1' -> [0.1, 0.2, ... 0.8]."""
    try:
        first, last, step = map(float, text.split(":"))
    except ValueError:
        first = last = step = 0.0
    if not 0 < first <= last < 1 or step <= 0:
        raise UserError(f"--sweep {text}: give first:last:step between 0 and 1, such as 0.1:0.8:0.1")
    return [round(first + i * step, 6) for i in range(int((last - first) / step + 1e-6) + 1)]


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


def write(result: Cut, opt: Namespace, source: dict[str, Any], layers: list[dict[str, Any]]) -> Path:
    """The slim checkpoint and the pictures into the run's folder, and a copy of the checkpoint here."""
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    carried = {k: source.get(k) for k in ("opt", "data", "hyp")}
    checkpoint.save(folder / OUTPUT, result.slim, imgsz=opt.imgsz, command=command_line(), **carried,
                    metrics={"proof": result.proof, "percent": result.achieved})
    plot_gammas(result.gammas.numpy(), folder / "gammas.png", threshold=result.threshold, percent=result.achieved, title="BatchNorm scales before the cut")
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


def target(text: str) -> tuple[str, float]:
    """'flops=0.5' -> ("flops", 0.5)."""
    kind, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if kind not in ("params", "flops", "latency", "map-drop") or not 0 < value < 1:
        raise UserError(f"--target {text}: give params=0.5, flops=0.5, latency=0.6 or map-drop=0.01, a number between 0 and 1")
    return kind, value


def parse(argv: list[str] | None = None) -> Namespace:
    """Command line -> options."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--weights", help="checkpoint to cut (not given: last.pt of the newest sparsity run)")
    add("--percent", type=float, default=0.5, help="share of the prunable channels to cut, 0..1")
    add("--cfg", help="model yaml to check the checkpoint against; never needed")
    add_common(parser, "runs/prune")
    add("--target", type=target, help="cut as much as this takes, in the place of --percent: params=0.5, flops=0.5, latency=0.6 (what is left), map-drop=0.01")
    add("--sweep", type=percents, help="first:last:step; show what each of these percents would give, and write no model")
    add("--sensitivity", action="store_true", help="show what cutting --percent of each layer alone would give, and write no model")
    add("--score", choices=list(SCORES), default="gamma", help="what channels are ranked by")
    add("--per-flop", action="store_true", help="rank by score per FLOP that goes with the channel: faster models")
    add("--min-channels", type=int, default=1, help="channels that every layer keeps")
    add("--min-share", type=float, default=MIN_SHARE, help="share of its channels that every layer keeps at least, unless their score is 0; 0..1")
    add("--round-to", type=int, help="layers that are cut keep a multiple of this, 8 say; default: what the sparsity training did, else 1")
    add("--shortcuts", choices=["skip", "joint"],
        help="channels that shortcuts tie together stay (skip), or go all at once (joint); default: what the sparsity training did, else skip")
    add("--keep", nargs="+", default=[], metavar="PATTERN", help="BatchNorms that stay whole, such as 'model.0.*'")
    add("--absorb", action="store_true", help="move the mean of the cut channels into the layers that read them")
    add("--recalibrate", type=int, default=0, metavar="N", help="measure the BatchNorms' statistics anew on N training images")
    add("--strict", action="store_true", help="refuse a cut above the limit (the smallest of the layers' largest gammas)")
    add("--noval", action="store_true", help="do not measure accuracy and speed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    """Command line -> slim checkpoint; returns the run's folder."""
    opt = parse(argv)
    if not 0 <= opt.percent < 1:
        raise UserError(f"--percent {opt.percent}: must be at least 0 and below 1 (0.5 cuts half of the prunable channels)")
    for flag, value in (("--min-channels", opt.min_channels), ("--round-to", opt.round_to)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if not 0 <= opt.min_share <= 1:
        raise UserError(f"--min-share {opt.min_share:g}: must be between 0 and 1")
    if not opt.weights:
        opt.weights = str(newest_sparsity_run())
        print(f"--weights not given: taking the newest sparsity run, {opt.weights}")
    source = checkpoint.read(opt.weights)
    model = checkpoint.build(source, path=opt.weights)
    if opt.cfg:
        check_cfg(model, opt.cfg)
    opt = resolve(opt, source)
    trained = source.get("opt") or {}
    opt.shortcuts = opt.shortcuts or trained.get("shortcuts", "skip")
    opt.round_to = opt.round_to or trained.get("round_to") or 1
    device = select_device(opt.device)
    ranked = rank(model, opt)
    if opt.sweep or opt.sensitivity:
        return explore(model, ranked, opt, device)
    result = cut(model, ranked, choose(model, ranked, opt, device))
    describe(result, opt)
    layers = layer_rows(result.masks, ranked.prunable)
    print("\n" + layer_table(layers) + "\n")
    print(f"proof: largest relative |slim - masked| in float64 is {result.proof:.1e} (must be below {PROOF_BOUND:.0e})\n")
    repaired = repair(result, opt, device)
    folder = write(result, opt, source, layers)  # before the measurements: whatever becomes of them, the model is there
    stages = [] if opt.noval else measure(repaired, opt, device)
    if stages:
        print(stage_table(stages) + "\n")
    ms = {} if opt.noval else milliseconds(result, opt, device)
    costs = cost_rows(profile(result.dense, opt.imgsz, model.yaml["ch"]), profile(result.slim, opt.imgsz, model.yaml["ch"]), ms)
    print(cost_table(costs) + (f"\nmilliseconds are medians, in turn; {torch.get_num_threads()} threads on the CPU\n" if ms else "\n"))
    if lineage := first_model(model, result.slim):
        print(lineage + "\n")
    report = {"command": command_line(), "weights": str(opt.weights), "data": opt.data, "imgsz": opt.imgsz,
              "requested": dict([opt.target]) if opt.target else opt.percent, "achieved": result.achieved, "threshold": result.threshold,
              "limit": {"gamma": result.limit.gamma, "percent": result.limit.percent}, "proof": result.proof, "stages": stages,
              "cost": costs, "threads": torch.get_num_threads(), "device": str(device), "lineage": lineage, "layers": layers, "notes": result.notes}
    write_json(folder / "report.json", report)
    print(f"Slim model: {folder / OUTPUT} (and {OUTPUT}); report and pictures in {folder}")
    return folder


if __name__ == "__main__":
    run_cli(main)
