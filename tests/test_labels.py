"""What the rows of label files mean: boxes, polygons, boxes with points, and what none of them is."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.data.dataset import DetectionDataset
from utils.data.image_files import label_path, label_reading
from utils.data.labels import MALFORMED, OUTSIDE, POINTS, POLYGONS, parse_labels, reading_of
from utils.errors import UserError

Row = Callable[[np.random.Generator], np.ndarray]


def text_of(values: np.ndarray) -> str:
    return "0 " + " ".join(f"{value:.6f}" for value in values)


def placed_box(rng: np.random.Generator, shape: float) -> np.ndarray:
    """x, y, w, h of an object anywhere, of 2 to 95 % of the image's height."""
    h = float(np.clip(np.exp(rng.normal(np.log(0.2), 0.9)), 0.02, 0.95))
    size = np.array([h * shape, h])
    return np.concatenate((rng.uniform(size / 2, 1 - size / 2), size))


def with_points(box: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The box and (n, 2) points, which are in shares of it."""
    return np.concatenate((box, (points * box[2:] + box[:2]).ravel()))


FACE = np.array([[-.17, -.12, 0], [.17, -.12, 0], [0, .05, .12], [-.13, .2, .02], [.13, .2, .02]])


def face(rng: np.random.Generator) -> np.ndarray:
    """Eyes, nose and corners of the mouth of a head that is turned in any way."""
    turns = np.eye(3)
    for axis, angle in enumerate(rng.normal(0, (0.2, 0.5, 0.2))):
        turn, (i, j) = np.eye(3), [k for k in range(3) if k != axis]
        turn[[i, j, i, j], [i, j, j, i]] = np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)
        turns = turn @ turns
    return with_points(placed_box(rng, 0.75), (FACE @ turns.T)[:, :2] * (1.4, 1.1) + rng.normal(0, 0.02, (5, 2)))


def webcam_face(rng: np.random.Generator) -> np.ndarray:
    """A large one in the middle of the image."""
    row, box = face(rng), np.array([0.5, 0.5, 0.4, 0.55]) + rng.normal(0, 0.05, 4)
    return with_points(box, (row[4:].reshape(-1, 2) - row[:2]) / row[2:4])


def hidden(rng: np.random.Generator) -> np.ndarray:
    row = face(rng)
    row[4 + 2 * rng.integers(5):][:2] = -1
    return row


def plate(rng: np.random.Generator) -> np.ndarray:
    """A number plate's corners."""
    corners = np.array([[-.48, -.4], [.48, -.4], [.48, .4], [-.48, .4]]) + rng.normal(0, 0.03, (4, 2))
    return with_points(placed_box(rng, 1) * (1, 1, 1, .4), corners.clip(-.5, .5))


def body(rng: np.random.Generator) -> np.ndarray:
    """17 joints, some of them not labelled."""
    row = with_points(placed_box(rng, 0.4), rng.uniform(-0.5, 0.5, (17, 2)))
    row[4:].reshape(-1, 2)[rng.random(17) < 0.2] = 0
    return row


def seen(row: Row, highest: int) -> Row:
    """The same with a visibility after each point."""
    def triples(rng: np.random.Generator) -> np.ndarray:
        values = row(rng)
        points = values[4:].reshape(-1, 2)
        visible = rng.integers(0, highest + 1, len(points))
        return np.concatenate((values[:4], np.column_stack((points, visible)).ravel()))

    return triples


def outline(rng: np.random.Generator) -> np.ndarray:
    """The outline of a mask of any shape, as a labelling tool writes it."""
    noise = cv2.GaussianBlur(rng.normal(0, 1, (100, 100)).astype(np.float32), (0, 0), rng.uniform(4, 14))
    mask = (noise > np.quantile(noise, rng.uniform(0.4, 0.9))).astype(np.uint8)
    found = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.approxPolyDP(max(found, key=cv2.contourArea), rng.uniform(0.3, 2), True)[:, 0].astype(float)


def rectangle(rng: np.random.Generator) -> np.ndarray:
    """A turned one."""
    angle, shape = rng.uniform(0, 6.3), (rng.uniform(0.1, 1), 1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * shape @ turn


def polygon(corners: Row, middle: bool = False) -> Row:
    """Such corners anywhere in an image, or in the middle of it; they begin at any and go round in any direction."""
    def row(rng: np.random.Generator) -> np.ndarray:
        shape = corners(rng)
        shape = np.roll(shape, rng.integers(len(shape)), 0)[::rng.choice([-1, 1])]
        shape = (shape - shape.min(0)) / np.ptp(shape, 0).max() * placed_box(rng, 1)[2]
        free = 1 - np.ptp(shape, 0)
        return (shape + (free / 2 if middle else rng.uniform(0, 1, 2) * free)).clip(0, 1).ravel()

    return row


WITH_POINTS: dict[str, Row] = {
    "faces": face, "faces, large": webcam_face, "faces, hidden": hidden, "plates": plate, "bodies": body,
    "bodies, seen": seen(body, 2), "faces, seen": seen(face, 1), "plates, seen": seen(plate, 1)}
OUTLINES: dict[str, Row] = {
    f"{name}{where}": polygon(corners, bool(where)) for where in ("", ", in the middle")
    for name, corners in (("outlines", outline), ("rectangles", rectangle))}
KINDS = [*((row, POINTS) for row in WITH_POINTS.values()), *((row, POLYGONS) for row in OUTLINES.values())]
NAMES = [*WITH_POINTS, *OUTLINES]


@pytest.mark.slow
@pytest.mark.parametrize("row, kind", KINDS, ids=NAMES)
def test_polygons_and_boxes_with_points_are_told_apart(row: Row, kind: str) -> None:
    """By themselves, but for a few; in a set, all of them."""
    rng = np.random.default_rng(0)
    rows = [row(rng) for _ in range(400)]
    texts = [text_of(values) for values in rows]
    alone = [parse_labels(text, Path())[1] for text in texts]
    assert sum(problems[kind] for problems in alone) >= 0.9 * len(rows)
    assert {reading_of(texts[i:i + 20]) for i in range(0, len(texts), 20)} == {kind}
    for values, text in zip(rows, texts):
        (found,), problems = parse_labels(text, Path(), reading=kind)
        assert problems[kind] == 1 and not problems[MALFORMED] + problems[OUTSIDE]
        if kind == POLYGONS:
            low, high = values.reshape(-1, 2).min(0), values.reshape(-1, 2).max(0)
            assert np.allclose(found[1:], [*(low + high) / 2, *high - low], atol=1e-5)
        else:
            assert np.allclose(found[1:], values[:4], atol=1e-5)


def test_a_set_tells_what_its_rows_are(tmp_path: Path) -> None:
    """A row that looks like a polygon, in a set of faces; the summary counts them."""
    rng = np.random.default_rng(1)
    doubtful = "0 .5 .5 .4 .45 .45 .42 .6 .4"
    assert parse_labels(doubtful, Path())[1] == {POLYGONS: 1}
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.zeros((20, 20, 3), np.uint8))
        (tmp_path / f"{i}.txt").write_text(text_of(face(rng)) if i else doubtful)
    dataset = DetectionDataset([tmp_path], 32)
    assert label_reading([str(path) for path in dataset.images]) == POINTS
    assert np.allclose(dataset.labels[0], [[0, .5, .5, .4, .45]])
    assert "6 boxes, 0 images without any; 6 boxes with points (the boxes are used)" in dataset.summary()


@pytest.mark.parametrize("row, box", [
    ("0 .5 .5 .2 .3 .45 .45 .55 .45 .5 .5 .46 .58", (.5, .5, .2, .3)),                    # 13 numbers
    ("0 .5 .5 .2 .3 .45 .45 .55 .45 .5 .5 .46 .58 .54 .58", (.5, .5, .2, .3)),            # 15
    ("0 .5 .5 .2 .3 .45 .45 2 .55 .45 2 .5 .5 1 .46 .58 0", (.5, .5, .2, .3)),            # 17
    ("0 .5 .5 .2 .3 -1 -1 -1 -1 -1 -1 -1 -1 -1 -1", (.5, .5, .2, .3)),
    ("0 .5 .5 .2 .3 0 0 0 0 0 0 0 0 0 0", (.5, .5, .2, .3)),
    ("0 .5 .5 .2 .3 .5 .5 .9", (.5, .5, .2, .3)),                                         # a confidence for visibility
    ("0 .1 .1 .5 .1 .5 .3", (.3, .2, .4, .2)),                                            # a triangle
    ("0 -.004 .1 .8 .1 .8 .3 .1 .3", (.4, .2, .8, .2)),                                   # slightly outside
    ("0 1.004 .5 .2 .2", (.952, .5, .096, .2)), ("0 .95 .5 .2 .2", (.925, .5, .15, .2))])
def test_rows_that_are_used(row: str, box: tuple[float, ...]) -> None:
    (found,), _ = parse_labels(row, Path())
    assert np.allclose(found, [0, *box], atol=1e-6)


@pytest.mark.parametrize("row, why", [
    ("0 40 40 100 100", OUTSIDE), ("0 320.5 1 2 .5", OUTSIDE), ("0 .5 .5 2 .5", OUTSIDE), ("0 -3 .5 .1 .1", OUTSIDE),
    ("0 10 10 80 10 80 30 10 30", OUTSIDE), ("0 .5 .5 .2 .2 300 400", OUTSIDE), ("0 1e300 1e300 .1 .1", OUTSIDE),
    ("0 .5 .5 .2 .3 .9", MALFORMED), ("0 .5 .5 .2 .3 .9 .9 .1 .1 .3", MALFORMED), ("0 .5 .5", MALFORMED),
    ("0 .5 .5 .2 .3 .9 .9 1", MALFORMED),  # the point is not in the box, and eight numbers are no polygon
    ("0,.5,.5,.2,.3", MALFORMED), ("cat .5 .5 .2 .3", MALFORMED), ("0 .5 .5 .2 .3 -1 .9 .9 -1", MALFORMED)])
def test_rows_that_are_refused(row: str, why: str) -> None:
    found, problems = parse_labels(f"{row}\n1 .5 .5 .1 .1", Path())
    assert found[:, 0].tolist() == [1] and problems == {why: 1}


# Where the labels are, and what they are written in ------------------------------------------------------------------

def one_image(folder: Path, images: str, labels: str, content: bytes = b"0 .5 .5 .2 .2\n") -> DetectionDataset:
    for name in (images, labels):
        (folder / name).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / images / "a.png"), np.zeros((20, 20, 3), np.uint8))
    (folder / labels / "a.txt").write_bytes(content)
    return DetectionDataset([folder / images], 32)


