"""The whole pipeline in one command: a model becomes sparse, shrinks while it trains, heals with a teacher.

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
from collections.abc import Mapping
from contextlib import redirect_stdout
from datetime import date
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
from models.formats import formats, runtimes
from models.formats.speed import measured_in, milliseconds, stopwatch
from models.pruning import model_pruner
from models.schema import MODEL
from models.yolo import whole_strides
from training.distillation import refuse_other_kind
from training.distributed import World, device_of_before
from training.pipeline import PRUNE, STATE, Pipeline, Progress, Stage, known_pipeline
from training.settings import DEFAULTS, absolute, hyp_file, resolve
from training.sparsity import SparsityPlan, frozen_norms
from training.start import freeze, start_model
from utils.data.config import DataConfig, other_names, read_data
from utils.data.dataset import DetectionDataset
from utils.data.loader import validation_loader
from utils.device import select_device
from utils.errors import UserError, run_cli
from utils.files import command_line, in_use, new_run_folder, write_json
from utils.options import training_parser
from utils.parser import Argv, HelpfulParser, at_least, from_python, named_fraction
from utils.plots.page import Page, headline
from utils.plots.slimming import plot_gamma_history, plot_kept, plot_tradeoff
from utils.slimming import TARGETS, Rules, report
from utils.slimming.cost import profile
from utils.slimming.target_sparsity import TargetSparsity
from val import pictures

OUTPUT = "slim.pt"
TRAININGS = {"train.py": train.main, "train_sparsity.py": train_sparsity.main,
             "finetune_pruned.py": finetune_pruned.main}
# Flags that the stages get in their own way, or not at all.
OWN = ("weights", "cfg", "data", "imgsz", "single_cls", "target", "epochs", "rounds", "export", "int8", "runtime",
       "resume", "project", "name", "exist_ok", "teacher", "teacher_weight", "workers", "device")
LEAST_IMAGES = 2
LEAST_MAP = 1e-3  # mAP50-95 below which a teacher has nothing to teach


def pipeline_parser() -> HelpfulParser:
    """The flags: those of a training, and what the whole is to reach."""
    parser = training_parser(__doc__, "runs/slim")
    add = parser.add_argument
    add("--target", type=named_fraction(TARGETS, "flops=0.5, params=0.5, latency=0.6 or map-drop=0.01"),
        default=("flops", 0.5),
        help="what is to be left: flops=0.5, params=0.5, latency=0.6 (see --runtime), or map-drop=0.01, the mAP50-95 "
             "on val that a cut may cost before fine-tuning")
    add("--runtime", choices=["torch", *runtimes()], default="torch",
        help="what --target latency and the table's milliseconds are measured in; in 8 bits with --int8")
    add("--rounds", type=at_least(1), default=1, help="become sparse and slim in so many trainings")
    add("--export", nargs="+", choices=[*formats(), "all"], metavar="FORMAT",
        help="in the end write these formats of export.py, such as onnx")
    add("--int8", action="store_true", help="with --export and --runtime: in 8 bits")
    parser.set_defaults(epochs=None)
    return parser


def begin(opt: Namespace, parser: HelpfulParser) -> Pipeline:
    """A new pipeline, in a folder of its own. UserError for whatever can be known at the start to fail."""
    held = checkpoint.read(opt.weights) if opt.weights else {}
    settled = resolve(opt, held)
    config = read_data(settled.data)
    suited = config.defaults.get("epochs")  # of a training: half as many again for becoming slim
    epochs = opt.epochs or (suited * 3 // 2 if suited else DEFAULTS["epochs"])
    names = {0: "object"} if settled.single_cls else config.names
    known = not opt.cfg and bool(held) and not other_names(names, held["names"])
    if (Path(opt.project) / opt.name / STATE).is_file() and opt.exist_ok:
        raise UserError(f"{Path(opt.project) / opt.name}: a pipeline is there already; --resume goes on with it, "
                        "another --name starts a new one")
    exports = ["--include", *opt.export, *(["--int8"] if opt.int8 else [])] if opt.export else []
    if exports:
        if "all" not in opt.export:  # what it refuses is refused now, not in the end
            export.chosen_formats(export.parse(["--weights", OUTPUT, *exports]))
    elif opt.int8 and opt.runtime == "torch":
        raise UserError("--int8: belongs to --export, such as --export openvino --int8, or to --runtime")
    precision = "int8" if opt.int8 and opt.runtime != "torch" else "fp32"
    opt.hyp = str(hyp_file(opt.hyp)) if opt.hyp else opt.hyp
    flags = parser.flags(opt, OWN) + (["--no-single-cls"] if opt.single_cls is False else [])
    pipeline = Pipeline(
        folder=Path(), command=command_line(), flags=flags, weights=opt.weights and absolute(opt.weights),
        cfg=opt.cfg and absolute(opt.cfg), data=settled.data, imgsz=settled.imgsz, single_cls=settled.single_cls,
        target=opt.target, epochs=epochs, rounds=opt.rounds, trained=known,
        teacher="none" if opt.teacher == "" else opt.teacher, teacher_weight=opt.teacher_weight, export=exports,
        runtime=opt.runtime, precision=precision, workers=opt.workers, device=opt.device)
    require_possible(pipeline, config, names)
    pipeline.folder = new_run_folder(opt.project, opt.name, opt.exist_ok).absolute()
    return pipeline


def require_possible(pipeline: Pipeline, config: DataConfig, names: dict[int, str]) -> None:
    """UserError where a stage, or a measurement after the last one, could not do its work; rounds the image size."""
    select_device(pipeline.device)
    if not config.train or not config.val:
        raise UserError(f"{config.file}: slim.py needs images under train: and val:")
    for split in tasks(config, "train"):
        images = DetectionDataset(getattr(config, split), 32, single_cls=pipeline.single_cls, nc=config.nc,
                                  prefix=split)
        if split == "train" and len(images) < LEAST_IMAGES:
            raise UserError(f"{config.file}: train: has a single image that can be used, from which no model learns; "
                            "give more")
        images.require_labels()
    sparse = next(stage for stage in pipeline.stages if stage.script == "train_sparsity.py")
    flags = [*start_flags(pipeline), *pipeline.dataset, *pipeline.flags, "--epochs", "1", *goal(pipeline, sparse, 1.0)]
    with redirect_stdout(None):  # begin() has said what the recipe is
        start = Namespace(**vars(train_sparsity.parse(flags)))
        model = start_model(start, names, {}, World(0, 1, torch.device("cpu")))
    pipeline.imgsz = whole_strides(start.imgsz, model.stride)
    if pipeline.teacher not in (None, "none"):
        refuse_other_kind(f"--teacher {pipeline.teacher}", checkpoint.load(pipeline.teacher), model)
    if pipeline.runtime != "torch":  # a model that it can't run would be known in the end only
        stopwatch(pipeline.runtime, pipeline.imgsz, torch.device("cpu"), precision=pipeline.precision)([model])
    freeze(model, start.freeze)
    SparsityPlan(start, pipeline.imgsz, model, frozen_norms(model))


def tasks(config: DataConfig, *more: str) -> list[str]:
    """The splits that are measured on: val, and test where its images are there; after `more` ones."""
    return [*more, "val", *(["test"] if config.test and all(path.exists() for path in config.test) else [])]


def start_flags(pipeline: Pipeline) -> list[str]:
    """What the first training starts from."""
    flags = [] if pipeline.weights is None else ["--weights", pipeline.weights]
    return flags + (["--cfg", pipeline.cfg] if pipeline.cfg else [])


def goal(pipeline: Pipeline, stage: Stage, left: float) -> list[str]:
    """The target of a sparsity training that starts with a model of which `left`, 0..1, is left, and its --shrink."""
    name, wanted = pipeline.target
    if name == "map-drop":
        return ["--target-sparsity", "0.5", "--shrink"]
    if name == "latency":
        name, wanted = "flops", pipeline.flops or 0.5
    rounds = [s.name for s in pipeline.stages if s.script == "train_sparsity.py"]
    wanted **= (rounds.index(stage.name) + 1) / len(rounds)
    return ["--target", f"{name}={min(wanted / left, 0.999):.6g}", "--shrink"]


def stage_flags(pipeline: Pipeline, stage: Stage, before: str) -> list[str]:
    """The command line of a stage. before: the checkpoint that the one before it has made."""
    run = [*pipeline.dataset, *pipeline.machine, "--project", str(pipeline.folder), "--name", stage.name,
           "--exist-ok"]
    if stage.script == PRUNE:
        return ["--weights", before, *run, "--target", f"map-drop={pipeline.target[1]:g}", "--noval"]
    run += [*pipeline.flags, "--epochs", str(stage.epochs)]
    if stage.name == "dense":
        return [*start_flags(pipeline), *run]
    flags = ["--weights", before, *run, *pipeline.taught]
    if stage.script != "train_sparsity.py":
        return flags
    figure = "parameters" if pipeline.target[0] == "params" else "flops"
    whole, here = (getattr(profile(checkpoint.load(file), 256), figure) for file in (pipeline.before, before))
    return flags + goal(pipeline, stage, here / whole)


def follow(pipeline: Pipeline) -> None:
    """Run the stages that are not done, each from where it stopped."""
    before, past = pipeline.before, 0
    for stage in pipeline.stages:
        if stage.script == "train_sparsity.py":
            prepare(pipeline)
        if stage.name not in pipeline.done:
            flags = stage_flags(pipeline, stage, before)
            command = f"python {stage.script} {shlex.join(flags)}"
            print(f"\n$ {command}", flush=True)
            run_stage(pipeline, stage, flags, Progress(past, pipeline.epochs))
            pipeline.done[stage.name] = {"command": command}
            pipeline.save()
        before, past = str(stage.product(pipeline.folder)), past + stage.epochs


def run_stage(pipeline: Pipeline, stage: Stage, flags: list[str], progress: Progress) -> None:
    """One stage, or the rest of it."""
    if stage.script == PRUNE:
        prune.main(flags, copy=False)
        return
    last = pipeline.folder / stage.name / "weights" / "last.pt"
    if not last.is_file():
        TRAININGS[stage.script](flags, [progress])
    elif checkpoint.read(last)["training"]["epoch"] < stage.epochs:
        TRAININGS[stage.script](["--resume", str(last), *pipeline.machine], [progress])


def prepare(pipeline: Pipeline) -> None:
    """Before the model becomes sparse: look at what it finds, and make a target in milliseconds one in FLOPs."""
    found = measure(pipeline, "val-before", pipeline.before, "val")
    if found["mAP50-95"] < LEAST_MAP and pipeline.trained:
        raise UserError(f"{pipeline.before}: finds nothing on the val images (mAP50-95 {found['mAP50-95']:.4f}); give "
                        "trained weights, or --weights '' --cfg models/yolov5n.yaml to train from scratch")
    if pipeline.target[0] != "latency" or pipeline.flops is not None:
        return
    model, imgsz = checkpoint.load(pipeline.before), found["imgsz"]
    pruner = model_pruner(model, imgsz, milliseconds=stopwatch(
        pipeline.runtime, imgsz, select_device(pipeline.device), precision=pipeline.precision))
    result = pruner.rank(rules=Rules(min_share=TargetSparsity.FLOOR, round_to=16), per_flop=True).cut(
        target=pipeline.target)
    if result.target is None or not result.target.reached:
        raise UserError(f"--target latency={pipeline.target[1]:g}: can't be reached, with all that may go "
                        f"{result.target.value if result.target else 1:.3f} of the time is left; give more")
    pipeline.flops = profile(result.slim, imgsz).flops / profile(model, imgsz).flops
    print(f"latency={pipeline.target[1]:g} takes about flops={pipeline.flops:.3f}: measured on the model before, "
          f"in {measured_in(pipeline.runtime, pipeline.precision)}")
    pipeline.save()


def clock(pipeline: Pipeline, ms: Mapping[str, Any]) -> str:
    """Which of the times in `ms` the table shows: PyTorch's where the runtime can't run one of the models."""
    wanted = f"{measured_in(pipeline.runtime, pipeline.precision)}, batch 1"
    return wanted if wanted in ms else "torch, batch 1"


def measure(pipeline: Pipeline, name: str, weights: str | Path, task: str) -> dict[str, Any]:
    """val.py on a checkpoint, once: mAP50 and mAP50-95, and the size of the images."""
    if name not in pipeline.done:
        summary = val.main(["--weights", str(weights), *pipeline.dataset, *pipeline.machine, "--task", task,
                            "--project", str(pipeline.folder), "--name", name, "--exist-ok"])
        pipeline.done[name] = {"mAP50": summary["metrics/mAP_0.5"], "mAP50-95": summary["metrics/mAP_0.5:0.95"],
                           "imgsz": summary["imgsz"]}
        pipeline.save()
    return pipeline.done[name]


def compare(pipeline: Pipeline) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """A row for the model before and one for the slim one: accuracy, cost, speed; and all that was timed."""
    measured = tasks(read_data(pipeline.data))
    files = {"before": pipeline.before, "slim": str(pipeline.after)}
    models = {name: checkpoint.load(file) for name, file in files.items()}
    rows = []
    for name, file in files.items():
        found = {task: measure(pipeline, f"{task}-{'before' if name == 'before' else 'after'}", file, task)
                 for task in measured}
        cost = profile(models[name], found["val"]["imgsz"], models[name].yaml["ch"])
        rows.append({"model": name, **{f"{key} {task}": found[task][key] for task in measured
                                       for key in ("mAP50", "mAP50-95")},
                     "parameters": cost.parameters, "GFLOPs": cost.gflops, "MB": cost.megabytes})
    ms = milliseconds(list(models.values()), found["val"]["imgsz"], select_device(pipeline.device), pipeline.runtime,
                      pipeline.precision)
    return [{**row, "ms": values} for row, values in zip(rows, ms[clock(pipeline, ms)])], ms


def reached(pipeline: Pipeline, rows: list[dict[str, Any]]) -> str:
    """What was asked and what came of it, in a line."""
    name, wanted = pipeline.target
    before, after = rows
    if name == "map-drop":
        drop = before["mAP50-95 val"] - after["mAP50-95 val"]
        return f"asked {name}={wanted:g}: the slim model's mAP50-95 on val is lower by {drop:.4f}"
    key = {"flops": "GFLOPs", "params": "parameters", "latency": "ms"}[name]
    share = after[key] / before[key]
    text = f"asked {name}={wanted:g}: {share:.3f} of it is left"
    return text if share <= wanted else f"{text}, which is more; --rounds 2 or a smaller number comes closer"


def stage_rows(pipeline: Pipeline) -> list[dict[str, Any]]:
    """A row per stage: what it ran, and what its model was after it."""
    rows = []
    for stage in pipeline.stages:
        held = checkpoint.read(stage.product(pipeline.folder))
        cost = profile(checkpoint.build(held), pipeline.done["val-before"]["imgsz"])
        found = (held.get("metrics") or {}).get("metrics/mAP_0.5:0.95", "")
        rows.append({"stage": stage.name, "script": stage.script, "epochs": stage.epochs, "mAP50-95 val": found,
                     "parameters": cost.parameters, "GFLOPs": cost.gflops})
    return rows


def write_page(pipeline: Pipeline, rows: list[dict[str, Any]], timed: str) -> None:
    """report.html and its pictures: the pipeline as one file."""
    folder, device = pipeline.folder, select_device(pipeline.device)
    before, after = checkpoint.load(pipeline.before), checkpoint.load(pipeline.after)
    config, imgsz = read_data(pipeline.data), pipeline.imgsz
    loader = validation_loader(config, "val", imgsz, 10, int(after.stride.max()), workers=0,
                               single_cls=pipeline.single_cls)
    histories = {stage.name: list(np.load(file, allow_pickle=False)) for stage in pipeline.stages
                 if (file := folder / stage.name / "gammas.npy").is_file()}
    kept = [{"layer": name, "original": len(mask), "remaining": int(mask.sum()), "prunable": True}
            for name, mask in after.masks.items()]
    drawn = {
        "Accuracy and time": plot_tradeoff([{**row, "map": row["mAP50-95 val"]} for row in rows],
                                           folder / "tradeoff.png"),
        "Channels kept": plot_kept(kept, folder / "channels.png")}
    if histories:
        drawn["BatchNorm scales over the epochs"] = plot_gamma_history(histories, folder / "gamma_history.png")
    commands = [pipeline.command, *(pipeline.done[stage.name]["command"] for stage in pipeline.stages)]
    title = f"Slimmed to {pipeline.target[0]}={pipeline.target[1]:g}"
    known = {**DEFAULTS, **config.defaults}
    model = (known["weights"] if pipeline.weights is None else pipeline.weights) or pipeline.cfg or known["cfg"]
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    facts = [f"{Path(model).stem} on {config.file.stem}, {imgsz} px, {date.today()}", reached(pipeline, rows),
             f"{pipeline.epochs} epochs in all", f"ms: the median of an image; {timed}"]
    tables = {"Models": rows, "Stages": stage_rows(pipeline)}
    pairs = pictures([before, after], loader, device)
    head = headline(rows[0], rows[1], f"{timed.removesuffix(', batch 1').replace('torch', 'PyTorch')}, {threads}")
    Page(title, facts, tables, drawn, pairs, commands, head).write(folder / "report.html")


def largest_difference(pipeline: Pipeline) -> float:
    """What the equivalence checks of all stages have found at most."""
    stages = [checkpoint.read(stage.product(pipeline.folder)) for stage in pipeline.stages]
    return max((held.get(key) or {}).get("difference") or 0.0 for held in stages for key in ("shrunk", "metrics"))


def finish(pipeline: Pipeline) -> None:
    """Table, slim.pt, report.json, report.html and exports."""
    held = checkpoint.read(pipeline.after)
    told = {key: value for key, value in held.items() if key not in (*MODEL, "format", "training")}
    checkpoint.save(pipeline.folder / OUTPUT, checkpoint.build(held), **told)
    rows, ms = compare(pipeline)
    timed = clock(pipeline, ms)
    write_json(pipeline.folder / "report.json", {
        "command": pipeline.command, "asked": dict([pipeline.target]), "reached": reached(pipeline, rows), "rows": rows,
        "milliseconds": ms, "shown": timed, "difference": largest_difference(pipeline),
        "commands": [pipeline.done[stage.name]["command"] for stage in pipeline.stages]})
    write_page(pipeline, rows, timed)
    print("\n" + report.stage_table(rows))
    print(f"\n{reached(pipeline, rows)}")
    print(f"milliseconds are medians, in turn: {timed}; {torch.get_num_threads()} threads on the CPU")
    if pipeline.export:
        export.main(["--weights", str(pipeline.folder / OUTPUT), *pipeline.export])
    print(f"Slim model: {pipeline.folder / OUTPUT}; {pipeline.folder / 'report.html'} tells what came of it, "
          f"every stage is a run in {pipeline.folder}")


def main(argv: Argv = None) -> Path:
    """Command line -> slim.pt; returns the pipeline's folder."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("slim.py: runs in one process; under torchrun start the commands that it prints")
    parser = pipeline_parser()
    opt = parser.parse_args(argv)
    if opt.resume:
        pipeline = known_pipeline(opt.resume, opt.project)
        given = [name for name in opt.given if name not in ("resume", "project", "workers", "device")]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: a pipeline that goes on keeps what it was started with; "
                            "leave it out, or start a new one")
        pipeline.workers = opt.workers if "workers" in opt.given else pipeline.workers
        pipeline.device = opt.device if "device" in opt.given else device_of_before(pipeline.device)
    else:
        pipeline = begin(opt, parser)
    with in_use(pipeline.folder):
        pipeline.save()
        stages = ", ".join(f"{s.name} ({s.epochs} epochs)" if s.epochs else s.name for s in pipeline.stages)
        print(f"{pipeline.folder}: {stages}; target {pipeline.target[0]}={pipeline.target[1]:g}")
        follow(pipeline)
        finish(pipeline)
    return pipeline.folder


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
