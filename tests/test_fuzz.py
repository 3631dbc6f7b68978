"""Readers of what users hand in, on anything at all: they answer, or end in one UserError.

Never another error, never an effect.
"""
from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import train
import train_sparsity
from finetune_pruned import gradual_cut, known_teacher
from models import checkpoint, formats
from models.config import read_yaml
from models.formats.yolov5 import to_yolov5
from models.yolo import Model
from prune import pruning_parser
from training.distributed import process_group
from training.interruption import listen
from training.resume import go_on
from training.settings import read_hyp, resolve
from training.start import start_options
from utils.data.config import read_data
from utils.data.image_files import parse_labels
from utils.errors import NonFiniteError, UserError
from utils.options import training_parser
from utils.slimming import Pruner

pytestmark = pytest.mark.slow
BOUNDED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(BOUNDED, max_examples=5, phases=[Phase.generate])  # each takes a good part of a second
scalars = st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=12)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12)


def keyed(*keys: str) -> st.SearchStrategy:
    """Mappings in which some of the keys that a reader looks for hold anything."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(keys, values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


numbers = st.from_regex(r"(-?[0-9]{0,3}(\.[0-9]{0,4}|e[0-9]{1,3})? ?){0,12}", fullmatch=True)


@BOUNDED
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=200) | numbers)
def test_label_files(text):
    try:
        labels, problems = parse_labels(text, Path("a.txt"), nc=5)
    except UserError:
        return
    assert labels.dtype == np.float32 and labels.shape[1] == 5 and np.isfinite(labels).all()
    assert all(n > 0 for n in problems.values())
    corners = np.concatenate((labels[:, 1:3] - labels[:, 3:] / 2, labels[:, 1:3] + labels[:, 3:] / 2), 1)
    assert (corners > -1e-6).all() and (corners < 1 + 1e-6).all()
    assert (labels[:, 3:] > 0).all() and (labels[:, 0] < 5).all()


@BOUNDED
@given(data=keyed("path", "train", "val", "test", "names", "nc", "defaults", "download"))
def test_data_yamls(folder, data):
    (folder / "data.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    try:
        config = read_data(folder / "data.yaml")
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert config.nc == len(config.names)


@BOUNDED
@given(raw=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_yaml_bytes(folder, raw):
    (folder / "any.yaml").write_bytes(raw)
    for read in (read_data, read_hyp, lambda path: Model(path)):
        with pytest.raises(UserError):
            read(folder / "any.yaml")
            raise UserError("an empty mapping is a valid hyp file")


entries = st.integers(-2, 3) | st.lists(st.integers(-3, 3), max_size=3) | values
convolutions = st.lists(entries, min_size=3, max_size=5).map(lambda row: [row[0], row[1], "Conv", row[2:]])
names = st.sampled_from(["Conv", "C3", "SPPF", "Concat", "Detect", "nn.Upsample", "Focus", "Ghost", "os.system"])
rows = convolutions | st.tuples(
    st.integers(-3, 2), st.integers(-1, 3), names, st.lists(scalars, max_size=4)).map(list)
needed = {"backbone": st.lists(rows, max_size=3) | values, "head": st.lists(rows, max_size=2) | values,
          "anchors": st.integers(0, 5) | values}
optional = dict.fromkeys(("nc", "width_multiple", "depth_multiple", "activation"), scalars)


@BOUNDED
@given(cfg=st.fixed_dictionaries(needed, optional=optional))
def test_model_yamls(cfg):
    try:
        Model(cfg)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def whole(folder) -> bytes:
    """A small checkpoint of ours."""
    cfg = {**read_yaml("yolov5n.yaml"), "width_multiple": 0.05}
    checkpoint.save(folder / "whole.pt", Model(cfg, nc=2), imgsz=64)
    return (folder / "whole.pt").read_bytes()


def must_read_or_refuse(path: Path, use: Callable[[Path], object] = checkpoint.load) -> None:
    try:
        use(path)
    except (UserError, NonFiniteError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@FEW
@given(place=st.floats(0, 1), damage=st.binary(min_size=1, max_size=40))
def test_checkpoints_with_bytes_overwritten(folder, whole, place, damage):
    start = int(place * (len(whole) - len(damage)))
    (folder / "damaged.pt").write_bytes(whole[:start] + damage + whole[start + len(damage):])
    must_read_or_refuse(folder / "damaged.pt")


@FEW
@given(raw=st.binary(max_size=300))
def test_checkpoints_with_another_pickle(folder, whole, raw):
    """The pickle inside the archive is anything."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        for item in old.infolist():
            new.writestr(item, raw if item.filename.endswith("data.pkl") else old.read(item))
    (folder / "pickle.pt").write_bytes(out.getvalue())
    must_read_or_refuse(folder / "pickle.pt")


@FEW
@given(change=keyed("format", "yaml", "names", "masks", "state_dict", "ema"))
def test_checkpoints_with_other_entries(folder, whole, change):
    data = torch.load(io.BytesIO(whole), weights_only=True)
    torch.save({**data, **change}, folder / "entries.pt")
    must_read_or_refuse(folder / "entries.pt")


# Checkpoints of which one value, at any depth, is another one ---------------------------------------------------------

