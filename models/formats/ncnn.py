"""ncnn, for phones and small boards: a folder with model.ncnn.param, model.ncnn.bin and metadata.yaml, made by pnnx.

ncnn's tensors have at most 4 dimensions and no batch, so the head is decoded in another way than Detect's; the numbers
are the same. One image at a time, of one size. Packages: ncnn and pnnx.
"""
from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.formats.format import Decoded, ExportOptions, FileDetector, Format
from models.formats.torchscript import packed, without_warnings
from models.yolo import Detect, Model, fused
from utils.errors import UserError, first_line
from utils.files import atomic_folder, write_yaml
from utils.text import read_text, read_yaml_mapping

PARAM, BIN, METADATA = "model.ncnn.param", "model.ncnn.bin", "metadata.yaml"
WRONG = 0.1  # difference of confidences, or of boxes as a share of the image's side: rounding to fp16 stays far below


class FlatDetect(Detect):
    """Detect for images of one size and a batch of one, in tensors of at most three dimensions."""

    def __init__(self, head: Detect, height: int, width: int):
        widths = [int(conv.weight.shape[1]) for conv in head.m]  # type: ignore[union-attr, index, arg-type]
        super().__init__(head.nc, head.anchors.flatten(1).tolist(), widths)
        self.load_state_dict(head.state_dict())
        self.stride.copy_(head.stride)
        self.pixels: list[float] = head.stride.tolist()
        for level, stride in enumerate(self.pixels):
            cells = (torch.arange(side // int(stride)) for side in (height, width))
            rows, columns = torch.meshgrid(*cells, indexing="ij")
            corner = (torch.stack((columns, rows)).view(1, 2, -1) - 0.5) * stride
            self.register_buffer(f"corner{level}", corner)
            self.register_buffer(f"anchor{level}", (self.anchors[level] * stride * 4).unsqueeze(2))

    def forward(self, x: list[Tensor]) -> Any:
        """(decoded (1, N, no) with xywh in pixels,), as Detect does in eval mode."""
        decoded = [self.decode(head(x[level]), level) for level, head in enumerate(self.m)]
        return torch.cat(decoded, 1),

    def decode(self, raw: Tensor, level: int) -> Tensor:
        """(1, na*no, ny, nx) logits -> (1, na*ny*nx, no)."""
        y = raw.reshape(self.na, self.no, -1).sigmoid()
        xy = y[:, :2] * (2 * self.pixels[level]) + self.get_buffer(f"corner{level}")
        wh = y[:, 2:4] * y[:, 2:4] * self.get_buffer(f"anchor{level}")
        return torch.cat((xy, wh, y[:, 4:]), 1).permute(0, 2, 1).reshape(1, -1, self.no)


def write(model: Model, path: Path, options: ExportOptions) -> None:
    """Convert a model by pnnx. The folder is there whole or not at all.

    UserError where ncnn lacks an operation of the model, or computes something else.
    """
    FORMAT.need("--include ncnn")
    image, decoded = options.image[:1], Decoded(fused(model)).eval()
    with torch.no_grad():
        expected = decoded(image)
        decoded.model.model[-1] = FlatDetect(decoded.model.detect, *image.shape[2:])
        with without_warnings():
            traced = torch.jit.trace(decoded, image, strict=False)
    with tempfile.TemporaryDirectory() as scratch, atomic_folder(path) as new:
        _convert(traced, Path(scratch), list(image.shape), options.precision)
        for name in (PARAM, BIN):
            (new / name).write_bytes((Path(scratch) / name).read_bytes())
        write_yaml(new / METADATA, {**options.metadata, "shape": list(image.shape)})
        _compare(NcnnDetector(new, torch.device("cpu")), image, expected)


def _convert(traced: torch.jit.ScriptModule, folder: Path, shape: list[int], precision: str) -> None:
    """Write PARAM and BIN into `folder`, among other files that pnnx makes."""
    import pnnx

    (folder / "model.pt").write_bytes(packed(traced))
    size, half = ",".join(map(str, shape)), int(precision == "fp16")
    process = subprocess.run([pnnx.EXEC_PATH, "model.pt", f"inputshape=[{size}]", f"fp16={half}"], cwd=folder,
                             text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if process.returncode or not all((folder / name).is_file() for name in (PARAM, BIN)):
        text = " / ".join(process.stdout.strip().splitlines()[-3:])
        raise UserError(f"--include ncnn: pnnx can't convert this model (exit code {process.returncode}: "
                        f"{text[-200:]}); export onnx instead")
    kinds = {line.split()[0] for line in read_text(folder / PARAM).splitlines()[2:]}
    if unknown := sorted(kind for kind in kinds if not kind.isalnum()):  # pnnx leaves such names as PyTorch has them
        raise UserError(f"--include ncnn: ncnn has no {', '.join(unknown)}, which a block of this model needs; "
                        "export onnx instead")


def _compare(detector: NcnnDetector, image: Tensor, expected: Tensor) -> None:
    """UserError where the file computes something else than the model: pnnx has misunderstood a block."""
    actual = detector(image)[0]
    wrong = float("inf")
    if actual.shape == expected.shape:
        away = (actual - expected).abs()
        wrong = max(float(away[..., :4].max()) / max(image.shape[2:]), float(away[..., 4:].max()))
    if not wrong < WRONG:  # NaN, too
        raise UserError(f"--include ncnn: a block of this model computes something else there (by {wrong:.2g}); "
                        "export onnx instead")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what ncnn's C++ code prints on stderr: its return codes tell the same."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


class NcnnDetector(FileDetector):
    """A detector as ncnn's .param and .bin. It takes as many threads as PyTorch has."""

    def __init__(self, path: Path, device: torch.device):
        FORMAT.need(str(path))
        import ncnn

        folder = path.parent if path.is_file() else path
        param = path if path.is_file() else next(iter(sorted(folder.glob("*.param"))), folder / PARAM)
        for file in (param, weights := param.with_suffix(".bin"), folder / METADATA):
            if not file.is_file():
                raise UserError(f"{path}: has no {file.name}; export it again")
        metadata = read_yaml_mapping(folder / METADATA, "ncnn's metadata")
        try:
            super().__init__(metadata, (1, *metadata["shape"][1:]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / METADATA}: not that of a detector that export.py wrote "
                            f"({type(error).__name__}: {first_line(error, 100)})") from None
        self.net = ncnn.Net()
        self.net.opt.num_threads = torch.get_num_threads()
        if self.precision != "fp16":  # ncnn's default is fp16 wherever the processor has it
            for option in ("fp16_storage", "fp16_packed", "fp16_arithmetic", "bf16_storage"):
                setattr(self.net.opt, f"use_{option}", False)
        with _quiet():
            failed = self.net.load_param(str(param)) or self.net.load_model(str(weights))
        if failed or len(self.net.input_names()) != 1 or len(self.net.output_names()) != 1:
            raise UserError(f"{path}: ncnn can't read it; export it again")

    def run(self, images: np.ndarray) -> np.ndarray:
        import ncnn

        image = np.ascontiguousarray(images[0], dtype=np.float32)  # ncnn reads it where it lies, until extract() ends
        extractor = self.net.create_extractor()
        failed = extractor.input(self.net.input_names()[0], ncnn.Mat(image))
        code, decoded = extractor.extract(self.net.output_names()[0])
        if failed or code:
            raise UserError(f"{self.file}: ncnn can't run it (code {failed or code}); export it again")
        array = np.array(decoded)  # a copy: ncnn takes its memory back
        return array.reshape(1, -1, array.shape[-1])


FORMAT = Format("ncnn", "_ncnn_model", write, NcnnDetector, precisions=("fp32", "fp16"), packages=("ncnn", "pnnx"),
                content="*.param")
