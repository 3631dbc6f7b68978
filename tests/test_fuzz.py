"""Readers of what users hand in, on anything at all: they answer, or end in one UserError.

Never another error, never an effect.
"""
from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import checkpoint
from models.config import read_yaml
from models.yolo import Model
from training.settings import read_hyp
from utils.data.config import read_data
from utils.data.image_files import parse_labels
from utils.errors import UserError

pytestmark = pytest.mark.slow
BOUNDED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
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


def must_read_or_refuse(path: Path) -> None:
    try:
        checkpoint.build(checkpoint.read(path), path=path)
    except UserError as error:
        assert "\n" not in str(error)


@BOUNDED
@given(place=st.floats(0, 1), damage=st.binary(min_size=1, max_size=40))
def test_checkpoints_with_bytes_overwritten(folder, whole, place, damage):
    start = int(place * (len(whole) - len(damage)))
    (folder / "damaged.pt").write_bytes(whole[:start] + damage + whole[start + len(damage):])
    must_read_or_refuse(folder / "damaged.pt")


@BOUNDED
@given(raw=st.binary(max_size=300))
def test_checkpoints_with_another_pickle(folder, whole, raw):
    """The pickle inside the archive is anything."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        for item in old.infolist():
            new.writestr(item, raw if item.filename.endswith("data.pkl") else old.read(item))
    (folder / "pickle.pt").write_bytes(out.getvalue())
    must_read_or_refuse(folder / "pickle.pt")


@BOUNDED
@given(change=keyed("format", "yaml", "names", "masks", "state_dict", "ema"))
def test_checkpoints_with_other_entries(folder, whole, change):
    data = torch.load(io.BytesIO(whole), weights_only=True)
    torch.save({**data, **change}, folder / "entries.pt")
    must_read_or_refuse(folder / "entries.pt")
