"""Each extension point, used from outside of the package in a few lines."""
from __future__ import annotations

import csv
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import export
import prune
import val
from models import checkpoint
from models.common import BLOCKS, Conv, block
from models.config import read_yaml
from models.formats import ExportOptions, Format, formats, register
from models.yolo import Model
from prune import pruning_parser
from tests.blocks import randomised
from train import train
from training.run import Hook, Run
from training.settings import resolve
from utils.options import training_parser
from utils.slimming import SCORES, TARGETS, Pruner, Target, TracedModel, group_mean, register_passthrough, slim
from utils.slimming.cost import profile
from utils.slimming.equivalence import largest_difference
from utils.slimming.tracing import PASSTHROUGH


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Every register is afterwards what it was before."""
    mappings, passthrough = (BLOCKS, SCORES, TARGETS, formats()), set(PASSTHROUGH)
    before = [dict(mapping) for mapping in mappings]
    yield
    for mapping, content in zip(mappings, before):
        mapping.clear()
        mapping.update(content)
    PASSTHROUGH.clear()
    PASSTHROUGH.update(passthrough)


def small(cfg: Path | dict, nc: int = 2) -> Model:
    torch.manual_seed(0)
    return randomised(Model(cfg if isinstance(cfg, dict) else str(cfg), nc=nc, names={0: "square", 1: "circle"})).eval()


# A block for model yamls, with an activation --------------------------------------------------------------------------

class SignedLog(nn.Module):
    """An activation that maps 0 to 0, of operations that the graph does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x) * torch.log1p(x.abs())


class LogConv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c1, c2, k, padding=k // 2, bias=False), nn.BatchNorm2d(c2)
        self.act = SignedLog()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


@pytest.mark.slow
def test_a_block_and_its_activation(tmp_path):
    block()(LogConv)
    cfg = {**read_yaml("yolov5n.yaml"), "width_multiple": 0.125}
    cfg["backbone"][2] = [-1, 1, "LogConv", [128, 3]]
    model = small(cfg)
    assert isinstance(model.model[2], LogConv) and model.model[2].bn.num_features == 16

    unaware = Pruner(model, 64).rank()
    assert "operation 'sign'" in unaware.graph.notes[0]
    result = unaware.cut(percent=0.8)
    assert bool(result.masks["model.2.bn"].all()) and not result.masks["model.3.bn"].all()

    register_passthrough(SignedLog)
    pruner = Pruner(model, 64).rank()
    result = pruner.cut(percent=0.8)
    assert not pruner.graph.notes and not result.masks["model.2.bn"].all() and result.difference < 1e-9
    checkpoint.save(tmp_path / "slim.pt", result.slim)
    assert largest_difference(checkpoint.load(tmp_path / "slim.pt"), result.slim) == 0


# A score with gradients on data ---------------------------------------------------------------------------------------

def taylor_score(traced: TracedModel) -> np.ndarray:
    """|gamma * dL/dgamma|: what the loss would change, to first order, if the channel were masked."""
    gammas = [norm.weight for norm in traced.norms.values()]
    total = [torch.zeros_like(gamma) for gamma in gammas]
    for loss in traced.losses(traced.model):
        for value, gamma, gradient in zip(total, gammas, torch.autograd.grad(loss, gammas)):
            value += gamma.detach() * gradient
    return group_mean(traced.graph, {n: v.abs() for n, v in zip(traced.norms, total)}, traced.graph.norms)


def test_a_score_with_gradients_on_data():
    SCORES["taylor"] = taylor_score
    torch.manual_seed(0)
    network = randomised(nn.Sequential(Conv(3, 8, 3), Conv(8, 8, 1), nn.Conv2d(8, 2, 1))).eval()
    with torch.no_grad():
        network[0].bn.weight[3] = 9.0        # the largest scale,
        network[1].conv.weight[:, 3] = 0.0   # and nobody looks at the channel
    images = torch.rand(3, 4, 3, 16, 16)

    def losses(model: nn.Module) -> Iterator[Tensor]:
        yield from (model(batch).square().mean() for batch in images)

    pruner = Pruner(network, 16, losses=losses)
    assert bool(pruner.rank("gamma").preview(1 / 16)[0]["0.bn"][3])
    first = pruner.rank("taylor").preview(1 / 16)[0]
    assert [int((~mask).sum()) for mask in first.values()] == [1, 0] and not first["0.bn"][3]
    scores = taylor_score(pruner)
    # Against its definition: the change of the loss when a gamma is made a little smaller.
    with torch.no_grad():
        whole = sum(losses(network))
        network[1].bn.weight[2] *= 0.999
        change = float(sum(losses(network)) - whole) / 0.001
    assert scores[pruner.graph.group[pruner.graph.norms["1.bn"][2]]] == pytest.approx(abs(change), rel=0.05)
    with pytest.raises(ValueError, match=r"give Pruner\(..., losses=\)"):
        Pruner(network, 16).rank("taylor")
    assert pruning_parser().parse_args(["--score", "taylor"]).score == "taylor"


# A target -------------------------------------------------------------------------------------------------------------

def bytes_left(traced: TracedModel, keep: np.ndarray) -> float:
    """Share of the file's size, 0..1."""
    after = slim(traced.model, traced.graph.masks(keep), traced.graph)
    return profile(after, traced.imgsz).bytes / profile(traced.model, traced.imgsz).bytes


