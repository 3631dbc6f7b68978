"""The whole road in one command: a model becomes sparse, shrinks while it trains, heals with a teacher, is measured.

    python slim.py                                               # the built-in data set
    python slim.py --weights my.pt --data my.yaml --target flops=0.5 --epochs 100
    python slim.py --resume                                      # go on where it stopped

Every stage is an ordinary run of train.py, train_sparsity.py, prune.py or finetune_pruned.py, in one folder, with the
command that makes it. Weights that were trained on these classes are the teacher; others are trained first, for a third
of the epochs. The slim model is slim.pt.
"""
from __future__ import annotations

import os
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import export
import finetune_pruned
import prune
import train
import train_sparsity
import val
from models import checkpoint
from models.pruning import model_pruner
from models.speed import milliseconds
from models.yolo import whole_strides
from utils.data.config import DataConfig, read_data
from utils.data.loader import validation_loader
from utils.errors import UserError, run_cli
from utils.files import ROOT, command_line, new_run_folder, write_json
from utils.options import BUILT_IN_DATA, DEFAULTS, road_parser
from utils.plots.page import Page
from utils.plots.slimming import plot_gamma_history, plot_kept, plot_tradeoff
from utils.slimming import Rules, report
from utils.slimming.cost import profile
from utils.slimming.target_sparsity import TargetSparsity
from utils.training.distributed import World, select_device
from utils.training.road import PRUNE, STATE, Progress, Road, Stage, known_road
from utils.training.start import start_model
from val import pictures

OUTPUT = "slim.pt"
TRAININGS = {"train.py": train.main, "train_sparsity.py": train_sparsity.main,
             "finetune_pruned.py": finetune_pruned.main}
# Flags that the stages get in their own way, or not at all.
OWN = ("weights", "cfg", "data", "imgsz", "target", "epochs", "rounds", "export", "int8", "resume", "project", "name",
       "exist_ok", "teacher", "workers", "device")
LEAST_MAP = 1e-3  # mAP50-95 below which a teacher has nothing to teach


