"""OpenVINO: a folder with model.xml and model.bin, made from ONNX; int8 by NNCF. Packages: openvino, and nncf for int8.

The metadata is inside of model.xml, and beside it: YOLOv5 looks for model.yaml, ultralytics for metadata.yaml.

Where a CPU has bf16 instructions OpenVINO computes in bf16 unless it is told otherwise: a file of fp32 or int8 tells
it, one of fp16 leaves it the choice.
"""
from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.formats import onnx
from models.formats.format import ExportOptions, FileDetector, Format
from models.formats.quantized import matching_nodes, without_convolution_after
from models.yolo import Model
from utils.errors import UserError, first_line
from utils.files import atomic_folder, write_yaml
from utils.text import read_yaml_mapping

INFO = "detector"  # name of the metadata in model.xml
METADATA = ("model.yaml", "metadata.yaml")


def write(model: Model, path: Path, options: ExportOptions) -> None:
    """Convert a model, with options.metadata inside. The folder is there whole or not at all."""
    FORMAT.need("--include openvino", options.precision)
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.onnx"
        onnx.write(model, graph, replace(options, precision="fp32", suppression=None, simplify=False))
        converted = openvino.convert_model(str(graph))
    if options.precision == "int8":
        converted = _quantize(converted, options)
    for key, value in options.metadata.items():
        converted.set_rt_info(str(value), [INFO, key])
    with atomic_folder(path) as new:
        try:
            openvino.save_model(converted, str(new / "model.xml"), compress_to_fp16=options.precision == "fp16")
        except RuntimeError as error:  # the disk is full, say: it tells no more
            raise UserError(f"{path}: can't be written ({first_line(error)}); free some space or choose another folder"
                            ) from None
        for name in METADATA:
            write_yaml(new / name, options.metadata)


def _quantize(model: Any, options: ExportOptions) -> Any:
    """Post-training quantization of weights and activations, mixed preset: activations may be asymmetric.

    The accurate bias correction makes up for what rounding does to the mean of each channel, layer after layer; the
    fast one, NNCF's default, looks at each layer alone and cost up to .017 mAP50-95 on BCCD. The head's convolutions
    stay in float, as in onnx.py.
    """
    import nncf

    for talkative in ("nncf", "torch.utils.cpp_extension"):  # the latter misses CUDA, which nothing here needs
        logging.getLogger(talkative).setLevel(logging.ERROR)
    ops = model.get_ordered_ops()
    readers = {op.get_friendly_name(): [target.get_node().get_friendly_name() for output in op.outputs()
                                        for target in output.get_target_inputs()] for op in ops}
    convolutions = [op.get_friendly_name() for op in ops if op.get_type_name() in ("Convolution", "GroupConvolution")]
    in_float = without_convolution_after(readers, convolutions) | matching_nodes(readers, options.keep)
    data = nncf.Dataset(options.calibration)
    scope = nncf.IgnoredScope(names=sorted(in_float), validate=False)
    return nncf.quantize(model, data, preset=nncf.QuantizationPreset.MIXED, subset_size=len(options.calibration),
                         ignored_scope=scope, fast_bias_correction=False)


def _metadata(file: Path, model: Any) -> dict[str, Any]:
    """What a file says of itself, or, where it is YOLOv5's or of ultralytics, a yaml beside it."""
    if model.has_rt_info(INFO):
        return {key: str(value) for key, value in model.get_rt_info(INFO).value.items()}
    beside = file.with_suffix(".yaml")
    return read_yaml_mapping(beside if beside.is_file() else file.with_name(METADATA[1]), "OpenVINO's metadata")


class OpenVinoDetector(FileDetector):
    """A detector as OpenVINO's model.xml and model.bin. It takes as many threads as PyTorch has."""

    def __init__(self, path: Path, device: torch.device):
        FORMAT.need(str(path))
        import openvino

        try:
            file = path if path.is_file() else next(path.glob("*.xml"))
            model = openvino.Core().read_model(file)
            metadata = _metadata(file, model)
            shape = [n.get_length() if n.is_static else 0 for n in model.input(0).get_partial_shape()]
            super().__init__(metadata, shape)
            config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            if self.precision != "fp16":
                config["INFERENCE_PRECISION_HINT"] = "f32"
            self.request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
        except UserError:
            raise
        except StopIteration:
            raise UserError(f"{path}: has no .xml file; export it again") from None
        except Exception as error:  # OpenVINO raises RuntimeError and kinds of its own
            raise UserError(f"{path}: not an OpenVINO detector of export.py or YOLOv5 ({first_line(error, 100)})"
                            ) from None

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.request.infer([images], share_inputs=True)[0].copy()


FORMAT = Format("openvino", "_openvino_model", write, OpenVinoDetector, precisions=("fp32", "fp16", "int8"),
                dynamic=True, packages=("onnx", "onnxruntime", "openvino"), int8_packages=("nncf",), content="*.xml")
