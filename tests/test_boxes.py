"""Box formats, overlap, letterboxing and NMS: parity with stock YOLOv5's values, then properties."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import nms as greedy_nms

from utils import boxes as B

NMS_CASES: dict[str, dict[str, Any]] = {
    "val": {"conf": 0.001, "iou": 0.6, "multi_label": True},
    "detect": {"conf": 0.25, "iou": 0.45},
    "agnostic": {"conf": 0.25, "iou": 0.45, "agnostic": True},
    "classes": {"conf": 0.25, "iou": 0.45, "classes": [0, 2]},
}


def random_boxes(n: int, seed: int = 0, size: float = 600) -> Tensor:
    """(n, 4) xywh in pixels."""
    rng = torch.Generator().manual_seed(seed)
    return torch.cat((torch.rand(n, 2, generator=rng) * size, torch.rand(n, 2, generator=rng) * size / 5 + 1), 1)


def random_predictions(batch: int, n: int, nc: int, seed: int = 0) -> Tensor:
    """(batch, n, nc + 5) decoded predictions."""
    rng = torch.Generator().manual_seed(seed)
    images = [torch.cat((random_boxes(n, seed + i), torch.rand(n, nc + 1, generator=rng)), 1) for i in range(batch)]
    return torch.stack(images)


# Parity

def test_overlap_equals_golden(golden: dict[str, np.ndarray]) -> None:
    a, b = torch.from_numpy(golden["boxes/a"]), torch.from_numpy(golden["boxes/b"])
    np.testing.assert_allclose(B.iou_xywh(a, b), golden["boxes/iou_xywh"], atol=1e-6)
    np.testing.assert_allclose(B.ciou(a, b), golden["boxes/ciou_xywh"], atol=1e-6)
    np.testing.assert_allclose(B.box_iou(B.xywh2xyxy(a), B.xywh2xyxy(b)).diag(), golden["boxes/iou_xywh"], atol=1e-5)


def test_letterbox_equals_golden(golden: dict[str, np.ndarray]) -> None:
    for h, w, size, auto, scale_up, out_h, out_w, *numbers in golden["letterbox/cases"]:
        image, ratio, pad = B.letterbox(np.zeros((int(h), int(w), 3), np.uint8), int(size), bool(auto), bool(scale_up))
        assert image.shape == (out_h, out_w, 3)
        np.testing.assert_allclose((*ratio, *pad), numbers, atol=1e-9)


def test_scale_boxes_equals_golden(golden: dict[str, np.ndarray]) -> None:
    args = golden["scale_boxes/args"].tolist()
    out = B.scale_boxes(args[:2], torch.from_numpy(golden["scale_boxes/in"]), args[2:])
    np.testing.assert_allclose(out, golden["scale_boxes/out"], atol=1e-4)


@pytest.mark.parametrize("case", NMS_CASES)
def test_nms_equals_golden(golden: dict[str, np.ndarray], case: str) -> None:
    pred = torch.from_numpy(golden["nms/pred"])
    for i, found in enumerate(B.nms(pred, **NMS_CASES[case])):
        np.testing.assert_allclose(found, golden[f"nms/{case}{i}"], atol=1e-6)


# Formats

@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_formats_are_inverse_and_leave_the_rest_alone(kind: str) -> None:
    xywh = torch.cat((random_boxes(50), torch.arange(100.0).view(50, 2)), 1).view(5, 10, 6)
    given: Any = xywh if kind == "torch" else xywh.numpy()
    before = xywh.numpy().copy()
    corners = B.xywh2xyxy(given)
    assert type(corners) is type(given) and corners.dtype == given.dtype and corners.shape == given.shape
    np.testing.assert_array_equal(given, before)
    np.testing.assert_array_equal(corners[..., 4:], before[..., 4:])
    np.testing.assert_allclose(B.xyxy2xywh(corners), before, atol=1e-4)
    assert B.xywh2xyxy(given[:0]).shape == given[:0].shape


def test_formats_keep_halves_of_whole_numbers() -> None:
    assert B.xywh2xyxy(np.array([[5, 5, 3, 3]])).tolist() == [[3.5, 3.5, 6.5, 6.5]]


# Overlap

def test_box_iou_is_symmetric_bounded_and_one_with_itself() -> None:
    a, b = B.xywh2xyxy(random_boxes(40)), B.xywh2xyxy(random_boxes(30, 1))
    iou = B.box_iou(a, b)
    assert iou.shape == (40, 30) and (iou >= 0).all() and (iou <= 1).all()
    torch.testing.assert_close(iou, B.box_iou(b, a).T)
    torch.testing.assert_close(B.box_iou(a, a).diag(), torch.ones(40))
    assert B.box_iou(a[:0], b).shape == (0, 30)
    points = torch.zeros(2, 4)
    assert (B.box_iou(points, points) == 0).all()


def test_box_iou_example() -> None:
    iou = B.box_iou(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 0, 15, 10], [20, 20, 30, 30]]))
    torch.testing.assert_close(iou, torch.tensor([[1 / 3, 0]]))


def test_ciou_is_at_most_iou_and_scale_free() -> None:
    a, b = random_boxes(500, size=100), random_boxes(500, 1, size=100)
    value = B.ciou(a, b)
    assert (value <= B.iou_xywh(a, b) + 1e-6).all() and (value > -1.5).all()
    torch.testing.assert_close(B.ciou(a * 7, b * 7), value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(B.ciou(a, a), torch.ones(500), atol=1e-4, rtol=0)  # float32 corners of 1 px boxes


def test_ciou_gradient_is_finite_for_degenerate_boxes() -> None:
    sides = torch.tensor([[0, 0], [0, 3], [3, 0], [3, 3], [1e-9, 1e-9], [1e6, 1e-6]])
    edge = torch.cat((torch.full_like(sides, 5), sides), 1)
    a = edge.repeat_interleave(len(edge), 0).requires_grad_()
    value = B.ciou(a, edge.repeat(len(edge), 1))
    (grad,) = torch.autograd.grad(value.sum(), a)
    assert value.isfinite().all() and grad.isfinite().all()


def test_ciou_gradient_holds_alpha_constant() -> None:
    a, b = random_boxes(20).double().requires_grad_(), (random_boxes(20) + 3).double()
    (grad,) = torch.autograd.grad(B.ciou(a, b).sum(), a)
    angle = torch.atan(a[:, 2] / a[:, 3]) - torch.atan(b[:, 2] / b[:, 3])
    v = 4 / torch.pi ** 2 * angle ** 2
    alpha = (v / (1 - B.iou_xywh(a, b) + v)).detach()
    low = torch.minimum(B.xywh2xyxy(a)[:, :2], B.xywh2xyxy(b)[:, :2])
    high = torch.maximum(B.xywh2xyxy(a)[:, 2:], B.xywh2xyxy(b)[:, 2:])
    penalty = ((a - b)[:, :2] ** 2).sum(1) / ((high - low) ** 2).sum(1)
    (expected,) = torch.autograd.grad((B.iou_xywh(a, b) - penalty - alpha * v).sum(), a)
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4)


# Letterbox and back

@pytest.mark.parametrize("scale_up", [True, False])
@pytest.mark.parametrize("auto", [True, False])
def test_letterbox_fills_the_shape(auto: bool, scale_up: bool) -> None:
    rng = np.random.default_rng(0)
    for h, w, size_h, size_w in rng.integers(20, 400, (30, 4)).tolist():
        size = (32 * (size_h // 32 + 1), 32 * (size_w // 32 + 1))
        geometry = B.letterbox_geometry((h, w), size, auto, scale_up)
        assert min(geometry.border) >= 0 and (scale_up or geometry.ratio <= 1)
        top, bottom, left, right = geometry.border
        shape = (geometry.size[0] + top + bottom, geometry.size[1] + left + right)
        assert 0 <= bottom - top <= 1 and 0 <= right - left <= 1
        if auto:
            assert all(side % 32 == 0 and side <= most for side, most in zip(shape, size))
        else:
            assert shape == size


def test_letterbox_pads_with_grey_and_leaves_its_input_alone() -> None:
    image = np.full((50, 100, 3), 200, np.uint8)
    out, _, (pad_w, pad_h) = B.letterbox(image, (100, 100))
    assert (pad_w, pad_h) == (0, 25) and (image == 200).all()
    assert (out[:25] == 114).all() and (out[25:75] == 200).all() and (out[75:] == 114).all()
    assert B.letterbox(np.zeros((1, 2000, 3), np.uint8), 64)[0].shape == (64, 64, 3)


def test_scale_boxes_inverts_letterbox() -> None:
    rng = np.random.default_rng(0)
    for h, w in rng.integers(40, 900, (30, 2)).tolist():
        geometry = B.letterbox_geometry((h, w), (320, 416))
        low, sides = torch.rand(2, 20, 2) * torch.tensor([w, h]) / 2
        boxes = torch.cat((low, low + sides, torch.rand(20, 2)), 1)
        pad = torch.tensor([*geometry.pad, *geometry.pad])
        moved = torch.cat((boxes[:, :4] * geometry.ratio + pad, boxes[:, 4:]), 1)
        before = moved.clone()
        for ratio_pad in (None, ((geometry.ratio, geometry.ratio), geometry.pad)):
            back = B.scale_boxes((320, 416), moved, (h, w), ratio_pad)
            assert (back - boxes).abs().max() * min(geometry.ratio, 1) < 1  # within a pixel of the letterbox
            assert torch.equal(back[:, 4:], boxes[:, 4:])
        assert torch.equal(moved, before)


def test_scale_boxes_clips_to_the_image() -> None:
    out = B.scale_boxes((100, 100), torch.tensor([[-50.0, -50, 500, 500, 0.5, 900]]), (50, 100))
    assert out.tolist() == [[0, 0, 100, 50, 0.5, 900]]
    assert B.scale_boxes((100, 100), torch.zeros(0, 6), (50, 100)).shape == (0, 6)


# NMS

@pytest.mark.parametrize("options", [*NMS_CASES.values(), {"conf": 0.1, "max_det": 7}], ids=[*NMS_CASES, "few"])
def test_nms_output_is_sorted_limited_and_survives_itself(options: dict) -> None:
    pred = random_predictions(2, 800, 4)
    before = pred.clone()
    for found in B.nms(pred, **options):
        assert found.shape[1] == 6 and 0 < len(found) <= options.get("max_det", 300)
        assert (found[:-1, 4] >= found[1:, 4]).all() and (found[:, 4] > options["conf"]).all()
        assert set(found[:, 5].tolist()) <= set(options.get("classes", range(4)))
        again = torch.cat((B.xyxy2xywh(found[:, :4]), found[:, 4:5], torch.eye(4)[found[:, 5].long()]), 1)
        torch.testing.assert_close(B.nms(again[None], **options)[0], found, atol=1e-4, rtol=0)
    assert torch.equal(pred, before)


@pytest.mark.parametrize("max_det", [5, 300, 5000])
@pytest.mark.parametrize("chunk", [1, 16, 100000])
def test_nms_in_chunks_equals_nms_at_once(monkeypatch: pytest.MonkeyPatch, chunk: int, max_det: int) -> None:
    monkeypatch.setattr(B, "FIRST_CHUNK", chunk)
    score = torch.rand(3000, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    corners = B.xywh2xyxy(random_boxes(3000, size=200))
    assert torch.equal(B._nms_first(corners, score, 0.4, max_det), greedy_nms(corners, score, 0.4)[:max_det])


def test_nms_in_threads_equals_nms_in_one() -> None:
    pred, before = random_predictions(9, 3000, 5), torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found[threads] = B.nms(pred, 0.001, 0.6, multi_label=True)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[1], found[3])) and len(found[1]) == 9


@pytest.mark.slow
def test_nms_uses_torchvisions_operator_without_its_package() -> None:
    program = """
