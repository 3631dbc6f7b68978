"""The VOC converter: every oddity of real annotations, on folders made for it, and BCCD as a whole."""
from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data.scripts import voc_to_yolo as voc
from data.scripts import yolo_layout
from utils.data.config import read_data
from utils.data.image_files import EXIF_ORIENTATION
from utils.errors import UserError

BOX = (11, 21, 30, 60)                                     # VOC counts from 1: pixels 10..30 x 20..60
ROW = "0 0.200000 0.500000 0.200000 0.500000\n"             # that box in an image of 100 x 80


def thing(box: tuple[object, ...] = BOX, name: str = "cat", extra: str = "") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def add(root: Path, stem: str, objects: str = thing(), size: str = "<size><width>100</width><height>80</height></size>",
        filename: str | None = None, suffix: str = ".jpg", exif: int = 0, xml: str | bytes | None = None) -> None:
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / stem).parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (80, 100) if exif in (6, 8) else (100, 80), (90, 120, 30))
    tags = Image.Exif()
    if exif:
        tags[EXIF_ORIENTATION] = exif
    image.save(root / "JPEGImages" / f"{stem}{suffix}", exif=tags)
    named = f"<filename>{stem + suffix if filename is None else filename}</filename>"
    text = f"<annotation>{named}{size}{objects}</annotation>" if xml is None else xml
    (root / "Annotations" / f"{stem}.xml").write_bytes(text if isinstance(text, bytes) else text.encode())


def lists(root: Path, **splits: str) -> None:
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for split, text in splits.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(text, encoding="utf-8")


def run(root: Path | list[Path], out: Path, *flags: object) -> str:
    roots = root if isinstance(root, list) else [root]
    return voc.convert(voc.parse(["--voc", *map(str, roots), "--out", str(out), *map(str, flags)]))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "VOC2007"


@pytest.fixture
def convert_one(folder: Path, tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """convert_one(objects, flags=[...], **keywords of add) -> (label file's text, report) of a single picture."""

    def convert(objects: str = thing(), flags: tuple[str, ...] = (), stem: str = "a",
                **keywords: Any) -> tuple[str, str]:
        add(folder, stem, objects, **keywords)
        add(folder, "z")  # without any box there is nothing to convert
        lists(folder, train=f"{stem}\nz\n")
        before = contents(folder)
        report = run(folder, tmp_path / "out", "--classes", "cat", "dog", *flags)
        assert contents(folder) == before
        return (tmp_path / "out" / "labels" / "train" / f"{stem}.txt").read_text(), report

    return convert


# ----------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize(("objects", "label", "counted"), [
    (thing(), ROW, ""),
    (thing(("11.0", " 21 ", "30.0", "60")), ROW, ""),
    (thing((10.5, 21, 30.5, 60)), "0 0.200000 0.500000 0.210000 0.500000\n", ""),
    (thing((0, 0, 100, 80)), "0 0.500000 0.500000 1.000000 1.000000\n", ""),
    (thing((1, 1, 100, 80)), "0 0.500000 0.500000 1.000000 1.000000\n", ""),
    (thing((-9, 41, 50, 90)), "0 0.250000 0.750000 0.500000 0.500000\n", "repaired: 1 x box cut at the image's edge"),
    (thing((30, 60, 11, 21)), ROW, "repaired: 1 x box with swapped corners"),
    (thing((30, 21, 30, 60)), "", "left out: 1 x box empty"),
    (thing((120, 21, 130, 60)), "", "left out: 1 x box outside the image"),
    (thing(("", 21, 30, 60)), "", "left out: 1 x box missing or not numeric"),
    (thing(("nan", 21, 30, 60)), "", "left out: 1 x box missing or not numeric"),
    (thing(("inf", 21, 30, 60)), "", "left out: 1 x box missing or not numeric"),
    ("<object><name>cat</name></object>", "", "left out: 1 x box missing or not numeric"),
    (thing(name=""), "", "left out: 1 x box without a class name"),
    (thing(name="\n cat \n"), ROW, ""),
    (thing() + thing(), ROW, "left out: 1 x box given twice"),
    (thing() + thing(name="dog"), ROW + "1" + ROW[1:], ""),
    (thing(name="cow"), "", "left out: 1 x object of class 'cow', not in --classes"),
    (thing(extra="<difficult>1</difficult>"), "", "left out: 1 x difficult object"),
    (thing(extra="<difficult>0</difficult>"), ROW, ""),
    (thing(extra=f"<part>{thing((1, 1, 5, 5), 'head')[8:-9]}</part>"), ROW, ""),
    ("<object><name>cat</name><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>", "",
     "left out: 1 x box missing or not numeric"),
    ("", "", ""),
])
def test_objects(convert_one: Callable[..., tuple[str, str]], objects: str, label: str, counted: str) -> None:
    text, report = convert_one(objects)
    assert text == label
    if counted:
        assert counted in report
    else:
        assert "repaired" not in report and "left out" not in report


