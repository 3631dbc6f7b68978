"""Files for other runtimes: the same numbers as PyTorch, int8 that leaves the head alone, one line for each mistake."""
from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import detect
import export
import val
from models import checkpoint, formats
from models.autoshape import AutoShape
from models.detector import require_finite
from models.formats import onnx, quantized, torchscript
from models.formats.format import FileDetector
from models.inference import detect as detect_images
from models.yolo import Model
from tests.blocks import random_masks, randomised
from tests.test_result_files import full_disk
from utils.boxes import nms
from utils.data.calibration import CalibrationImages
from utils.data.config import read_data
from utils.data.loader import Batch, validation_loader
from utils.errors import NonFiniteError, UserError
from utils.files import atomic_folder
from utils.slimming import slim, trace

CPU = torch.device("cpu")
NAMES = {0: "square", 1: "circle"}
RUNTIMES = [name for name, fmt in formats.formats().items() if fmt.load is not None]


def installed(name: str, precision: str = "fp32") -> formats.Format:
    """A format, or a skipped test."""
    fmt = formats.formats()[name]
    if missing := fmt.missing(precision):
        pytest.skip(f"pip install {' '.join(missing)}")
    return fmt


@pytest.fixture(scope="module")
def weights(cfg, tmp_path_factory) -> Path:
    """A slim checkpoint for the tiny set, without one of its branches."""
    torch.manual_seed(0)
    model = randomised(Model(str(cfg), nc=2, names=NAMES))
    graph = trace(model)
    branch = graph.branches["model.6.m.1.cv2.bn"]
    gone = {name: torch.zeros(len(graph.norms[name]), dtype=torch.bool) for name in branch.norms}
    model = slim(model, random_masks(graph, 6, coupled=False) | gone)
    checkpoint.save(path := tmp_path_factory.mktemp("weights") / "m.pt", model.eval(), imgsz=64)
    return path


def decoded(model: Model, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)[0]


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((found.detach().float() - expected).abs().max() / expected.abs().max())


# Every runtime --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_file_computes_what_the_checkpoint_does(weights, name, tiny, tmp_path, monkeypatch, capsys):
    fmt = installed(name)
    path, = export.main(["--weights", str(weights), "--include", name])
    assert path.name == f"m{fmt.suffix}" and "largest difference" in capsys.readouterr().out
    detector, says = formats.load(path, CPU)
    assert (detector.names, detector.stride, says["imgsz"]) == (NAMES, 32, 64)
    images = torch.rand(3, 3, 64, 64)
    assert worst(detector(images)[0], decoded(checkpoint.load(weights), images)) < 1e-4
    with pytest.raises(UserError, match="takes images of shape"):
        detector(torch.rand(1, 3, 96, 64))
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(tiny), "--imgsz", "64", "--batch-size", "4", "--workers", "0", "--noplots"]
    by_torch, by_file = (val.main(["--weights", str(file), *common]) for file in (weights, path))
    assert by_file["images"] == by_torch["images"] == 6
    # One has rectangular batches, the other squares, and the model is not trained.
    assert by_file["metrics/mAP_0.5"] == pytest.approx(by_torch["metrics/mAP_0.5"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_dynamic_files_take_any_number_and_size(weights, name):
    installed(name)
    path, = export.main(["--weights", str(weights), "--include", name, "--dynamic"])
    detector = formats.load(path, CPU)[0]
    assert detector.input_shape[0] == detector.input_shape[2] == 0
    for shape in ((1, 3, 64, 64), (3, 3, 96, 64)):
        images = torch.rand(shape)
        assert worst(detector(images)[0], decoded(checkpoint.load(weights), images)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "ncnn"])
def test_halves(weights, name):
    installed(name)
    single, = export.main(["--weights", str(weights), "--include", name])
    half, = export.main(["--weights", str(weights), "--include", name, "--half"])
    assert half.name == single.name.replace("m", "m_fp16", 1) and single.exists()
    assert export.megabytes(half) < 0.9 * export.megabytes(single)  # a slim one is graph as much as weights
    images = torch.rand(1, 3, 64, 64)
    detector = formats.load(half, CPU)[0]
    assert detector.dtype == torch.float32
    assert worst(detector(images)[0], decoded(checkpoint.load(weights), images)) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "ncnn"])
def test_folders_have_the_names_and_the_yaml_that_others_look_for_and_old_names_open(teacher, tmp_path, name):
    installed(name)
    shutil.copy(teacher, tmp_path / "m.pt")
    path, = export.main(["--weights", str(tmp_path / "m.pt"), "--include", name])
    assert path.name == f"m_{name}_model"
    for file in [path / "metadata.yaml", *path.glob("model.yaml")]:
        says = yaml.safe_load(file.read_text())
        assert says["names"] == NAMES and says["stride"] == 32 and says["imgsz"] == [64, 64]
    assert (path / "model.yaml").is_file() == (name == "openvino")  # YOLOv5's is called as the .xml
    path.rename(older := tmp_path / f"m_{name}")
    assert formats.load(older, CPU)[0].names == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["x.yaml", "metadata.yaml"])
