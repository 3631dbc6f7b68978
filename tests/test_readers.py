"""Every reader of text, on any bytes, types and sizes: a result or a UserError, and soon."""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.scripts import coco_to_yolo, voc_to_yolo
from models.formats.format import FileDetector
from models.yolo import Model
from training.settings import read_hyp
from utils.data.coco import CocoResults
from utils.data.config import read_data
from utils.data.image_files import find_images, scan_image
from utils.data.sources import files, frames
from utils.errors import UserError
from utils.tables import read_results
from utils.text import read_yaml_mapping

SECONDS = 10
Reader = Callable[[Path], object]


def metadata(path: Path) -> None:
    """An export's, of which a detector is made; what it may raise is caught where the file is known."""
    content = read_yaml_mapping(path, "metadata")
    try:
        FileDetector(content, (1, *content["shape"][1:]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(str(error)) from None


def convert_coco(path: Path) -> None:
    flags = ["--json", f"train={path}", "--images", f"train={path.parent}", "--out", str(path.parent / "out")]
    coco_to_yolo.convert(coco_to_yolo.parse(flags))


def convert_voc(path: Path) -> None:
    flags = ["--xml", str(path.parent), "--images-dir", str(path.parent), "--out", str(path.parent / "out")]
    voc_to_yolo.convert(voc_to_yolo.parse([*flags, "--classes", "cat"]))


# File -> what reads it. image.jpg and good.jpg lie beside it.
READERS: dict[str, tuple[str, Reader]] = {
    "data yaml": ("a.yaml", read_data), "hyp": ("a.yaml", read_hyp), "model yaml": ("a.yaml", lambda path: Model(path)),
    "metadata": ("metadata.yaml", metadata), "results.csv": ("results.csv", read_results),
    "list": ("list.txt", find_images), "source": ("list.txt", lambda path: files(str(path))),
    "streams": ("a.streams", lambda path: list(frames(str(path)))),
    "label": ("image.txt", lambda path: scan_image(path.with_suffix(".jpg"), nc=3)),
    "COCO": ("a.json", convert_coco), "COCO truth": ("a.json", lambda path: CocoResults({0: "cat"}, path)),
    "VOC": ("image.xml", convert_voc)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, and a good annotation of one of them."""
    folder = tmp_path_factory.mktemp("readers") / "in"
    folder.mkdir()
    for name in ("image.jpg", "good.jpg"):
        Image.new("RGB", (40, 30)).save(folder / name)
    return folder


def read(folder: Path, kind: str, data: bytes) -> None:
    """Hand bytes to a reader. Any error but UserError fails the test, and so does more time than SECONDS."""
    name, reader = READERS[kind]
    (folder / name).write_bytes(data)
    if kind == "VOC":
        (folder / "good.xml").write_text("<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
                                         "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>")
    began = time.process_time()
    try:
        with suppress(UserError):  # of which run_cli() prints one line, test_text.py has that
            reader(folder / name)
    finally:
        for file in ("good.xml", name):
            (folder / file).unlink(missing_ok=True)
    assert time.process_time() - began < SECONDS


BOMB = "a: &a {k: [1, 2]}\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
                                       for a, b in zip("abcdefghij", "bcdefghijk"))
XML_BOMB = '<!DOCTYPE a [<!ENTITY b "cat">]><annotation><object><name>&b;</name></object></annotation>'
NASTY = {
    "nothing": b"", "a NUL": b"\0", "NULs": bytes(5000), "all bytes": bytes(range(256)), "a mark": b"\xff\xfe",
    "UTF-16": "train: .\nnames: [é]\n".encode("utf-16"), "GBK": "names: [鱼]".encode("gbk"),
    "JPEG": b"\xff\xd8\xff\xe0\0\x10",
    "brackets": b"[" * 3000, "braces": b'{"a":' * 3000, "closed brackets": b"[" * 5000 + b"]" * 5000,
    "a date": b"lr0: 2024-13-45\n", "5,000 digits": b"lr0: " + b"1" * 5000, "digits alone": b"9" * 5000,
    "a tag": b"names: !!int abc", "python": b"!!python/object/apply:os.system [ls]", "aliases": BOMB.encode(),
    "in itself": b"names: &a [*a]", "merges": b"a: &a {<<: [*a, *a]}", "a NUL escaped": b'path: "a\\0b"\nnames: [a]',
    "nobody's home": b"path: ~nosuchuser\ntrain: ~nosuchuser\nnames: [a]\n", "a long path": b"x" * 5000 + b".jpg",
    "many long paths": (b"x" * 300 + b".jpg\n") * 300, "a long line": b"1 " * 200_000,
    "many lines": b"0 .5 .5 .1 .1\n" * 20_000, "itself": b"list.txt\na.streams\nimage.jpg",
    "NaN": b"[NaN, Infinity]", "deep XML": b"<a>" * 20_000, "an entity": XML_BOMB.encode(),
    "punycode": b'<?xml version="1.0" encoding="punycode"?>' + b"zz9-" * 100_000,
    "a zip's encoding": b'<?xml version="1.0" encoding="zip"?><annotation/>'}


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("data", NASTY.values(), ids=NASTY)
def test_nasty_files(folder: Path, kind: str, data: bytes) -> None:
    read(folder, kind, data)


scalars = (st.none() | st.booleans() | st.integers(-3, 200) | st.integers() | st.floats() | st.text(max_size=12)
           | st.sampled_from([10**400, "~nosuchuser", "..", "C:\\a", "\ud800", "image.jpg", "1", "[[[", "cat", "a\nb"]))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.text(max_size=8) | st.integers(-1, 3), inner, max_size=4), max_leaves=12)


def holding(*keys: str, **known: st.SearchStrategy) -> st.SearchStrategy:
    """Mappings in which some of these keys hold anything, and others what they should."""
    return st.fixed_dictionaries({}, optional={**dict.fromkeys(keys, values), **known})


ids = st.sampled_from([1, "1", 1.0, 0, None, [1], {}])
images = st.lists(holding("width", "height", id=ids, file_name=st.just("image.jpg") | values), max_size=3)
annotations = st.lists(holding("bbox", "segmentation", "iscrowd", "area", image_id=ids, category_id=ids), max_size=4)
categories = st.lists(holding("supercategory", id=ids, name=st.just("cat") | values), max_size=2)
coco = holding(images=images | values, annotations=annotations | values, categories=categories | values)
TAGS = ("annotation", "object", "name", "bndbox", "xmin", "ymin", "xmax", "ymax", "size", "width", "height", "robndbox",
        "cx", "cy", "w", "h", "angle", "polygon", "x1", "y1", "x2", "y2", "pt", "x", "y", "difficult", "filename",
        "part")
elements = st.recursive(
    st.sampled_from(["", "cat", "1", "9", "nan", "1e999", "-3", "../x", "1" * 5000]),
    lambda inner: st.lists(st.tuples(st.sampled_from(TAGS), inner), max_size=5).map(
        lambda found: "".join(f"<{tag}>{text}</{tag}>" for tag, text in found)), max_leaves=25)
objects = st.lists(elements.map(lambda text: f"<object><name>cat</name>{text}</object>"), max_size=3).map("".join)
rows = st.lists(st.lists(scalars, max_size=6).map(lambda row: " ".join(map(str, row))), max_size=5).map("\n".join)
table = st.lists(st.lists(scalars, max_size=4).map(lambda row: ",".join(map(str, row))), max_size=5).map(
    lambda found: "epoch,a,b\n" + "\n".join(found))


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def as_yaml(*keys: str) -> st.SearchStrategy:
    return (holding(*keys) | values).map(lambda data: yaml.safe_dump(data, allow_unicode=True)).map(encoded)


def as_json(data: st.SearchStrategy) -> st.SearchStrategy:
    return data.map(json.dumps).map(encoded)


CONTENT = {
    "data yaml": as_yaml("path", "train", "val", "test", "names", "nc", "defaults"),
    "hyp": as_yaml("lr0", "momentum", "box", "hsv_h"), "model yaml": as_yaml("nc", "anchors", "backbone", "head"),
    "metadata": as_yaml("names", "stride", "shape", "imgsz", "precision"), "results.csv": table.map(encoded),
    "list": rows.map(encoded), "source": rows.map(encoded), "streams": st.just(b"gone.mp4"), "label": rows.map(encoded),
    "COCO": as_json(coco | values), "COCO truth": as_json(coco | values),
    "VOC": (objects | elements).map(lambda text: encoded(f"<annotation>{text}</annotation>"))}
noise = st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-16", "surrogatepass"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_content(folder: Path, kind: str, data: st.DataObject) -> None:
    content = data.draw(CONTENT[kind] | CONTENT[kind] | noise)
    if kind != "streams":  # a line of noise might be an address
        read(folder, kind, content)
