"""slim.py: killed and out of disk on its way, to every kind of target; what is refused at the start."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import slim
from models import checkpoint
from models.yolo import Model
from slim import pipeline_parser
from tests import crash
from tests.blocks import randomised
from tests.test_crash import run_with
from training.pipeline import Pipeline, Settings, known_pipeline
from utils.errors import UserError
from utils.slimming.cost import profile
from utils.slimming.targets import TARGETS, Target

WHERE = ("torch", "onnxruntime int8")


@pytest.fixture(scope="module")
def flags(tiny, cfg) -> list[str]:
    """Three epochs of training, six of sparsity."""
    return ["--data", str(tiny), "--weights", "", "--cfg", str(cfg), "--epochs", "9", "--imgsz", "64",
            "--batch-size", "4", "--nbs", "4", "--workers", "0", "--device", "cpu", "--noplots", "--adam",
            "--target", "flops=0.6"]


@pytest.fixture
def quick(monkeypatch, tmp_path) -> None:
    """In an empty folder, without measuring milliseconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slim, "milliseconds", lambda models, *_: {f"{where}, batch 1": [2.0, 1.0] for where in WHERE})


def share_left(pipeline: Path, figure: str) -> float:
    """Of slim.pt, of the dense model."""
    model = checkpoint.load(pipeline / "slim.pt")
    return getattr(profile(model, 64), figure) / getattr(profile(Model(model.yaml), 64), figure)