def test_openvino_folders_of_others_open(teacher, tmp_path, beside):
    """They say what they are in a yaml; there is nothing in the .xml."""
    installed("openvino")
    import openvino

    onnx_file, folder = tmp_path / "m.onnx", tmp_path / "m_openvino_model"
    model = checkpoint.load(teacher)
    formats.formats()["onnx"].write(model, onnx_file, formats.export_options(model, (1, 3, 64, 64)))
    openvino.save_model(openvino.convert_model(onnx_file), folder / "x.xml", compress_to_fp16=False)
    with pytest.raises(UserError, match="metadata.yaml: no such file"):
        formats.load(folder, CPU)
    (folder / beside).write_text(yaml.safe_dump({"stride": 32, "names": NAMES}))
    images = torch.rand(1, 3, 64, 64)
    assert worst(formats.load(folder, CPU)[0](images)[0], decoded(model, images)) < 1e-4


# NMS inside -----------------------------------------------------------------------------------------------------------

def eager(cfg: Path) -> Model:
    """A model that finds something everywhere."""
    torch.manual_seed(0)
    model = randomised(Model(str(cfg), nc=2, names=NAMES)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics are those of the next batch
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3))
        for head in model.detect.m:
            head.bias.view(3, -1)[:, 4:] = -0.5
    return model.eval()


@pytest.mark.parametrize("batch, dynamic, opset, precision, suppression", [
    (1, False, 17, "fp32", formats.Suppression(0.001, 0.45, 20)),
    (2, False, 12, "fp32", formats.Suppression(0.25, 0.6, 300, agnostic=True)),
    pytest.param(3, True, 17, "fp32", formats.Suppression(0.1, 0.45, 300), marks=pytest.mark.slow),
    pytest.param(1, False, 17, "fp16", formats.Suppression(0.1, 0.45, 20), marks=pytest.mark.slow)])
def test_boxes_of_a_file_are_those_of_nms(cfg, tmp_path, batch, dynamic, opset, precision, suppression):
    installed("onnx")
    import onnxruntime

    model, path = eager(cfg), tmp_path / "m.onnx"
    options = formats.export_options(model, (batch, 3, 64, 64), precision, dynamic=dynamic, opset=opset,
                                     suppression=suppression)
    onnx.write(model, path, options)
    images = torch.rand(batch, 3, 64, 64)
    found = onnxruntime.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0]
    assert found.shape == (batch, suppression.max_det, 6)
    how = {"conf": suppression.conf, "iou": suppression.iou, "agnostic": suppression.agnostic,
           "max_det": suppression.max_det}
    expected = nms(decoded(model, images), **how)
    detector = formats.load(path, CPU)[0]
    again = nms(detector(images)[0], **how)  # val.py and detect.py: nothing is left to suppress
    for boxes, own, once_more in zip(found, expected, again):
        count = int((boxes[:, 4] > 0).sum())
        assert len(own) > 10 and not boxes[count:].any() and np.allclose(once_more.numpy(), boxes[:count], atol=1e-3)
        if precision == "fp32":
            assert count == len(own) and np.abs(boxes[:count] - own.numpy()).max() < 0.1


def test_metadata_tells_boxes_from_predictions():
    """Of one class both have six columns."""
    rows = torch.tensor([[[10.0, 20, 30, 60, 0.5, 0], [0, 0, 0, 0, 0, 0]]])
    plain, boxes = (FileDetector({"names": ["a"], "stride": 32, **more}, (1, 3, 64, 64)).check_output(rows)
                    for more in ({}, {"nms": "True"}))
    assert torch.equal(plain, rows) and boxes[0, 0].tolist() == [20, 40, 20, 40, 0.5, 1]


@pytest.mark.slow
def test_simplify_takes_onnxslim_where_it_is(cfg, tmp_path, monkeypatch, capsys):
    installed("onnx")
    model, written = Model(str(cfg), nc=2).eval(), []
    options = formats.export_options(model, (1, 3, 64, 64), simplify=True)
    monkeypatch.setitem(sys.modules, "onnxslim", None)
    onnx.write(model, tmp_path / "a.onnx", options)
    assert "pip install onnxslim" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "onnxslim", SimpleNamespace(slim=lambda graph: written.append(graph) or graph))
    onnx.write(model, tmp_path / "b.onnx", options)
    assert len(written) == 1 and capsys.readouterr().out == ""


