"""The pipeline from a model to a slim one: its stages, what is done of them, what came of it, and what time is left."""
from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models import checkpoint
from models.formats import formats, runtimes
from models.formats.speed import measured_in
from models.schema import ANY, FLAG, MAPPING, TEXT, Kind, Needed, has, maybe, number, one_of, require, tree, whole
from training.levers import Levers
from training.loggers import Cell, duration
from training.run import Hook, Run
from utils.data.config import DataConfig
from utils.errors import UserError, first_line
from utils.files import newest, write_json
from utils.slimming.cost import profile
from utils.slimming.targets import TARGETS, is_target
from utils.text import read_json

STATE = "slim.json"
PRUNE = "prune.py"
OTHER_STAGES = 3  # one in so many epochs is for what comes before, or after, becoming sparse


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline. Its name is that of its run's folder."""

    name: str
    script: str
    epochs: int = 0

    def product(self, folder: Path) -> Path:
        """The checkpoint that it makes. A training of so few epochs that none counted as the best leaves last.pt."""
        if self.script == PRUNE:
            return folder / self.name / "pruned_model.pt"
        best, last = (folder / self.name / "weights" / name for name in ("best.pt", "last.pt"))
        return best if best.is_file() or not last.is_file() else last


@dataclass(frozen=True)
class Settings:
    """What a pipeline is asked for. All of it is resolved when the pipeline begins, and does not change."""

    weights: str | None           # that it starts from; None: those that train.py takes where none are given
    cfg: str | None               # model yaml
    data: str                     # data yaml, an absolute path
    imgsz: int                    # pixels, in whole strides: what the model before is for
    single_cls: bool
    target: tuple[str, float]     # a name of TARGETS, and what is to be left
    epochs: int                   # of all stages
    rounds: int                   # trainings to sparsity
    trained: bool                 # the weights were trained on the classes of the data: no dense training is needed
    teacher: str | None = None    # another one than the model before; "none": no teacher
    teacher_weight: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)  # other settings that were given for the trainings
    export: list[str] = field(default_factory=list)         # formats to write in the end
    int8: bool = False            # write them, and measure, in 8 bits
    runtime: str = "torch"        # in which milliseconds are measured
    layers: bool = False          # may whole branches go
    smaller_images: bool = False  # may the slim model be for smaller images: with a target of speedup

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", tuple(self.target))  # JSON has lists only
        for stage in self.stages:
            if stage.script != PRUNE and stage.epochs < 1:
                raise UserError(f"--epochs {self.epochs}: too few, the pipeline is {len(self.stages)} stages long; "
                                "give more")

    @property
    def precision(self) -> str:
        """Of what is measured."""
        return "int8" if self.int8 and self.runtime != "torch" else "fp32"

    @property
    def stages(self) -> list[Stage]:
        """The commands in order."""
        left, found = self.epochs, []
        if not self.trained:
            found.append(Stage("dense", "train.py", left // OTHER_STAGES))
            left -= left // OTHER_STAGES
        tuning = left // OTHER_STAGES if self.target[0] == "map-drop" else 0
        left -= tuning
        for i in range(self.rounds):
            name = f"sparse{i + 1}" if self.rounds > 1 else "sparse"
            found.append(Stage(name, "train_sparsity.py", left // self.rounds + (i < left % self.rounds)))
        if self.target[0] == "map-drop":
            found += [Stage("cut", PRUNE), Stage("tuned", "finetune_pruned.py", tuning)]
        return found

    @property
    def dataset(self) -> dict[str, Any]:
        """Settings that every script takes: the data, the size of its images, and whether its classes are one."""
        return {"data": self.data, "imgsz": self.imgsz, "single_cls": self.single_cls}

    @property
    def start(self) -> dict[str, Any]:
        """What the first training starts from."""
        return {"weights": self.weights, "cfg": self.cfg or None}


FIGURES = {"mAP50": Needed(number()), "mAP50-95": Needed(number())}


def form_of_state() -> dict[str, Any]:
    """What slim.json must hold, as models.schema says it. Of `done`: what all of its entries are."""
    one, side = (TEXT, number(), FLAG), whole(32, 65_536)
    targets = f"one of {', '.join(TARGETS)}, and a number between 0 and 1; or speedup, and one above 1"
    levers = {"imgsz": Needed(side), "latency": Needed(number(0, 1)), "rows": Needed([{...: one}])}
    return {"command": Needed(TEXT), "workers": whole(), "device": TEXT, "done": {...: MAPPING},
            "levers": Needed(maybe(levers)), "settings": Needed({
                "weights": maybe(TEXT), "cfg": maybe(TEXT), "data": TEXT, "imgsz": side, "single_cls": FLAG,
                "epochs": whole(1), "rounds": whole(1, 1000), "trained": FLAG, "target": Kind(targets, _is_target),
                "teacher": maybe(TEXT), "teacher_weight": number(0), "training": {...: (*one, [one])},
                "export": [one_of(*formats(), "all")], "int8": FLAG, "runtime": one_of("torch", *runtimes()),
                "layers": FLAG, "smaller_images": FLAG})}


def _is_target(value: Any) -> bool:
    """Of slim.py: is_target(), or a speedup."""
    speedup = has(value, [ANY]) and len(value) == 2 and value[0] == "speedup" and has(value[1], number(1))
    return speedup or is_target(value)


@dataclass
class Pipeline:
    """A pipeline on its way. It lies in its folder, as slim.json, written anew after each stage."""

    folder: Path
    command: str                  # that began it
    settings: Settings
    workers: int = 8              # of this machine: they may change when the pipeline goes on
    device: str = ""
    levers: Levers | None = None  # with a target of speedup: what is to reach it
    done: dict[str, Any] = field(default_factory=dict)  # name of a stage or measurement -> its figures

    @property
    def imgsz(self) -> int:
        """Pixels of the images that the slim model is for."""
        return self.levers.imgsz if self.levers else self.settings.imgsz

    @property
    def machine(self) -> dict[str, Any]:
        """Settings of this machine, which every script takes."""
        return {"workers": self.workers, "device": self.device or None}

    @property
    def teacher(self) -> dict[str, Any]:
        """Settings of a training that has a teacher."""
        if self.settings.teacher == "none":
            return {"teacher": "none"}
        return {"teacher": self.settings.teacher or self.before, "teacher_weight": self.settings.teacher_weight}

    @property
    def before(self) -> str:
        """The checkpoint of the model that becomes slim, which is its teacher as well unless another one is given."""
        settings = self.settings
        return str(settings.weights if settings.trained else settings.stages[0].product(self.folder))

    @property
    def after(self) -> Path:
        """The slim checkpoint."""
        return self.settings.stages[-1].product(self.folder)

    def run_of(self, name: str) -> dict[str, Any]:
        """Settings of a script whose run lies in the pipeline's folder under this name."""
        return {"project": str(self.folder), "name": name, "exist_ok": True}

    def save(self) -> None:
        """Write slim.json, atomically."""
        write_json(self.folder / STATE, {key: value for key, value in asdict(self).items() if key != "folder"})


def known_pipeline(resume: str | bool, project: str) -> Pipeline:
    """The pipeline that --resume means: its folder, a file in it, or the newest."""
    path = Path(resume) if isinstance(resume, str) else newest(f"{project}/*/{STATE}")
    if path is None:
        raise UserError(f"--resume: no pipeline under {project}; give its folder: --resume path/to/exp")
    for folder in (path.absolute(), *path.absolute().parents):
        if (folder / STATE).is_file():
            try:
                data = tree(read_json(folder / STATE))
                require(data, form_of_state())
                levers = Levers(**data["levers"]) if data["levers"] else None
                pipeline = Pipeline(folder, **{**data, "settings": Settings(**data["settings"]), "levers": levers})
                stages = {stage.name: {"command": Needed(TEXT)} for stage in pipeline.settings.stages}
                require(pipeline.done, {**stages, "probe": MAPPING, ...: FIGURES}, "done")
                return pipeline
            except (UserError, TypeError, ValueError) as error:
                raise UserError(f"{folder / STATE}: damaged, or of another version ({first_line(error)}); mend it, or "
                                "start a new pipeline: --weights with the best of its stages") from None
    raise UserError(f"--resume {path}: no {STATE} there or above; give the folder of a slim.py run")


def tasks(config: DataConfig) -> list[str]:
    """The splits that are measured on: val, and test where its images are there."""
    return ["val", *(["test"] if config.test and all(path.exists() for path in config.test) else [])]


def goal(settings: Settings, stage: Stage, left: float, levers: Levers | None = None) -> dict[str, Any]:
    """The target of a sparsity training that starts with a model of which `left`, 0..1, is left, and its --shrink."""
    (name, wanted), cuts = settings.target, {"shrink": True, "layers": settings.layers}
    if name == "map-drop":
        return {"target_sparsity": 0.5, **cuts}
    if name == "speedup":
        name, wanted = "latency", levers.latency if levers else 0.9
        if levers and not levers.cuts:
            return {"no_st": True}
    rounds = [s.name for s in settings.stages if s.script == "train_sparsity.py"]
    if name == "latency":  # of the model that the round starts with
        return {"target": f"latency={wanted ** (1 / len(rounds)):.6g}", "runtime": settings.runtime,
                "int8": settings.precision == "int8", **cuts}
    wanted **= (rounds.index(stage.name) + 1) / len(rounds)
    return {"target": f"{name}={min(wanted / left, 0.999):.6g}", **cuts}


def clock(settings: Settings, ms: Mapping[str, Any]) -> str:
    """Which of the times in `ms` the table shows: PyTorch's where the runtime can't run one of the models."""
    wanted = f"{measured_in(settings.runtime, settings.precision)}, batch 1"
    return wanted if wanted in ms else next(iter(ms))


def reached(settings: Settings, rows: list[dict[str, Any]]) -> str:
    """What was asked and what came of it, in a line."""
    name, wanted = settings.target
    before, after = rows
    if name == "map-drop":
        drop = before["mAP50-95 val"] - after["mAP50-95 val"]
        return f"asked {name}={wanted:g}: the slim model's mAP50-95 on val is lower by {drop:.4f}"
    if name == "speedup":
        return f"asked {name}={wanted:g}: {before['ms'] / after['ms']:.2f} times as fast"
    key = {"flops": "GFLOPs", "params": "parameters", "latency": "ms"}[name]
    share = after[key] / before[key]
    text = f"asked {name}={wanted:g}: {share:.3f} of it is left"
    return text if share <= wanted else f"{text}, which is more; --rounds 2 or a smaller number comes closer"


def stage_rows(pipeline: Pipeline) -> list[dict[str, Any]]:
    """A row per stage: what it ran, and what its model was after it."""
    settings, rows = pipeline.settings, []
    for stage in settings.stages:
        saved = checkpoint.read(stage.product(pipeline.folder))
        cost = profile(checkpoint.build(saved), settings.imgsz if stage.script == "train.py" else pipeline.imgsz)
        found = (saved.get("metrics") or {}).get("metrics/mAP_0.5:0.95", "")
        rows.append({"stage": stage.name, "script": stage.script, "epochs": stage.epochs, "mAP50-95 val": found,
                     "parameters": cost.parameters, "GFLOPs": cost.gflops})
    return rows


def largest_difference(pipeline: Pipeline) -> float:
    """What the equivalence checks of all stages have found at most."""
    stages = [checkpoint.read(stage.product(pipeline.folder)) for stage in pipeline.settings.stages]
    return max((saved.get(key) or {}).get("difference") or 0.0 for saved in stages for key in ("shrunk", "metrics"))


class Progress(Hook):
    """After each epoch of a stage: how far the whole pipeline is, and about how long the rest takes.

    before: epochs of the stages before this one. epochs: of the whole pipeline.
    """

    def __init__(self, before: int, epochs: int):
        self.before, self.epochs = before, epochs

    def start(self, run: Run) -> None:
        self.run, self.first, self.begun = run, run.epoch, time.monotonic()

    def columns(self) -> dict[str, Cell]:
        return {"all stages": lambda log: f"{self.before + self.run.epoch + 1}/{self.epochs}",
                "all left": lambda log: duration(self.left())}

    def left(self) -> float:
        """Seconds until the last stage's end, as fast as this stage has been."""
        here = self.run.epoch + 1
        return (time.monotonic() - self.begun) / (here - self.first) * (self.epochs - self.before - here)
