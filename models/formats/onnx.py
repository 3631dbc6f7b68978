"""ONNX, in fp32, fp16 and int8: writing it, and running it by onnxruntime. Packages: requirements-export.txt."""
from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.formats.format import Decoded, ExportOptions, FileDetector, Format
from models.formats.nms import with_nms
from models.formats.quantized import matching_nodes, without_convolution_after
from models.yolo import Model, fused
from utils.errors import UserError
from utils.files import atomic

TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}  # of an input; YOLOv5 has fp16, too
SILU_FLOOR = -6.0  # SiLU of less lies between -0.015 and 0


def write(model: Model, path: Path, options: ExportOptions) -> None:
    """Export a model with options.metadata inside. The file is there whole or not at all."""
    FORMAT.need("--include onnx", options.precision)
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        _trace(model, graph := Path(folder) / "graph.onnx", options)
        proto = onnx.load(graph)
        if options.precision == "fp16":
            proto = _halved(proto)
        elif options.precision == "int8":
            proto = onnx.load(_quantize(graph, proto, options))
    if options.suppression is not None:
        proto = with_nms(proto, options.suppression, len(model.names))
    if options.simplify:
        proto = _simplified(proto)
    # With task and batch the ultralytics package takes a file with NMS inside as one of its own.
    boxes = {"nms": True, "task": "detect", "batch": len(options.image)} if options.suppression else {}
    for key, value in {**options.metadata, **boxes}.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, str(value)
    onnx.checker.check_model(proto)
    with atomic(path) as temporary:
        onnx.save(proto, temporary)


def _trace(model: Model, path: Path, options: ExportOptions) -> None:
    """Write the fused model, in fp32."""
    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output0": {0: "batch", 1: "boxes"}}
    with warnings.catch_warnings():
        # The newer exporter needs another package and fixes more shapes.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(Decoded(fused(model)).eval(), (options.image,), str(path), input_names=["images"],
                          output_names=["output0"], opset_version=options.opset,
                          dynamic_axes=axes if options.dynamic else None, dynamo=False)


def _simplified(proto: Any) -> Any:
    """What onnxslim makes of the model, where that is installed."""
    try:
        import onnxslim
    except ImportError:
        print("--simplify: onnxslim is not installed (pip install onnxslim); the file is simple without it: "
              "BatchNorms are folded, and runtimes fold its constants")
        return proto
    return onnxslim.slim(proto)


def _head(graph: Any) -> set[str]:
    """Names of the head's nodes: its convolutions, and the decoding of boxes."""
    convolutions = [node.name for node in graph.node if node.op_type == "Conv"]
    readers = {node.name: [other.name for other in graph.node if set(node.output) & set(other.input)]
               for node in graph.node}
    return without_convolution_after(readers, convolutions)


def _halved(proto: Any) -> Any:
    """The model in fp16. Images, boxes and their decoding stay in fp32, for fp16 has steps of half a pixel at 640."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    head = _head(proto.graph)
    decoding = [node.name for node in proto.graph.node if node.name in head and node.op_type != "Conv"]
    halved = convert_float_to_float16(proto, keep_io_types=True, node_block_list=decoding)
    _keep_scales(halved.graph)
    OnnxModel(halved).topological_sort()  # the casts were put at the end
    return halved


def _keep_scales(graph: Any) -> None:
    """Constant scales for every Resize, in place: the conversion puts a Cast before them, which OpenCV 5 refuses."""
    from onnx import numpy_helper

    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    values = {value.name: value for value in graph.initializer}
    values |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    needless: dict[str, Any] = {}
    for node in graph.node:
        cast = casts.get(node.input[2]) if node.op_type == "Resize" else None
        if cast is not None and cast.input[0] in values:
            scales = numpy_helper.to_array(values[cast.input[0]]).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(scales, f"{node.name}_scales"))
            node.input[2], needless[cast.name] = graph.initializer[-1].name, cast
    for cast in needless.values():
        graph.node.remove(cast)
    inputs = {name for node in graph.node for name in node.input}
    for node in [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in inputs]:
        graph.node.remove(node)


def _quantize(path: Path, proto: Any, options: ExportOptions) -> Path:
    """A file beside `path` with QDQ pairs around its operations: weights int8 per channel, activations uint8.

    All kinds of operations are quantized, not convolutions alone: a float operation between two of int8 costs a
    conversion each way. The head's convolutions stay in float as well, for onnxruntime would round what they compute,
    boxes and confidences of all sizes, to 256 steps.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self, images: Sequence[np.ndarray]):
            self.images = iter(images)

        def get_next(self) -> Any:
            image = next(self.images, None)
            return None if image is None else {"images": image}

    _unshare(proto.graph)
    onnx.save(proto, path)
    nodes = (node.name for node in proto.graph.node)
    in_float = _head(proto.graph) | matching_nodes(nodes, options.keep)
    with _quiet():
        calibrator = create_calibrator(path, augmented_model_path=str(path.with_name("calibration.onnx")))
        calibrator.collect_data(Reader(options.calibration))
        ranges = {name: data.range_value for name, data in calibrator.compute_data().items()}
        quantize_static(str(path), str(path.with_name("int8.onnx")), Reader(options.calibration),
                        quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
                        weight_type=QuantType.QInt8, nodes_to_exclude=sorted(in_float),
                        extra_options={"TensorQuantOverrides": _without_tails(proto.graph, ranges)})
    return path.with_name("int8.onnx")