# Ensembles ------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_an_ensemble_gives_the_boxes_of_all(weights, cfg, tmp_path, capsys):
    path = tmp_path / "b.pt"
    checkpoint.save(path, randomised(Model(str(cfg), nc=2, names=NAMES), 1).eval(), imgsz=96)
    both, says = formats.load([weights, path], CPU, half=True)
    images = torch.rand(2, 3, 64, 96)
    parts = [decoded(checkpoint.load(file), images) for file in (weights, path)]
    assert worst(both(images)[0], torch.cat(parts, 1)) < 1e-4
    assert both.names == NAMES and both.input_shape == (0, 3, 0, 0) and says["imgsz"] == 64 and both.stride == 32
    assert "--half: a CPU computes in fp32" in capsys.readouterr().out


@pytest.mark.slow
def test_an_ensemble_of_files_of_two_sizes_is_refused(cfg, tmp_path):
    model = Model(str(cfg), nc=2).eval()
    for side in (64, 96):
        torchscript.write(model, tmp_path / f"{side}.torchscript", formats.export_options(model, (1, 3, side, side)))
    with pytest.raises(UserError, match=r"64.torchscript: takes images of shape \(3, 64, 64\), another one of the"):
        formats.load([tmp_path / "64.torchscript", tmp_path / "96.torchscript"], CPU)


