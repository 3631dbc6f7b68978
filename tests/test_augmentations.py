"""Augmentations: a box stays on its object, chance comes only from the generator, arguments stay untouched."""
from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from utils.data.augmentations import (
    FILL,
    Labelled,
    augment_hsv,
    flip_lr,
    flip_ud,
    mixup,
    mosaic,
    random_perspective,
    to_tensor_layout,
    worth_keeping,
)

NONE = np.zeros((0, 5), np.float32)
SHADES = (60, 110, 160, 210)  # blue of the four objects of a mosaic; green and red are 0 there and 114 elsewhere


def scene(box: tuple[int, int, int, int], height: int = 120, width: int = 160, shade: int = 255) -> Labelled:
    """A grey image with one blue rectangle (x1, y1, x2, y2), and its label."""
    image = np.full((height, width, 3), FILL, np.uint8)
    image[box[1]:box[3], box[0]:box[2]] = (shade, 0, 0)
    return image, np.array([[3, *box]], np.float32)


def extent(image: np.ndarray, shade: int | None = None) -> np.ndarray | None:
    """xyxy of the coloured pixels (of one shade of blue), or None."""
    found = image[..., 1] < (57 if shade is None else 25)
    if shade is not None:
        found &= np.abs(image[..., 0].astype(int) - shade) < 25
    ys, xs = np.nonzero(found)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) if len(xs) else None


def assert_hugs(box: np.ndarray, image: np.ndarray, shade: int | None = None) -> None:
    seen = extent(image, shade)
    assert seen is not None
    assert np.abs(box - seen).max() <= 2, f"box {box} but pixels {seen}"


@pytest.mark.parametrize("flip", [flip_lr, flip_ud])
def test_flip_moves_the_box_with_the_pixels_and_is_its_own_inverse(flip) -> None:
    image, labels = scene((20, 30, 70, 50))
    flipped, moved = flip(image, labels)
    assert (extent(flipped) == moved[0, 1:]).all() and not (moved == labels).all()
    again, back = flip(flipped, moved)
    assert (again == image).all() and (back == labels).all()


@pytest.mark.parametrize("gains", [{"scale": 0.5, "translate": 0.1}, {"degrees": 30.0}, {"shear": 10.0},
                                   {"perspective": 0.001},
                                   {"degrees": 20.0, "scale": 0.3, "shear": 5.0, "perspective": 0.0005}])
def test_box_hugs_its_object_under_every_map(gains: dict[str, Any]) -> None:
    image, labels = scene((60, 45, 100, 75))
    gains = {"translate": 0.0, "scale": 0.0, **gains}
    for seed in range(25):
        moved, boxes = random_perspective(image, labels, np.random.default_rng(seed), **gains)
        assert moved.shape == image.shape and boxes.shape == (1, 5) and boxes[0, 0] == 3
        assert_hugs(boxes[0, 1:], moved)


def test_box_is_cut_where_its_object_is_cut() -> None:
    image, labels = scene((0, 0, 80, 120))
    kept = 0
    for seed in range(40):
        moved, boxes = random_perspective(image, labels, np.random.default_rng(seed), translate=0.4, scale=0.2)
        if len(boxes):
            kept += 1
            assert_hugs(boxes[0, 1:], moved)
            assert (boxes[0, 1:] >= 0).all() and (boxes[0, 1:] <= [160, 120, 160, 120]).all()
    assert kept > 30


def test_no_gain_leaves_all_as_it_is() -> None:
    image, labels = scene((20, 30, 70, 50))
    moved, boxes = random_perspective(image, labels, np.random.default_rng(0), translate=0, scale=0)
    assert (moved == image).all() and np.allclose(boxes, labels)
    assert augment_hsv(image, np.random.default_rng(0), 0, 0, 0) is image


@pytest.mark.parametrize("before, after, keep", [
    ((10, 10), (10, 10), True), ((10, 10), (2, 10), False), ((3, 301), (3, 301), False), ((10, 10), (3, 3), False)])