import sys, torch
from utils.boxes import nms
pred = torch.rand(2, 500, 8, generator=torch.Generator().manual_seed(0))
nms(pred)
assert "torchvision" not in sys.modules, "imported"
import torchvision
boxes, scores = torch.rand(50, 4).cumsum(1), torch.rand(50)
assert torch.equal(torchvision.ops.nms(boxes, scores, 0.5), torch.ops.torchvision.nms(boxes, scores, 0.5))
"""
    root = Path(B.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_nms_looks_at_the_most_confident_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    pred = random_predictions(1, 500, 3)
    every = B.nms(pred, 0.01, 1.0, multi_label=True, max_det=5000)[0]
    monkeypatch.setattr(B, "MAX_CANDIDATES", 100)
    assert len(every) > 1000
    assert torch.equal(B.nms(pred, 0.01, 1.0, multi_label=True, max_det=5000)[0], every[:100])


def test_nms_keeps_the_first_of_equals() -> None:
    row = torch.tensor([50, 50, 10, 10, 1, 0.5])
    pred = torch.stack((row + torch.tensor([100.0, 0, 0, 0, 0, 0]), row, row + torch.tensor([1.0, 0, 0, 0, 0, 0])))
    assert B.nms(pred[None])[0][:, 0].tolist() == [145, 45]


def test_nms_of_one_class_and_of_nothing() -> None:
    pred = random_predictions(3, 60, 1)
    assert all(map(torch.equal, B.nms(pred, multi_label=True), B.nms(pred)))
    for empty in (pred[:, :0], pred * 0, pred * float("nan")):
        assert [f.shape for f in B.nms(empty)] == [(0, 6)] * 3
    assert B.nms(pred, classes=[])[0].shape == (0, 6)
    assert B.nms(pred, max_det=0)[0].shape == (0, 6)
    assert B.nms(pred.half())[0].dtype == torch.float32