@pytest.mark.slow
def test_ensembles_in_val_and_detect(teacher, cfg, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(Path("b.pt"), randomised(Model(str(cfg), nc=2, names=NAMES), 1).eval(), imgsz=64)
    pair = ["--weights", str(teacher), "b.pt", "--device", "cpu"]
    found = val.main([*pair, "--data", str(tiny), "--workers", "0", "--noplots"])
    assert found["images"] == 6 and found["imgsz"] == 64 and found["weights"] == f"{teacher} b.pt"
    assert detect.main([*pair, "--source", str(tiny.parent / "images/val"), "--imgsz", "64"]).is_dir()


def test_a_folder_is_known_by_what_is_in_it(tmp_path):
    (tmp_path / "any").mkdir()
    with pytest.raises(UserError, match="no file in it tells its format"):
        formats.load(tmp_path / "any", CPU)
    (tmp_path / "any" / "x.xml").touch()
    found = formats.format_of(tmp_path / "any")
    assert found is not None and found.name == "openvino" == formats.format_of(tmp_path / "any" / "x.xml").name


# int8 -----------------------------------------------------------------------------------------------------------------

def quantize(weights: Path, tiny: Path, name: str, *flags: str) -> Path:
    return export.main(["--weights", str(weights), "--include", name, "--int8", "--data", str(tiny), "--workers", "0",
                        "--calibration-images", "4", *flags])[0]


@pytest.mark.slow
def test_onnx_int8_keeps_the_head_in_float(weights, tiny, capsys):
    onnx = pytest.importorskip("onnx")
    installed("onnx", "int8")
    path = quantize(weights, tiny, "onnx", "--int8-keep", "model.0", "model.2.m.*")
    said = capsys.readouterr().out
    assert path.name == "m_int8.onnx" and "onnx int8" in said and "against fp32" in said
    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    readers = {node.name: [n.name for n in graph.node if set(node.output) & set(n.input)] for node in graph.node}
    kinds = {node.name: node.op_type for node in graph.node}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    head = quantized.without_convolution_after(readers, [node.name for node in convs])  # the grid's places, too
    assert len(head) > 20 and not {kinds[name] for name in head} & {"QuantizeLinear", "DequantizeLinear"}
    in_float = {node.name for node in convs if node.input[1] not in makers}  # else it is dequantized
    last = {node.name for node in convs if node.name in head}
    kept = {node.name for node in convs if "/model.0/" in node.name or "/model.2/m/" in node.name}
    assert len(last) == 3 and kept and in_float == last | kept
    assert {"Sigmoid", "Mul", "Concat"} <= {kinds[r] for node in graph.node if node.op_type == "DequantizeLinear"
                                            for r in readers[node.name]}
    weight = next(i for i in graph.initializer if i.name.endswith("weight_scale") and len(i.dims))
    assert weight.dims[0] > 1  # a scale per channel
    detector = formats.load(path, CPU)[0]
    images = torch.rand(1, 3, 64, 64)
    assert detector.names == NAMES
    assert worst(detector(images)[0], decoded(checkpoint.load(weights), images)) < 0.1


@pytest.mark.slow
def test_onnxruntime_runs_all_convolutions_but_the_heads_in_int8(cfg, tmp_path):
    """Also where biases are equal, as those of a new model: the exporter writes them once."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    installed("onnx", "int8")
    model, options = Model(str(cfg), nc=2).eval(), onnxruntime.SessionOptions()
    calibration = [np.random.default_rng(i).random((1, 3, 64, 64), np.float32) for i in range(3)]
    formats.formats()["onnx"].write(model, tmp_path / "m.onnx",
                                    formats.export_options(model, (1, 3, 64, 64), "int8", calibration=calibration))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("Conv") + kinds.count("FusedConv") == 3 and kinds.count("QLinearConv") > 10


@pytest.mark.slow
def test_openvino_int8_keeps_the_head_in_float(weights, tiny):
    openvino = pytest.importorskip("openvino")
    installed("openvino", "int8")
    path = quantize(weights, tiny, "openvino", "--noval", "--int8-keep", "model.0")
    talk = logging.getLogger("torch.utils.cpp_extension")  # NNCF imports it, and it misses CUDA on a CPU
    assert not talk.isEnabledFor(logging.WARNING)
    model = openvino.Core().read_model(path / "model.xml")
    ops = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
    readers = {name: [t.get_node().get_friendly_name() for o in op.outputs() for t in o.get_target_inputs()]
               for name, op in ops.items()}
    convs = [name for name, op in ops.items() if op.get_type_name() == "Convolution"]
    head = quantized.without_convolution_after(readers, convs)
    kinds = [op.get_type_name() for name, op in ops.items() if name in head]
    assert len(kinds) > 20 and "FakeQuantize" not in kinds

    in_float = {name for name in convs  # the weights of the others are int8, and go through a conversion
                if ops[name].input(1).get_source_output().get_node().get_type_name() == "Constant"}
    assert in_float == {name for name in convs if "/model.0/" in name or name in head}


@pytest.mark.slow
def test_sensitivity_quantizes_once_for_every_stage(weights, tiny, monkeypatch, capsys):
    """With a format that writes nothing but the stage that is left in float, and detects accordingly."""
    kept: list[tuple[str, ...]] = []
    fake = formats.Format("fake", ".fake", lambda model, path, options: kept.append(options.keep),
                          lambda path, device: kept[-1], precisions=("int8",))
    monkeypatch.setitem(formats.formats(), "fake", fake)
    monkeypatch.setattr(formats, "load", lambda path, device: (kept[-1], {}))
    monkeypatch.setattr(export, "_accuracy", lambda detector, loader:
                        (0.9, 0.5 if isinstance(detector, Model) else 0.45 if "model.2" in detector else 0.4))
    before = {p.name for p in weights.parent.iterdir() if p.suffix != ".csv"}
    csv, = export.main(["--weights", str(weights), "--include", "fake", "--int8-sensitivity", "--data", str(tiny),
                        "--int8-keep", "model.1", "--calibration-images", "2", "--workers", "0"])
    stages = [i for i, layer in enumerate(checkpoint.load(weights).model) if any(True for _ in layer.parameters())]
    assert kept == [("model.1",), *(("model.1", f"model.{i}") for i in stages)]
    said = capsys.readouterr().out
    assert "(none)" in said and "model.24 (Detect)" in said and "Upsample" not in said
    rows = {line.split(",")[1]: line.split(",")[2:] for line in csv.read_text().splitlines()[1:]}
    assert rows["model.2 (C3)"] == ["0.45", "-0.05"] and rows["model.0 (Conv)"] == ["0.4", "-0.1"]
    assert {p.name for p in weights.parent.iterdir() if p.suffix != ".csv"} == before


@pytest.mark.slow
def test_dynamic_files_remember_their_size_and_oblong_ones_are_used_in_it(weights, tiny, tmp_path, monkeypatch):
    installed("onnx")
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(tiny), "--workers", "0", "--noplots"]
    dynamic, = export.main(["--weights", str(weights), "--include", "onnx", "--dynamic"])
    assert val.main(["--weights", str(dynamic), *common])["imgsz"] == 64
    oblong, = export.main(["--weights", str(weights), "--include", "onnx", "--imgsz", "64", "96"])
    assert val.main(["--weights", str(oblong), *common])["images"] == 6
    detector, images = formats.load(oblong, CPU)[0], [np.zeros((50, 70, 3), np.uint8)]
    assert detect_images(detector, images, 64, CPU, nms).shape == (1, 3, 64, 96)


@pytest.mark.slow
def test_int8_with_a_batch_of_several(weights, tiny):
    installed("onnx", "int8")
    flags = ["--weights", str(weights), "--include", "onnx", "--int8", "--data", str(tiny), "--noval"]
    path, = export.main([*flags, "--batch-size", "2", "--calibration-images", "2"])
    assert formats.load(path, CPU)[0].input_shape[0] == 2
    with pytest.raises(UserError, match="--int8 needs 13"):
        export.main([*flags, "--opset", "12"])


def test_threads_of_onnxruntime_have_cores_of_their_own(monkeypatch):
    monkeypatch.setattr(onnx.os, "sched_getaffinity", lambda process: {7, 2, 5}, raising=False)
    assert [onnx.cores_of_workers(threads) for threads in (1, 2, 3, 4)] == ["", "", "6;8", ""]


@pytest.mark.slow
def test_a_file_that_computes_nan_is_not_equal(weights):
    """max(0.0, nan) is 0.0: the worst file had the best report."""
    model = checkpoint.load(weights)

    class Broken:
        dtype, input_shape = torch.float32, (1, 3, 64, 64)

        def __call__(self, images):
            return decoded(model, images) * float("nan"), None

    with pytest.raises(NonFiniteError, match="the model: its predictions"):
        export.output_difference(model, Broken(), formats.export_options(model, [1, 3, 64, 64]))


def test_calibration_images_are_those_of_val_py(tiny):
    config = read_data(str(tiny))
    images = CalibrationImages(config, (64, 64), 5, seed=1)
    again, other = CalibrationImages(config, (64, 64), 5, seed=1), CalibrationImages(config, (64, 64), 5, seed=2)
    assert len(images) == 5 and all(np.array_equal(a, b) for a, b in zip(images, again))
    assert not all(np.array_equal(a, b) for a, b in zip(images, other))
    assert images[0].shape == (1, 3, 64, 64) and images[0].dtype == np.float32 and images[0].max() <= 1
    loader = validation_loader(config, "train", 64, 1, 32, workers=0, rect=False)
    known = {batch.images.numpy().tobytes() for batch in loader}
    assert all((image * 255).round().astype(np.uint8).tobytes() in known for image in images)


# The head, by position ------------------------------------------------------------------------------------------------

def test_the_head_is_what_no_convolution_follows():
    readers = {"in": ["c0"], "c0": ["a", "c1"], "a": ["c2"], "c1": ["x"], "x": ["out"], "c2": ["y"], "y": ["out"],
               "grid": ["y"], "out": []}
    assert quantized.without_convolution_after(readers, ["c0", "c1", "c2"]) == {"c1", "c2", "x", "y", "grid", "out"}
    deep = {str(i): [str(i + 1)] for i in range(5000)}
    assert quantized.without_convolution_after(deep, ["0", "4998"]) == {"4998", "4999"}


@pytest.mark.parametrize("seed", range(20))
def test_the_head_is_every_node_without_a_path_to_a_convolution(seed):
    rng = np.random.default_rng(seed)
    count = 12
    readers = {str(i): [str(j) for j in range(i + 1, count) if rng.random() < 0.2] for i in range(count)}
    convs = [str(i) for i in range(count) if rng.random() < 0.4]

    def descendants(node: str) -> set[str]:
        return set(readers[node]).union(*(descendants(other) for other in readers[node]))

    expected = {node for node in readers if not descendants(node) & set(convs)}
    assert quantized.without_convolution_after(readers, convs) == expected


def test_modules_of_nodes():
    nodes = ["/model/model.0/conv/Conv", "/model/model.2/m/m.0/cv1/act/Mul", "Constant_7"]
    assert [quantized.module_of(node) for node in nodes] == ["model.0.conv", "model.2.m.m.0.cv1.act", ""]
    assert quantized.matching_nodes(nodes, ["model.0"]) == {nodes[0]}
    assert quantized.matching_nodes(nodes, ["model.2.m.*"]) == {nodes[1]}
    with pytest.raises(UserError, match="--int8-keep: no part of the model is called 'model.9'"):
        quantized.matching_nodes(nodes, ["model.0", "model.9"])


# Mistakes -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, said", [
    (["--int8"], "give the --data whose train images activations are measured on"),
    (["--int8", "--half"], "a file has one precision"),
    (["--int8", "--include", "torchscript"], "--include torchscript: has no int8 here; onnx, openvino have"),
    (["--half", "--include", "torchscript"], "--include torchscript: has no fp16 here"),
    (["--int8", "--data", "no.yaml"], "no.yaml"),
    (["--include", "onnx", "--opset", "3"], "--opset 3: must be")])
def test_a_mistake_in_a_line_and_nothing_written(weights, flags, said, monkeypatch):
    installed("onnx", "int8")
    before = sorted(weights.parent.iterdir())
    with pytest.raises(UserError, match=said):
        export.main(["--weights", str(weights), *flags])
    assert sorted(weights.parent.iterdir()) == before


@pytest.mark.slow
def test_a_missing_package_is_named(weights, monkeypatch, capsys):
    installed("openvino", "int8")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name in ("openvino", "nncf") else real(name, *rest))
    with pytest.raises(UserError, match=r"openvino is missing; pip install -r requirements-export.txt"):
        export.main(["--weights", str(weights), "--include", "openvino"])
    with pytest.raises(UserError, match=r"openvino and nncf are missing.*pip install openvino nncf"):
        export.main(["--weights", str(weights), "--include", "openvino", "--int8", "--data", "x.yaml"])
    with pytest.raises(UserError, match="openvino is missing"):
        formats.formats()["openvino"].load(Path("m_openvino"), CPU)
    opt = export.parse(["--weights", "x", "--include", "all"])
    assert "openvino" not in [fmt.name for fmt in export.chosen_formats(opt)]
    assert "openvino: left out; pip install openvino" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, said", [
    ("m.onnx", b"not a graph", "not an ONNX detector"),
    ("m.torchscript", b"not a zip", "not a TorchScript detector"),
    ("m.tflite", b"x", "its name tells no format that is known here"),
    ("m_openvino/model.xml", b"<net/>", "not an OpenVINO detector of export.py or YOLOv5"),
    ("m_openvino_model/notes.txt", b"", "has no .xml file")])
def test_foreign_and_broken_files(tmp_path, name, content, said):
    for runtime in ("onnx", "openvino"):
        if runtime in name:
            installed(runtime)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        formats.load(tmp_path / Path(name).parts[0], CPU)


@pytest.mark.slow
def test_a_quantization_that_fails_leaves_nothing(weights, tiny, monkeypatch):
    installed("onnx", "int8")
    from onnxruntime import quantization

    def fails(*args, **kwargs):
        raise ValueError("no")

    monkeypatch.setattr(quantization, "quantize_static", fails)
    before = sorted(weights.parent.iterdir())
    with pytest.raises(ValueError, match="no"):
        quantize(weights, tiny, "onnx", "--noval")
    assert sorted(weights.parent.iterdir()) == before


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    for content in ("1", "2"):
        with atomic_folder(path) as new:
            (new / "a").write_text(content)
        assert (path / "a").read_text() == content and [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(RuntimeError), atomic_folder(path) as new:
        (new / "a").write_text("3")
        raise RuntimeError
    (path / "mine").touch()
    with pytest.raises(UserError, match="holds mine, which is not of an export"), atomic_folder(path) as new:
        (new / "a").write_text("4")
    assert (path / "a").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.slow
def test_int8_of_a_model_of_a_single_class(cfg, tiny, tmp_path):
    """Trained with --single-cls: the data names more classes than the model knows, and that is right."""
    model, path = Model(str(cfg), nc=1, names={0: "object"}), tmp_path / "m.pt"
    for trained in ({}, {"single_cls": True}):
        checkpoint.save(path, model, imgsz=64, opt=trained)
        opt = export.parse(["--weights", str(path), "--int8", "--data", str(tiny), "--workers", "0"])
        if not trained:
            with pytest.raises(UserError, match="knows 1 classes"):
                export.options_of(opt, model, checkpoint.read(path))
            continue
        options = export.options_of(opt, model, checkpoint.read(path))
        targets = torch.cat([batch.targets for batch in export.square_val_loader(opt, options, 32)])
        assert len(targets) and not targets[:, 1].any()


def test_names_in_a_list_are_numbered():
    """Files of older YOLOv5 hold names so."""
    assert FileDetector({"names": "['cat', 'dog']", "stride": "32"}, (1, 3, 64, 64)).names == {0: "cat", 1: "dog"}


# TorchScript: a program -----------------------------------------------------------------------------------------------

class Stock(torch.nn.Module):
    """What YOLOv5's own export traces: it gives a tuple."""

    def __init__(self, model: Model, wrap: str):
        super().__init__()
        self.model, self.wrap = model.eval(), wrap

    def forward(self, images):
        decoded = self.model(images)[0]
        return {"tuple": (decoded,), "both": (decoded, [decoded]), "masks": (torch.cat((decoded, decoded), 2), decoded),
                "classes": decoded[:, 0], "v8": decoded.transpose(1, 2)}[self.wrap]


def stock_file(path: Path, cfg: Path, wrap: str = "tuple") -> Path:
    torch.manual_seed(0)
    traced = torch.jit.trace(Stock(randomised(Model(str(cfg), nc=2, names=NAMES)), wrap), torch.rand(1, 3, 64, 64),
                             strict=False, check_trace=False)
    config = json.dumps({"shape": [1, 3, 64, 64], "stride": 32, "names": NAMES})
    traced.save(str(path), _extra_files={"config.txt": config})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["tuple", "both"])
