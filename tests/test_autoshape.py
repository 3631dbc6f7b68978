"""The Python API that YOLOv5's users know: torch.hub, AutoShape and its Detections."""
from __future__ import annotations

import ast
import io
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageShow

import detect
import hubconf
from models import checkpoint, formats
from models.autoshape import AutoShape, read_image
from models.inference import to_batch
from models.pruning import model_pruner
from models.yolo import Model
from utils.boxes import nms
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ("000000000009.jpg", "000000000036.jpg", "000000000030.jpg")  # 640 x 480, 481 x 640 and 640 x 428
# What ultralytics/yolov5 at 5081342f gives with its AutoShape: yolov5n.pt, size 640, its default conf and iou; xyxy in
# pixels, confidence, class. BATCH: the three photos in one call, so that all are letterboxed to 640 x 640.
BATCH = (
    [[378.971, 7.936, 627.489, 244.649, 0.503, 45], [246.35, 230.038, 578.989, 477.697, 0.478, 50],
     [63.766, 340.28, 335.359, 478.893, 0.32, 54]],
    [[179.509, 157.827, 458.663, 640.0, 0.685, 0], [6.127, 70.709, 437.771, 523.619, 0.347, 25]],
    [[241.832, 150.95, 399.079, 351.288, 0.485, 75], [196.088, 42.707, 464.653, 351.465, 0.427, 58]])
ALONE = (
    [[63.084, 342.281, 335.376, 479.207, 0.606, 54], [368.583, 0.0, 627.811, 237.516, 0.423, 45],
     [248.069, 213.731, 564.214, 480.0, 0.398, 50]],
    [[179.259, 158.154, 461.218, 640.0, 0.693, 0], [7.603, 76.792, 437.244, 517.397, 0.339, 25]],
    [[241.867, 151.295, 398.915, 351.233, 0.492, 75], [194.965, 41.977, 466.151, 353.248, 0.421, 58]])