@pytest.mark.parametrize("images, labels", [
    ("Images", "Labels"), ("IMAGES/train", "labels/train"), ("images/train", "Labels/train"), ("photos", "photos"),
    ("images/a/Images", "images/a/LABELS"), ("Images/a", "Images/a")])
def test_folders_may_be_written_in_capitals(tmp_path: Path, images: str, labels: str) -> None:
    assert one_image(tmp_path, images, labels).labels.counts.tolist() == [1]


def test_the_usual_folder_comes_first(tmp_path: Path) -> None:
    for name in ("images", "labels", "Labels", "LABELS"):
        (tmp_path / name).mkdir()
    assert label_path(tmp_path / "images" / "a.jpg") == tmp_path / "labels" / "a.txt"
    assert label_path(tmp_path / "none" / "images" / "a.jpg") == tmp_path / "none" / "labels" / "a.txt"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_labels_may_be_in_any_unicode(tmp_path: Path, encoding: str) -> None:
    dataset = one_image(tmp_path, "images", "labels", "0 .5 .5 .2 .2\n1 .3 .3 .2 .2\n".encode(encoding))
    assert dataset.labels.counts.tolist() == [2] and not dataset.problems


# Nothing to learn from ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, why", [
    (b"", "1 label files are empty, 0 are missing"), (None, "there are no label files, looked for .*a.txt"),
    (b"0 40 40 90 90\n", r"1 rows outside the image .*pixels.*line 1 of .*labels.a.txt: 0 40 40 90 90;"),
    (b"0 .5 .5 .2 .2 .9\n0 9 9 9 9\n0 .5\n", "2 malformed rows skipped, e.g. line 1 of .*: 0 .5 .5 .2 .2 .9; a row is"),
    (b"0 .5 .5 0 .2\n", "1 boxes dropped .*line 1"), (b"\xff\xfe\xff\xff\xd8", "no text.*a.txt")])
def test_why_there_is_no_label_is_said(tmp_path: Path, content: bytes | None, why: str) -> None:
    dataset = one_image(tmp_path, "images", "labels", content or b"")
    if content is None:
        (tmp_path / "labels" / "a.txt").unlink()
        dataset = DetectionDataset([tmp_path / "images"], 32)
    with pytest.raises(UserError, match=f"images: no image has a usable label: .*{why}") as error:
        dataset.require_labels()
    assert "\n" not in str(error.value) and dataset.unlabelled in dataset.summary()
