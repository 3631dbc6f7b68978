"""Cut the channels with the smallest BatchNorm scales and write the slim model.

    python prune.py --percent 0.5                                # the newest sparsity run
    python prune.py --weights runs/train/exp/weights/last.pt --target flops=0.5 --shortcuts joint
    python prune.py --sweep 0.1:0.8:0.1                          # only shows; --sensitivity: layer by layer

Prints what it cut, checks that the slim model computes what the masked one does, measures both. The engine is
utils/slimming/pruner.py. The next step is: python finetune_pruned.py
"""
from __future__ import annotations

import shlex
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import checkpoint
from models.config import check_cfg
from models.formats import runtimes
from models.formats.speed import milliseconds, stopwatch
from models.pruning import model_pruner
from models.yolo import Model, whole_strides
from training.repair import repair
from training.resume import newest_run
from training.sample import SAMPLE_IMAGES, TrainingSample
from training.settings import read_hyp, resolve
from utils.data.loader import DetectionLoader
from utils.device import select_device
from utils.errors import UserError, run_cli
from utils.files import command_line, copy_file, new_run_folder, write_json
from utils.options import add_common
from utils.parser import Argv, HelpfulParser, as_latency, at_least, fraction, fractions, from_python, named_fraction
from utils.plots.page import Page
from utils.plots.slimming import plot_gammas, plot_kept, plot_sensitivity, plot_sweep
from utils.slimming import TARGETS, Pruner, PruneResult, Rules, report
from utils.slimming.cost import profile
from utils.slimming.graph import UnknownNormError
from utils.slimming.ranking import MIN_SHARE, SCORES, knee
from utils.tables import write_csv
from val import accuracy, dataset_loader, pictures

OUTPUT = "pruned_model.pt"
Loader = Callable[[], DetectionLoader]  # of the val images, which are read where they are needed, once


def pruning_parser() -> HelpfulParser:
    """The flags."""
    parser = HelpfulParser(__doc__)
    add = parser.add_argument
    add("--weights", help="checkpoint to cut (not given: last.pt of the newest sparsity run)")
    add("--percent", type=fraction(one=False, hint="0.5 cuts half of the prunable channels"), default=0.5,
        help="share of the prunable channels (those that --keep and --shortcuts let go) to cut, 0..1")
    add("--cfg", help="model yaml to check the checkpoint against; never needed")
    add_common(parser, "runs/prune")
    add("--target", type=named_fraction([*TARGETS, "speedup"],
                                        "params=0.5, flops=0.5, latency=0.6, speedup=1.5 or map-drop=0.01"),
        help="cut as much as this takes, instead of --percent: params=0.5, flops=0.5, latency=0.6 (what is left), "
             "speedup=1.5 (times as fast), map-drop=0.01")
    add("--runtime", choices=["torch", *runtimes()], default="torch",
        help="what --target latency and --sweep measure in, and the table as well")
    add("--int8", action="store_true", help="... in 8 bits, where the runtime has it")
    add("--latency-batch", type=at_least(1), default=1, help="with --target latency and --sweep: images a batch")
    add("--sweep", type=fractions,
        help="first:last:step; show what each of these percents would give, and write no model")
    add("--sensitivity", action="store_true",
        help="show what cutting --percent of each layer alone would give, and write no model")
    add("--score", choices=["auto", *SCORES], default="auto",
        help="what channels are ranked by; auto: gamma, and where gammas do not tell channels apart taylor, which is "
             "what the loss on training images would lose")
    add("--per-flop", action="store_true", help="rank by score per FLOP that goes with the channel: faster models")
    add("--min-channels", type=at_least(1), default=1, help="channels that every layer keeps")
    add("--min-share", type=fraction(), default=MIN_SHARE,
        help="share of its channels that every layer keeps at least, unless their score is 0; 0..1")
    add("--round-to", type=at_least(1), help="layers that are cut keep a multiple of this, 8 say; "
                                             "default: what the sparsity training did, else 1")
    add("--shortcuts", choices=["skip", "joint"], help="channels that shortcuts couple stay (skip), or go all "
        "at once (joint); default: what the sparsity training did, else skip")
    add("--layers", action=BooleanOptionalAction, help="whole branches around which a shortcut leads may go, too, not "
        "only channels; default: what the sparsity training did, else --no-layers")
    add("--keep", nargs="+", default=[], metavar="PATTERN", help="BatchNorms that stay whole, such as 'model.0.*'")
    add("--reconstruct", action="store_true", help="refit the weights that are left by least squares, on training "
        "images: for cuts that take channels that the model uses; includes --absorb")
    add("--absorb", action="store_true", help="move the mean of the cut channels into the layers that read them")
    add("--recalibrate", type=at_least(0), default=0, metavar="N",
        help="measure the BatchNorms' statistics anew on N random training images, augmented as in training")
    add("--strict", action="store_true",
        help="refuse a cut above the limit (the smallest of the layers' largest gammas)")
    add("--noval", action="store_true", help="do not measure accuracy and speed")
    parser.apart("--percent", ["--target"], "{} finds out how much to cut")
    parser.apart("--percent", ["--sweep"], "{} has percents of its own")
    parser.apart("--sweep", ["--sensitivity"], "shows whole cuts, {} layer by layer")
    for show in ("--sweep", "--sensitivity"):
        parser.apart(show, ["--target", "--strict", "--reconstruct", "--absorb", "--recalibrate"],
                     "only shows, {} is for a cut")
        parser.apart(show, ["--noval"], "measures, {} forbids it")
    parser.needs(["--latency-batch"], "--target latency", "--target speedup", "--sweep")
    return parser