def begin(opt: Namespace, flags: list[str]) -> Road:
    """A new road. UserError for whatever can be known at the start to fail."""
    held = checkpoint.read(opt.weights) if opt.weights else {}
    trained = held.get("opt") or {}
    data = opt.data or trained.get("data")
    config = read_data(data or ROOT / BUILT_IN_DATA)
    suited = config.defaults.get("epochs")  # of a training: half as many again for becoming slim
    epochs = opt.epochs or (suited * 3 // 2 if suited else DEFAULTS["epochs"])
    names = {0: "object"} if opt.single_cls else config.names
    known = not opt.cfg and bool(held) and list(held["names"].values()) == list(names.values())
    if (Path(opt.project) / opt.name / STATE).is_file() and opt.exist_ok:
        raise UserError(f"{Path(opt.project) / opt.name}: a road is there already; --resume goes on with it, "
                        "another --name starts a new one")
    formats = ["--include", *opt.export, *(["--int8"] if opt.int8 else [])] if opt.export else []
    if formats:
        export.parse(["--weights", OUTPUT, *formats])  # refuses what it does not know now, not in the end
    elif opt.int8:
        raise UserError("--int8: belongs to --export, such as --export openvino --int8")
    if known and trained.get("optimizer") and not {"optimizer", "adam", "hyp"} & set(opt.given):
        flags = [*flags, "--optimizer", trained["optimizer"]]  # go on as these weights were trained
    weights = str(Path(opt.weights).absolute()) if opt.weights else opt.weights
    data = str(Path(data).absolute()) if data and Path(data).is_file() else data
    teacher = "none" if opt.teacher == "" else opt.teacher
    road = Road(Path(), command_line(), flags, weights, opt.cfg, data, opt.imgsz or trained.get("imgsz"), opt.target,
                epochs, opt.rounds, known, teacher, formats, opt.workers, opt.device)
    require_possible(road, config, names)
    road.folder = new_run_folder(opt.project, opt.name, opt.exist_ok).absolute()
    road.save()
    return road


def require_possible(road: Road, config: DataConfig, names: dict[int, str]) -> None:
    """UserError where the first training to sparsity could not reach its target, or would have no images."""
    if not config.train or not config.val:
        raise UserError(f"{config.file}: slim.py needs images under train: and val:")
    sparse = next(stage for stage in road.stages if stage.script == "train_sparsity.py")
    start = Namespace(**vars(train_sparsity.parse([*start_flags(road), "--epochs", "1", *goal(road, sparse, 1.0)])))
    model = start_model(start, names, {}, World(1, 2, torch.device("cpu")))  # not as the main process: it says nothing
    start.imgsz = whole_strides(start.imgsz, model.stride)
    train_sparsity.SparsityHook().choose(start, model, model, {}, set())


def start_flags(road: Road) -> list[str]:
    """Where the first training starts."""
    flags = [] if road.weights is None else ["--weights", road.weights]
    flags += ["--cfg", road.cfg] if road.cfg else []
    return flags + data_flags(road)


def data_flags(road: Road) -> list[str]:
    """The data and the size of its images, where they are known."""
    flags = ["--data", road.data] if road.data else []
    return flags + (["--imgsz", str(road.imgsz)] if road.imgsz else [])


def goal(road: Road, stage: Stage, left: float) -> list[str]:
    """The target of a sparsity training that starts with a model of which `left`, 0..1, is left, and its --shrink."""
    name, wanted = road.target
    if name == "map-drop":
        return ["--target-sparsity", "0.5", "--shrink"]
    if name == "latency":
        name, wanted = "flops", road.flops or 0.5
    rounds = [s.name for s in road.stages if s.script == "train_sparsity.py"]
    wanted **= (rounds.index(stage.name) + 1) / len(rounds)
    return ["--target", f"{name}={min(wanted / left, 0.999):.6g}", "--shrink"]


def stage_flags(road: Road, stage: Stage, before: str) -> list[str]:
    """The command line of a stage. before: the checkpoint that the one before it has made."""
    run = [*data_flags(road), *road.machine, "--project", str(road.folder), "--name", stage.name, "--exist-ok"]
    if stage.script == PRUNE:
        return ["--weights", before, *run, "--target", f"map-drop={road.target[1]:g}", "--noval"]
    run += [*road.flags, "--epochs", str(stage.epochs)]
    if stage.name == "dense":
        return [*start_flags(road), *run]
    flags = ["--weights", before, *run, "--teacher", road.teacher or road.before]
    if stage.script != "train_sparsity.py":
        return flags
    figure = "parameters" if road.target[0] == "params" else "flops"
    whole, here = (getattr(profile(checkpoint.load(file), 256), figure) for file in (road.before, before))
    return flags + goal(road, stage, here / whole)


def follow(road: Road) -> None:
    """Run the stages that are not done, each from where it stopped."""
    before, past = road.before, 0
    for stage in road.stages:
        if stage.script == "train_sparsity.py":
            prepare(road)
        if stage.name not in road.done:
            flags = stage_flags(road, stage, before)
            command = f"python {stage.script} {shlex.join(flags)}"
            print(f"\n$ {command}", flush=True)
            run_stage(road, stage, flags, Progress(past, road.epochs))
            road.done[stage.name] = {"command": command}
            road.save()
        before, past = str(stage.product(road.folder)), past + stage.epochs


def run_stage(road: Road, stage: Stage, flags: list[str], progress: Progress) -> None:
    """One stage, or the rest of it."""
    if stage.script == PRUNE:
        prune.main(flags)
        return
    last = road.folder / stage.name / "weights" / "last.pt"
    if not last.is_file():
        TRAININGS[stage.script](flags, [progress])
    elif checkpoint.read(last)["training"]["epoch"] < stage.epochs:
        TRAININGS[stage.script](["--resume", str(last), *road.machine], [progress])


def prepare(road: Road) -> None:
    """Before the model becomes sparse: look at what it finds, and make a target in milliseconds one in FLOPs."""
    found = measure(road, "val-before", road.before, "val")
    if found["mAP50-95"] < LEAST_MAP and road.trained:
        raise UserError(f"{road.before}: finds nothing on the val images (mAP50-95 {found['mAP50-95']:.4f}); give "
                        "trained weights, or --weights '' --cfg models/yolov5n.yaml to train from scratch")
    if road.target[0] != "latency" or road.flops is not None:
        return
    model, imgsz = checkpoint.load(road.before), found["imgsz"]
    pruner = model_pruner(model, imgsz, select_device(road.device))
    result = pruner.rank(rules=Rules(min_share=TargetSparsity.FLOOR, round_to=16), per_flop=True).cut(
        target=road.target)
    if result.target is None or not result.target.reached:
        raise UserError(f"--target latency={road.target[1]:g}: can't be reached, with all that may go "
                        f"{result.target.value if result.target else 1:.3f} of the time is left; give more")
    road.flops = profile(result.slim, imgsz).flops / profile(model, imgsz).flops
    print(f"latency={road.target[1]:g} takes about flops={road.flops:.3f}: measured on the model before")
    road.save()


def measure(road: Road, name: str, weights: str | Path, task: str) -> dict[str, Any]:
    """val.py on a checkpoint, once: mAP50 and mAP50-95, and the size of the images."""
    if name not in road.done:
        single = ["--single-cls"] if "--single-cls" in road.flags else []
        summary = val.main(["--weights", str(weights), *data_flags(road), *road.machine, *single, "--task", task,
                            "--project", str(road.folder), "--name", name, "--exist-ok"])
        road.done[name] = {"mAP50": summary["metrics/mAP_0.5"], "mAP50-95": summary["metrics/mAP_0.5:0.95"],
                           "imgsz": summary["imgsz"]}
        road.save()
    return road.done[name]


def compare(road: Road) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """A row for the model before and one for the slim one: accuracy, cost, speed; and all that was timed."""
    config = read_data(road.data or ROOT / BUILT_IN_DATA)
    tasks = ["val", *(["test"] if config.test and all(path.exists() for path in config.test) else [])]
    files = {"before": road.before, "slim": str(road.after)}
    models = {name: checkpoint.load(file) for name, file in files.items()}
    rows = []
    for name, file in files.items():
        found = {task: measure(road, f"{task}-{'before' if name == 'before' else 'after'}", file, task)
                 for task in tasks}
        cost = profile(models[name], found["val"]["imgsz"], models[name].yaml["ch"])
        rows.append({"model": name, **{f"{key} {task}": found[task][key] for task in tasks
                                       for key in ("mAP50", "mAP50-95")},
                     "parameters": cost.parameters, "GFLOPs": cost.gflops, "MB": cost.megabytes})
    ms = milliseconds(list(models.values()), found["val"]["imgsz"], select_device(road.device))
    return [{**row, "ms": values} for row, values in zip(rows, ms["torch, batch 1"])], ms


def reached(road: Road, rows: list[dict[str, Any]]) -> str:
    """What was asked and what came of it, in a line."""
    name, wanted = road.target
    before, after = rows
    if name == "map-drop":
        drop = before["mAP50-95 val"] - after["mAP50-95 val"]
        return f"asked {name}={wanted:g}: the slim model's mAP50-95 on val is lower by {drop:.4f}"
    key = {"flops": "GFLOPs", "params": "parameters", "latency": "ms"}[name]
    share = after[key] / before[key]
    text = f"asked {name}={wanted:g}: {share:.3f} of it is left"
    return text if share <= wanted else f"{text}, which is more; --rounds 2 or a smaller number comes closer"


def stage_rows(road: Road) -> list[dict[str, Any]]:
    """A row per stage: what it ran, and what its model was after it."""
    rows = []
    for stage in road.stages:
        held = checkpoint.read(stage.product(road.folder))
        cost = profile(checkpoint.build(held), road.done["val-before"]["imgsz"])
        found = (held.get("metrics") or {}).get("metrics/mAP_0.5:0.95", "")
        rows.append({"stage": stage.name, "script": stage.script, "epochs": stage.epochs, "mAP50-95 val": found,
                     "parameters": cost.parameters, "GFLOPs": cost.gflops})
    return rows


def write_page(road: Road, rows: list[dict[str, Any]]) -> None:
    """report.html and its pictures: the road as one file."""
    folder, device = road.folder, select_device(road.device)
    before, after = checkpoint.load(road.before), checkpoint.load(road.after)
    config, imgsz = read_data(road.data or ROOT / BUILT_IN_DATA), road.done["val-before"]["imgsz"]
    loader = validation_loader(config, "val", imgsz, 10, int(after.stride.max()), workers=0,
                               single_cls="--single-cls" in road.flags)
    histories = {stage.name: list(np.load(file, allow_pickle=False)) for stage in road.stages
                 if (file := folder / stage.name / "gammas.npy").is_file()}
    kept = [{"layer": name, "original": len(mask), "remaining": int(mask.sum()), "prunable": True}
            for name, mask in after.masks.items()]
    drawn = {
        "Accuracy and time": plot_tradeoff([{**row, "map": row["mAP50-95 val"]} for row in rows],
                                           folder / "tradeoff.png"),
        "Channels kept": plot_kept(kept, folder / "channels.png")}
    if histories:
        drawn["BatchNorm scales over the epochs"] = plot_gamma_history(histories, folder / "gamma_history.png")
    commands = [road.command, *(road.done[stage.name]["command"] for stage in road.stages)]
    title = f"Slimmed to {road.target[0]}={road.target[1]:g}"
    facts, tables = [reached(road, rows), f"{road.epochs} epochs in all."], {"Models": rows, "Stages": stage_rows(road)}
    pairs = pictures([before, after], loader, device)
    Page(title, facts, tables, drawn, pairs, commands).write(folder / "report.html")


def finish(road: Road) -> None:
    """Table, slim.pt, report.json, report.html and exports."""
    rows, ms = compare(road)
    held = checkpoint.read(road.after)
    told = {key: value for key, value in held.items() if key not in (*checkpoint.KINDS, "format", "training")}
    checkpoint.save(road.folder / OUTPUT, checkpoint.build(held), **told)
    write_json(road.folder / "report.json", {
        "command": road.command, "asked": dict([road.target]), "reached": reached(road, rows), "rows": rows,
        "milliseconds": ms, "proof": (held.get("shrunk") or held.get("metrics") or {}).get("proof"),
        "commands": [road.done[stage.name]["command"] for stage in road.stages]})
    write_page(road, rows)
    print("\n" + report.stage_table(rows))
    print(f"\n{reached(road, rows)}")
    print(f"milliseconds are medians, in turn; {torch.get_num_threads()} threads on the CPU")
    if road.export:
        export.main(["--weights", str(road.folder / OUTPUT), *road.export])
    print(f"Slim model: {road.folder / OUTPUT}; {road.folder / 'report.html'} tells what came of it, "
          f"every stage is a run in {road.folder}")


def main(argv: list[str] | None = None) -> Path:
    """Command line -> slim.pt; returns the road's folder."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("slim.py: runs in one process; under torchrun start the commands that it prints")
    parser = road_parser(__doc__)
    opt = parser.parse_args(argv)
    if opt.resume:
        road = known_road(opt.resume, opt.project)
        given = [name for name in opt.given if name not in ("resume", "project", "workers", "device")]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: a road that goes on keeps what it was started with; "
                            "leave it out, or start a new one")
        road.workers = opt.workers if "workers" in opt.given else road.workers
        road.device = opt.device if "device" in opt.given else road.device
    else:
        road = begin(opt, parser.flags(opt, OWN))
    print(f"{road.folder}: {', '.join(f'{s.name} ({s.epochs} epochs)' if s.epochs else s.name for s in road.stages)}; "
          f"target {road.target[0]}={road.target[1]:g}")
    follow(road)
    finish(road)
    return road.folder


if __name__ == "__main__":
    run_cli(main)