def bomb(levels: int, width: int) -> list:
    """Lists of the same list: levels deep, width ** levels values when they are written out."""
    inner: list = [1]
    for _ in range(levels):
        inner = [inner] * width
    return inner


def endless() -> list:
    """A list that holds itself."""
    inner: list = []
    inner.append(inner)
    return inner


tensors = st.sampled_from([torch.zeros(()), torch.ones(3), torch.full((2, 3), float("nan")), torch.zeros(0),
                           torch.ones(5056, dtype=torch.uint8), torch.zeros(1).expand(10 ** 9), torch.ones(4).bool()])
anything = values | tensors | st.sampled_from([10 ** 9, -(10 ** 30), 10 ** 5000, b"x", (1, 2)]) | st.builds(
    bomb, st.sampled_from([12, 3000]), st.sampled_from([1, 8])) | st.builds(endless)


def of_tensor(draw: Callable, value: torch.Tensor) -> object:
    """A tensor of another type, length or content."""
    if not value.numel():
        return value
    flat = value.detach().clone().flatten()
    infinite = flat.float().index_fill(0, torch.tensor(0), float("inf")).view(value.shape)
    return draw(st.sampled_from([infinite, flat[:1], flat[:-1], torch.cat((flat, flat)), value.detach().int(),
                                 flat[:1].expand(value.shape or 1)]))


def mutate(draw: Callable, value: object) -> object:
    """A copy in which one value, at a depth and place that are drawn, is another one, missing or added."""
    inner: dict = {}
    if isinstance(value, (dict, list, tuple)):
        inner = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    elif isinstance(value, nn.Module):
        inner = dict(vars(value))
    how = draw(st.integers(0, 9))
    if not inner or how == 0:
        return of_tensor(draw, value) if isinstance(value, torch.Tensor) and how % 2 else draw(anything)
    key = draw(st.sampled_from(sorted(inner, key=str)))
    if how == 1:
        del inner[key]
    elif how == 2:
        inner[draw(scalars)] = draw(anything)
    else:
        inner[key] = mutate(draw, inner[key])
    if isinstance(value, nn.Module):
        changed = type(value).__new__(type(value))
        changed.__dict__.update({k: v for k, v in inner.items() if isinstance(k, str)})
        return changed
    return inner if isinstance(value, dict) else type(value)(inner.values())


@pytest.fixture(scope="module")
def trained(tiny, cfg, tmp_path_factory) -> dict[str, Path]:
    """A dense, a slim and a training's checkpoint, one of YOLOv5."""
    folder = tmp_path_factory.mktemp("trained")
    train_sparsity.main(list(map(str, [
        "--data", tiny, "--weights", "", "--cfg", cfg, "--epochs", 1, "--imgsz", 64, "--batch-size", 4, "--workers", 0,
        "--target-sparsity", 0.5, "--image-weights", "--noplots", "--device", "cpu", "--project", folder])))
    paths = {"dense": folder / "exp/weights/best.pt", "training": folder / "exp/weights/last.pt",
             "slim": folder / "slim.pt", "foreign": folder / "foreign.pt"}
    model = checkpoint.load(paths["training"])
    read = checkpoint.read(paths["training"])
    checkpoint.save(paths["slim"], Pruner(model, 64).rank().cut(percent=0.5).slim, opt=read["opt"], imgsz=64,
                    parent=str(paths["training"]), gradual=True)
    torch.save({"epoch": -1, "model": to_yolov5(model), "ema": None, "opt": {"imgsz": 64}}, paths["foreign"])
    return paths


def start(path: Path) -> None:
    """What the scripts do with a checkpoint before anything is computed."""
    model, data = formats.load(path, torch.device("cpu"))
    model(torch.zeros(1, 3, 64, 64))
    flags = ["--weights", str(path), "--device", "cpu", "--workers", "0"]
    options = pruning_parser().parse_args(flags)
    resolve(options, data)
    start_options(training_parser("").parse_args(flags))
    known_teacher(data)
    gradual_cut(data, frozen=False)


def resume(path: Path) -> None:
    """--resume, up to the first step."""
    opt = train_sparsity.parse(["--resume", str(path), "--workers", "0", "--device", "cpu"])
    opt.epochs, opt.given = 2, [*opt.given, "epochs"]
    with ExitStack() as locks:
        opt, resumed = go_on(opt, locks)
        world, signals = locks.enter_context(process_group("cpu")), locks.enter_context(listen(1))
        run = train.build_run(opt, resumed, world, [train_sparsity.SparsityHook()], signals, locks)
        assert run.logger is not None
        run.logger.close()


@pytest.mark.parametrize("kind, use", [("dense", start), ("slim", start), ("training", start), ("training", resume),
                                       ("foreign", start)])
def test_checkpoints_with_a_value_of_another_kind(trained, folder, kind, use):
    use(trained[kind])  # which is well as it is
    original = torch.load(trained[kind], weights_only=False)

    @FEW
    @given(draw=st.data())
    def mutated(draw):
        path = folder / "exp" / "weights" / "last.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(mutate(draw.draw, original), path)
        except (RecursionError, TypeError, AttributeError):
            return  # nobody can write that
        must_read_or_refuse(path, use)

    mutated()