def settle(opt: Namespace, saved: dict[str, Any], model: Model) -> Namespace:
    """The flags, and for those that were not given what the checkpoint (read()'s dict) of the model says."""
    nothing_left = saved.get("shrunk", {}).get("done") and not {"percent", "target", "sweep", "sensitivity"} & set(
        opt.given)
    if nothing_left:
        print(f"{opt.weights}: its zeros were cut in the training, so nothing is cut now (--percent 0.2: a fifth more)")
    trained = {**(saved.get("opt") or {}), **saved.get("sparsity", {})}
    opt = resolve(opt, saved)
    return Namespace(**{**vars(opt), "percent": 0.0 if nothing_left else opt.percent,
                        "target": as_latency(opt.target), "hyp": read_hyp(saved.get("hyp") or {}),
                        "imgsz": whole_strides(opt.imgsz, model.divisor),
                        "layers": bool(trained.get("layers") if opt.layers is None else opt.layers),
                        "shortcuts": opt.shortcuts or trained.get("shortcuts", "skip"),
                        "round_to": opt.round_to or trained.get("round_to") or 1})


def rank(model: Model, opt: Namespace, device: torch.device, loader: Loader) -> Pruner[Model]:
    """The engine, with the model's channels ranked as the flags say."""
    rules = Rules(opt.min_channels, opt.min_share, opt.round_to, coupled=opt.shortcuts == "joint", layers=opt.layers,
                  keep=tuple(opt.keep))

    def evaluate(candidate: Model) -> dict[str, float]:
        metrics = accuracy(candidate, loader(), opt, device)
        return {key: metrics[key] for key in ("mAP50", "mAP50-95")}

    try:
        pruner = model_pruner(model, opt.imgsz, device, evaluate,
                              TrainingSample(opt, model, SAMPLE_IMAGES, device).losses,
                              stopwatch(opt.runtime, opt.imgsz, device, opt.latency_batch,
                                        "int8" if opt.int8 else "fp32"))
        return pruner.rank(opt.score, rules, opt.per_flop)
    except UnknownNormError as error:
        raise UserError(f"--keep: {error}; the names are in the table that prune.py prints") from None
    except ValueError as error:
        raise UserError(f"{opt.weights}: {error}") from None