def test_torchscript_of_yolov5_is_run_and_said_to_be_a_program(cfg, tiny, tmp_path, monkeypatch, capsys, wrap):
    monkeypatch.chdir(tmp_path)
    path = stock_file(tmp_path / "stock.torchscript", cfg, wrap)
    for main, flags in ((val.main, ["--data", str(tiny), "--batch-size", "4", "--workers", "0", "--noplots"]),
                        (detect.main, ["--source", str(tiny.parent / "images/val")])):
        capsys.readouterr()
        main(["--weights", str(path), "--device", "cpu", *flags])
        said = [line for line in capsys.readouterr().out.splitlines() if "program" in line]
        assert len(said) == 1 and said[0].startswith(f"{path}: ") and "trust" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["masks", "classes", "v8"])
def test_torchscript_of_other_models_is_refused_in_one_line(cfg, tmp_path, wrap):
    detector = formats.load(stock_file(tmp_path / "other.torchscript", cfg, wrap), CPU)[0]
    with pytest.raises(UserError, match="no YOLOv5 detector of 2 classes"):
        detector(torch.rand(1, 3, 64, 64))


@pytest.mark.slow
def test_the_line_comes_before_the_program_runs_and_not_for_our_own_files(cfg, tmp_path, monkeypatch, capsys):
    model = randomised(Model(str(cfg), nc=2, names=NAMES)).eval()
    torchscript.write(model, own := tmp_path / "own.torchscript", formats.export_options(model, (1, 3, 64, 64)))
    formats.load(own, CPU)
    assert capsys.readouterr().out == ""
    path = stock_file(tmp_path / "stock.torchscript", cfg)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail(capsys.readouterr().out))
    with pytest.raises(pytest.fail.Exception, match="program"):
        formats.load(path, CPU)