def load(path: Path, **options) -> AutoShape:
    model = hubconf.custom(str(path), _verbose=False, device="cpu", **options)
    assert isinstance(model, AutoShape)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A checkpoint that finds something everywhere; what it finds depends on the image."""
    torch.manual_seed(0)
    model = Model("yolov5n.yaml", nc=2, names={0: "square", 1: "circle/ring"})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics are those of the next batch
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3))
        for head in model.detect.m:
            head.weight.mul_(3)
            head.bias.view(3, -1)[:, 4:] = 1.0
    path = tmp_path_factory.mktemp("weights") / "eager.pt"
    checkpoint.save(path, model.eval(), imgsz=64)
    return path


@pytest.fixture
def model(weights) -> AutoShape:
    found = load(weights)
    found.max_det = 5
    return found


@pytest.fixture
def photo(tiny) -> Path:
    return tiny.parent / "images/val/001.png"


def close(found: torch.Tensor, expected: list | torch.Tensor) -> bool:
    """Within a pixel and a hundredth of confidence; the same classes."""
    wanted = torch.as_tensor(expected)
    return found.shape == wanted.shape and bool(
        (found[:, :4] - wanted[:, :4]).abs().max() < 1 and (found[:, 4] - wanted[:, 4]).abs().max() < 0.01
        and torch.equal(found[:, 5], wanted[:, 5]))


# What it finds --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_boxes_are_those_of_stock_autoshape(assets):
    model = load(assets / "yolov5n.pt")
    photos = [assets / "coco128/images/train2017" / name for name in PHOTOS]
    results = model(photos)
    assert results.s == (3, 3, 640, 640) and model.names[45] == "bowl"
    assert results.files == list(PHOTOS) and len(results.t) == 3
    for found, batch, photo, alone in zip(results.xyxy, BATCH, photos, ALONE):
        assert close(found, batch)
        assert close(model(str(photo), size=640).xyxy[0], alone)
    assert str(results).startswith("image 1/3: 480x640 1 bowl, 1 broccoli, 1 donut\nimage 2/3: 640x481 1 person, 1 umb")


@pytest.mark.slow
def test_boxes_are_those_of_detect(model, weights, tiny, tmp_path):
    source = tiny.parent / "images/val"
    folder = detect.main(["--weights", str(weights), "--source", str(source), "--save-txt", "--save-conf", "--nosave",
                          "--max-det", "5", "--device", "cpu", "--project", str(tmp_path)])
    files = sorted(source.iterdir())
    results = model(files)
    for file, together in zip(files, results.xywhn):
        rows = torch.from_numpy(np.loadtxt(folder / "labels" / f"{file.stem}.txt", ndmin=2))
        alone = model(file).xywhn[0].double()
        assert len(rows) == 5
        assert torch.allclose(alone[:, [5, 0, 1, 2, 3, 4]], rows, atol=1e-5)
        assert torch.allclose(together, alone.float(), atol=1e-4)  # one shape: a batch changes rounding only


@pytest.mark.slow
def test_all_kinds_of_images_give_the_same_boxes(model, photo, site):
    bgr, data = cv2.imread(str(photo)), photo.read_bytes()
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    picture = Image.open(photo)
    expected = model(photo).xyxy[0]
    assert len(expected) == 5
    images = [str(photo), f"{site}/images/val/001.png?size=1", data, picture, picture.convert("RGBA"), bgr[..., ::-1],
              io.BytesIO(data), rgb, rgb.transpose(2, 0, 1), rgb.astype(np.float64), np.dstack([rgb, rgb[..., 0]])]
    for image in images:
        assert torch.equal(model(image).xyxy[0], expected)
    results = model(images)
    # A batch takes other kernels, whose rounding such random weights enlarge: a hundredth of a pixel.
    assert all(torch.allclose(found, expected, atol=1e-2) for found in results.xyxy)
    assert results.files[:5] == ["001.jpg", "001_1.jpg", "image2.jpg", "001_3.jpg", "image4.jpg"]
    grey = rgb[..., 1]
    assert torch.equal(model(grey).xyxy[0], model(np.dstack([grey] * 3)).xyxy[0])
    with open(photo, "rb") as file:
        results = model(file)
    assert torch.equal(results.xyxy[0], expected) and results.files == ["001.jpg"]
    assert not torch.equal(model(bgr).xyxy[0], expected)  # the order of the channels matters


def test_exif_rotation_is_applied_in_every_kind(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 20, 3), np.uint8).repeat(4, 0).repeat(4, 1))
    exif = image.getexif()
    exif[274] = 6
    image.save(path := tmp_path / "turned.jpg", exif=exif, quality=100)
    arrays = [read_image(source)[0].astype(int) for source in (path, path.read_bytes(), Image.open(path))]
    assert all(a.shape == (80, 32, 3) and abs(a - arrays[0]).mean() < 1 for a in arrays)


@pytest.mark.slow
def test_attributes_of_nms(model, photo):
    model.conf, model.max_det = 0.01, 1000
    everything = model(photo).xyxy[0]
    model.max_det = 3
    assert torch.equal(model(photo).xyxy[0], everything[:3])
    model.max_det, model.conf = 1000, float(everything[len(everything) // 2, 4])
    assert torch.equal(model(photo).xyxy[0], everything[everything[:, 4] > model.conf])
    model.classes = [1]
    ones = model(photo).xyxy[0]
    assert len(ones) > 0 and torch.equal(ones, everything[(everything[:, 4] > model.conf) & (everything[:, 5] == 1)])
    model.classes, model.iou = None, 0.9
    assert len(model(photo).xyxy[0]) > (everything[:, 4] > model.conf).sum()
    model.iou, model.agnostic = 0.45, True
    assert len(model(photo).xyxy[0]) < (everything[:, 4] > model.conf).sum()


@pytest.mark.slow
def test_size_and_augmentation(model, photo):
    assert model(photo).s == (1, 3, 64, 64) and model(photo, size=100).s == (1, 3, 96, 128)
    assert model(photo, size=128).s == model(photo, size=(64, 128), profile=True).s == (1, 3, 96, 128)
    model.amp = True  # on a CPU without effect, as in YOLOv5
    assert torch.equal(model(photo).xyxy[0], model(photo).xyxy[0])
    assert model(x := torch.rand(1, 3, 64, 64)).dtype == x.dtype
    assert not torch.equal(model(photo, augment=True).xyxy[0], model(photo).xyxy[0])
    x = torch.rand(2, 3, 64, 96)
    assert model(x).shape == (2, 3 * (8 * 12 + 4 * 6 + 2 * 3), 7)
    found = model(photo).xyxy[0]
    found[:, 4] = 0  # an ordinary tensor, which may be changed


@pytest.mark.slow
def test_a_tensor_gives_what_nms_takes(model, photo):
    x = to_batch([cv2.imread(str(photo))], 64, 32, False, torch.device("cpu"), torch.float32)
    found = nms(model(x), model.conf, model.iou, max_det=5)[0]
    assert torch.equal(found[:, 4:], model(photo).xyxy[0][:, 4:])


@pytest.mark.slow
def test_training_mode_changes_nothing(model, photo):
    expected, x = model(photo).xyxy[0], torch.rand(1, 3, 64, 64)
    decoded = model(x)
    for module in (model, model.model):
        module.train()
        assert torch.equal(model(photo).xyxy[0], expected) and torch.equal(model(x), decoded)


@pytest.mark.slow
@pytest.mark.parametrize("name, values", [
    ("conf", [-1, 2, float("nan"), "x", None]), ("iou", [-1, 2, float("nan"), None]), ("max_det", [0, -1, 1.5, None]),
    ("classes", [5, [99], [-1], "x", [0.5], [None]]),
    ("size", [0, -1, "64", 64.5, float("nan"), True, [], (64, 64, 64), 10**6])])
def test_settings_that_can_not_be_are_refused(model, photo, name, values):
    """Most found nothing, or looked at 32 pixels, and said nothing."""
    for value in values:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=rf"^(model\.)?{name}: "):
            if name == "size":
                model(photo, size=value)
            patch.setattr(model, name, value)
            model(photo)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (0, 3, 64, 64), (64, 64, 3)])
def test_a_tensor_that_is_no_batch_is_refused(model, shape):
    with pytest.raises(UserError, match=r"is no batch of images; give \(B, 3, H, W\)"):
        model(torch.zeros(shape))


@pytest.mark.slow
def test_what_is_no_model_and_no_image_is_refused(model):
    for path in (None, 5, [], b"best.pt"):
        with pytest.raises(UserError, match="is not the path of a model"):
            hubconf.custom(path)
    for classes in (0, -1, "x", 2.5):
        with pytest.raises(UserError, match="^classes: must be a whole number"):
            hubconf.yolov5n(pretrained=False, classes=classes)
    with pytest.raises(UserError, match="0 x 5 pixels is empty"):
        model(Image.new("RGB", (0, 5)))


@pytest.mark.slow
def test_pandas_twice_and_a_list_of_nothing(model, photo):
    assert [*model(photo).pandas().pandas().xyxy[0].columns][-1] == "name"
    assert model([]).tolist() == []


@pytest.mark.slow
def test_no_images(model):
    results = model([])
    assert len(results) == 0 and results.xyxy == [] and results.pandas().xyxy == [] and "(0, 3, 64, 64)" in str(results)


# Other formats --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_slim_checkpoints(weights, photo, tmp_path):
    slim = model_pruner(checkpoint.load(weights), 64).rank().cut(0.3).slim
    checkpoint.save(tmp_path / "slim.pt", slim, imgsz=64)
    model = load(tmp_path / "slim.pt")
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in load(weights).parameters())
    assert len(model(photo).xyxy[0]) > 0 and model(photo).names == {0: "square", 1: "circle/ring"}
    trainable = hubconf.custom(str(tmp_path / "slim.pt"), autoshape=False, device="cpu")
    assert isinstance(trainable, Model) and any(isinstance(m, torch.nn.BatchNorm2d) for m in trainable.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name, batch, dynamic", [("onnx", 1, False), ("onnx", 2, False), ("onnx", 1, True),
                                                  ("torchscript", 1, False)])
def test_exported_models(weights, model, tiny, tmp_path, name, batch, dynamic):
    pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")
    form = formats.formats()[name]
    path = tmp_path / f"model{form.suffix}"
    metadata = {"stride": 32, "names": model.names, "shape": [batch, 3, 64, 64]}
    form.write(checkpoint.load(weights), path, formats.ExportOptions(torch.rand(batch, 3, 64, 64), metadata, dynamic))
    exported = load(path)
    exported.max_det = 5
    images = [cv2.imread(str(file))[:, 12:84, ::-1] for file in sorted((tiny.parent / "images/val").iterdir())[:3]]
    for found, expected in zip(exported(images, size=64).xyxy, model(images).xyxy):  # square, as most runtimes want it
        assert close(found, expected)
    if not dynamic:
        assert exported(images).s == (3, 3, 64, 64)  # its size is taken from the file
    with pytest.raises(UserError, match="augment"):
        exported(images, augment=True)


# What the results offer -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_formats_of_boxes_and_iteration(model, photo):
    results = model([photo, cv2.imread(str(photo))])
    assert len(results) == results.n == 2 and results.files == ["001.jpg", "image1.jpg"]
    assert results.pred is results.xyxy
    x1, y1, x2, y2 = results.xyxy[1][:, :4].T
    assert torch.allclose(results.xywh[1][:, :4], torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1))
    sides = torch.tensor([96, 72, 96, 72])
    assert torch.allclose(results.xywhn[1][:, :4] * sides, results.xywh[1][:, :4])
    assert torch.allclose(results.xyxyn[1][:, :4] * sides, results.xyxy[1][:, :4])
    assert all(torch.equal(b[1][:, 4:], results.pred[1][:, 4:]) for b in (results.xywh, results.xywhn, results.xyxyn))
    for i, one in enumerate(results):
        assert len(one) == 1 and torch.equal(one.xyxy[0], results.xyxy[i]) and one.files == [results.files[i]]
        assert one.t == pytest.approx(results.t)
    assert results.imgs is results.ims and [t.t * 500 for t in results.times] == pytest.approx(results.t)  # 2 images


@pytest.mark.slow
def test_pandas(model, photo):
    pytest.importorskip("pandas")
    results = model(photo)
    tables = results.pandas()
    corners = ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    centres = ["xcenter", "ycenter", "width", "height", "confidence", "class", "name"]
    for key, columns in (("xyxy", corners), ("xyxyn", corners), ("xywh", centres), ("xywhn", centres)):
        table = getattr(tables, key)[0]
        assert list(table.columns) == columns
        assert np.allclose(table.iloc[:, :6].to_numpy(float), getattr(results, key)[0].numpy())
    assert table["class"].dtype == np.int64 and set(table.name) <= {"square", "circle/ring"}
    model.conf = 1.0
    empty = model(photo).pandas().xyxy[0]
    assert list(empty.columns) == corners and len(empty) == 0 and isinstance(results.xyxy[0], torch.Tensor)


@pytest.mark.slow
def test_pandas_is_not_needed_before(model, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        model(photo).pandas()


@pytest.mark.slow
def test_print_names_every_image(model, photo, capsys):
    model.conf, model.max_det = 0.0, 4
    results = model([photo, photo])
    results.print()
    first, second, speed = capsys.readouterr().out.splitlines()
    counts = [(results.pred[0][:, 5] == c).sum() for c in (0, 1)]
    listed = ", ".join(f"{n} {name}{'s' * (n > 1)}" for n, name in zip(counts, ("square", "circle/ring")) if n)
    assert first == f"image 1/2: 72x96 {listed}" and second.startswith("image 2/2")
    assert speed.startswith("Speed: ") and speed.endswith("ms NMS per image at shape (2, 3, 64, 64)")
    model.conf = 1.0
    assert "72x96 (no detections)" in str(model(photo))


@pytest.mark.slow
def test_save_render_and_show(model, photo, tmp_path, monkeypatch):
    results = model([photo, photo])
    before = results.ims[0].copy()
    results.save(save_dir=tmp_path / "exp")
    results.save(save_dir=tmp_path / "exp")
    results.save(labels=False, save_dir=tmp_path / "exp", exist_ok=True)
    for folder in ("exp", "exp2"):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ["001.jpg", "001_1.jpg"]
    assert np.array_equal(results.ims[0], before)
    shown: list = []
    monkeypatch.setattr(ImageShow, "show", lambda picture, title: bool(shown.append(np.array(picture)) or len(shown)))
    results.show()
    drawn = results.render()
    assert len(shown) == 2 and np.array_equal(shown[1], drawn[1]) and drawn is results.ims
    assert not np.array_equal(drawn[0], before)
    monkeypatch.setattr(ImageShow, "show", lambda picture, title: False)
    with pytest.raises(UserError, match=r"\.save\(\)"):
        results.show()


@pytest.mark.slow
def test_display_is_what_older_versions_have(model, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results = model(photo)
    before = results.ims[0].copy()
    assert results.display(pprint=True, save=True) is None and (tmp_path / "001.jpg").is_file()
    assert capsys.readouterr().out.startswith("image 1/1: 72x96 ") and np.array_equal(results.ims[0], before)
    assert len(results.display(crop=True, save=True, save_dir="x")) == 5 and list(Path("x/crops").rglob("*.jpg"))
    results.display(render=True, labels=False)
    assert not np.array_equal(results.ims[0], before)


@pytest.mark.slow
def test_hubconf_as_a_script(script, weights, tmp_path):
    done = script("hubconf.py", "--model", weights.with_suffix(""), cwd=tmp_path)
    assert "image 1/1: " in done.stdout and "Speed: " in done.stdout
    done = script("hubconf.py", "--model", "none", cwd=tmp_path, code=2)
    assert done.stderr == "error: none.pt: no such checkpoint\n"


@pytest.mark.slow
def test_crops(model, photo, tmp_path):
    image = cv2.imread(str(photo))
    results = model(photo)
    crops = results.crop(save_dir=tmp_path / "exp")
    written = sorted(p.relative_to(tmp_path / "exp/crops").as_posix() for p in tmp_path.rglob("*.jpg"))
    folders = [("square", "circle_ring")[int(crop["cls"])] for crop in crops]
    assert written == sorted(f"{folders[i]}/001_{i}.jpg" for i, crop in enumerate(crops) if crop["im"].size)
    assert len(written) > 2 and len(crops) == 5
    for crop, row in zip(crops, results.xyxy[0]):
        x1, y1, x2, y2 = row[:4].int().tolist()
        assert torch.equal(torch.stack(crop["box"]), row[:4]) and crop["conf"] == row[4] and crop["cls"] == row[5]
        assert crop["label"] == f"{results.names[int(row[5])]} {row[4]:.2f}"
        assert np.array_equal(crop["im"], image[y1:max(y2, y1 + 1), x1:max(x2, x1 + 1)])  # BGR
    assert len(results.crop(save=False, save_dir=tmp_path / "none")) == 5 and not (tmp_path / "none").exists()


# torch.hub ------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_hub_from_another_folder(weights, photo, tmp_path):
    """torch.hub takes the repository off sys.path after loading: nothing of it may be imported later."""
    code = f"""