def cut(pruner: Pruner[Model], opt: Namespace) -> PruneResult[Model]:
    """Cut, check, and say what came of it. UserError where the check fails, and beyond the threshold with --strict."""
    try:
        result = pruner.cut(target=opt.target) if opt.target else pruner.cut(opt.percent)
    except ValueError as error:
        raise UserError(f"{error}; nothing was written") from None
    if (target := result.target) and target.name == "latency" and not target.reached:
        raise UserError(f"--target latency={target.goal:g}: with all that the rules let go it is still "
                        f"{target.value:.3f}; nothing was written. Give more, or lower --min-share")
    percent, requested = opt.percent, f"{opt.percent:.1%} of the prunable channels"
    if target:
        percent, requested = result.achieved, f"{target.name}={target.goal:g}"
        again = None
        if target.name == "latency":
            again = TARGETS[target.name].value(pruner, pruner.graph.kept(result.masks))
        print(report.target_note(target, again))
    if opt.score != result.score:
        print(report.score_note(result.score, SAMPLE_IMAGES))
    channels = "channels" if opt.min_channels > 1 else "channel"
    floors = f"at least {opt.min_channels} {channels} and {opt.min_share:.0%} of its own"
    print(report.describe(result, percent, requested, floors))
    if opt.strict and percent > (limit := result.safe.percent):
        raise UserError(f"--strict: {percent:.3f} of the channels is above the limit of {limit:.3f}; "
                        "give less, or train to more sparsity")
    return result


def explore(pruner: Pruner[Model], opt: Namespace) -> Path:
    """--sweep and --sensitivity: what cuts would give, as a table, a csv and a picture. No model is written."""
    rows = pruner.sweep([0.0, *opt.sweep]) if opt.sweep else pruner.sensitivity(opt.percent)
    if opt.score == "auto":
        print(report.score_note(rows[-1]["score"] if opt.sweep else pruner.score_for(opt.percent), SAMPLE_IMAGES))
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    if opt.sweep:
        best = knee([row["percent"] for row in rows], [row["mAP50-95"] for row in rows])
        shown = [row | {"percent": f"{row['percent']:.2f}", "": ""} for row in rows]
        shown[best][""] = "<- knee"
        print(report.stage_table(shown))
        write_csv(folder / "sweep.csv", rows)
        plot_sweep(rows, folder / "sweep.png", best)
    else:
        print(report.stage_table(rows))
        write_csv(folder / "sensitivity.csv", rows)
        plot_sensitivity(rows, folder / "sensitivity.png", opt.percent)
    print(f"mAP is that right after the cut, before any fine-tuning. Results in {folder}")
    return folder


def save_result(result: PruneResult[Model], opt: Namespace, saved: dict[str, Any]) -> Path:
    """The slim checkpoint and the pictures into the run's folder."""
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok)
    repaired = opt.reconstruct or opt.absorb or opt.recalibrate  # which a start from the model before would undo
    settings = {key: getattr(opt, key) for key in ("data", "imgsz", "single_cls")}
    metadata = {"opt": {**(saved.get("opt") or {}), **settings}, "data": opt.data, "hyp": saved.get("hyp")}
    metadata |= {"sparsity": saved["sparsity"]} if "sparsity" in saved else {}
    metadata |= {"parent": str(Path(opt.weights).resolve()), "gradual": not (result.gammas_separate or repaired)}
    checkpoint.save(folder / OUTPUT, result.slim, imgsz=opt.imgsz, command=command_line(), **metadata,
                    metrics={"difference": result.difference, "percent": result.achieved})
    plot_gammas(result.gammas.numpy(), folder / "gammas.png", cut=~result.kept.numpy(),
                title=f"BatchNorm scales before the cut; channels are ranked by {result.score}")
    plot_kept(result.layers, folder / "channels.png")
    return folder


def copy_here(folder: Path) -> None:
    """A copy of a run's checkpoint in the working directory, where finetune_pruned.py looks first."""
    if Path(OUTPUT).exists():
        print(f"note: {OUTPUT} was there and is replaced; every run keeps its own copy ({folder / OUTPUT})")
    try:
        copy_file(folder / OUTPUT, Path(OUTPUT))
    except UserError as error:
        print(f"note: no copy in the working directory ({error}); use {folder / OUTPUT}")