@pytest.mark.slow
def test_disturbed_at_each_stage_it_ends_bit_identical(flags, tmp_path):
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    crash.finish("slim.py", flags, whole)
    log = (whole / "log.txt").read_text()
    for words in ("dense (3 epochs), sparse (6 epochs); target flops=0.6", "slim from here on", "asked flops=0.6: 0.",
                  "Slim model: "):
        assert words in log, words
    pipeline = whole / "runs/slim/exp"
    assert 0.5 < share_left(pipeline, "flops") <= 0.6
    told = json.loads((pipeline / "report.json").read_text())
    assert told["difference"] < 1e-9 and [row["model"] for row in told["rows"]] == ["before", "slim"]
    assert len(told["commands"]) == 2 and "train_sparsity.py" in told["commands"][1]
    assert (pipeline / "report.html").read_text().count("data:image/jpeg") == 2 * 6  # the val images
    for folder in ("dense", "sparse"):  # ordinary runs
        assert {"opt.yaml", "results.csv"} <= {path.name for path in (pipeline / folder).iterdir()}

    disturbed.mkdir()
    code, output = run_with("full-disk", flags, disturbed, "slim.py")
    assert code == 2 and "can't be written" in output and "Traceback" not in output
    for words in ("slim from here on", "val-before"):  # the second one is in the log already: a kill at the start
        assert crash.kill("slim.py", crash.going_on(flags, disturbed), disturbed, crash.when_logged(words))
    crash.finish("slim.py", crash.going_on(flags, disturbed), disturbed)
    assert crash.pipeline_differences(whole, disturbed) == []


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_rounds_to_a_share_of_the_parameters(flags, capsys):
    pipeline = slim.main([*flags, "--target", "params=0.5", "--rounds", "2", "--epochs", "4", "--export", "yolov5"])
    said = capsys.readouterr().out
    assert "dense (1 epochs), sparse1 (2 epochs), sparse2 (1 epochs)" in said and "asked params=0.5: 0." in said
    halfway = checkpoint.load(pipeline / "sparse1/weights/best.pt")
    assert 0.5 < share_left(pipeline, "parameters") / 0.5 <= 1
    assert sum(p.numel() for p in halfway.parameters()) > sum(
        p.numel() for p in checkpoint.load(pipeline / "slim.pt").parameters())
    assert "Speed:" not in said  # val.py's times are not comparable with one another
    told, page = json.loads((pipeline / "report.json").read_text()), (pipeline / "report.html").read_text()
    files = told["files"]
    assert [(row["model"], row["format"], row["precision"]) for row in files] == [
        ("before", "torch", "fp32"), ("slim", "torch", "fp32"), ("slim", "yolov5", "fp16")]
    assert (pipeline / "slim.yolov5.pt").stat().st_size / 1e6 == pytest.approx(files[2]["MB"], rel=1e-3)
    assert files[0]["faster"] == 1 and [row["ms"] for row in files[:2]] == [row["ms"] for row in told["rows"]]
    assert "mAP on square images" in page and ">yolov5</td>" in page
    assert re.search("slim +yolov5 +fp16 +[0-9.]+ ", said)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_drop_of_map_is_cut_and_tuned(flags, capsys):
    pipeline = slim.main([*flags, "--target", "map-drop=0.02", "--epochs", "5"])
    said = capsys.readouterr().out
    assert "dense (1 epochs), sparse (3 epochs), cut, tuned (1 epochs)" in said and "asked map-drop=0.02" in said
    assert not Path("pruned_model.pt").exists()  # it is the user's: prune.py alone writes there
    slimmer = [sum(p.numel() for p in checkpoint.load(pipeline / file).parameters())
               for file in ("dense/weights/best.pt", "sparse/weights/best.pt", "cut/pruned_model.pt", "slim.pt")]
    assert slimmer[0] > slimmer[1] >= slimmer[2] == slimmer[3]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_milliseconds_are_reached(flags, monkeypatch, capsys):
    """As if the time were that of the FLOPs; and where nothing makes it faster, it is said."""
    monkeypatch.setitem(TARGETS, "latency", TARGETS["flops"])
    monkeypatch.setattr(slim, "stopwatch", lambda *args, **kwargs: lambda models: [1.0] * len(models))
    pipeline = slim.main([*flags, "--target", "latency=0.7", "--epochs", "3", "--teacher", "none", "--runtime",
                          "onnxruntime", "--int8"])
    done = json.loads((pipeline / "slim.json").read_text())["done"]
    assert "--runtime onnxruntime --int8" in done["sparse"]["command"] and 0.6 < share_left(pipeline, "flops") <= 0.7
    said = capsys.readouterr().out
    assert "teacher:" not in said and "timed in turns: onnxruntime int8" in said
    monkeypatch.setitem(TARGETS, "latency", Target(lambda traced, keep: 1.0))
    again = ["--weights", str(pipeline / "dense/weights/best.pt"), "--target", "latency=0.7"]
    with pytest.raises(UserError, match="at most 0.0 of the latency can go"):
        slim.main(again)  # its data, image size and optimizer are those of the checkpoint


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_speed_that_needs_no_cut(flags, monkeypatch):
    monkeypatch.setattr(slim, "in_turns", lambda timed, device: [1.0] * len(timed))
    pipeline = slim.main([*flags, "--target", "speedup=1.02", "--epochs", "3"])
    assert "--no-st" in json.loads((pipeline / "slim.json").read_text())["done"]["sparse"]["command"]
    assert not checkpoint.load(pipeline / "slim.pt").masks and (pipeline / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_speed_is_shared_out(flags, tiny, monkeypatch, capsys):
    """As if the time were that of the FLOPs."""
    monkeypatch.setitem(TARGETS, "latency", TARGETS["flops"])
    monkeypatch.setattr(slim, "in_turns", lambda timed, device: [
        profile(one.model, one.imgsz).flops / 1e6 for one in timed])
    data = tiny.with_name("of_128_px.yaml")
    data.write_text(tiny.read_text() + "defaults: {imgsz: 128}\n")
    free = [flag for flag in flags if flag not in ("--imgsz", "64")]
    pipeline = slim.main([*free, "--data", str(data), "--target", "speedup=3", "--epochs", "6", "--layers"])
    state = json.loads((pipeline / "slim.json").read_text())
    size = state["levers"]["imgsz"]
    assert size in (64, 96) and 0.3 < state["levers"]["latency"] < 0.9 and set(state["done"]) >= {"probe", "val-96"}
    assert f"--imgsz {size} " in state["done"]["sparse"]["command"] and "--layers" in state["done"]["sparse"]["command"]
    before, slimmed = json.loads((pipeline / "report.json").read_text())["rows"]
    assert (before["px"], slimmed["px"]) == (128, size) and before["ms"] / slimmed["ms"] == pytest.approx(3, rel=0.1)
    said = capsys.readouterr().out
    assert "image size" in said and "asked speedup=3: " in said
    assert checkpoint.read(pipeline / "slim.pt")["imgsz"] == size
    assert known_pipeline(str(pipeline), "").levers.imgsz == size


@pytest.mark.parametrize("change, words", [
    (["--weights", "missing.pt"], "missing.pt: no such checkpoint"),
    (["--target", "flops=0.01"], "of the flops can go"),
    (["--epochs", "2"], "too few"),
    (["--int8"], "belongs to --export"),
    (["--export", "all", "--int8", "--target", "flops=0.01"], "of the flops can go"),
    (["--export", "onxx"], "--export: invalid choice: 'onxx'"),
    (["--export", "yolov5", "--int8"], "--include yolov5: has no int8 here"),
    (["--runtime", "tensorrt"], "--runtime: invalid choice: 'tensorrt'"),
    (["--runtime", "torchscript", "--int8"], "--int8: --runtime torchscript has none here"),
    (["--resume"], "no pipeline under runs/slim"),
    (["--resume", "somewhere/else"], "no slim.json there or above")])
@pytest.mark.usefixtures("quick")
def test_what_can_be_known_at_the_start_is_refused_there(flags, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        slim.main([*flags, *change])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def begun(*flags: object) -> Pipeline:
    """The pipeline that these flags begin."""
    return slim.begin(pipeline_parser().parse_args(list(map(str, flags))))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_size_and_single_cls_are_settled_at_the_start_for_every_stage(tiny, cfg, tmp_path):
    """The checkpoint's single_cls was dropped, and a size that is no multiple of the stride failed at the end."""
    shutil.copyfile(cfg, "model.yaml")
    Path("hyp.yaml").write_text("lr0: 0.02\n")
    model = randomised(Model("model.yaml", nc=1, names={0: "object"})).eval()
    checkpoint.save("one.pt", model, imgsz=64, opt={"data": str(tiny), "single_cls": True, "imgsz": 100})
    common = ["--workers", 0, "--device", "cpu", "--hyp", "hyp.yaml", "--teacher-weight", 2]
    known = begun("--weights", "one.pt", *common, "--target", "map-drop=.02")
    fresh = begun("--weights", "", "--cfg", "model.yaml", "--data", tiny, "--imgsz", 100, "--single-cls", *common)
    stages = known.settings.stages, fresh.settings.stages
    assert known.settings.trained and [stage.name for stage in stages[0]] == ["sparse", "cut", "tuned"]
    assert [stage.name for stage in stages[1]] == ["dense", "sparse"]
    for pipeline, scripts in ((known, stages[0]), (fresh, stages[1][:1])):
        settings = pipeline.settings
        assert (settings.imgsz, settings.single_cls, settings.data) == (128, True, str(tiny))
        for stage in scripts:
            flags = slim.stage_flags(pipeline, stage, "one.pt")
            assert "--single-cls" in flags and flags[flags.index("--imgsz") + 1] == "128"
            if stage.script != "prune.py":  # read from wherever the pipeline goes on
                assert flags[flags.index("--hyp") + 1] == str(tmp_path / "hyp.yaml")
    assert known.settings.weights == str(tmp_path / "one.pt") and fresh.settings.cfg == str(tmp_path / "model.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("change, words", [
    (["--teacher", "missing.pt"], "missing.pt: no such checkpoint"),
    (["--hyp", "missing.yaml"], "missing.yaml: no such"), (["--freeze", "99"], "--freeze 99: the model has"),
    (["--device", "77"], "--device 77"), (["--rect", "--image-weights"], "--rect"),
    (["--teacher", "other.pt"], "other.pt: has 3 classes, the model has 2")])
@pytest.mark.usefixtures("quick")
def test_flags_of_later_stages_are_checked_at_the_start(flags, cfg, tmp_path, change, words):
    checkpoint.save("other.pt", Model(str(cfg), nc=3))
    with pytest.raises(UserError, match=words):
        slim.main([*flags, *change])
    assert [path.name for path in tmp_path.rglob("*")] == ["other.pt"]


@pytest.mark.usefixtures("quick")
def test_one_image_is_refused(flags, tiny, tmp_path):
    (tmp_path / "one").mkdir()
    for kind, suffix in (("images", "png"), ("labels", "txt")):
        name = f"one/{kind}/000.{suffix}"
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((tiny.parent / kind / "train" / f"000.{suffix}").read_bytes())
    data = tmp_path / "one.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: one/images\nval: one/images\nnames: [square, circle]\n")
    with pytest.raises(UserError, match="one.yaml: train: has a single image"):
        slim.main([*flags, "--data", str(data)])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_weights_that_find_nothing_teach_nothing(tiny, teacher):
    with pytest.raises(UserError, match="finds nothing on the val images"):
        slim.main(["--weights", str(teacher), "--data", str(tiny), "--imgsz", "64", "--workers", "0"])