@pytest.mark.slow
def test_a_target(tiny, cfg, tmp_path, monkeypatch, capsys):
    TARGETS["bytes"] = Target(bytes_left)
    model = small(cfg)
    result = Pruner(model, 64).rank().cut(target=("bytes", 0.6))
    left = profile(result.slim, 64).bytes / profile(model, 64).bytes
    assert result.target.reached and result.target.value == left and 0.59 < left <= 0.6
    monkeypatch.chdir(tmp_path)
    checkpoint.save("dense.pt", model, imgsz=64)
    prune.main(["--weights", "dense.pt", "--data", str(tiny), "--target", "bytes=0.6", "--noval", "--device", "cpu",
                "--score", "gamma", "--min-share", "0"])
    assert f"target bytes=0.6: {left:.3f} of the bytes are left" in capsys.readouterr().out
    assert all(map(torch.equal, checkpoint.load("pruned_model.pt").masks.values(), result.masks.values()))


# A hook ---------------------------------------------------------------------------------------------------------------

class StepCounter(Hook):
    """Counts steps over all resumes, and pulls at the weights of the first layer."""

    steps = 0

    def start(self, run: Run) -> None:
        self.run = run

    def extra_loss(self, batch, outputs) -> Tensor:
        return 1e-3 * self.run.model.model[0].conv.weight.square().sum()

    def after_step(self, skipped: bool) -> None:
        self.steps += 1

    def epoch_end(self, log: dict[str, float]) -> None:
        log["steps"] = self.steps

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


class Renamed(StepCounter):
    name = "counter of mine"


class Newer(StepCounter):
    """One that the run did not have when it began."""


def options(*flags: object) -> Namespace:
    """Options of a training script of one's own."""
    opt = training_parser(None).parse_args(list(map(str, flags)))
    opt.script = "mine.py"
    return opt if opt.resume else resolve(opt)


@pytest.mark.slow
def test_a_hook_and_its_state(tiny, cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--data", tiny, "--weights", "", "--cfg", cfg, "--imgsz", 64, "--batch-size", 4, "--nbs", 4,
              "--workers", 0, "--device", "cpu", "--noplots"]
    train(options(*common, "--epochs", 1), [StepCounter(), Renamed()])
    last = tmp_path / "runs/train/exp/weights/last.pt"
    assert checkpoint.read(last)["training"]["hooks"] == {"StepCounter": {"steps": 3}, "counter of mine": {"steps": 3}}

    # In any order, whatever else is there; what is missing, or not used, is said.
    capsys.readouterr()
    goes_on = options("--resume", last, "--epochs", 2, "--workers", 0, "--device", "cpu")
    run = train(goes_on, [Newer(), StepCounter(), Hook()])
    said = capsys.readouterr().out
    assert [getattr(hook, "steps", None) for hook in run.hooks] == [3, 6, None]
    assert "the checkpoint has no state of Newer; it starts anew" in said and "state of Hook" not in said
    assert "the checkpoint's state of counter of mine is not used" in said and "StepCounter" not in said
    with open(last.parents[1] / "results.csv", newline="") as file:
        assert [float(row["steps"]) for row in csv.DictReader(file)] == [3, 6]


# A format -------------------------------------------------------------------------------------------------------------

def write_npz(model: Model, path: Path, options: ExportOptions) -> None:
    np.savez(path, description=json.dumps([model.yaml, options.metadata]),
             **{name: value.numpy() for name, value in model.state_dict().items()})


class NpzDetector:
    """A Detector whose weights are in a NumPy archive; images of any size."""

    dtype, input_shape = torch.float32, (0, 3, 0, 0)
    calls = 0

    def __init__(self, path: Path, device: torch.device):
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        config, metadata = json.loads(str(content.pop("description")))
        self.names, self.divisor = {int(k): v for k, v in metadata["names"].items()}, metadata["stride"]
        self.model = Model(config).eval().to(device)
        self.model.load_state_dict({name: torch.from_numpy(value) for name, value in content.items()})

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        NpzDetector.calls += 1
        return self.model(images)[0], None


@pytest.mark.slow
def test_a_format(tiny, cfg, tmp_path, monkeypatch, capsys):
    register(Format("numpy", ".npz", write_npz, NpzDetector))
    monkeypatch.chdir(tmp_path)
    checkpoint.save("dense.pt", small(cfg), imgsz=64)
    path, = export.main(["--weights", "dense.pt", "--include", "numpy"])
    assert path == Path("dense.npz") and "numpy: dense.npz" in capsys.readouterr().out
    NpzDetector.calls = 0  # export.py has compared the file with the model
    common = ["--data", str(tiny), "--imgsz", "64", "--batch-size", "4", "--workers", "0", "--device", "cpu",
              "--noplots"]
    by_torch, by_numpy = (val.main(["--weights", weights, *common]) for weights in ("dense.pt", "dense.npz"))
    assert NpzDetector.calls == 2 and by_numpy["images"] == by_torch["images"] == 6
    # Fused or not, an untrained model's mAP hangs on the last digit.
    assert by_numpy["metrics/mAP_0.5"] == pytest.approx(by_torch["metrics/mAP_0.5"], abs=0.01)