def test_slivers_go(before: tuple[int, int], after: tuple[int, int], keep: bool) -> None:
    old, new = (np.array([[0, 0, *size]], np.float32) for size in (before, after))
    assert worth_keeping(old, new).tolist() == [keep]


def test_mosaic_boxes_hug_their_objects_before_and_after_the_warp() -> None:
    size, seen = 128, 0
    tiles = [scene((30, 20, 70, 60), 96, 128, s) for s in SHADES]
    for i, (_, rows) in enumerate(tiles):
        rows[:, 0] = i
    for seed in range(20):
        rng = np.random.default_rng(seed)
        canvas, labels = mosaic(tiles, rng, size)
        assert canvas.shape == (256, 256, 3) and labels.shape == (4, 5)
        warped, boxes = random_perspective(canvas, labels, rng, scale=0.3, border=(-size // 2, -size // 2))
        assert warped.shape == (size, size, 3)
        for picture, rows in ((canvas, labels[(labels[:, 3:] > labels[:, 1:3]).all(1)]), (warped, boxes)):
            for row in rows:
                seen += 1
                assert_hugs(row[1:], picture, SHADES[int(row[0])])
    assert seen > 80


def test_mosaic_tiles_meet_at_a_point_of_the_middle() -> None:
    tiles = [(np.full((64, 64, 3), value, np.uint8), NONE) for value in (10, 20, 30, 40)]
    for seed in range(10):
        canvas, labels = mosaic(tiles, np.random.default_rng(seed), 64)
        ys, xs = np.nonzero(canvas[..., 0] == 10)
        x, y = xs.max() + 1, ys.max() + 1
        assert 32 <= x <= 96 and 32 <= y <= 96
        assert canvas[y - 1:y + 1, x - 1:x + 1, 0].tolist() == [[10, 20], [30, 40]]
        assert set(np.unique(canvas)) <= {10, 20, 30, 40, FILL} and len(labels) == 0


def test_mixup_blends_about_half_and_keeps_both_labels() -> None:
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    one, two = scene((1, 1, 3, 3))[1], scene((4, 4, 7, 7))[1]
    blended, labels = mixup(black, one, white, two, np.random.default_rng(0))
    assert 64 < blended.mean() < 192 and len(np.unique(blended)) == 1
    assert (labels == np.concatenate((one, two))).all()


def test_hsv_keeps_grey_grey_and_changes_colours_within_the_gain() -> None:
    grey, colour = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), (40, 80, 120), np.uint8)
    values = [augment_hsv(grey, np.random.default_rng(seed), 0.015, 0.7, 0.4) for seed in range(20)]
    assert all(np.ptp(v) == 0 and 59 <= v[0, 0, 0] <= 140 for v in values)
    assert len({int(v[0, 0, 0]) for v in values}) > 10
    changed = [augment_hsv(colour, np.random.default_rng(seed), 0.0, 0.3, 0.3) for seed in range(20)]
    hues = [int(cv2.cvtColor(image, cv2.COLOR_BGR2HSV)[0, 0, 0]) for image in changed]
    assert max(hues) - min(hues) <= 2


def test_same_generator_same_result_and_arguments_untouched() -> None:
    image, labels = scene((20, 30, 70, 50))
    copy = image.copy(), labels.copy()

    def everything(seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        result = random_perspective(*mosaic([(image, labels)] * 4, rng, 160), rng, 10, 0.1, 0.5, 3, 0.0005, (-80, -80))
        result = mixup(*result, *random_perspective(image, labels, rng, border=(20, 0)), rng)
        return flip_lr(*flip_ud(augment_hsv(result[0], rng, 0.015, 0.7, 0.4), result[1]))

    first, second, other = everything(1), everything(1), everything(2)
    assert all((a == b).all() for a, b in zip(first, second)) and not (first[0] == other[0]).all()
    assert (image == copy[0]).all() and (labels == copy[1]).all()


def test_tensor_layout_is_contiguous_rgb() -> None:
    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    planes = to_tensor_layout(image)
    assert planes.shape == (3, 5, 7) and planes.flags["C_CONTIGUOUS"]
    assert (planes == image[..., ::-1].transpose(2, 0, 1)).all()