import sys, torch
sys.path = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
model = torch.hub.load({str(ROOT)!r}, "custom", path={str(weights)!r}, source="local", device="cpu")
assert {str(ROOT)!r} not in sys.path
print(*sys.modules)
results = model([{str(photo)!r}, {str(photo)!r}], augment=True)
results.save()
results.crop()
results.render()
results.print()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loading, modules, *_, first, second, speed = done.stdout.splitlines()
    assert loading == f"{weights}: 2 classes, 64 px, on cpu" and first.startswith("image 1/2: 72x96 ")
    assert len(list(tmp_path.glob("runs/detect/exp/*.jpg"))) == 2 and list(tmp_path.glob("runs/detect/exp2/crops/*/*"))
    foreign = {root for name in modules.split() for root in top_level_imports(name)}
    assert foreign | {"torchvision"} == set(hubconf.dependencies)  # torchvision: NMS imports it when it runs


def top_level_imports(module: str) -> set[str]:
    """Packages of others that a module of the repository imports, but for those that it imports inside of functions."""
    if module.split(".")[0] not in ("models", "utils"):
        return set()
    base = ROOT / module.replace(".", "/")
    file = next(f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file())
    body = ast.parse(file.read_text(encoding="utf-8")).body
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"models", "utils"}


def test_hub_lists_the_models_only(capfd):
    sizes = [f"yolov5{size}{p6}" for size in "nsmlx" for p6 in ("", "6")]
    found = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert sorted(found) == sorted(["custom", *sizes]) and capfd.readouterr().out == ""