def shape(inner: str) -> str:
    return f"<object><name>cat</name>{inner}</object>"


def points(*pairs: tuple[int, int]) -> str:
    return "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in enumerate(pairs, 1))


def rotated(angle: object) -> str:
    """A box of 40 x 20 around the middle of the picture."""
    return shape(f"<robndbox><cx>50</cx><cy>40</cy><w>40</w><h>20</h><angle>{angle}</angle></robndbox>")


CORNERS = ((10, 20), (30, 20), (30, 60), (10, 60))          # pixel edges: the box of ROW


@pytest.mark.parametrize(("objects", "label", "counted"), [
    (shape(f"<polygon>{points(*CORNERS)}</polygon>"), ROW, "1 x box missing, made from the polygon"),
    (shape("<polygon>" + "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in CORNERS) + "</polygon>"), ROW,
     "1 x box missing, made from the polygon"),
    (shape(f"<bndbox><xmin/></bndbox><polygon>{points(*CORNERS)}</polygon>"), "", "1 x box missing or not numeric"),
    (shape(f"<bndbox>{points(*CORNERS)}</bndbox>"), ROW, "1 x box missing, made from the polygon"),
    (thing()[:-9] + f"<polygon>{points((1, 1), (2, 2), (3, 1))}</polygon></object>", ROW, ""),   # its bndbox counts
    (shape(f"<polygon>{points((1, 1), (2, 1), (3, 1))}</polygon>"), "", "1 x box missing or not numeric"),
    (shape("<polygon><x1>nan</x1><y1>1</y1></polygon>"), "", "1 x box missing or not numeric"),
    (rotated(0), "0 0.500000 0.500000 0.400000 0.250000\n", "1 x box rotated, made upright around it"),
    (rotated(1.5707963), "0 0.500000 0.500000 0.200000 0.500000\n", "1 x box rotated, made upright around it"),
    (rotated(90), "0 0.500000 0.500000 0.200000 0.500000\n", "1 x box rotated, made upright around it"),
    (rotated("nan"), "", "1 x box missing or not numeric")])
def test_polygons_and_rotated_boxes(convert_one: Callable[..., tuple[str, str]], objects: str, label: str,
                                    counted: str) -> None:
    """They used to be left out, and so a whole set was converted without a box."""
    text, report = convert_one(objects)
    assert text == label
    assert counted in report if counted else "made" not in report


@pytest.mark.parametrize(("objects", "reason"), [
    (thing(extra="<difficult>1</difficult>") * 2, "difficult object, kept with --keep-difficult: 2"),
    (thing((30, 21, 30, 60)) + thing(name=""), "box empty: 1, box without a class name: 1"),
    ("<item/>", "the annotations hold none")])
def test_where_no_box_is_left_nothing_is_written(folder: Path, tmp_path: Path, objects: str, reason: str) -> None:
    add(folder, "a", objects)
    lists(folder, train="a\n")
    with pytest.raises(UserError) as error:
        run(folder, tmp_path / "out")
    assert str(error.value) == f"--voc: no box is left ({reason})" and not (tmp_path / "out").exists()
    add(folder, "b")
    lists(folder, val="b\n")
    with pytest.raises(UserError, match="--voc: train: no box is left"):
        run(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"object of class 'cat', not in --classes: 1"):
        run(folder, tmp_path / "out", "--splits", "val", "--classes", "dog")


@pytest.mark.parametrize(("head", "encoding"), [
    ('<?xml version="1.0" encoding="GB2312"?>', "gb2312"), ("<?xml version='1.0' encoding='big5'?>", "big5"),
    ('<?xml version="1.0" encoding="Shift_JIS"?>', "shift_jis"), ('<?xml version="1.0" encoding="utf-16"?>', "utf-16"),
    ('<?xml version="1.0" encoding="utf-16"?>', "utf-8"), ("", "utf-8-sig"), ("", "utf-16"),
    ('<?xml version="1.0" encoding="UTF-8" standalone="yes"?>', "utf-8")])
def test_encodings_of_xml(folder: Path, tmp_path: Path, head: str, encoding: str) -> None:
    """expat knows neither GB2312 nor Big5."""
    add(folder, "a", xml=f"{head}<annotation>{thing(name='中')}</annotation>".encode(encoding))
    lists(folder, train="a\n")
    run(folder, tmp_path / "out")
    assert read_data(tmp_path / "out/data.yaml").names == {0: "中"}


def test_a_list_in_utf16(folder: Path, tmp_path: Path) -> None:
    add(folder, "größe")
    lists(folder, train="")
    (folder / "ImageSets/Main/train.txt").write_text("größe\n", encoding="utf-16")
    run(folder, tmp_path / "out")
    assert os.listdir(tmp_path / "out/images/train") == ["größe.jpg"]


def test_difficult_objects_are_kept_on_demand(convert_one: Callable[..., tuple[str, str]]) -> None:
    assert convert_one(thing(extra="<difficult>1</difficult>"), ("--keep-difficult",))[0] == ROW


# ---------------------------------------------------------------------------------------------------- sizes and files


@pytest.mark.parametrize(("size", "counted"), [
    ("", "size missing"),
    ("<size/>", "size missing"),
    ("<size><width>0</width><height>0</height></size>", "size missing"),
    ("<size><width>80</width><height>100</height></size>", "size wrong"),
    ("<size><width>wide</width><height>80</height></size>", "size wrong"),
    ("<size><width>100.0</width><height>80.0</height></size>", ""),
])
def test_size_comes_from_the_image(convert_one: Callable[..., tuple[str, str]], size: str, counted: str) -> None:
    text, report = convert_one(size=size)
    assert text == ROW
    assert f"repaired: 1 x {counted} in the XML" in report if counted else "repaired" not in report


def test_boxes_of_an_image_that_was_scaled_since(convert_one: Callable[..., tuple[str, str]]) -> None:
    """They count the pixels that the XML states: the same corners of twice the size are half of it."""
    text, report = convert_one(size="<size><width>200</width><height>160</height></size>")
    assert [float(x) for x in text.split()] == pytest.approx([float(x) / 2 for x in ROW.split()])
    assert "repaired: 1 x image scaled after the XML was written, boxes with it" in report


UNUSABLE = [("200", "80"), ("", ""), ("0", "0"), ("0.5", "0.4"), ("nan", "nan"), ("inf", "inf")]


@pytest.mark.parametrize("stated", UNUSABLE)
def test_a_size_that_can_not_be_that_of_the_boxes(stated: tuple[str, str]) -> None:
    assert yolo_layout.size_of_boxes(stated, (100, 80)) == (100, 80)


@pytest.mark.parametrize("exif", [3, 6, 8])
def test_size_is_that_which_is_displayed(convert_one: Callable[..., tuple[str, str]], exif: int) -> None:
    text, report = convert_one(exif=exif)
    assert text == ROW
    assert "repaired" not in report


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png", ".PNG", ".bmp"])
def test_kinds_of_image(convert_one: Callable[..., tuple[str, str]], tmp_path: Path, suffix: str) -> None:
    assert convert_one(suffix=suffix)[0] == ROW
    assert (tmp_path / "out/images/train" / f"a{suffix}").is_file()


@pytest.mark.parametrize("stem", ["two words", "größe-図", "a#1", "a.b", "1", "cat 1", "100%"])
def test_odd_names(convert_one: Callable[..., tuple[str, str]], tmp_path: Path, stem: str) -> None:
    text, report = convert_one(stem=stem)
    assert text == ROW
    assert "left out" not in report
    data = read_data(tmp_path / "out/data.yaml")
    assert sorted(p.stem for p in data.train[0].iterdir()) == sorted([stem, "z"])


@pytest.mark.parametrize("filename", ["other.jpg", "C:\\pictures\\other.jpg", "a"])
def test_file_name_in_the_xml_differs(convert_one: Callable[..., tuple[str, str]], filename: str) -> None:
    text, report = convert_one(filename=filename)
    assert text == ROW
    assert "repaired: 1 x file name in the XML is another" in report


def test_file_name_in_the_xml_decides_where_the_stem_leaves_a_choice(folder: Path, tmp_path: Path) -> None:
    add(folder, "a", filename="a.png")
    Image.new("RGB", (50, 50)).save(folder / "JPEGImages/a.png")
    add(folder, "b", filename="IMG 7.jpg")
    (folder / "JPEGImages/b.jpg").rename(folder / "JPEGImages/IMG 7.jpg")
    lists(folder, train="a\nb\n")
    run(folder, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out/images/train")) == ["a.png", "b.jpg"]


BOMB = '<!DOCTYPE a [<!ENTITY b "cat">]><annotation><object><name>&b;</name></object></annotation>'


@pytest.mark.parametrize(("xml", "reason"), [
    ("<annotation><object>", "XML broken"),
    ("", "XML broken"),
    (b"\xff\xfe\x00nonsense", "XML not in the encoding"),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', "XML not in the encoding"),
    ('<?xml version="1.0" encoding="zip"?><annotation/>', "XML not in the encoding"),
    (f"<annotation>{thing(name='鱼')}</annotation>".encode("gbk"), "XML not in the encoding"),
    (BOMB, "XML with a DOCTYPE or entities"),
    (BOMB.encode("utf-16"), "XML with a DOCTYPE or entities"),
    ("<!doctype html><annotation/>", "XML with a DOCTYPE or entities"),
])
def test_unusable_xml_is_named_and_skipped(folder: Path, tmp_path: Path, xml: str | bytes, reason: str) -> None:
    add(folder, "bad", xml=xml)
    add(folder, "good")
    lists(folder, train="bad\ngood\n")
    report = run(folder, tmp_path / "out")
    assert f"left out: 1 x {reason}" in report
    assert "bad.xml" in report
    assert os.listdir(tmp_path / "out/labels/train") == ["good.txt"]


def test_missing_and_unreadable_files_are_counted(folder: Path, tmp_path: Path) -> None:
    for stem in ("good", "no image", "no xml", "broken"):
        add(folder, stem)
    (folder / "JPEGImages/no image.jpg").unlink()
    (folder / "Annotations/no xml.xml").unlink()
    (folder / "JPEGImages/broken.jpg").write_bytes(b"nothing")
    lists(folder, train="good\nno image\nno xml\nbroken\nneither\ngood\n")
    report = run(folder, tmp_path / "out")
    for reason in ("XML without image", "image without XML", "image unreadable", "name without image and XML",
                   "name listed twice"):
        assert f"left out: 1 x {reason}" in report
    assert os.listdir(tmp_path / "out/images/train") == ["good.jpg"]


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(("given", "flags", "expected", "val"), [
    ("train val trainval test", "", "train val test", "val"),
    ("train val trainval", "", "train val", "val"),
    ("trainval test", "", "trainval test", "test"),
    ("trainval val test", "", "trainval test", "test"),
    ("train test", "", "train test", "test"),
    ("train", "", "train", "train"),
    ("train val trainval test", "--splits trainval test", "trainval test", "test"),
    ("train val trainval test", "--splits test train", "train test", "test"),
])
def test_choice_of_splits(folder: Path, tmp_path: Path, given: str, flags: str, expected: str, val: str) -> None:
    members = {"train": "a\nb\n", "val": "c\n", "trainval": "a\nb\nc\n", "test": "d\n"}
    for stem in "abcd":
        add(folder, stem)
    lists(folder, **{split: members[split] for split in given.split()}, cat_train="a 1\nb -1\n", cat_val="c 1\n")
    run(folder, tmp_path / "out", *flags.split())
    assert sorted(os.listdir(tmp_path / "out/labels")) == sorted(expected.split())
    for split in expected.split():
        assert sorted(p.stem for p in (tmp_path / "out/images" / split).iterdir()) == members[split].split()
    text = (tmp_path / "out/data.yaml").read_text()
    assert yaml.safe_load(text)["val"] == f"images/{val}"
    assert ("there is no val split" in text) == (val != "val")


@pytest.mark.parametrize("line", ["a", "a 1", "a -1", "a  0", "a.jpg", "JPEGImages/a.jpg", "..\\JPEGImages\\a.jpg",
                                  "\ufeffa", " a\t"])
def test_forms_of_a_list(folder: Path, tmp_path: Path, line: str) -> None:
    add(folder, "a")
    lists(folder, train=f"{line}\n\n")
    run(folder, tmp_path / "out")
    assert os.listdir(tmp_path / "out/images/train") == ["a.jpg"]


@pytest.mark.parametrize(("flags", "message"), [
    ("--splits train trainval", "trainval is train and val together"),
    ("--splits train test", "test.txt"),
    ("--val-share 1", "--val-share"),
    ("--classes cat cat", "twice"),
])
def test_flags_that_make_no_sense(folder: Path, tmp_path: Path, flags: str, message: str) -> None:
    add(folder, "a")
    lists(folder, train="a\n", trainval="a\n")
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_class_lists", [False, True])
def test_without_lists_the_split_is_random_and_repeatable(folder: Path, tmp_path: Path, with_class_lists: bool) -> None:
    for i in range(20):
        add(folder, f"{i:02d}")
    if with_class_lists:
        lists(folder, cat_train="01 1\n")
    for name, flags in (("a", ()), ("b", ()), ("c", ("--seed", 1)), ("d", ("--val-share", 0.5))):
        run(folder, tmp_path / name, *flags)
    a, b, c, d = (sorted(os.listdir(tmp_path / name / "images/val")) for name in "abcd")
    assert a == b != c
    assert (len(a), len(c), len(d)) == (4, 4, 10)
    assert sorted(a + os.listdir(tmp_path / "a/images/train")) == [f"{i:02d}.jpg" for i in range(20)]


def test_several_folders_with_the_same_names(tmp_path: Path) -> None:
    roots = [tmp_path / "VOC2007", tmp_path / "VOC2012"]
    for root, box in zip(roots, (BOX, (1, 1, 100, 80))):
        add(root, "a", thing(box))
        lists(root, train="a\n")
    lists(roots[0], test="a\n")
    report = run(roots, tmp_path / "out", "--splits", "train", "test")
    assert sorted(os.listdir(tmp_path / "out/images/train")) == ["VOC2012_a.jpg", "a.jpg"]
    assert (tmp_path / "out/labels/train/a.txt").read_text() == ROW
    assert (tmp_path / "out/labels/train/VOC2012_a.txt").read_text() != ROW
    assert "repaired: 1 x image renamed, its name was taken" in report
    assert "left out: 1 x name listed twice" in report  # test's a is train's


def test_flat_folder(tmp_path: Path) -> None:
    add(tmp_path / "made", "a")
    add(tmp_path / "made", "b")
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (*(tmp_path / "made/JPEGImages").iterdir(), *(tmp_path / "made/Annotations").iterdir()):
        file.rename(flat / file.name)
    (flat / "._a.xml").write_bytes(b"\0")
    report = run(flat, tmp_path / "out")
    assert "left out" not in report
    assert len(list((tmp_path / "out").rglob("*.txt"))) == 2


# ------------------------------------------------------------------------------------------------------------- classes


def test_class_order(folder: Path, tmp_path: Path) -> None:
    add(folder, "a", "".join(thing(name=name) for name in reversed(voc.VOC_NAMES)))
    add(folder, "b", thing(name="Zebra") + thing(name="ape") + thing(name="yes", extra="<difficult>1</difficult>"))
    lists(folder, train="a\n", val="b\n")
    run(folder, tmp_path / "voc", "--splits", "train")
    assert tuple(read_data(tmp_path / "voc/data.yaml").names.values()) == voc.VOC_NAMES
    run(folder, tmp_path / "found", "--splits", "val")
    assert list(read_data(tmp_path / "found/data.yaml").names.values()) == ["Zebra", "ape", "yes"]
    report = run(folder, tmp_path / "asked", "--splits", "val", "--classes", "ape", "unicorn")
    assert (tmp_path / "asked/labels/val/b.txt").read_text() == ROW
    assert "note: no object of class 'unicorn' was found" in report


def test_no_class_at_all(folder: Path, tmp_path: Path) -> None:
    add(folder, "a", "")
    lists(folder, train="a\n")
    with pytest.raises(UserError, match=r"--voc: no box is left \(the annotations hold none\)"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("flag", ["--place", "--images"])
@pytest.mark.parametrize("how", ["copy", "link", "hardlink"])
def test_ways_to_place_images_never_write_into_the_input(folder: Path, tmp_path: Path, how: str, flag: str) -> None:
    add(folder, "a")
    lists(folder, train="a\n")
    before, out = contents(folder), tmp_path / "out"
    for way in (how, "copy", how):  # a copy over a link must not go through the link
        run(folder, out, flag, way)
        assert contents(folder) == before
        target = out / "images/train/a.jpg"
        assert target.read_bytes() == (folder / "JPEGImages/a.jpg").read_bytes()
        assert target.is_symlink() == (way == "link")
        assert target.samefile(folder / "JPEGImages/a.jpg") == (way != "copy")


def test_data_yaml_moves_with_its_folder(folder: Path, tmp_path: Path) -> None:
    add(folder, "a")
    lists(folder, train="a\n", val="a\n", test="a\n")
    run(folder, tmp_path / "one" / "out")
    (tmp_path / "one").rename(tmp_path / "two")
    data = read_data(tmp_path / "two/out/data.yaml")
    assert data.train == (tmp_path / "two/out/images/train",)
    run(folder, tmp_path / "one/apart", "--yaml", tmp_path / "one/configs/my set.yaml")
    assert read_data(tmp_path / "one/configs/my set.yaml").train == (tmp_path / "one/apart/images/train",)
    assert not (tmp_path / "one/apart/data.yaml").exists()
    (tmp_path / "one").rename(tmp_path / "three")
    assert read_data(tmp_path / "three/configs/my set.yaml").train == (tmp_path / "three/apart/images/train",)


def test_data_yaml_opens_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YOLOv5 resolves a relative path against its repository, ultralytics against a folder of data sets."""
    for stem in "abc":
        add(folder, stem)
    lists(folder, train="a\n", val="b\n", test="c\n")
    monkeypatch.chdir(tmp_path)
    run(folder, Path("out"))
    content = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    root = Path(content["path"])
    assert root.is_absolute() and content["names"] == {0: "cat"}
    for split in ("train", "val", "test"):
        assert (root / content[split]).resolve() == tmp_path / "out/images" / split


def test_second_call_removes_only_what_the_first_has_made(folder: Path, tmp_path: Path) -> None:
    for stem in "ab":
        add(folder, stem)
    lists(folder, train="a\nb\n")
    run(folder, tmp_path / "out")
    (tmp_path / "out/images/train/mine.jpg").write_bytes(b"mine")
    (tmp_path / "out/notes.txt").write_bytes(b"mine")
    lists(folder, train="b\n")
    run(folder, tmp_path / "out")
    left = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {yolo_layout.MARKER, "data.yaml", "notes.txt", "images/train/mine.jpg", "images/train/b.jpg",
                    "labels/train/b.txt"}


def test_a_list_of_files_that_leads_elsewhere_removes_nothing(folder: Path, tmp_path: Path) -> None:
    """The list in a folder that a stranger has made: by name, by a link, or as nonsense."""
    add(folder, "a")
    lists(folder, train="a\n")
    out, mine = tmp_path / "out", tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    (mine / "sub/thesis.txt").write_text("mine")
    (out / "images").mkdir(parents=True)
    (out / "images/link").symlink_to(mine)
    names = ["images/link/sub/thesis.txt", "images/../../mine/sub/thesis.txt", str(mine / "sub/thesis.txt"), "images"]
    (out / yolo_layout.MARKER).write_text(json.dumps({"files": names}))
    run(folder, out)
    assert (mine / "sub/thesis.txt").read_text() == "mine"
    for nonsense in ("[]", '{"files": [1]}', "[" * 9000, '{"files": 3}'):
        (out / yolo_layout.MARKER).write_text(nonsense)
        with pytest.raises(UserError, match="damaged|not readable"):
            run(folder, out)


def test_equal_names_of_the_greatest_length(tmp_path: Path) -> None:
    roots = [tmp_path / f"VOC{year}" for year in (2007, 2008, 2009)]
    for root in roots:
        add(root, "ä" * 125)
        lists(root, train="ä" * 125 + "\n")
    run(roots, tmp_path / "out")
    assert len(os.listdir(tmp_path / "out/images/train")) == len(os.listdir(tmp_path / "out/labels/train")) == 3


def test_foreign_output_is_refused(folder: Path, tmp_path: Path) -> None:
    add(folder, "a")
    lists(folder, train="a\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run(folder, out)
    assert os.listdir(out) == ["thesis.txt"]
    run(folder, out, "--exist-ok")
    assert (out / "thesis.txt").read_text() == "mine"
    (tmp_path / "my.yaml").write_text("names: [a]\n")
    with pytest.raises(UserError, match="my.yaml"):
        run(folder, tmp_path / "new", "--yaml", tmp_path / "my.yaml")
    assert not (tmp_path / "new").exists()


def test_output_may_not_overlap_with_the_input(folder: Path, tmp_path: Path) -> None:
    add(folder, "a")
    before = contents(folder)
    for out in (folder, folder / "yolo", tmp_path):
        with pytest.raises(UserError, match="overlaps"):
            run(folder, out, "--exist-ok")
    with pytest.raises(UserError, match="overlaps"):
        run(folder, tmp_path / "out", "--yaml", folder / "data.yaml")
    assert contents(folder) == before


@pytest.mark.slow
def test_command_line(folder: Path, tmp_path: Path, script: Callable) -> None:
    add(folder, "a")
    add(folder, "b")
    done = script("data/scripts/voc_to_yolo.py", "--voc", folder, "--out", tmp_path / "out", cwd=tmp_path)
    assert ["train", "1", "1"] in [line.split() for line in done.stdout.splitlines()]
    for flags in (["--voc", tmp_path / "nowhere"], ["--voc", tmp_path / "out"], ["--voc", folder, "--splits", "test"]):
        done = script("data/scripts/voc_to_yolo.py", *flags, "--out", tmp_path / "other", cwd=tmp_path, code=2)
        assert done.stderr.startswith("error: --") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------- BCCD


@pytest.mark.slow
def test_bccd(assets: Path, tmp_path: Path) -> None:
    source = assets / "bccd"
    stamps = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in source.rglob("*")}
    report = run(source, tmp_path / "out")
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in source.rglob("*")} == stamps
    sides = []
    for file in (source / "Annotations").iterdir():
        for item in ElementTree.parse(file).getroot().findall("object"):
            x1, y1, x2, y2 = (int(item.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
            sides.append((x2 - x1, y2 - y1))
    labels = {p: np.loadtxt(p, ndmin=2) for p in (tmp_path / "out/labels").rglob("*.txt")}
    rows = np.concatenate(list(labels.values()))
    assert len(rows) == sum(min(pair) > 0 for pair in sides) == 4886
    assert "left out: 2 x box empty" in report
    data = read_data(tmp_path / "out/data.yaml")
    assert list(data.names.values()) == ["Platelets", "RBC", "WBC"]
    assert [len(list(split[0].iterdir())) for split in (data.train, data.val, data.test)] == [205, 87, 72]
    assert (rows[:, 1:3] - rows[:, 3:] / 2 > -1e-5).all() and (rows[:, 1:3] + rows[:, 3:] / 2 < 1 + 1e-5).all()


def test_two_annotations_of_one_image_and_numbers_in_parts_of_it_are_counted(folder: Path, tmp_path: Path) -> None:
    for stem in ("a", "b", "z"):
        add(folder, stem, thing((.1, .1, .3, .4)) if stem == "z" else thing())
    for stem in ("c", "d"):
        add(folder, stem, filename="e.jpg")
        (folder / f"JPEGImages/{stem}.jpg").rename(folder / "JPEGImages/e.jpg")
    report = run(folder, tmp_path / "out")
    assert "1 x XML of an image that has another" in report and "1 x box within the first pixel" in report
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 4


@pytest.mark.parametrize(("stem", "filename"), [("a", "b.jpg"), ("a", "../../b.jpg"), ("c", "C:\\x\\b.jpg"),
                                                ("c", "b"), ("x/b", "b.jpg"), ("x/a", "b.jpg")])
def test_the_image_of_another_xml_is_not_taken(folder: Path, tmp_path: Path, stem: str, filename: str) -> None:
    """In the order of their names, the first XML used to get the other's image."""
    add(folder, "b", thing(name="dog"))
    add(folder, "z", thing(name="dog"))
    add(folder, stem, thing(name="cat"), filename=filename)
    (folder / f"JPEGImages/{stem}.jpg").unlink()
    report = run(folder, tmp_path / "out")
    assert "1 x XML without image (the one that fits belongs to another)" in report
    assert "cat" not in read_data(tmp_path / "out/data.yaml").names.values()
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.jpg")) == ["b.jpg", "z.jpg"]
