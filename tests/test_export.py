"""What other programs get: the same numbers in every format, from dense and from slim models."""
from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from export import main
from models import checkpoint, formats
from models.formats import ExportOptions, yolov5
from models.yolo import Model, on_device
from tests.blocks import random_masks, randomised
from utils.errors import UserError
from utils.slimming import slim, trace


@pytest.fixture(scope="module", params=["dense", "slim"])
def model(request) -> Model:
    torch.manual_seed(0)
    dense = randomised(Model("yolov5n.yaml", nc=3, names={0: "a", 1: "b", 2: "c"}))
    if request.param == "dense":
        return dense.eval()
    return slim(dense, random_masks(trace(dense), 6, coupled=False)).eval()


@pytest.fixture
def weights(model, tmp_path):
    checkpoint.save(tmp_path / "m.pt", on_device(model, "cpu"), imgsz=64)  # channels_last, as training leaves it
    return tmp_path / "m.pt"


def stocks_forward(model: nn.Module, x: torch.Tensor):
    """The layers in turn, by the attributes that YOLOv5's own forward pass goes by."""
    outputs: list = []
    for layer in model.model:
        if layer.f != -1:
            x = outputs[layer.f] if isinstance(layer.f, int) else [x if j == -1 else outputs[j] for j in layer.f]
        x = layer(x)
        outputs.append(x if layer.i in model.save else None)
    return x


@pytest.mark.slow
def test_yolov5_file_computes_the_same_and_comes_back(model, weights, tmp_path):
    path, = main(["--weights", str(weights), "--include", "yolov5"])
    assert path.name == "m.yolov5.pt"
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)[0]
        again = checkpoint.load(path)(x)[0]
        theirs = yolov5.to_yolov5(model)
        theirs.detect.stride = theirs.__dict__["stride"]
        walked = stocks_forward(theirs, x)[0]
    assert torch.allclose(walked, expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(again, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))  # it is stored in fp16
    raw = torch.load(path, weights_only=False)["model"]
    assert all(p.is_contiguous() for p in raw.parameters())  # stock's fuse() calls view()
    assert raw.names == model.names and raw.__dict__["stride"].tolist() == [8, 16, 32] and not hasattr(raw, "masks")
    of_torch = {m.__module__ for m in vars(nn).values() if isinstance(m, type)}
    assert {type(m).__module__ for m in raw.modules()} <= {"models.yolo", "models.common"} | of_torch


def test_a_block_that_yolov5_lacks_is_named(model, tmp_path):
    class Strange(nn.Module):
        def forward(self, x):
            return x

    model = Model("yolov5n.yaml", nc=1)
    model.model[0].act = Strange()
    with pytest.raises(UserError, match="no block Strange"):
        yolov5.write(model, tmp_path / "x.pt", ExportOptions(torch.rand(1, 3, 64, 64), {}))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [[], ["--dynamic"]])
def test_onnx_agrees_with_torch(model, weights, dynamic, capsys):
    runtime = pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")
    path, = main(["--weights", str(weights), "--include", "onnx", *dynamic])
    session = runtime.InferenceSession(str(path))
    meta = session.get_modelmeta().custom_metadata_map
    assert meta["stride"] == "32" and ast.literal_eval(meta["names"]) == model.names
    shape = (2, 3, 96, 64) if dynamic else (1, 3, 64, 64)
    x = torch.rand(shape)
    with torch.no_grad():
        expected = model(x)[0].numpy()
    found = session.run(None, {"images": x.numpy()})[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.slow
def test_torchscript_agrees_with_torch(model, weights):
    path, = main(["--weights", str(weights), "--include", "torchscript", "--imgsz", "64", "96"])
    files = {"config.txt": ""}
    loaded = torch.jit.load(str(path), _extra_files=files)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(loaded(x), model(x)[0], rtol=1e-4, atol=1e-4)
    assert json.loads(files["config.txt"])["shape"] == [1, 3, 64, 96]


def test_a_size_that_is_no_multiple_of_the_stride_is_refused(weights):
    pytest.importorskip("onnx")
    with pytest.raises(UserError, match="multiples of 32"):
        main(["--weights", str(weights), "--imgsz", "100"])


@pytest.mark.slow
def test_unmodified_yolov5_computes_the_same(model, weights, tmp_path):
    """With YOLOV5_REPO, a clone of ultralytics/yolov5, and YOLOV5_PYTHON, an interpreter that has its requirements."""
    repository, python = os.environ.get("YOLOV5_REPO"), os.environ.get("YOLOV5_PYTHON", sys.executable)
    if not repository:
        pytest.skip("set YOLOV5_REPO (and YOLOV5_PYTHON) to run stock YOLOv5")
    path, = main(["--weights", str(weights), "--include", "yolov5"])
    x = torch.rand(2, 3, 64, 96)
    np.save(tmp_path / "x.npy", x.numpy())
    code = ("import numpy as np, torch; from models.experimental import attempt_load; "
            f"m = attempt_load(r'{path}', fuse=True); x = torch.from_numpy(np.load(r'{tmp_path / 'x.npy'}')); "
            f"np.save(r'{tmp_path / 'y.npy'}', m(x)[0].detach().numpy())")
    subprocess.run([python, "-c", code], cwd=repository, check=True, capture_output=True,
                   env={**os.environ, "YOLO_OFFLINE": "true"})
    half = checkpoint.load(path)  # what the file holds is rounded to fp16
    with torch.no_grad():
        expected = half(x)[0].numpy()
    assert np.abs(np.load(tmp_path / "y.npy") - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_unmodified_yolov5_opens_our_openvino_folder_and_we_open_its(model, weights, tmp_path):
    """As above; YOLOv5's interpreter needs openvino."""
    pytest.importorskip("openvino")
    repository, python = os.environ.get("YOLOV5_REPO"), os.environ.get("YOLOV5_PYTHON", sys.executable)
    if not repository:
        pytest.skip("set YOLOV5_REPO (and YOLOV5_PYTHON) to run stock YOLOv5")
    x = torch.rand(1, 3, 64, 64)
    np.save(tmp_path / "x.npy", x.numpy())
    ours, stock = main(["--weights", str(weights), "--include", "openvino", "yolov5"])
    code = ("import numpy as np, torch; from models.common import DetectMultiBackend; "
            f"m = DetectMultiBackend(r'{ours}'); assert m.stride == 32 and m.names == {model.names}; "
            f"np.save(r'{tmp_path / 'y.npy'}', m(torch.from_numpy(np.load(r'{tmp_path / 'x.npy'}'))).numpy())")
    export = ["export.py", "--weights", str(stock), "--include", "openvino", "--imgsz", "64"]
    for command in (["-c", code], export):
        subprocess.run([python, *command], cwd=repository, check=True, capture_output=True,
                       env={**os.environ, "YOLO_OFFLINE": "true"})
    with torch.no_grad():
        expected = model(x)[0]
    detector = formats.load(tmp_path / "m.yolov5_openvino_model", torch.device("cpu"))[0]
    assert detector.names == model.names
    for found, tolerance in ((torch.from_numpy(np.load(tmp_path / "y.npy")), 1e-4), (detector(x)[0], 1e-2)):
        assert (found - expected).abs().max() < tolerance * expected.abs().max()  # stock's .pt is rounded to fp16
