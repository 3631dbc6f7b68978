"""Everything that a user can get wrong: what is given, what is said, the exit code.

None of the user's files changes.
"""
from __future__ import annotations

import gc
import importlib
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from models import checkpoint
from models.yolo import Model, fused
from tests.blocks import randomised
from tests.test_commands import digest
from utils.errors import run_cli

pytestmark = pytest.mark.slow
SMALL = "--imgsz 64 --batch-size 4 --workers 0 --device cpu"
TRAIN = f"train.py --data my.yaml --weights untrained.pt --epochs 1 --noplots {SMALL}"
SPARSITY = TRAIN.replace("train.py", "train_sparsity.py")
FINETUNE = TRAIN.replace("train.py", "finetune_pruned.py")
VAL = f"val.py --data my.yaml --weights untrained.pt --noplots {SMALL}"
PRUNE = f"prune.py --data my.yaml --weights untrained.pt {SMALL}"
DETECT = f"detect.py --weights untrained.pt --source my/images/val {SMALL.replace('--batch-size 4 --workers 0', '')}"


@pytest.fixture(scope="module")
def ready(tiny, cfg, tmp_path_factory) -> Path:
    """A user's folder: my/ with images and labels, my.yaml, untrained.pt, model.yaml."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(tiny.parent, folder / "my")
    (folder / "my" / tiny.name).unlink()
    (folder / "my.yaml").write_text("path: my\ntrain: images/train\nval: images/val\nnames: [square, circle]\n")
    shutil.copyfile(cfg, folder / "model.yaml")
    model = randomised(Model(str(cfg), nc=2, names={0: "square", 1: "circle"})).eval()
    checkpoint.save(folder / "untrained.pt", model, imgsz=64)
    return folder


def image(folder: Path) -> Path:
    return folder / "my/images/val/000.png"


def label(text: str | bytes) -> Callable[[Path], object]:
    """The first training image's labels become this."""
    def change(folder: Path) -> None:
        file = folder / "my/labels/train/001.txt"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def labels(text: str, split: str = "train") -> Callable[[Path], object]:
    """All label files of a split become this."""
    return lambda folder: [path.write_text(text) for path in (folder / "my/labels" / split).iterdir()]


def capitals(folder: Path) -> None:
    for name in ("images", "labels"):
        (folder / "my" / name).rename(folder / "my" / name.capitalize())
    (folder / "my.yaml").write_text("path: my\ntrain: Images/train\nval: Images/val\nnames: [square, circle]\n")


def data_yaml(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "my.yaml").write_text(text)