def report_result(result: PruneResult[Model], models: dict[str, Model], folder: Path, opt: Namespace,
                  device: torch.device, loader: Loader) -> None:
    """Accuracy of the stages (name -> model), cost before and after: printed, as report.json and report.html."""
    model, stages, ms, pairs = result.model, [], {}, []
    if not opt.noval:
        stages = [{"stage": stage, **accuracy(m, loader(), opt, device)} for stage, m in models.items()]
        print(report.stage_table(stages) + "\n")
        ms = milliseconds([model, result.slim], opt.imgsz, device, opt.runtime, "int8" if opt.int8 else "fp32")
        pairs = pictures([model, result.slim], loader(), device)
    before, after = (profile(m, opt.imgsz, model.yaml["ch"]) for m in (model, result.slim))
    print(report.cost_table(costs := report.cost_rows(before, after, ms)))
    if ms:
        print(f"milliseconds are medians, the models timed in turns; {torch.get_num_threads()} threads on the CPU\n")
    if lineage := report.lineage_note(model.masks, result.slim.masks):
        print(lineage + "\n")
    print(report.layer_table(result) + "\n")
    write_json(folder / "report.json", {
        "command": command_line(), "weights": str(opt.weights), "data": opt.data, "imgsz": opt.imgsz,
        "requested": dict([opt.target]) if opt.target else opt.percent, **result.report, "stages": stages,
        "cost": costs, "threads": torch.get_num_threads(), "device": str(device), "lineage": lineage})
    write_page(folder, opt, result.score, stages, costs, pairs)


def write_page(folder: Path, opt: Namespace, score: str, stages: list[dict[str, Any]], costs: list[dict[str, Any]],
               pairs: list[tuple[str, list[np.ndarray]]]) -> None:
    """report.html, the run as one file. score: what the channels were ranked by."""
    request = "{}={:g}".format(*opt.target) if opt.target else f"{opt.percent:.1%} of the prunable channels"
    drawn = {"BatchNorm scales": folder / "gammas.png", "Channels kept": folder / "channels.png"}
    Page(f"Pruned: {Path(opt.weights).name}", [f"Asked: {request}, ranked by {score}. Before any fine-tuning."],
         {"Stages": stages, "Cost": costs}, drawn, pairs, [command_line()]).write(folder / "report.html")


def main(argv: Argv = None, copy: bool = True) -> Path:
    """Command line -> slim checkpoint, of which a copy lies in the working directory; returns the run's folder."""
    opt = pruning_parser().parse_args(argv)
    if not opt.weights:
        opt.weights = str(newest_run("train_sparsity.py"))
        print(f"--weights not given: taking the newest sparsity run, {opt.weights}")
    model = checkpoint.build(saved := checkpoint.read(opt.weights), path=opt.weights)
    if opt.cfg:
        check_cfg(model.yaml, opt.cfg)
    opt = settle(opt, saved, model)
    device, loader = select_device(opt.device), cache(lambda: dataset_loader(model, opt))
    if not opt.noval:
        try:
            loader()
        except UserError as error:  # before anything is written
            raise UserError(f"{error}; or cut without measuring: --noval") from None
    pruner = rank(model, opt, device, loader)
    if opt.sweep or opt.sensitivity:
        return explore(pruner, opt)
    result = cut(pruner, opt)
    models = repair(pruner, result, opt, device)
    folder = save_result(result, opt, saved)  # before the measurements: whatever becomes of them, the model is there
    if copy:
        copy_here(folder)
    report_result(result, models, folder, opt, device, loader)
    print(f"Slim model: {folder / OUTPUT}{f' (and {OUTPUT})' if copy else ''}; report.html and pictures in {folder}")
    if argv is None:
        print(f"now: python finetune_pruned.py --weights {shlex.quote(str(folder / OUTPUT))}")
    return folder


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