def _unshare(graph: Any) -> None:
    """Give every node constants of its own, in place: the exporter writes equal ones once, for an Identity to share.

    In int8 a bias has the scale of its convolution. Of those that share it one would run in int8, the others in float.
    """
    values = {value.name: value for value in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Identity" and node.input[0] in values]:
        own = graph.initializer.add()
        own.CopyFrom(values[node.input[0]])
        own.name = node.output[0]
        graph.node.remove(node)


def _without_tails(graph: Any, ranges: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Narrower ranges for what goes into a SiLU: what is below SILU_FLOOR counts as SILU_FLOOR.

    onnxruntime rounds the output of a convolution before the activation, and much of its range is where SiLU is 0.
    """
    gates = {name for node in graph.node if node.op_type == "Sigmoid" for name in node.input}
    overrides: dict[str, list[dict[str, Any]]] = {}
    for node in graph.node:
        output = node.output[0]
        if node.op_type == "Conv" and output in gates and output in ranges:
            low, high = (np.asarray(limit, np.float32).reshape(-1)[0] for limit in ranges[output])
            if low < SILU_FLOOR < high:
                overrides[output] = [{"rmin": np.float32(SILU_FLOOR), "rmax": high}]
    return overrides


@contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice on preparing a model, which export has done (BatchNorms are folded)."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)


def cores_of_workers(threads: int) -> str:
    """The cores, counted from 1, of all threads but the caller's: "2;3". "" where cores are left over, or off Linux.

    Where threads take all cores and are not pinned, two of them share a core now and then, which takes up to twice the
    time. Where cores are left over the system finds free ones, and knows which of them are halves of one core.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return ";".join(str(core + 1) for core in cores[1:]) if threads == len(cores) else ""


class OnnxDetector(FileDetector):
    """A detector that export.py (or YOLOv5's) has written as ONNX. It takes as many threads as PyTorch has."""

    def __init__(self, path: Path, device: torch.device):
        FORMAT.need(str(path))
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that go on spinning after a run take time from the next model, and from PyTorch.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if cores := cores_of_workers(options.intra_op_num_threads):
            options.add_session_config_entry("session.intra_op_thread_affinities", cores)
        cuda = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        available = onnxruntime.get_available_providers()
        providers = [p for p in (*cuda, "CPUExecutionProvider") if p in available]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            image = self.session.get_inputs()[0]
            shape = [n if isinstance(n, int) else 0 for n in image.shape]
            super().__init__(self.session.get_modelmeta().custom_metadata_map, shape)
            self.input, self.dtype = image.name, TYPES[image.type]
        except Exception as error:  # onnxruntime has many kinds, none of them public
            raise UserError(f"{path}: not an ONNX detector with 'names' and 'stride' in its metadata "
                            f"({str(error)[:100]})") from None

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.input: images})[0]


FORMAT = Format("onnx", ".onnx", write, OnnxDetector, precisions=("fp32", "fp16", "int8"), dynamic=True,
                packages=("onnx", "onnxruntime"), runtime="onnxruntime")