def model_yaml(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "model.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))

    return change


def bomb(folder: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    image(folder).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                              + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


def list_of_nothing(folder: Path) -> None:
    """The val images are a list whose only entry does not exist."""
    (folder / "my/val.txt").write_text("./a.png\n")
    (folder / "my.yaml").write_text("path: my\ntrain: images/train\nval: val.txt\nnames: [a, b]\n")


def cut_off(folder: Path) -> None:
    pixels = cv2.imread(str(image(folder)))
    whole = cv2.imencode(".jpg", pixels)[1].tobytes()
    image(folder).unlink()
    image(folder).with_suffix(".jpg").write_bytes(whole[:len(whole) // 2])


def resaved(**changes: object) -> Callable[[Path], object]:
    """untrained.pt with some of its entries changed."""
    def change(folder: Path) -> None:
        data = torch.load(folder / "untrained.pt", weights_only=True)
        torch.save({**data, **changes}, folder / "untrained.pt")

    return change


def truncated(folder: Path) -> None:
    file = folder / "untrained.pt"
    file.write_bytes(file.read_bytes()[:-5000])


def not_torch(folder: Path) -> None:
    with zipfile.ZipFile(folder / "untrained.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")


def fused_file(folder: Path) -> None:
    checkpoint.save(folder / "untrained.pt", fused(checkpoint.load(folder / "untrained.pt")), imgsz=64)


def nothing(folder: Path) -> None:
    """The mistake is in the command."""


# Name -> what is done to the user's folder, the command, what is said, the exit code.
CASES: dict[str, tuple[Callable[[Path], object], str, str, int]] = {
    # images
    "no such image folder": (
        lambda f: shutil.rmtree(f / "my/images/val"), VAL,
        "my/images/val does not exist; correct 'path:'", 2),
    "empty image folder": (
        lambda f: [p.unlink() for p in (f / "my/images/val").iterdir()], VAL,
        "my/images/val: no images there", 2),
    "all images broken": (
        lambda f: [p.write_text("x") for p in (f / "my/images/train").iterdir()], TRAIN,
        "none of the 12 images can be used", 2),
    "image of no bytes": (
        lambda f: image(f).write_bytes(b""), VAL,
        "1 unreadable images skipped", 0),
    "text called .png": (
        lambda f: image(f).write_text("hello"), VAL,
        "1 unreadable images skipped", 0),
    "image cut off": (
        cut_off, VAL,
        "1 unreadable images skipped", 0),
    "decompression bomb": (
        bomb, VAL,
        "1 unreadable images skipped", 0),
    "image of 5 pixels": (
        lambda f: cv2.imwrite(str(image(f)), np.zeros((5, 5, 3), np.uint8)), VAL,
        "1 images under 10 px skipped", 0),
    "16-bit image": (
        lambda f: cv2.imwrite(str(image(f)), np.full((72, 96), 40_000, np.uint16)), VAL,
        "", 0),
    "broken images in training": (
        lambda f: (f / "my/images/train/001.png").write_bytes(b"x"), TRAIN,
        "1 unreadable images skipped", 0),
    "link to nothing": (
        lambda f: (f / "my/images/val/link.png").symlink_to("nowhere.png"), VAL,
        "1 unreadable images skipped", 0),
    "folder called x.png": (
        lambda f: (f / "my/images/val/x.png").mkdir(), VAL,
        "", 0),
    "list of images that are not there": (
        list_of_nothing, VAL,
        "none of the 1 images can be used", 2),
    # labels
    "class too high": (
        label("7 .5 .5 .2 .2"), TRAIN,
        "001.txt: line 1: class 7, but the data yaml names 2 (0 to 1)", 2),
    "negative class": (
        label("-1 .5 .5 .2 .2"), TRAIN,
        "1 malformed rows skipped", 0),
    "half a class": (
        label("0.5 .5 .5 .2 .2"), TRAIN,
        "1 malformed rows skipped", 0),
    "words": (
        label("cat .5 .5 .2 .2"), TRAIN,
        "1 malformed rows skipped", 0),
    "four numbers": (
        label("0 .5 .5 .2"), TRAIN,
        "1 malformed rows skipped", 0),
    "NaN": (
        label("0 nan .5 .2 .2"), TRAIN,
        "1 malformed rows skipped", 0),
    "infinity": (
        label("0 .5 .5 inf .2"), TRAIN,
        "1 malformed rows skipped", 0),
    "pixels, not shares": (
        label("0 48 36 20 20"), TRAIN,
        "1 rows outside the image skipped (pixels? divide by its width and height)", 0),
    "over the edge": (
        label("0 .95 .5 .2 .2"), TRAIN,
        "1 boxes cut at the edge", 0),
    "no area": (
        label("0 .5 .5 0 .2"), TRAIN,
        "1 boxes dropped (no area in the image)", 0),
    "twice the same": (
        label("0 .5 .5 .2 .2\n0 .5 .5 .2 .2"), TRAIN,
        "1 duplicate rows removed", 0),
    "bytes": (
        label(bytes(range(256))), TRAIN,
        "1 label files skipped (no text; save them as UTF-8)", 0),
    "byte-order mark": (
        label("\ufeff0 .5 .5 .2 .2"), TRAIN,
        "", 0),
    "no labels at all": (
        lambda f: shutil.rmtree(f / "my/labels"), TRAIN,
        "images/train: no image has a usable label: there are no label files, looked for", 2),
    "all in pixels": (
        labels("0 40 40 90 90\n"), TRAIN,
        "12 rows outside the image skipped (pixels? divide by its width and height), e.g. line 1 of", 2),
    "six columns": (
        labels("0 .5 .5 .2 .2 .9\n"), SPARSITY,
        "12 malformed rows skipped, e.g. line 1 of", 2),
    "background alone": (
        labels(""), FINETUNE,
        "12 label files are empty, 0 are missing", 2),
    "nothing to slim for": (
        labels(""), f"slim.py --data my.yaml --weights untrained.pt --epochs 3 {SMALL}",
        "12 label files are empty, 0 are missing", 2),
    "val images without labels": (
        labels("", "val"), TRAIN,
        "images/val: no image has a usable label", 2),
    "val images without labels in val.py": (
        labels("", "val"), VAL,
        "images/val: no image has a usable label", 2),
    "predictions for images without labels": (
        labels("", "val"), f"{VAL} --save-json",
        "no image has a usable label", 0),
    "folders in capitals": (
        capitals, TRAIN,
        "train: 12 images, 12 boxes, 4 images without any", 0),
    "labels are a folder": (
        lambda f: ((f / "my/labels/train/001.txt").unlink(), (f / "my/labels/train/001.txt").mkdir()), TRAIN,
        "can't be read", 2),
    # data yaml
    "no data yaml": (
        lambda f: (f / "my.yaml").unlink(), VAL,
        "my.yaml: no such file", 2),
    "empty yaml": (
        data_yaml(""), VAL,
        "must be a mapping", 2),
    "yaml list": (
        data_yaml("- a\n- b\n"), VAL,
        "must be a mapping", 2),
    "yaml syntax": (
        data_yaml("names: [a\n"), VAL,
        "not a readable yaml", 2),
    "tab in yaml": (
        data_yaml("names:\n\t- a\n"), VAL,
        "not a readable yaml", 2),
    "python in yaml": (
        data_yaml("names: !!python/object/apply:os.system ['touch harm']\n"), VAL,
        "not a readable yaml", 2),
    "no names": (
        data_yaml("path: my\nval: images/val\n"), VAL,
        "needs 'names:'", 2),
    "nc is not the number of names": (
        data_yaml("path: my\nval: images/val\nnc: 3\nnames: [a, b]\n"), VAL,
        "says nc: 3 but names 2 classes", 2),
    "names with a gap": (
        data_yaml("path: my\nval: images/val\nnames: {0: a, 2: b}\n"), VAL,
        "without a gap", 2),
    "no splits": (
        data_yaml("path: my\nnames: [a, b]\n"), VAL,
        "has neither 'train:' nor 'val:'", 2),
    "no val": (
        data_yaml("path: my\ntrain: images/train\nnames: [a, b]\n"), TRAIN,
        "has no 'val:' entry", 2),
    "no test": (
        nothing, f"{VAL} --task test",
        "has no 'test:' entry", 2),
    "path is a number": (
        data_yaml("path: 3\nval: images/val\nnames: [a, b]\n"), VAL,
        "3/images/val does not exist; correct 'path:'", 2),
    "split is a number": (
        data_yaml("path: my\nval: 3\nnames: [a, b]\n"), VAL,
        "my/3 does not exist; correct 'path:'", 2),
    "split is a mapping": (
        data_yaml("path: my\nval: {a: b}\nnames: [a, b]\n"), VAL,
        "'val:' must be a folder", 2),
    "unknown defaults": (
        data_yaml("path: my\nval: images/val\nnames: [a, b]\ndefaults: {lr: 3}\n"), VAL,
        "defaults has unknown keys lr", 2),
    "other classes": (
        data_yaml("path: my\nval: images/val\nnames: [a, b, c]\n"), VAL,
        "my.yaml names 3; give the --data it was trained on", 2),
    # hyper-parameters
    "no hyp": (
        nothing, f"{TRAIN} --hyp none.yaml",
        "--hyp none.yaml: no such file", 2),
    "hyp is text": (
        lambda f: (f / "hyp.yaml").write_text("lr0: fast\n"), f"{TRAIN} --hyp hyp.yaml",
        "'lr0' must be a number", 2),
    "unknown hyp": (
        lambda f: (f / "hyp.yaml").write_text("lrO: 0.1\n"), f"{TRAIN} --hyp hyp.yaml",
        "unknown 'lrO'", 2),
    "negative rate": (
        lambda f: (f / "hyp.yaml").write_text("lr0: -0.1\n"), f"{TRAIN} --hyp hyp.yaml",
        "'lr0' must", 2),
    # model yaml
    "no model yaml": (
        nothing, f"{TRAIN} --cfg none.yaml",
        "--cfg none.yaml: no such file", 2),
    "model yaml without a head": (
        lambda f: (f / "model.yaml").write_text("nc: 2\n"), f"{TRAIN} --cfg model.yaml",
        "needs the keys", 2),
    "unknown block": (
        model_yaml(backbone=[[-1, 1, "Magic", [64, 3]]]), f"{TRAIN} --cfg model.yaml",
        "no block named 'Magic'", 2),
    "code in an argument": (
        model_yaml(backbone=[[-1, 1, "Conv", ["__import__('os').system('touch harm')", 3]]]),
        f"{TRAIN} --cfg model.yaml",
        "row 0 (Conv)", 2),
    "reads from a later layer": (
        model_yaml(backbone=[[5, 1, "Conv", [64, 3]]]), f"{TRAIN} --cfg model.yaml",
        "reads from layer 5", 2),
    "row that is no row": (
        model_yaml(backbone=["Conv"]), f"{TRAIN} --cfg model.yaml",
        "row 0", 2),
    "width is text": (
        model_yaml(width_multiple="wide"), f"{TRAIN} --cfg model.yaml",
        "width_multiple", 2),
    "anchors are text": (
        model_yaml(anchors="many"), f"{TRAIN} --cfg model.yaml",
        "anchors", 2),
    # checkpoints
    "no checkpoint": (
        nothing, VAL.replace("untrained.pt", "none.pt"),
        "none.pt: no such checkpoint", 2),
    "folder as checkpoint": (
        nothing, VAL.replace("untrained.pt", "my"),
        "my: is a folder", 2),
    "empty checkpoint": (
        lambda f: (f / "untrained.pt").write_bytes(b""), VAL,
        "not a PyTorch checkpoint, or cut off", 2),
    "text as checkpoint": (
        lambda f: (f / "untrained.pt").write_text("hello"), VAL,
        "not a PyTorch checkpoint", 2),
    "checkpoint cut off": (
        truncated, VAL,
        "not a PyTorch checkpoint, or cut off", 2),
    "another zip": (
        not_torch, VAL,
        "can't be read as a checkpoint", 2),
    "weights of another model": (
        resaved(state_dict={"model.0.bn.weight": torch.ones(3)}), VAL,
        "the weights do not fit the yaml inside", 2),
    "format of the future": (
        resaved(format="yolov5-slimming/9"), VAL,
        "update the repository", 2),
    "tensors only": (
        lambda f: torch.save({"a": torch.ones(3)}, f / "untrained.pt"), VAL,
        "holds no YOLOv5 model", 2),
    "yaml inside is broken": (
        resaved(yaml={"nc": 2}), VAL,
        "untrained.pt", 2),
    "fused for pruning": (
        fused_file, PRUNE,
        "from before fusing", 2),
    "nothing to resume": (
        nothing, "train.py --resume untrained.pt",
        "holds weights only, nothing to resume", 2),
    "no run to resume": (
        nothing, "train.py --resume",
        "--resume: no run under runs/train", 2),
    "wrong yaml for pruning": (
        nothing, f"{PRUNE} --cfg yolov5s.yaml",
        "leave --cfg out", 2),
    # flags
    "percent above 1": (
        nothing, f"{PRUNE} --percent 50",
        "--percent 50: must be at least 0 and below 1", 2),
    "percent below 0": (
        nothing, f"{PRUNE} --percent -0.1",
        "--percent -0.1: must be at least 0 and below 1", 2),
    "no number": (
        nothing, f"{PRUNE} --percent half",
        "--percent: invalid float", 2),
    "unknown flag": (
        nothing, f"{PRUNE} --percnt 0.5",
        "unrecognized arguments: --percnt", 2),
    "layer that is not there": (
        nothing, f"{PRUNE} --keep model.99.*",
        "no BatchNorm is called model.99.*", 2),
    "layer that is not trained": (
        nothing, f"{SPARSITY} --only head.*",
        "--only: no BatchNorm is called head.*", 2),
    "target above 1": (
        nothing, f"{PRUNE} --target flops=5",
        "--target flops=5: give params=0.5, flops=0.5", 2),
    "unknown target": (
        nothing, f"{PRUNE} --target speed=.5",
        "--target speed=.5: give params=0.5, flops=0.5", 2),
    "cut that can't be measured": (
        labels("", "val"), PRUNE,
        "label files are empty, 0 are missing; or cut without measuring: --noval", 2),
    "target out of reach": (
        nothing, f"{PRUNE} --noval --target params=0.001",
        "there is no smaller cut", 0),
    "share above 1": (
        nothing, f"{PRUNE} --min-share 2",
        "--min-share 2: must be at least 0 and at most 1", 2),
    "no channels": (
        nothing, f"{PRUNE} --min-channels 0",
        "--min-channels 0: must be at least 1", 2),
    "sweep of one number": (
        nothing, f"{PRUNE} --sweep 0.5",
        "--sweep 0.5: give first:last:step", 2),
    "sweep of too many": (
        nothing, f"{PRUNE} --sweep 0.1:0.9:1e-9",
        "--sweep 0.1:0.9:1e-9: give a larger step; at most 1000", 2),
    "sweep of steps of almost nothing": (
        nothing, f"{PRUNE} --sweep 0.1:0.9:5e-324",
        "--sweep 0.1:0.9:5e-324: give a larger step", 2),
    "sweep of no step": (
        nothing, f"{PRUNE} --sweep 0.1:0.9:nan",
        "--sweep 0.1:0.9:nan: give first:last:step", 2),
    "negative sr": (
        nothing, f"{SPARSITY} --sr -1",
        "--sr -1: must be at least 0", 2),
    "share of zeros in percent": (
        nothing, f"{SPARSITY} --target-sparsity 50",
        "--target-sparsity 50: must be above 0 and below 1", 2),
    "share that layers can't give": (
        nothing, f"{SPARSITY} --target-sparsity 0.97",
        "of the channels can go", 2),
    "blocks too large": (
        nothing, f"{SPARSITY} --target-sparsity 0.5 --round-to 512",
        "blocks of 512; give less, or a smaller --round-to", 2),
    "blocks of 0": (
        nothing, f"{SPARSITY} --target-sparsity 0.5 --round-to 0",
        "--round-to 0: must be at least 1", 2),
    "blocks under L1": (
        nothing, f"{SPARSITY} --sr 0.01 --round-to 8",
        "--round-to: has no effect without --target-sparsity or --target", 2),
    "no epochs": (
        nothing, f"{TRAIN} --epochs 0",
        "--epochs 0: must be at least 1", 2),
    "no images in a batch": (
        nothing, f"{TRAIN} --batch-size 0",
        "--batch-size 0: must be at least 1", 2),
    "images of 8 pixels": (
        nothing, f"{TRAIN} --imgsz 8",
        "--imgsz 8: must be at least 32", 2),
    "workers below 0": (
        nothing, f"{TRAIN} --workers -1",
        "--workers -1: must be at least 0", 2),
    "GPU that is not there": (
        nothing, f"{TRAIN} --device 77",
        "--device 77", 2),
    "two GPUs without torchrun": (
        nothing, f"{TRAIN} --device 0,1",
        "torchrun --nproc_per_node 2", 2),
    "layer 99 frozen": (
        nothing, f"{TRAIN} --freeze 99",
        "--freeze 99: the model has 25 layers, 0 to 24; give fewer", 2),
    "smoothing of 2": (
        nothing, f"{TRAIN} --label-smoothing 2",
        "--label-smoothing 2: must be at least 0 and below 1", 2),
    "half on a CPU": (
        nothing, f"{VAL} --half",
        "--half: a CPU computes in fp32; fp16 needs a GPU", 0),
    "no data for classes of one's own": (
        nothing, VAL.replace("--data my.yaml ", ""),
        "--data: untrained.pt does not say what it was trained on; give the data yaml of its 2 classes", 2),
    "no source for classes of one's own": (
        nothing, DETECT.replace("--source my/images/val ", ""),
        "--source: give an image, a folder, a video or a camera's number", 2),
    "an ensemble of other classes": (
        lambda f: checkpoint.save(f / "b.pt", Model(str(f / "model.yaml"), nc=3)),
        VAL.replace("untrained.pt", "untrained.pt b.pt"),
        "b.pt: knows 3 classes, untrained.pt 2; the models of an ensemble have the same classes", 2),
    "three sides": (
        nothing, DETECT.replace("--imgsz 64", "--imgsz 64 64 64"),
        "--imgsz 64 64 64: give the longest side, or height and width", 2),
    "confidence above 1": (
        nothing, f"{VAL} --conf-thres 25",
        "--conf-thres 25: must be at least 0 and at most 1", 2),
    "dense model fine-tuned": (
        nothing, FINETUNE,
        "nothing was cut from it yet", 0),
    # paths
    "project is a file": (
        lambda f: (f / "runs").write_text("x"), VAL,
        "runs/val/exp: can't be made", 2),
    "nothing to detect in": (
        nothing, DETECT.replace("my/images/val", "nowhere"),
        "--source nowhere: no such file, folder or pattern", 2),
    "folder without pictures": (
        nothing, DETECT.replace("my/images/val", "my/labels"),
        "no images or videos there", 2),
    "two ways to say how much": (
        nothing, f"{PRUNE} --percent 0.3 --target flops=0.5",
        "--target finds out how much to cut; leave one of the two out", 2),
    "two tables": (
        nothing, f"{PRUNE} --sweep 0.1:0.5:0.1 --sensitivity",
        "--sensitivity layer by layer; leave one of the two out", 2),
    "no detections": (
        nothing, f"{VAL} --max-det -1",
        "-1: must be at least 1", 2),
    "negative penalty": (
        nothing, f"{SPARSITY} --sr-bias nan",
        "nan: must be at least 0", 2),
    "all frozen": (
        nothing, f"{TRAIN} --freeze 25",
        "nothing is left to train; freeze fewer layers", 2),
    "no name": (
        nothing, f"{TRAIN} --name=",
        "--name: is empty", 2),
    "no metal": (
        nothing, TRAIN.replace("--device cpu", "--device mps"),
        "this PyTorch has no Metal here", 2),
    "no format of this precision": (
        nothing, f"benchmarks.py --data my.yaml --weights untrained.pt --include ncnn --precisions int8 {SMALL}",
        "none of these formats has one of these precisions here", 2),
    "export size": (
        nothing, "export.py --weights untrained.pt --imgsz 100",
        "multiples of 32", 2),
    "voc folder": (
        nothing, "data/scripts/voc_to_yolo.py --voc my --out out",
        "no Annotations/*.xml", 2),
}


def test_a_script_ends_without_a_last_garbage_collection():
    gc.unfreeze()
    try:
        run_cli(lambda: None)
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_in_one_line_and_nothing_of_the_user_changes(name, ready, tmp_path, monkeypatch, capsys):
    change, command, words, code = CASES[name]
    folder = tmp_path / "user"
    shutil.copytree(ready, folder)
    change(folder)
    before = digest(folder)
    monkeypatch.chdir(folder)
    script, *flags = command.split()
    monkeypatch.setattr("sys.argv", [script, *flags])
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    try:
        run_cli(lambda: main(flags) if "data/" not in script else main())
        found = 0
    except SystemExit as ended:
        found = ended.code
    said = capsys.readouterr()
    assert found == code, said.err[-2000:]
    assert words in said.out + said.err, said.out[-1500:] + said.err[-1500:]
    assert "Traceback" not in said.err and "harm" not in [p.name for p in folder.iterdir()]
    if code:
        assert said.err.count("\n") == 1 and said.err.startswith("error: "), said.err
    after = digest(folder)
    assert {k: v for k, v in after.items() if k in before} == before
    if code:
        assert not [p for p in (folder / "runs").rglob("*") if p.is_file()] if (folder / "runs").is_dir() else True
