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
from contextlib import redirect_stdout
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import benchmarks
import export
import finetune_pruned
import prune
import train
import train_sparsity
import val
from models import checkpoint
from models.formats import formats, runtimes
from models.formats.speed import Timed, in_turns, measured_in, milliseconds, stopwatch
from models.schema import MODEL
from models.yolo import Model, whole_strides
from training.distillation import refuse_other_kind
from training.distributed import World, device_of_before
from training.levers import Levers, Measured, candidate_sizes, choose
from training.pipeline import (
    PRUNE,
    STATE,
    Pipeline,
    Progress,
    Settings,
    Stage,
    clock,
    goal,
    known_pipeline,
    largest_difference,
    reached,
    stage_rows,
    tasks,
)
from training.settings import DEFAULTS, absolute, hyp_file, resolve
from training.sparsity_plan import SparsityPlan, frozen_norms
from training.start import freeze, start_model
from utils.data.config import other_names, read_data
from utils.data.dataset import DetectionDataset
from utils.data.loader import validation_loader
from utils.device import select_device
from utils.errors import UserError, run_cli
from utils.files import command_line, in_use, new_run_folder, write_json
from utils.options import training_parser
from utils.parser import Argv, HelpfulParser, as_flags, at_least, format_name, from_python, named_fraction
from utils.plots.page import Page, headline
from utils.plots.slimming import plot_gamma_history, plot_kept, plot_tradeoff
from utils.slimming import TARGETS, report
from utils.slimming.cost import profile
from val import pictures

OUTPUT = "slim.pt"
TRAININGS = {"train.py": train.main, "train_sparsity.py": train_sparsity.main,
             "finetune_pruned.py": finetune_pruned.main}
FILES = "Files: mAP on square images, which they take; faster: than the first row"
LEAST_IMAGES = 2
LEAST_MAP = 1e-3  # mAP50-95 below which a teacher has nothing to teach
PROBE = "flops=0.7"  # the cut that tells what channels cost on this data


def pipeline_parser() -> HelpfulParser:
    """The flags: those of a training, and what the whole is to reach."""
    parser = training_parser(__doc__, "runs/slim")
    add = parser.add_argument
    add("--target", type=named_fraction([*TARGETS, "speedup"],
                                        "speedup=2, flops=0.5, params=0.5, latency=0.6 or map-drop=0.01"),
        default=("flops", 0.5),
        help="speedup=2: twice as fast as the model before in fp32, by smaller images (unless --imgsz is given), fewer "
             "channels and, with --int8, 8 bits. Or what channels are to leave: flops=0.5, params=0.5, latency=0.6. Or "
             "map-drop=0.01, the mAP50-95 on val that a cut may cost before fine-tuning")
    add("--runtime", choices=["torch", *runtimes()], default="torch",
        help="what speedup, latency and the table's milliseconds are measured in; in 8 bits with --int8")
    add("--layers", action="store_true", help="whole branches around which a shortcut leads may go, too")
    add("--rounds", type=at_least(1), default=1, help="become sparse and slim in so many trainings")
    add("--export", nargs="+", type=format_name, choices=[*formats(), "all"], metavar="FORMAT",
        help="in the end write these formats of export.py, such as onnx")
    add("--int8", action="store_true", help="with --export and --runtime: in 8 bits")
    parser.set_defaults(epochs=None)
    return parser


def begin(opt: Namespace) -> Pipeline:
    """A new pipeline, in a folder of its own. UserError for whatever can be known at the start to fail."""
    if (Path(opt.project) / opt.name / STATE).is_file() and opt.exist_ok:
        raise UserError(f"{Path(opt.project) / opt.name}: a pipeline is there already; --resume goes on with it, "
                        "another --name starts a new one")
    settings, model = settle(opt)
    if settings.export:
        if "all" not in settings.export:  # what it refuses is refused now, not in the end
            export.chosen_formats(export.parse(as_flags({"weights": OUTPUT, **exporting(settings)})))
    elif opt.int8 and opt.runtime == "torch":
        raise UserError("--int8: belongs to --export, such as --export openvino --int8, or to --runtime")
    select_device(opt.device)
    require_possible(settings, model)
    folder = new_run_folder(opt.project, opt.name, opt.exist_ok).absolute()
    return Pipeline(folder, command_line(), settings, opt.workers, opt.device)