@pytest.mark.slow
def test_official_models(assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLO_WEIGHTS_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"yolov5n\.pt: can't be fetched") as error:
        hubconf.yolov5n(device="cpu")
    assert "\n" not in str(error.value)
    (tmp_path / "yolov5n.pt").symlink_to(assets / "yolov5n.pt")
    assert len(hubconf.yolov5n(_verbose=False, device="cpu").names) == 80
    mine = hubconf.yolov5n(channels=4, classes=7, device=torch.device("cpu"))
    official = checkpoint.load(assets / "yolov5n.pt")
    assert mine.detect.nc == 7 and mine.eval()(torch.rand(1, 4, 64, 64))[0].shape[2] == 12
    same = [torch.equal(v, official.state_dict()[k]) for k, v in mine.state_dict().items()]
    assert len(same) - sum(same) == 7  # the first layer's weight, and the head's three weights and biases
    assert hubconf.yolov5n(channels=4, device="cpu").names == official.names
    assert len(hubconf.custom("yolov5n", _verbose=False, device="cpu").names) == 80  # as in YOLOv5, .pt is added


@pytest.mark.parametrize("options", [{"pretrained": False}, {"pretrained": False, "classes": 3, "channels": 4}])
def test_a_model_that_is_to_be_trained_is_the_bare_one(options):
    model = hubconf.yolov5n(**options, device="cpu")
    assert isinstance(model, Model) and model.training and all(p.requires_grad for p in model.parameters())
    sum(level.sum() for level in model(torch.rand(2, options.get("channels", 3), 64, 64))).backward()
    assert model.model[0].conv.weight.grad.abs().sum() > 0 and len(model.names) == options.get("classes", 80)


# Mistakes -------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_mistakes_are_told_in_one_line(model, site, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "png")
    cases = [(tmp_path / "none.jpg", "none.jpg: .*No such file"), (str(tmp_path / "text.jpg"), "text.jpg: .*not an"),
             (tmp_path / "cut.png", "cut.png: "), (tmp_path, "not a file"),
             (f"{site}/none.jpg", f"{site}/none.jpg: can't be fetched"), (f"{site}/tiny.yaml", "yaml: .*not an im"),
             ("http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9/a.jpg: can't be fetched"), (b"abc", "image0: .*bytes"),
             (buffer.getvalue()[:200], "image0"), (None, "not NoneType"), (np.zeros((4, 5, 6, 7)), r"\(4, 5, 6, 7\)"),
             (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"), (np.zeros((20, 30, 7)), r"\(20, 30, 7\)")]
    for image, message in cases:
        for images in (image, [image]):
            with pytest.raises(UserError, match=message) as error:
                model(images)
            assert "\n" not in str(error.value)
    for path in ("none.pt", "none.onnx"):
        with pytest.raises(UserError, match=f"{path}: no such"):
            load(tmp_path / path)