METADATA = [{}, {"names": {}}, {"names": "[" * 5000}, {"stride": 0}, {"stride": "1e999"}, {"shape": [1, 3, -64, 64]},
            {"shape": [1, 3]}, {"shape": "x"}, {"shape": [1, 3, 10**9, 10**9]}, {"names": {5: "a"}},
            {"imgsz": "inf"}, {"names": 5}, {"names": {"a": "b"}}]


@pytest.mark.parametrize("change", METADATA)
def test_metadata_of_others_is_checked_whole(tmp_path, change):
    good = {"names": ["a"], "stride": 32, "shape": [1, 3, 64, 64], "imgsz": [64, 64]}
    config = {**good, **change} if change else {}
    try:
        shape = config["shape"]
        FileDetector(config, shape)
    except (ValueError, KeyError, TypeError):
        pass
    else:
        pytest.fail("taken")
    with zipfile.ZipFile(tmp_path / "a.torchscript", "w") as file:
        file.writestr("a/extra/config.txt", json.dumps(config))
    with pytest.raises(UserError, match="not a TorchScript detector"):
        formats.load(tmp_path / "a.torchscript", CPU)


class Others(FileDetector):
    """A file whose program gives what a detector does not."""

    def __init__(self, give):
        super().__init__({"names": ["a", "b"], "stride": 32}, (1, 3, 64, 64))
        self.file, self.run = "other.onnx", give


