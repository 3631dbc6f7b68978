"""The pipeline from a model to a slim one: its stages, what is done of them, and how long the rest takes."""
from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.run import Hook, Run
from utils.errors import UserError
from utils.files import newest, write_json
from utils.text import read_json

STATE = "slim.json"
PRUNE = "prune.py"
SHARE = 3  # one in so many epochs is for what comes before, or after, becoming sparse


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


@dataclass
class Pipeline:
    """What is known of a pipeline. It lies in its folder, as slim.json, written anew after each stage."""

    folder: Path
    command: str
    flags: list[str]              # given by the user, for the trainings
    weights: str | None           # that it starts from; None: those that train.py takes where none are given
    cfg: str | None
    data: str
    imgsz: int                    # in whole strides
    single_cls: bool
    target: tuple[str, float]
    epochs: int
    rounds: int
    trained: bool                 # the weights were trained on the classes of the data: no dense training is needed
    teacher: str | None = None    # another one than the model before; "none": no teacher
    teacher_weight: float = 1.0
    export: list[str] = field(default_factory=list)  # flags of export.py
    runtime: str = "torch"        # in which milliseconds are measured
    precision: str = "fp32"       # of that runtime
    workers: int = 8
    device: str = ""
    flops: float | None = None    # with a target of latency: the share of the FLOPs that is to reach it
    done: dict[str, Any] = field(default_factory=dict)  # name of a stage or measurement -> its figures

    @property
    def stages(self) -> list[Stage]:
        """The commands in order. UserError where there are too few epochs for them."""
        left, found = self.epochs, []
        if not self.trained:
            found.append(Stage("dense", "train.py", left // SHARE))
            left -= left // SHARE
        tuning = left // SHARE if self.target[0] == "map-drop" else 0
        left -= tuning
        for i in range(self.rounds):
            name = f"sparse{i + 1}" if self.rounds > 1 else "sparse"
            found.append(Stage(name, "train_sparsity.py", left // self.rounds + (i < left % self.rounds)))
        if self.target[0] == "map-drop":
            found += [Stage("cut", PRUNE), Stage("tuned", "finetune_pruned.py", tuning)]
        if any(stage.epochs < 1 for stage in found if stage.script != PRUNE):
            raise UserError(f"--epochs {self.epochs}: too few, the pipeline is {len(found)} stages long; give more")
        return found

    @property
    def machine(self) -> list[str]:
        """Flags that every script takes, and that may change when the pipeline goes on."""
        return ["--workers", str(self.workers), *(["--device", self.device] if self.device else [])]

    @property
    def dataset(self) -> list[str]:
        """Flags that every script takes: the data, the size of its images, and whether its classes are one."""
        return ["--data", self.data, "--imgsz", str(self.imgsz), *(["--single-cls"] if self.single_cls else [])]

    @property
    def taught(self) -> list[str]:
        """Flags of a training that has a teacher."""
        if self.teacher == "none":
            return ["--teacher", "none"]
        return ["--teacher", self.teacher or self.before, "--teacher-weight", str(self.teacher_weight)]

    @property
    def before(self) -> str:
        """The checkpoint of the model that becomes slim, which is its teacher as well unless another one is given."""
        return str(self.weights if self.trained else self.stages[0].product(self.folder))

    @property
    def after(self) -> Path:
        """The slim checkpoint."""
        return self.stages[-1].product(self.folder)

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
                data = read_json(folder / STATE)
                return Pipeline(folder, **{**data, "target": tuple(data["target"])})
            except (UserError, TypeError, KeyError):
                raise UserError(f"{folder / STATE}: damaged, or of another version; start a new pipeline: "
                                "--weights with the best of its stages") from None
    raise UserError(f"--resume {path}: no {STATE} there or above; give the folder of a slim.py run")


class Progress(Hook):
    """After each epoch of a stage: how far the whole pipeline is, and about how long the rest takes.

    before: epochs of the stages before this one. epochs: of the whole pipeline.
    """

    def __init__(self, before: int, epochs: int):
        self.before, self.epochs = before, epochs

    def start(self, run: Run) -> None:
        self.run, self.first, self.begun = run, run.epoch, time.monotonic()

    def epoch_end(self, log: dict[str, float]) -> None:
        if not self.run.world.main:
            return
        here = self.run.epoch + 1
        done = self.before + here
        minutes = (time.monotonic() - self.begun) / (here - self.first) * (self.epochs - done) / 60
        print(f"{'':>11}{done} of {self.epochs} epochs of the whole, about {minutes:.1f} minutes left", flush=True)