@pytest.mark.usefixtures("quick")
def test_a_pipeline_keeps_what_it_was_started_with(tmp_path):
    pipeline = Pipeline(tmp_path / "runs/slim/exp", "", Settings(None, None, "", 64, False, ("flops", 0.5), 9, 1, True))
    pipeline.save()
    assert known_pipeline(True, "runs/slim") == pipeline
    with pytest.raises(UserError, match="a pipeline is there already; --resume goes on"):
        slim.main(["--exist-ok"])
    with pytest.raises(UserError, match="--epochs: a pipeline that goes on keeps"):
        slim.main(["--resume", "runs/slim/exp/sparse/weights/last.pt", "--epochs", "3"])
    (pipeline.folder / "slim.json").write_text("{}")
    with pytest.raises(UserError, match="damaged, or of another version"):
        slim.main(["--resume"])


EDITED = {"settings/weights": [3, [], {}], "settings/imgsz": ["64", 0, 64.0, True, None],
          "settings/epochs": [0, "9", 1e9],
          "settings/target": ["flops", ["flops"], ["speed", 0.5], ["flops", 2], {"flops": 0.5}, [[], 0.5], None],
          "settings/rounds": [0, -1, 10**12, "1"], "settings/trained": ["yes", None], "settings/runtime": ["tpu", 1],
          "settings/export": ["onnx", ["tpu"], [1], None], "settings/training": [[], {"hyp": {}}, {"a": [[1]]}],
          "settings/teacher_weight": ["x", -1], "settings/data": [None, 1], "settings/single_cls": [2],
          "settings/more": [1], "settings": [[], None, 1], "workers": ["8", -1, 1.5], "device": [0, None],
          "levers": ["x", 2, {}, {"imgsz": 64, "latency": 2, "rows": []}],
          "done": [[], {"sparse": 1}, {"sparse": {}}, {"val-before": {"mAP50": 1}},
                   {"sparse": {"mAP50": 1, "mAP50-95": 1}}, {"val-before": {"command": "x"}}],
          "more": [1], "command": [1]}


@pytest.mark.parametrize("key", EDITED)
def test_a_state_that_was_edited_is_one_line(key, tmp_path):
    pipeline = Pipeline(tmp_path, "x", Settings(None, None, "", 64, False, ("flops", 0.5), 9, 1, True))
    pipeline.save()
    whole = (tmp_path / "slim.json").read_text()
    for value in EDITED[key]:
        data = json.loads(whole)
        (data["settings"] if "/" in key else data)[key.removeprefix("settings/")] = value
        (tmp_path / "slim.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match="slim.json: damaged, or of another version"):
            known_pipeline(str(tmp_path), "")


@pytest.mark.usefixtures("quick")
def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        slim.main([])
