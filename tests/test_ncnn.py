"""ncnn: its folder holds the same model, in the precision asked for, and what it can't hold is refused in a line."""
from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from export import main
from models import checkpoint, formats
from models.common import BLOCKS, BlockSpec
from models.formats import ExportOptions, ncnn
from models.yolo import Detect, Model
from tests.blocks import random_masks, randomised
from utils.errors import UserError
from utils.slimming import slim, trace

INSTALLED = all(importlib.util.find_spec(name) for name in ("ncnn", "pnnx"))
needs_ncnn = pytest.mark.skipif(not INSTALLED, reason="pip install -r requirements-export.txt")
CPU = torch.device("cpu")
FILES = ["metadata.yaml", "model.ncnn.bin", "model.ncnn.param"]


def narrow(cfg: str = "yolov5n.yaml", **changes: object) -> Model:
    """A model of few channels, with statistics as if it had been trained."""
    torch.manual_seed(0)
    description = {**Model(cfg).yaml, "width_multiple": 0.125, "depth_multiple": 0.33, **changes}
    return randomised(Model(description)).eval()


def options(model: Model, height: int = 64, width: int = 96, precision: str = "fp32") -> ExportOptions:
    image = torch.rand(1, model.yaml["ch"], height, width)
    return ExportOptions(image, {"stride": model.divisor, "names": model.names, "precision": precision},
                         precision=precision)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model and its folder."""
    model, path = narrow(nc=3), tmp_path_factory.mktemp("written") / "m_ncnn"
    ncnn.write(model, path, options(model))
    return model, path


@pytest.mark.parametrize("nc, levels, anchors", [(1, 3, 3), (80, 4, 3), (2, 1, 1), (7, 3, 2)])
def test_boxes_are_decoded_to_the_same_numbers(nc, levels, anchors):
    torch.manual_seed(0)
    head = Detect(nc, (torch.rand(levels, 2 * anchors) * 9).tolist(), [4] * levels).eval()
    head.stride.copy_(torch.tensor([8.0 * 2 ** level for level in range(levels)]))
    features = [torch.randn(1, 4, 128 // int(s), 192 // int(s)) * 3 for s in head.stride]
    with torch.no_grad():
        expected, found = head(features)[0], ncnn.FlatDetect(head, 128, 192)(features)[0]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@needs_ncnn
def test_the_folder_holds_the_model_and_nothing_else(written, tmp_path, monkeypatch, capfd):
    model = written[0]
    monkeypatch.chdir(tmp_path)
    ncnn.write(model, Path("m_ncnn"), options(model))
    assert sorted(p.name for p in Path("m_ncnn").iterdir()) == FILES
    assert [p.name for p in Path().iterdir()] == ["m_ncnn"]
    said = capfd.readouterr()
    assert said.out == said.err == ""
    detector, about = formats.load("m_ncnn", CPU)
    assert detector.names == model.names and detector.stride == 32 and about["imgsz"] == 96
    images = torch.rand(3, 3, 64, 96)  # the file takes one at a time
    with torch.no_grad():
        assert difference(detector(images)[0], model(images)[0]) < 1e-4
    again = formats.load(Path("m_ncnn") / "model.ncnn.param", CPU)[0]
    assert torch.equal(again(images)[0], detector(images)[0])
    with pytest.raises(UserError, match="give this --imgsz"):
        detector(torch.rand(1, 3, 64, 64))


@needs_ncnn
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slim", "four levels"])
def test_other_models_agree_with_torch(kind, tmp_path):
    size = 128 if kind == "four levels" else 64
    if kind == "four levels":
        model = narrow("yolov5n6.yaml", nc=2)
    else:
        model = narrow(nc=1)
        model = slim(model, random_masks(trace(model), 3, coupled=False)).eval()
    ncnn.write(model, tmp_path / "m_ncnn", options(model, size, size))
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert difference(formats.load(tmp_path / "m_ncnn", CPU)[0](images)[0], model(images)[0]) < 1e-4


@pytest.mark.slow
@needs_ncnn
def test_half_is_stored_in_half_the_bytes(written, tmp_path):
    model, whole = written
    ncnn.write(model, tmp_path / "m_fp16_ncnn", options(model, precision="fp16"))
    sizes = [(folder / "model.ncnn.bin").stat().st_size for folder in (whole, tmp_path / "m_fp16_ncnn")]
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 4)
    assert sizes[0] > 4 * weights and 2 * weights < sizes[1] < 0.6 * sizes[0]
    detector, images = formats.load(tmp_path / "m_fp16_ncnn", CPU)[0], torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert 1e-6 < difference(detector(images)[0], model(images)[0]) < 0.02
    assert formats.load(whole, CPU)[0].net.opt.use_fp16_storage is False and detector.net.opt.use_fp16_storage is True


class Strange(nn.Module):
    """An operation that pnnx leaves as PyTorch calls it."""

    def forward(self, x):
        return x + torch.fft.fft2(x).real


@needs_ncnn
@pytest.mark.slow
def test_what_ncnn_has_no_word_for_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(BLOCKS, "Strange", BlockSpec(Strange, "same", False))
    backbone = narrow().yaml["backbone"]
    for cfg in ({"backbone": [[-1, 1, "Focus", [64, 3]], *backbone[1:]]},
                {"backbone": [*backbone[:-1], [-1, 1, "Strange", []]]}):
        model = narrow(**cfg)
        with pytest.raises(UserError, match="--include ncnn: .*; export onnx instead") as caught:
            ncnn.write(model, tmp_path / "m_ncnn", options(model))
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert capfd.readouterr().err == ""


def test_a_file_that_computes_otherwise_is_refused():
    image, expected = torch.rand(1, 3, 64, 64), torch.rand(1, 5, 7)
    for found in (expected[:, :4], expected + 0.2, expected * float("nan")):
        with pytest.raises(UserError, match="computes something else"):
            ncnn._compare(lambda images, found=found: (found, None), image, expected)
    ncnn._compare(lambda images: (expected + torch.tensor([1.0] * 4 + [0.05] * 3), None), image, expected)


def broken(folder: Path, how: str) -> None:
    """Damage a folder that was written."""
    if how.startswith("no "):
        (folder / how[3:]).unlink()
    elif how == "cut weights":
        file = folder / "model.ncnn.bin"
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "foreign param":
        (folder / "model.ncnn.param").write_text("nothing\n")
    elif how == "unknown layer":
        file = folder / "model.ncnn.param"
        file.write_text(file.read_text().replace("Swish ", "Swash "))
    else:
        (folder / "metadata.yaml").write_text(how)


@needs_ncnn
@pytest.mark.parametrize("how", ["no model.ncnn.bin", "no metadata.yaml", "cut weights", "foreign param",
                                 "unknown layer", "stride: 32\n", "names: 7\nstride: 32\n", "[1]\n",
                                 "names: {0: a}\nstride: 32\nshape: 5\n"])
def test_a_broken_folder_is_told_in_a_line(written, tmp_path, how, capfd):
    shutil.copytree(written[1], folder := tmp_path / "m_ncnn")
    broken(folder, how)
    with pytest.raises(UserError) as caught:
        formats.load(folder, CPU)
    assert "\n" not in str(caught.value) and "m_ncnn" in str(caught.value)
    said = capfd.readouterr()
    assert said.out == said.err == ""


@pytest.mark.slow
def test_missing_packages_and_int8_are_told_in_a_line(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "m.pt", narrow(nc=2), imgsz=64)
    with pytest.raises(UserError, match="--include ncnn: has no int8 here"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        main(["--weights", str(tmp_path / "m.pt"), "--include", "ncnn", "--int8", "--data", "shapes"])
    (tmp_path / "m_ncnn_model").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install ncnn pnnx"):
        main(["--weights", str(tmp_path / "m.pt"), "--include", "ncnn"])
    with pytest.raises(UserError, match="pip install ncnn pnnx"):
        formats.load(tmp_path / "m_ncnn_model", CPU)


@needs_ncnn
@pytest.mark.slow
def test_commands(script, teacher, tiny, tmp_path):
    """export.py, then detect.py and val.py on its folder."""
    done = script("export.py", "--weights", teacher, "--include", "ncnn", "--batch-size", 4, cwd=tmp_path)
    assert "ncnn: largest difference to torch" in done.stdout
    folder = teacher.with_name("teacher_ncnn_model")
    done = script("detect.py", "--weights", folder, "--source", tiny.parent / "images/val/000.png", cwd=tmp_path)
    assert "1 pictures" in done.stdout
    common = ["--data", tiny, "--imgsz", 64, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--noplots"]
    script("val.py", "--weights", folder, *common, cwd=tmp_path)
    assert json.loads((tmp_path / "runs/val/exp/metrics.json").read_text())["images"] == 6
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
