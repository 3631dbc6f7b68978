"""The built-in detection set: images of circles, squares, triangles and stars, drawn here, so nothing is downloaded.

An image is a pure function of (seed, split, index). The objects vary in size, proportions, angle, colour and texture;
they cover one another, and clutter that belongs to no class covers them. As in photographs, a class has typical
colours, but not all of its objects have them: a detector has to learn outlines as well.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np
from tqdm import tqdm

from utils.boxes import xyxy2xywh
from utils.errors import UserError
from utils.files import exclusive, scratch
from utils.text import read_text

HUES: Mapping[str, float] = MappingProxyType({"circle": 0, "square": 120, "triangle": 240, "star": 60})  # degrees
NAMES = tuple(HUES)
COUNTS: Mapping[str, int] = MappingProxyType({"train": 400, "val": 120, "test": 120})
VERSION = 2            # of the images: raise it with every change that draws them differently
MARKER = "complete"    # the file that marks a finished set; it holds VERSION

WIDTH = (160, 224)     # pixels
HEIGHT = (120, 200)
SIZE = (0.18, 0.60)    # longer side of an object's box : shorter side of the image
EMPTY = 0.05           # share of images without objects
MOST_OBJECTS = 5
LEAST_VISIBLE = 0.4    # share of an object's area; an object that is covered more has no label
TYPICAL = 0.85         # share of objects in a colour typical of their class: within HUE_SPREAD of its hue
HUE_SPREAD = 35        # degrees
LEAST_CONTRAST = 70    # grey levels between an object and the background's mean, in the channel that differs most
FINER = 4              # sub-pixels per pixel and axis
JPEG_QUALITY = 95

Rng = np.random.Generator


def generate(root: Path, counts: Mapping[str, int] = COUNTS, seed: int = 0) -> None:
    """Draw the set into root/images/<split>/000001.jpg and root/labels/<split>/000001.txt, unless it is there already.

    The set is written beside `root` and then renamed, so it is whole or absent. Of processes that do this at the same
    time one draws and the others wait. UserError where `root` holds anything else; OSError where it can't be written.
    """
    root = Path(root).resolve()
    if _is_complete(root):
        return
    with exclusive(root), scratch(root) as folder:
        if _is_complete(root):
            return
        building = folder / root.name
        _write_splits(building, counts, seed)
        (building / MARKER).write_text(f"{VERSION}\n", encoding="utf-8")
        try:
            if root.is_dir():
                root.rmdir()  # Windows can't rename onto an existing folder, not even an empty one
            building.rename(root)
        except OSError:
            if not _is_complete(root):  # if it is, another process was faster: not every system has locks
                raise


def _is_complete(root: Path) -> bool:
    """Whether the set is at `root`: False where there is nothing yet, UserError where there is something else."""
    marker = root / MARKER
    if marker.is_file():
        version = read_text(marker).strip()
        if version != str(VERSION):
            raise UserError(f"{root}: drawn by another version of this program ({version or 'unknown'}, "
                            f"not {VERSION}); delete the folder and it is drawn anew")
        return True
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: holds something else than the built-in data set; move it away or delete it")
    return False


def _write_splits(folder: Path, counts: Mapping[str, int], seed: int) -> None:
    """Draw and write all images and labels."""
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    for kind in ("images", "labels"):
        for split in counts:
            (folder / kind / split).mkdir(parents=True)
    for split, index in tqdm(jobs, "drawing the built-in data set", delay=1.0, leave=False, disable=None):
        image, labels = draw(seed, split, index)
        _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        (folder / "images" / split / f"{index + 1:06d}.jpg").write_bytes(jpeg.tobytes())
        rows = "".join("{:.0f} {:.6f} {:.6f} {:.6f} {:.6f}\n".format(*row) for row in labels)
        (folder / "labels" / split / f"{index + 1:06d}.txt").write_bytes(rows.encode())  # bytes: \n on every system


# One image ------------------------------------------------------------------------------------------------------------

def draw(seed: int, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One image, uint8 (h, w, 3) BGR, and its labels, float32 (m, 5): class, xywh normalised; m <= MOST_OBJECTS.

    A box surrounds the part of the shape that lies in the image, whether something covers it or not.
    """
    rng = np.random.default_rng([seed, *split.encode(), 0, index])
    width, height = int(rng.integers(*WIDTH, endpoint=True)), int(rng.integers(*HEIGHT, endpoint=True))
    image = _background(rng, height, width)
    mean = image.mean((0, 1))
    owner = np.full((height, width), -1, np.int16)  # which object each pixel shows; -1 = none
    count = 0 if rng.random() < EMPTY else int(rng.integers(1, MOST_OBJECTS, endpoint=True))
    for _ in range(rng.integers(0, 4)):
        _clutter(rng, image, owner, mean)
    objects = []  # class, x1, y1, x2, y2, area
    for number in range(count):
        kind = int(rng.integers(len(NAMES)))
        points = _place(rng, outline(rng, kind), height, width)
        mask = mask_of(points, height, width)
        paint(rng, image, mask, mean, HUES[NAMES[kind]] if rng.random() < TYPICAL else None)
        owner[mask >= 128] = number
        objects.append((kind, *extent(mask), cv2.contourArea(points.astype(np.float32))))
    for _ in range(rng.integers(0, 3)):
        _clutter(rng, image, owner, mean)
    shown = [row[:5] for number, row in enumerate(objects) if (owner == number).sum() >= LEAST_VISIBLE * row[5]]
    labels = np.array(shown, np.float64).reshape(-1, 5)
    labels[:, 1:] = xyxy2xywh(labels[:, 1:] / (width, height, width, height))
    return _expose(rng, image), labels.astype(np.float32)