def settle(opt: Namespace) -> tuple[Settings, Model]:
    """The command line -> all that stages and measurements need to know, and the model that the first stage trains."""
    saved = checkpoint.read(opt.weights) if opt.weights else {}
    resolved = resolve(opt, saved)
    config = read_data(resolved.data)
    names = {0: "object"} if resolved.single_cls else config.names
    trained = not opt.cfg and bool(saved) and not other_names(names, saved["names"])
    own = {field.name for field in fields(Settings)} | {"resume", "project", "name", "exist_ok", "workers", "device"}
    training = {name: getattr(opt, name) for name in opt.given if name not in own}
    if opt.hyp:
        training["hyp"] = str(hyp_file(opt.hyp))
    if opt.single_cls is False:  # given: the weights may have been trained as one class
        training["no_single_cls"] = True
    suited = config.defaults.get("epochs")  # of a training: half as many again for becoming slim
    model = start_model(resolved, names, {}, World(1, 2, torch.device("cpu")))  # not the main process: it says nothing
    return Settings(
        weights=opt.weights and absolute(opt.weights), cfg=opt.cfg and absolute(opt.cfg), data=resolved.data,
        imgsz=whole_strides(resolved.imgsz, model.divisor),
        single_cls=resolved.single_cls, target=opt.target,
        epochs=opt.epochs or (suited * 3 // 2 if suited else DEFAULTS["epochs"]), rounds=opt.rounds, trained=trained,
        teacher="none" if opt.teacher == "" else opt.teacher, teacher_weight=opt.teacher_weight, training=training,
        export=opt.export or [], int8=opt.int8, runtime=opt.runtime, layers=opt.layers,
        smaller_images=opt.target[0] == "speedup" and "imgsz" not in opt.given), model


def require_possible(settings: Settings, model: Model) -> None:
    """UserError where a stage that starts with `model`, or a measurement after the last one, could not do its work."""
    config = read_data(settings.data)
    if not config.train or not config.val:
        raise UserError(f"{config.file}: slim.py needs images under train: and val:")
    for split in ("train", *tasks(config)):
        images = DetectionDataset(getattr(config, split), 32, single_cls=settings.single_cls, nc=config.nc,
                                  prefix=split)
        if split == "train" and len(images) < LEAST_IMAGES:
            raise UserError(f"{config.file}: train: has a single image that can be used, from which no model learns; "
                            "give more")
        images.require_labels()
    if settings.teacher not in (None, "none"):
        refuse_other_kind(f"--teacher {settings.teacher}", checkpoint.load(settings.teacher), model)
    if settings.runtime != "torch":  # a model that it can't run would be known in the end only
        stopwatch(settings.runtime, settings.imgsz, torch.device("cpu"), precision=settings.precision)([model])
    first = next(stage for stage in settings.stages if stage.script == "train_sparsity.py")
    with redirect_stdout(None):  # settle() has said what the recipe is
        opt = train_sparsity.parse(as_flags({**settings.start, **settings.dataset, **settings.training, "epochs": 1,
                                             **goal(settings, first, 1.0)}))
    freeze(model, opt.freeze)
    SparsityPlan(opt, settings.imgsz, model, frozen_norms(model), 0, stopwatch(
        settings.runtime, settings.imgsz, torch.device("cpu"), precision=settings.precision))


def exporting(settings: Settings) -> dict[str, Any]:
    """Settings of export.py. What is written is measured here."""
    return {"include": settings.export, "int8": settings.int8, "noval": settings.int8}


def stage_flags(pipeline: Pipeline, stage: Stage, before: str) -> list[str]:
    """The command line of a stage. before: the checkpoint that the one before it has made."""
    settings, run = pipeline.settings, {**pipeline.machine, **pipeline.run_of(stage.name)}
    if stage.script == PRUNE:
        return as_flags({"weights": before, **settings.dataset, **run, "noval": True,
                         "target": f"map-drop={settings.target[1]:g}"})
    start, teacher, target = {"weights": before}, pipeline.teacher, {}
    if stage.name == "dense":
        start, teacher = settings.start, {}
    if stage.script == "train_sparsity.py":
        figure = "parameters" if settings.target[0] == "params" else "flops"
        whole, here = (getattr(profile(checkpoint.load(file), 256), figure) for file in (pipeline.before, before))
        target = {"imgsz": pipeline.imgsz, **goal(settings, stage, here / whole, pipeline.levers)}
    return as_flags({**start, **settings.dataset, **run, **settings.training, "epochs": stage.epochs, **teacher,
                     **target})


def follow(pipeline: Pipeline) -> None:
    """Run the stages that are not done, each from where it stopped."""
    before, past = pipeline.before, 0
    for stage in pipeline.settings.stages:
        if stage.script == "train_sparsity.py":
            prepare(pipeline)
        if stage.name not in pipeline.done:
            flags = stage_flags(pipeline, stage, before)
            command = f"python {stage.script} {shlex.join(flags)}"
            print(f"\n$ {command}", flush=True)
            run_stage(pipeline, stage, flags, Progress(past, pipeline.settings.epochs))
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
        TRAININGS[stage.script](as_flags({"resume": str(last), **pipeline.machine}), [progress])


def prepare(pipeline: Pipeline) -> None:
    """Before the model becomes sparse: look at what it finds, and share a speed out between the levers."""
    settings, found = pipeline.settings, measure(pipeline, "val-before", pipeline.before, "val")
    if found["mAP50-95"] < LEAST_MAP and settings.trained:
        raise UserError(f"{pipeline.before}: finds nothing on the val images (mAP50-95 {found['mAP50-95']:.4f}); give "
                        "trained weights, or --weights '' --cfg models/yolov5n.yaml to train from scratch")
    if settings.target[0] == "speedup" and pipeline.levers is None:
        pipeline.levers = choose_levers(pipeline)
        pipeline.save()
        print("\n" + report.stage_table(pipeline.levers.rows), flush=True)


def choose_levers(pipeline: Pipeline) -> Levers:
    """Precision, image size and channels for a target of speedup, by what can be measured before training."""
    settings, before = pipeline.settings, pipeline.before
    model, whole, file_format = checkpoint.load(before), settings.imgsz, runtimes().get(settings.runtime)
    sizes = candidate_sizes(whole, model.divisor) if settings.smaller_images else []
    probe = pruned_probe(pipeline)
    fp32, full, cut, *smaller = in_turns(
        [Timed(model, whole, file_format), *(Timed(one, size, file_format, settings.precision) for one, size in (
            (model, whole), (checkpoint.load(probe), whole), *((model, size) for size in sizes)))],
        select_device(pipeline.device))
    factors = {whole: 1.0, **{size: full / ms for size, ms in zip(sizes, smaller)}}
    accuracy = {size: measure(pipeline, f"val-{size}", before, "val", size)["mAP50-95"] for size in factors}
    probed = measure(pipeline, "val-probe", probe, "val")["mAP50-95"]
    return choose(settings.target[1], Measured(
        fp32 / full if settings.precision != "fp32" else 1.0, factors,
        {size: accuracy[whole] - value for size, value in accuracy.items()}, full / cut, accuracy[whole] - probed))


def pruned_probe(pipeline: Pipeline) -> Path:
    """The model before with fewer channels, repaired but not trained: what channels cost on this data."""
    flags = {"weights": pipeline.before, **pipeline.settings.dataset, **pipeline.machine, **pipeline.run_of("probe"),
             "target": PROBE, "reconstruct": True, "noval": True}
    if "probe" not in pipeline.done:
        prune.main(as_flags(flags), copy=False)
        pipeline.done["probe"] = {}
    return Stage("probe", PRUNE).product(pipeline.folder)


def measure(pipeline: Pipeline, name: str, weights: str | Path, task: str, imgsz: int = 0) -> dict[str, Any]:
    """val.py on a checkpoint, once: mAP50 and mAP50-95. imgsz: pixels; 0: those of the model before."""
    if name not in pipeline.done:
        summary = val.main(as_flags({"weights": str(weights), **pipeline.settings.dataset, **pipeline.machine,
                                     "imgsz": imgsz or pipeline.settings.imgsz, "task": task, **pipeline.run_of(name)}),
                           timed=False)  # other than in turns, times can't be compared
        pipeline.done[name] = {"mAP50": summary["metrics/mAP_0.5"], "mAP50-95": summary["metrics/mAP_0.5:0.95"]}
        pipeline.save()
    return pipeline.done[name]


def exported(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Write the formats of --export. A row for each file, and before them one for both models, as benchmarks.py has it.

    All are timed in turns, and see the same square images: the shape that files take.
    """
    settings = pipeline.settings
    if not settings.export:
        return []
    weights = {"weights": str(pipeline.folder / OUTPUT)}
    models = {"before": (checkpoint.load(pipeline.before), settings.imgsz),
              "slim": (checkpoint.load(pipeline.after), pipeline.imgsz)}
    rows = benchmarks.measured_files(
        models, export.main(as_flags({**weights, **exporting(settings)})), "int8" if settings.int8 else "fp32",
        as_flags({**weights, **settings.dataset, **pipeline.machine, "imgsz": pipeline.imgsz}))
    for row in rows[2:]:
        if row["precision"] == "int8" and row["mAP50-95"] != "":
            export.warn_of_loss(f"{row['format']} int8", rows[1]["mAP50-95"] - row["mAP50-95"])
    return rows


def compare(pipeline: Pipeline, timed: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """A row for the model before and one for the slim one: accuracy, cost, speed; and all that was timed.

    timed: rows of exported(), whose times of both models hold here as well.
    """
    settings = pipeline.settings
    measured = tasks(read_data(settings.data))
    files = {"before": pipeline.before, "slim": str(pipeline.after)}
    models = {name: checkpoint.load(file) for name, file in files.items()}
    rows = []
    for name, file in files.items():
        imgsz = settings.imgsz if name == "before" else pipeline.imgsz
        found = {task: measure(pipeline, f"{task}-{'before' if name == 'before' else 'after'}", file, task, imgsz)
                 for task in measured}
        cost = profile(models[name], imgsz, models[name].yaml["ch"])
        rows.append({"model": name, "px": imgsz, **{f"{key} {task}": found[task][key] for task in measured
                                       for key in ("mAP50", "mAP50-95")},
                     "parameters": cost.parameters, "GFLOPs": cost.gflops, "MB": cost.megabytes})
    device, file_format = select_device(pipeline.device), runtimes().get(settings.runtime)
    if settings.target[0] == "speedup":  # of different sizes and precisions
        slim_in = "" if settings.precision == "fp32" else f", slim in {settings.precision}"
        ms = {measured_in(settings.runtime) + slim_in: in_turns([
            Timed(models["before"], settings.imgsz, file_format),
            Timed(models["slim"], pipeline.imgsz, file_format, settings.precision)], device)}
    else:
        ms = milliseconds(list(models.values()), settings.imgsz, device, settings.runtime, settings.precision)
    if timed and settings.runtime == "torch":
        ms[clock(settings, ms)] = [row["ms"] for row in timed[:2]]
    return [{**row, "ms": values} for row, values in zip(rows, ms[clock(settings, ms)])], ms


def write_page(pipeline: Pipeline, rows: list[dict[str, Any]], files: list[dict[str, Any]], timed: str) -> None:
    """report.html and its pictures: the pipeline as one file."""
    settings, folder, device = pipeline.settings, pipeline.folder, select_device(pipeline.device)
    before, after = checkpoint.load(pipeline.before), checkpoint.load(pipeline.after)
    config, imgsz = read_data(settings.data), settings.imgsz
    loader = validation_loader(config, "val", imgsz, 10, after.divisor, workers=0,
                               single_cls=settings.single_cls)
    histories = {stage.name: list(np.load(file, allow_pickle=False)) for stage in settings.stages
                 if (file := folder / stage.name / "gammas.npy").is_file()}
    kept = [{"layer": name, "original": len(mask), "remaining": int(mask.sum()), "prunable": True}
            for name, mask in after.masks.items()]
    points = [{"model": f"{row['model']}, {row['format']} {row['precision']}", "ms": row["ms"], "map": row["mAP50-95"]}
              for row in files if not row["reason"]] or [{**row, "map": row["mAP50-95 val"]} for row in rows]
    drawn = {"Accuracy and time": plot_tradeoff(points, folder / "tradeoff.png"),
             **({"Channels kept": plot_kept(kept, folder / "channels.png")} if kept else {})}
    if histories:
        drawn["BatchNorm scales over the epochs"] = plot_gamma_history(histories, folder / "gamma_history.png")
    commands = [pipeline.command, *(pipeline.done[stage.name]["command"] for stage in settings.stages)]
    title = f"Slimmed to {settings.target[0]}={settings.target[1]:g}"
    known = {**DEFAULTS, **config.defaults}
    model = (known["weights"] if settings.weights is None else settings.weights) or settings.cfg or known["cfg"]
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    facts = [f"{Path(model).stem} on {config.file.stem}, {imgsz} px, {date.today()}", reached(settings, rows),
             f"{settings.epochs} epochs in all", f"ms: the median of an image; {timed}"]
    tables = {"Models": rows, FILES: files, "Stages": stage_rows(pipeline)}
    pairs = pictures([before, after], loader, device)
    head = headline(rows[0], rows[1], f"{timed.removesuffix(', batch 1').replace('torch', 'PyTorch')}, {threads}")
    Page(title, facts, tables, drawn, pairs, commands, head).write(folder / "report.html")


def finish(pipeline: Pipeline) -> None:
    """slim.pt, exports, tables, report.json and report.html."""
    settings, saved = pipeline.settings, checkpoint.read(pipeline.after)
    metadata = {key: value for key, value in saved.items() if key not in (*MODEL, "format", "training")}
    checkpoint.save(pipeline.folder / OUTPUT, checkpoint.build(saved), **metadata)
    files = exported(pipeline)
    rows, ms = compare(pipeline, files)
    timed = clock(settings, ms)
    write_json(pipeline.folder / "report.json", {
        "command": pipeline.command, "asked": dict([settings.target]), "reached": reached(settings, rows), "rows": rows,
        "files": files, "milliseconds": ms, "shown": timed, "difference": largest_difference(pipeline),
        "commands": [pipeline.done[stage.name]["command"] for stage in settings.stages]})
    write_page(pipeline, rows, files, timed)
    print("\n" + report.stage_table(rows))
    print(f"\n{reached(settings, rows)}")
    print(f"milliseconds are medians, the models timed in turns: {timed}; {torch.get_num_threads()} threads on the CPU")
    if files:
        print(f"\n{benchmarks.table(files)}\n{FILES}\n")
    print(f"Slim model: {pipeline.folder / OUTPUT}; {pipeline.folder / 'report.html'} tells what came of it, "
          f"every stage is a run in {pipeline.folder}")


def main(argv: Argv = None) -> Path:
    """Command line -> slim.pt; returns the pipeline's folder."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("slim.py: runs in one process; under torchrun start the commands that it prints")
    opt = pipeline_parser().parse_args(argv)
    if opt.resume:
        pipeline = known_pipeline(opt.resume, opt.project)
        given = [name for name in opt.given if name not in ("resume", "project", "workers", "device")]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: a pipeline that goes on keeps what it was started with; "
                            "leave it out, or start a new one")
        pipeline.workers = opt.workers if "workers" in opt.given else pipeline.workers
        pipeline.device = opt.device if "device" in opt.given else device_of_before(pipeline.device)
    else:
        pipeline = begin(opt)
    with in_use(pipeline.folder):
        pipeline.save()
        settings = pipeline.settings
        stages = ", ".join(f"{s.name} ({s.epochs} epochs)" if s.epochs else s.name for s in settings.stages)
        print(f"{pipeline.folder}: {stages}; target {settings.target[0]}={settings.target[1]:g}")
        follow(pipeline)
        finish(pipeline)
    return pipeline.folder


run = from_python(main)

if __name__ == "__main__":
    run_cli(main)
