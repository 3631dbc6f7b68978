"""What the VOC converter finds in folders as tools write them: labelImg, Kaggle, Roboflow, a whole VOCdevkit."""
from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from data.scripts import voc_to_yolo as voc
from tests.test_voc_to_yolo import BOX, ROW, add, lists, run, thing
from utils.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a set"


def moved(root: Path, **folders: str) -> None:
    """Rename the folders Annotations and JPEGImages of `root`; "." moves the files into `root` itself."""
    for name, to in ((name, to) for name, to in folders.items() if name != to):
        (root / to).mkdir(parents=True, exist_ok=True)
        for file in (root / name).iterdir():
            file.rename(root / to / file.name)
        (root / name).rmdir()


def converted(out: Path) -> dict[str, str]:
    """Label files: split/name -> text."""
    return {p.relative_to(out / "labels").with_suffix("").as_posix(): p.read_text()
            for p in (out / "labels").rglob("*.txt")}


@pytest.mark.parametrize(("annotations", "images"), [
    ("annotations", "images"), ("ANNOTATIONS", "Images"), ("labels", "JPEGImages"), ("xml", "img"), ("xmls", "."),
    (".", "images"), (".", "."), ("images", "images"), ("boxes of mine", "my photos"),
    ("data/Annotations", "data/images"), ("data/ann", "data/pics"), ("annotations/deep/er", "images/deep")])
def test_names_of_folders(folder: Path, tmp_path: Path, annotations: str, images: str) -> None:
    for stem in ("a", "b"):
        add(folder, stem, filename="IMG_0001.JPG")  # labelImg leaves the name that the picture had
    moved(folder, Annotations=annotations, JPEGImages=images)
    (folder / "classes.txt").write_text("cat\n")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.xml").write_text("")
    report = run(folder, tmp_path / "out")
    assert "left out" not in report and "repaired: 2 x file name in the XML is another" in report
    assert sorted(name[-1] for name in converted(tmp_path / "out")) == ["a", "b"]
    assert set(converted(tmp_path / "out").values()) == {ROW}


def test_pictures_of_a_segmentation_are_no_images(folder: Path, tmp_path: Path) -> None:
    add(folder, "a")
    (folder / "SegmentationClass").mkdir()
    Image.new("RGB", (100, 80)).save(folder / "SegmentationClass/a.png")
    lists(folder, train="a\n")
    assert "left out" not in run(folder, tmp_path / "out")
    assert os.listdir(tmp_path / "out/images/train") == ["a.jpg"]


def test_a_folder_for_each_split(tmp_path: Path) -> None:
    """As Roboflow exports VOC: train/, valid/ and test/ with XML and images together, here with equal names."""
    root = tmp_path / "export"
    for split, box in (("train", BOX), ("valid", (1, 1, 100, 80)), ("test", BOX)):
        add(root / split, "a", thing(box))
        moved(root / split, Annotations=".", JPEGImages=".")
    report = run(root, tmp_path / "out")
    found = converted(tmp_path / "out")
    assert "left out" not in report and set(found) == {"train/a", "val/a", "test/a"}
    assert found["train/a"] == ROW != found["val/a"]
    run(root, tmp_path / "one", "--splits", "test")
    assert set(converted(tmp_path / "one")) == {"test/a"}


def test_a_devkit_is_all_of_its_years(tmp_path: Path) -> None:
    kit = tmp_path / "VOCdevkit"
    for year in ("VOC2007", "VOC2012"):
        add(kit / year, "a")
        add(kit / year, "b")
        lists(kit / year, train="a\n", val="b\n")
    assert "left out" not in run(kit, tmp_path / "out")
    assert set(converted(tmp_path / "out")) == {"train/a", "train/VOC2012_a", "val/b", "val/VOC2012_b"}


@pytest.mark.parametrize("apart", [True, False])
def test_equal_names_in_subfolders_are_kept_apart(folder: Path, tmp_path: Path, apart: bool) -> None:
    for kind, box in (("cats", BOX), ("dogs", (1, 1, 100, 80))):
        add(folder / kind, "1", thing(box))
        if apart:
            (folder / "annotations" / kind).mkdir(parents=True)
            (folder / "images" / kind).mkdir(parents=True)
            (folder / kind / "Annotations/1.xml").rename(folder / "annotations" / kind / "1.xml")
            (folder / kind / "JPEGImages/1.jpg").rename(folder / "images" / kind / "1.jpg")
    report = run(folder, tmp_path / "out")
    assert "left out" not in report
    assert sorted(converted(tmp_path / "out").values()) == sorted([ROW, "0 0.500000 0.500000 1.000000 1.000000\n"])


def test_an_image_that_could_be_one_of_several_is_left_out(folder: Path, tmp_path: Path) -> None:
    add(folder, "a")
    add(folder, "b")
    moved(folder, JPEGImages="images/one")
    (folder / "images/two").mkdir()
    (folder / "images/two/a.jpg").write_bytes((folder / "images/one/a.jpg").read_bytes())
    report = run(folder, tmp_path / "out")
    assert "left out: 1 x several images fit the XML" in report and len(converted(tmp_path / "out")) == 1


def test_folders_given_by_name(tmp_path: Path) -> None:
    root = tmp_path / "a set"
    for stem in ("a", "b"):
        add(root, stem)
    moved(root, Annotations="boxes", JPEGImages="../elsewhere/photos")
    flags = ["--xml", root / "boxes", "--images-dir", tmp_path / "elsewhere/photos", "--images", "link"]
    voc.convert(voc.parse([*map(str, flags), "--out", str(tmp_path / "out")]))
    assert set(converted(tmp_path / "out").values()) == {ROW}
    assert all(p.is_symlink() for p in (tmp_path / "out/images").rglob("*.jpg"))
    lists(root, train="a\n", val="b\n")  # lists come from --voc
    run(root, tmp_path / "listed", *flags)
    assert set(converted(tmp_path / "listed")) == {"train/a", "val/b"}
    beside = tmp_path / "elsewhere" / "more"
    for words, more in (("no such folder", ["--xml", tmp_path / "none", "--images-dir", root]),
                        ("--voc", []), ("one --voc", ["--voc", root, beside, "--xml", root / "boxes"]),
                        ("overlaps", ["--xml", root / "boxes", "--images-dir", tmp_path])):
        beside.mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match=words):
            voc.convert(voc.parse([*map(str, more), "--out", str(tmp_path / "new")]))


@pytest.mark.parametrize("years", [("",), ("VOC2007", "VOC2012")])
def test_loops_of_links_and_pipes_change_nothing(folder: Path, tmp_path: Path, years: tuple[str, ...]) -> None:
    for year in years:
        for stem in ("a", "b"):
            add(folder / year, f"{stem}{year}")
        for inside in (folder / year, folder / year / "Annotations", folder / year / "JPEGImages"):
            (inside / "loop").symlink_to(".")
            (inside / "loop too").symlink_to(inside)
        os.mkfifo(folder / year / "Annotations" / f"pipe{year}.xml")
        os.mkfifo(folder / year / "JPEGImages" / f"pipe{year}.jpg")
    (folder / "again").symlink_to(years[0] or ".")
    report = run(folder, tmp_path / "out")
    assert "left out" not in report and len(converted(tmp_path / "out")) == 2 * len(years)