def outline(rng: Rng, kind: int) -> np.ndarray:
    """A shape of class `kind` at a random angle: float (n, 2) corners, box centred on 0, longer side 1."""
    if NAMES[kind] == "circle":
        angles, radii = np.arange(72) * (2 * np.pi / 72), np.ones(72)
    elif NAMES[kind] == "square":
        angles, radii = np.arange(4) * (np.pi / 2), np.ones(4)
    elif NAMES[kind] == "triangle":
        angles, radii = (np.arange(3) + rng.uniform(-0.12, 0.12, 3)) * (2 * np.pi / 3), np.ones(3)
    else:
        angles, radii = np.arange(10) * (np.pi / 5), np.tile((1, rng.uniform(0.36, 0.48)), 5)
    points = np.column_stack((np.cos(angles), np.sin(angles))) * radii[:, None]
    # A view from the side: one direction shrinks. For a square it is parallel to two sides, so it stays a rectangle.
    lean = np.pi / 4 if NAMES[kind] == "square" else rng.uniform(0, np.pi)
    points = points @ _rotation(lean) * (1, rng.uniform(0.78, 1)) @ _rotation(rng.uniform(0, 2 * np.pi))
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) / (high - low).max()


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _place(rng: Rng, points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale a unit outline and place it, with at most a fifth of its box outside the image: float (n, 2) pixels."""
    low, high = np.log(SIZE)
    points = points * (np.exp(rng.uniform(low, high)) * min(height, width))  # log-uniform: no size is preferred
    margin = 0.3 * np.ptp(points, axis=0)
    return points + rng.uniform(margin, (width, height) - margin)


def mask_of(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each pixel a polygon (n, 2), in pixels, covers: uint8 (height, width), 0..255, anti-aliased."""
    # Drawn larger and shrunk: OpenCV's own anti-aliasing spreads edges by half a pixel and sometimes by two.
    fine = np.zeros((height * FINER, width * FINER), np.uint8)
    # For OpenCV integers are pixel centres, here they are pixel edges. 4 bits of fraction.
    fixed = np.round((points * FINER - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(fine, [fixed], 255, cv2.LINE_8, 4)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box x1, y1, x2, y2 of the pixels that are at least half covered; zeros if there are none."""
    ys, xs = np.nonzero(mask >= 128)
    return (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(xs) else (0, 0, 0, 0)


# Colour and texture ---------------------------------------------------------------------------------------------------

def paint(rng: Rng, image: np.ndarray, mask: np.ndarray, mean: np.ndarray, hue: float | None = None) -> None:
    """Fill the masked part of a float (h, w, 3) image in place, plain or textured, in two colours unlike `mean`.

    The colours' hues are within HUE_SPREAD of `hue` (degrees), or any if that is None.
    """
    x, y, w, h = cv2.boundingRect(mask)  # of all pixels above 0, the anti-aliased rim included
    part, alpha = image[y:y + h, x:x + w], mask[y:y + h, x:x + w, None] / np.float32(255)
    first, second = _colour(rng, mean, hue), _colour(rng, mean, hue)
    blend = _texture(rng, h, w)[..., None]
    part += alpha * (first + blend * (second - first) - part)


def _colour(rng: Rng, mean: np.ndarray, hue: float | None) -> np.ndarray:
    """A random colour that contrasts with `mean`: BGR, float32 (3,), 0..255."""
    if hue is None:
        colours = rng.uniform(15, 240, (16, 3)).astype(np.float32)
    else:
        hues = (hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD, 16)) % 360
        hsv = np.column_stack((hues, rng.uniform(0.45, 1, 16), rng.uniform(0.35, 1, 16))).astype(np.float32)
        colours = 255 * cv2.cvtColor(hsv[None], cv2.COLOR_HSV2BGR)[0]
    contrast = np.abs(colours - mean).max(1)
    return colours[int(np.argmax(contrast >= LEAST_CONTRAST))]


def _texture(rng: Rng, height: int, width: int) -> np.ndarray:
    """The second colour's share in each pixel, float32 (height, width) 0..1: plain, noise, a gradient or stripes."""
    kind, strength = rng.integers(4), np.float32(rng.uniform(0.4, 1))
    if kind == 0:
        return np.zeros((height, width), np.float32)
    if kind == 1:
        return strength * _smooth_noise(rng, height, width, 3, 1)[..., 0].clip(-1, 1) / 2 + strength / 2
    angle = rng.uniform(0, np.pi)
    along = (np.arange(width) * np.cos(angle) + (np.arange(height) * np.sin(angle))[:, None]).astype(np.float32)
    if kind == 2:
        return strength * (along - along.min()) / max(float(np.ptp(along)), 1)
    period = rng.uniform(4, 12)  # pixels
    return strength * (np.sin(along * (2 * np.pi / period)) > 0).astype(np.float32)


def _smooth_noise(rng: Rng, height: int, width: int, cell: float, channels: int) -> np.ndarray:
    """Normal noise with spots about `cell` pixels wide: float32 (height, width, channels)."""
    coarse = rng.standard_normal((int(height / cell) + 2, int(width / cell) + 2, channels), np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def _background(rng: Rng, height: int, width: int) -> np.ndarray:
    """A cloudy, grainy background of a random colour: float32 (height, width, 3)."""
    image = np.broadcast_to(rng.uniform(30, 225, 3).astype(np.float32), (height, width, 3)).copy()
    image += rng.uniform(4, 22) * _smooth_noise(rng, height, width, rng.uniform(25, 70), 3)
    image += rng.uniform(0, 14) * _smooth_noise(rng, height, width, rng.uniform(3, 9), 1)
    return image


def _clutter(rng: Rng, image: np.ndarray, owner: np.ndarray, mean: np.ndarray) -> None:
    """Draw a bent line or an irregular blob in place. It belongs to no class and covers what is under it."""
    height, width = owner.shape
    side = min(height, width)
    centre = rng.uniform((0, 0), (width, height))
    if rng.random() < 0.6:
        mask = np.zeros((height, width), np.uint8)
        steps = np.cumsum(rng.normal(rng.normal(0, 1, 2), 0.5, (6, 2)), 0) * side * 0.15
        thickness = int(rng.integers(1, 4))
        cv2.polylines(mask, [np.round(centre + steps).astype(np.int32)], False, 255, thickness, cv2.LINE_AA)
    else:
        angles = np.arange(60) * (2 * np.pi / 60)
        phases = np.array([[2], [3], [4]]) * angles + rng.uniform(0, 7, (3, 1))
        waves = rng.uniform(0.15, 0.35, (3, 1)) * np.cos(phases)
        radii = (1 + waves.sum(0)).clip(0.15) * rng.uniform(0.05, 0.14) * side
        mask = mask_of(centre + np.column_stack((np.cos(angles), np.sin(angles))) * radii[:, None], height, width)
    if mask.any():
        paint(rng, image, mask, mean)
        owner[mask >= 128] = -1


def _expose(rng: Rng, image: np.ndarray) -> np.ndarray:
    """Blur, brightness and noise as of a camera: uint8 (h, w, 3)."""
    blurred = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9))
    lit = rng.uniform(0.55, 1.15) * blurred
    noisy = lit + rng.uniform(1, 7) * rng.standard_normal(image.shape, np.float32)
    return noisy.clip(0, 255).astype(np.uint8)
