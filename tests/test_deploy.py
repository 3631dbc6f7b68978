"""What docs/deploy.md says of the exported ONNX: operators, versions, shapes; no NMS inside."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models.formats import onnx as exporter
from models.yolo import Model
from tests.blocks import random_masks
from tests.conftest import ROOT
from tests.test_ncnn import narrow, options
from utils.slimming import slim, trace

onnx = pytest.importorskip("onnx", reason="pip install -r requirements-export.txt")
PAGE = ROOT / "docs" / "deploy.md"
OPERATORS = {"Add", "Concat", "Constant", "Conv", "Expand", "MaxPool", "Mul", "Reshape", "Resize", "Sigmoid", "Slice",
             "Sub", "Transpose", "Unsqueeze"}
DYNAMIC = {"Cast", "Gather", "Range", "Shape"}  # with --dynamic, beside them


@pytest.fixture(scope="module", params=["dense", "slim"])
def model(request: pytest.FixtureRequest) -> Model:
    dense = narrow(nc=3)
    return dense if request.param == "dense" else slim(dense, random_masks(trace(dense), 3, coupled=False)).eval()


def graph(model: Model, path: Path, **changes: object):
    """The model as ONNX, checked strictly: types and shapes of every node."""
    exporter.write(model, path, replace(options(model), **changes))
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    return onnx.shape_inference.infer_shapes(loaded, check_type=True, strict_mode=True, data_prop=True)


def kinds(loaded) -> set[str]:
    assert {node.domain for node in loaded.graph.node} <= {"", "ai.onnx"}
    return {node.op_type for node in loaded.graph.node}


@pytest.mark.slow
@pytest.mark.parametrize("opset", [12, 17])
def test_every_opset_that_the_page_names_runs(model, opset, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    loaded = graph(model, tmp_path / "m.onnx", opset=opset)
    assert [entry.version for entry in loaded.opset_import] == [opset]
    assert kinds(loaded) == OPERATORS
    output, = loaded.graph.output
    assert [d.dim_value for d in output.type.tensor_type.shape.dim] == [1, 3 * (8 * 12 + 4 * 6 + 2 * 3), 8]
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)[0].numpy()
    found = runtime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"images": images.numpy()})[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_open_shapes_add_four_operators(model, tmp_path):
    assert kinds(graph(model, tmp_path / "m.onnx", dynamic=True)) == OPERATORS | DYNAMIC


@pytest.mark.slow
@pytest.mark.parametrize("opset, precision", [(12, "fp32"), (17, "fp32"), (17, "fp16")])
def test_opencv_computes_the_same(model, opset, precision, tmp_path):
    """In fp16 the scales of Resize went through a Cast, which OpenCV 5 refuses."""
    graph(model, tmp_path / "m.onnx", opset=opset, precision=precision)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)[0].numpy()
    net = cv2.dnn.readNetFromONNX(str(tmp_path / "m.onnx"))
    net.setInput(images.numpy())
    assert np.abs(net.forward() - expected).max() < (1e-4 if precision == "fp32" else 0.01) * np.abs(expected).max()


def test_the_page_names_the_operators():
    text = PAGE.read_text(encoding="utf-8")
    assert ", ".join(sorted(OPERATORS)) in " ".join(text.split())
    assert ", ".join(sorted(DYNAMIC)) in " ".join(text.split())
