"""ONNX: writing it, running it by onnxruntime, and how fast that is. Packages: requirements-export.txt."""
from __future__ import annotations

import ast
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.formats.format import Decoded, ExportOptions, Format
from models.yolo import Model, fused
from utils.errors import UserError
from utils.slimming.timing import medians


def write(model: Model, path: Path, options: ExportOptions) -> None:
    """Export a model with names and stride in the metadata, and print the largest difference to PyTorch."""
    try:
        import onnx  # noqa: F401  (the writer needs it)
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--include onnx: {error.name} is missing; pip install -r requirements-export.txt") from None
    ready = fused(model)
    write_onnx(ready, options.image, path, options.dynamic, options.opset, options.metadata)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batch, channels, height, width = options.image.shape
    shapes = [(batch, channels, height, width)]
    if options.dynamic:
        shapes.append((2, channels, height + 32, width))
    worst = max(_relative_difference(Decoded(ready).eval(), session, shape) for shape in shapes)
    print(f"onnx: largest difference to torch {worst:.1e} (relative to the largest output)")


def _relative_difference(model: Decoded, session: Any, shape: tuple[int, ...]) -> float:
    """Largest |onnxruntime - PyTorch| over a random image of `shape`, relative to the largest output."""
    images = torch.rand(shape)
    with torch.no_grad():
        expected = model(images).numpy()
    found = session.run(None, {"images": images.numpy()})[0]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def write_onnx(model: Model, image: Tensor, path: Path, dynamic: bool = False, opset: int = 17,
               metadata: dict[str, Any] | None = None) -> None:
    """Write a fused model for images of the shape of `image`, (B, C, h, w), or of any shape if `dynamic`."""
    import onnx

    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output0": {0: "batch", 1: "boxes"}} if dynamic else None
    with warnings.catch_warnings():
        # The newer exporter needs another package and fixes more shapes.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(Decoded(model).eval(), (image,), str(path), input_names=["images"], output_names=["output0"],
                          opset_version=opset, dynamic_axes=axes, dynamo=False)
    written = onnx.load(path)
    for key, value in (metadata or {}).items():
        entry = written.metadata_props.add()
        entry.key, entry.value = key, str(value)
    onnx.checker.check_model(written)
    onnx.save(written, path)


class OnnxDetector:
    """A detector that export.py (or YOLOv5's) has written as ONNX."""

    dtype = torch.float32

    def __init__(self, path: Path, device: torch.device):
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path}: onnxruntime is missing; pip install -r requirements-export.txt") from None
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        available = onnxruntime.get_available_providers()
        providers = [p for p in (*wanted, "CPUExecutionProvider") if p in available]
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=providers)
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.names = {int(k): str(v) for k, v in ast.literal_eval(metadata["names"]).items()}
            self.stride = int(metadata["stride"])
        except Exception as error:  # onnxruntime has many kinds, none of them public
            raise UserError(f"{path}: not an ONNX detector with 'names' and 'stride' in its metadata "
                            f"({str(error)[:100]})") from None
        image = self.session.get_inputs()[0]
        self.input = image.name
        self.input_shape = tuple(n if isinstance(n, int) else 0 for n in image.shape)

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """(B, C, h, w) float -> (decoded (B, N, nc + 5), None)."""
        count = len(images)
        if 0 < count < self.input_shape[0]:  # the last batch of a data set
            images = torch.cat((images, images.new_zeros(self.input_shape[0] - count, *images.shape[1:])))
        if any(want and want != have for want, have in zip(self.input_shape, images.shape)):
            raise UserError(f"this ONNX model takes {self.input_shape} only, not {tuple(images.shape)}; "
                            "give these sizes, or export it with --dynamic")
        found = self.session.run(None, {self.input: np.ascontiguousarray(images.cpu().numpy())})[0]
        return torch.from_numpy(found)[:count], None


def onnx_latency(models: list[Model], imgsz: int, batch: int = 1, runs: int = 20) -> list[float] | None:
    """Median milliseconds per image of fused models under onnxruntime on the CPU, with as many threads as PyTorch has.

    The models are measured in turns. None where onnxruntime is not installed, or fails.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Spinning threads of one model would take time from the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    calls = []
    with tempfile.TemporaryDirectory() as folder:
        for i, model in enumerate(models):
            image = torch.rand(batch, model.yaml["ch"], imgsz, imgsz)
            try:
                write_onnx(model, image, path := Path(folder) / f"{i}.onnx")
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # a block of the user's that ONNX has no word for fails in many ways
                reason = (str(error) or type(error).__name__).splitlines()[0][:100]
                print(f"note: not measured under onnxruntime ({reason})")
                return None
            pixels = np.ascontiguousarray(image.numpy())
            calls.append(lambda session=session, pixels=pixels: session.run(None, {"images": pixels}))
    return [ms / batch for ms in medians(calls, runs)]


FORMAT = Format("onnx", ".onnx", write, OnnxDetector)