def missing_input(images: np.ndarray) -> np.ndarray:
    raise ValueError("Required inputs (['b']) are missing")


@pytest.mark.parametrize("give, words", [
    (missing_input, "other.onnx: can't be run on images alone"),
    (lambda images: np.array([["a"]], object), "other.onnx: can't be run on images alone"),
    (lambda images: ["a"], "other.onnx: can't be run on images alone"),
    (lambda images: np.zeros((1, 6), np.float32), "other.onnx: is no YOLOv5 detector of 2 classes"),
])
def test_what_other_programs_give_is_one_line_that_names_the_file(give, words):
    with pytest.raises(UserError, match=words):
        Others(give)(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("value, column, inside", [(np.nan, 4, False), (np.inf, 0, False), (-np.inf, 6, False),
                                                (np.nan, 5, True), (np.nan, 0, True)])
def test_predictions_that_are_not_finite_end_with_the_files_name(value, column, inside):
    """They found nothing, exit code 0."""
    given = np.full((1, 9, 6 if inside else 7), 0.5, np.float32)
    given[0, 3, column] = value
    detector = Others(lambda images: given)
    detector.has_nms = inside
    with pytest.raises(NonFiniteError, match="other.onnx: its predictions are NaN or infinite"):
        detect_images(detector, [np.zeros((64, 64, 3), np.uint8)], 64, CPU, nms)
    given[0, 3, column] = -1 if inside else 3e38  # is finite, but the sum of two of them is not
    given[0, 4, column] = given[0, 3, column]
    if column < 5:
        require_finite(detector(torch.rand(1, 3, 64, 64))[0], detector)
    elif inside:
        with pytest.raises(UserError, match="other.onnx: gives classes that are not 0 to 1"):
            detector(torch.rand(1, 3, 64, 64))


@pytest.mark.slow
def test_weights_that_overflow_end_with_the_files_name(cfg, tmp_path):
    """All of them are finite."""
    model = Model(str(cfg), nc=2).eval()
    for parameter in model.model[:3].parameters():
        parameter.data *= 1e30
    checkpoint.save(tmp_path / "a.pt", model, imgsz=64)
    detector = formats.load(tmp_path / "a.pt", CPU, augment=True)[0]
    loader = [Batch(torch.full((1, 3, 64, 64), 99, dtype=torch.uint8), torch.zeros(0, 6), ["a.jpg"], [])]
    with pytest.raises(NonFiniteError, match=r"a\.pt: its predictions are NaN or infinite"):
        val.evaluate(detector, loader, CPU)


@pytest.mark.slow
def test_torchscript_that_gives_nothing_is_refused(cfg, tmp_path):
    detector = formats.load(stock_file(tmp_path / "other.torchscript", cfg), CPU)[0]
    detector.module = lambda images: []
    with pytest.raises(UserError, match=r"other.torchscript: is no YOLOv5 detector"):
        detector(torch.rand(1, 3, 64, 64))


# Flags that a file can't follow ---------------------------------------------------------------------------------------

def oblong(cfg: Path, folder: Path) -> Path:
    model = randomised(Model(str(cfg), nc=2, names=NAMES)).eval()
    torchscript.write(model, path := folder / "oblong.torchscript", formats.export_options(model, (1, 3, 64, 96)))
    return path


@pytest.mark.slow
def test_another_size_than_the_files_is_refused_and_the_files_is_told(cfg, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, source = oblong(cfg, tmp_path), tiny.parent / "images/val/001.png"
    for main, flags in ((detect.main, ["--source", str(source)]), (val.main, ["--data", str(tiny), "--noplots"])):
        with pytest.raises(UserError, match="--imgsz 320: this file takes images of 64 x 96"):
            main(["--weights", str(path), "--imgsz", "320", *flags])
    assert not (tmp_path / "runs").exists()
    for size in ([], ["--imgsz", "96"]):
        detect.main(["--weights", str(path), "--source", str(source), *size])
        assert "at 64 x 96 px" in capsys.readouterr().out
    shaped = AutoShape(*formats.load(path, CPU)[:1], CPU, 96)
    assert shaped(source).s == (1, 3, 64, 96)
    with pytest.raises(UserError, match="size 320: "):
        shaped(source, size=320)


@pytest.mark.parametrize("name", RUNTIMES)
def test_half_and_a_file_do_not_go_together(tmp_path, name):
    (path := tmp_path / f"a{formats.formats()[name].suffix}").touch()
    with pytest.raises(UserError, match="--half: not with"):
        formats.load(path, CPU, half=True)


@pytest.mark.parametrize("flags", ["--seed 1", "--noval", "--int8-keep x", "--calibration-images 3", "--data x"])
def test_flags_of_int8_without_int8_are_refused(flags):
    with pytest.raises(UserError, match=f"{flags.split()[0]}: has no effect without --int8"):
        export.parse(["--weights", "x.pt", *flags.split()])


@pytest.mark.parametrize("parse", [partial(detect.parse, ["--weights", "x", "--source", "x", "--save-conf"]),
                                   partial(val.parse, ["--save-conf"])])
def test_save_conf_needs_save_txt(parse):
    with pytest.raises(UserError, match="--save-conf: has no effect without --save-txt"):
        parse()


# A full disk, a single class ------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", formats.formats())
def test_a_full_disk_is_one_line_and_leaves_nothing(cfg, tmp_path, name):
    """PyTorch's save() of TorchScript ended the process."""
    installed(name)
    checkpoint.save(tmp_path / "m.pt", randomised(Model(str(cfg), nc=2, names=NAMES)).eval(), imgsz=64)
    with full_disk(30_000), pytest.raises(UserError, match="can't be written"):
        export.main(["--weights", str(tmp_path / "m.pt"), "--include", name])
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.slow
def test_a_full_disk_under_openvinos_own_files_is_one_line(cfg, tmp_path, monkeypatch):
    installed("openvino")
    import openvino

    def full(model, path, **options):
        Path(path).write_text("half")
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", full)
    model = randomised(Model(str(cfg), nc=2, names=NAMES)).eval()
    fmt = formats.formats()["openvino"]
    with pytest.raises(UserError, match="can't be written .*iostream error"):
        fmt.write(model, tmp_path / "m_openvino", formats.export_options(model, (1, 3, 64, 64)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_calibration_on_nothing_is_refused(teacher, tiny, monkeypatch):
    monkeypatch.setattr(export, "CalibrationImages", lambda *_: [])
    opt = export.parse(["--weights", str(teacher), "--int8", "--data", str(tiny), "--imgsz", "64"])
    with pytest.raises(UserError, match="none of 100 train images can be decoded"):
        export.options_of(opt, checkpoint.load(teacher), {})


def test_calibration_images_of_a_single_class_may_have_any_labels(tiny, tmp_path):
    shutil.copytree(tiny.parent, tmp_path / "set")
    (tmp_path / "set/labels/train/001.txt").write_text("7 .5 .5 .2 .2\n")
    config = read_data(tmp_path / "set" / tiny.name)
    assert len(CalibrationImages(config, (64, 64), 5, single_cls=True)) == 5
    with pytest.raises(UserError, match="class 7"):
        CalibrationImages(config, (64, 64), 5)
