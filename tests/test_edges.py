"""What a GPU, a scaler, a resumed run or a reused folder could break. Where a GPU is needed, the CPU stands in."""
from __future__ import annotations

import importlib
import os
import shlex
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prune
import train
import train_sparsity
import val
from models import checkpoint
from models.yolo import Model
from tests.blocks import randomised
from training import autobatch, distributed, resume
from training.distributed import device_of_rank
from training.optimizer import EarlyStopping, build_optimizer
from training.run import Hook, amp_name
from training.sample import TrainingSample
from training.settings import resolve
from utils import device
from utils.errors import NonFiniteError, UserError
from utils.files import newest
from utils.options import training_parser
from utils.parser import at_least
from utils.slimming.gamma_l1 import GammaL1
from val import evaluate

FAST = ["--imgsz", "64", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--noplots"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(tiny, cfg, *more):
    return ["--data", str(tiny), "--weights", "", "--cfg", str(cfg), *FAST, *map(str, more)]


# Scaled gradients -----------------------------------------------------------------------------------------------------

def test_a_skipped_first_step_leaves_no_garbage_in_the_momentum():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = build_optimizer(model, "SGD", 0.1, 0.9, 0.0, scaled=True)
    scaler = torch.amp.GradScaler("cpu")
    before = {k: v.clone() for k, v in model.named_parameters()}
    for gradient in (float("inf"), 0.0, 0.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        scaler.scale(torch.ones(1))  # the scale is made when it is first used
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())


class NonFiniteGradients(Hook):
    """The gradient of every step is infinite, as it is under a scale that is too large."""

    def start(self, run):
        self.run = run
        next(p for p in run.model.parameters() if p.dim() == 4).register_hook(lambda g: g * float("inf"))


@pytest.mark.slow
def test_gradients_that_stay_infinite_under_a_scaler_stop_the_run(tiny, cfg, here):
    opt = training_parser("").parse_args(start(tiny, cfg, "--amp", "fp16", "--epochs", 20, "--nbs", 4, "--noval"))
    opt.script = "train.py"
    with pytest.raises(NonFiniteError, match="not finite in 50 steps in a row"):
        train.train(resolve(opt), [NonFiniteGradients()])
    saved = checkpoint.read(here / "runs/train/exp/weights/last.pt")
    assert all(bool(v.isfinite().all()) for v in saved["state_dict"].values() if v.is_floating_point())


@pytest.mark.slow
def test_a_skipped_step_is_known_without_asking_the_scaler(tiny, cfg, here, monkeypatch):
    """Reading the scale waits for a GPU; the norm was read already."""
    get_scale, in_step, seen = torch.amp.GradScaler.get_scale, [False], []
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale",
                        lambda self: pytest.fail("a second read") if in_step[0] else get_scale(self))

    class Note(Hook):
        def before_step(self):
            in_step[0] = True

        def after_step(self, skipped):
            in_step[0] = False
            seen.append(skipped)

    opt = training_parser("").parse_args(start(tiny, cfg, "--amp", "fp16", "--epochs", 1))
    opt.script = "train.py"
    train.train(resolve(opt), [Note()])
    assert seen


@pytest.mark.slow
def test_validation_computes_in_the_precision_it_is_given(tiny, cfg):
    from utils.data.config import read_data
    from utils.data.loader import validation_loader

    model = Model(str(cfg), nc=2, names={0: "square", 1: "circle"}).eval()
    types = []
    model.model[0].conv.register_forward_hook(lambda _, __, y: types.append(y.dtype))
    loader = validation_loader(read_data(tiny), "val", 64, 4, 32, workers=0)
    for amp in (None, torch.bfloat16):
        evaluate(model, loader, torch.device("cpu"), amp=amp)
    assert set(types[:2]) == {torch.float32} and set(types[2:]) == {torch.bfloat16}


# Sparsity -------------------------------------------------------------------------------------------------------------

def test_patience_counts_from_the_first_epoch_that_may_be_best():
    stopper = EarlyStopping(3)
    assert not any(stopper.over(epoch) for epoch in range(10))  # none was noted yet
    assert stopper.better(10, 0.5) and not stopper.better(11, 0.4)
    assert not stopper.over(12) and stopper.over(13)


@pytest.mark.slow
def test_a_run_with_a_target_ends_with_its_zeros_whatever_the_patience(tiny, cfg, here):
    """From weights whose first epochs are the best ones: --patience 1 would end the run before there is a zero."""
    flags = start(tiny, cfg, "--epochs", 10, "--nbs", 4, "--target-sparsity", 0.5, "--patience", 1, "--round-to", 1)
    run = train_sparsity.main(flags)
    hook = run.hooks[-1]
    assert run.epoch >= 8
    assert run.stopper.best_epoch >= 7  # the zeros are final after 80% of the run
    best = checkpoint.load(run.folder / "weights/best.pt")
    zeros = sum(int((best.get_submodule(name).weight == 0).sum()) for name in hook.plan.norms)
    total = sum(len(norm.weight) for norm in hook.plan.norms.values())
    assert zeros / total == pytest.approx(0.5, abs=0.02)


def test_importance_does_not_see_the_penalty():
    order = []
    hook = train_sparsity.SparsityHook()
    hook.run = SimpleNamespace(epoch=0, batch_fraction=1.0)
    hook.plan = SimpleNamespace(target=SimpleNamespace(observe=lambda: order.append("observe")),
                                penalty=SimpleNamespace(add_to_gradients=lambda *_: order.append("penalty")))
    hook.before_step()
    assert order == ["observe", "penalty"]


def test_the_reach_of_a_batch_above_the_nominal_one_counts_in_full():
    from training.optimizer import Schedule
    from training.sparsity_report import l1_note

    hyp = {"lr0": 0.01, "lrf": 1.0, "momentum": 0.9, "warmup_epochs": 0.0}
    norm = torch.nn.BatchNorm2d(4)

    def reach(batch_size):
        schedule = Schedule(hyp, 10, 100, batch_size, 64)
        opt = Namespace(hyp=hyp, epochs=10, batch_size=batch_size, optimizer="SGD")
        run = SimpleNamespace(opt=opt, nbs=64, schedule=schedule, loader=range(100))
        text = l1_note(run, GammaL1([norm], 0.001, 10))
        return float(text.split("holds by ")[1].split()[0])

    assert reach(128) == pytest.approx(2 * reach(64), rel=0.05)


def test_the_preview_speaks_of_the_target():
    parse = training_parser("")
    train_sparsity.add_sparsity_flags(parse)

    def percent(*flags):
        return train_sparsity.settle(parse.parse_args(list(flags))).percent

    assert percent("--target-sparsity", "0.55") == 0.55
    assert percent("--target-sparsity", "0.55", "--percent", "0.3") == 0.3 and percent("--sr", "0.1") == 0.5


# Files of a run -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_file_that_was_measured_is_named_and_an_old_best_is_moved_away(tiny, cfg, here, capsys):
    flags = start(tiny, cfg, "--epochs", 2, "--exist-ok")
    train.main(flags)
    old = (here / "runs/train/exp/weights/best.pt").read_bytes()
    capsys.readouterr()
    run = train.main([*flags, "--nosave", "--seed", "5"])
    said = capsys.readouterr().out
    weights = here / "runs/train/exp/weights"
    assert (weights / "best.old.pt").read_bytes() == old
    measured = "best.pt" if (weights / "best.pt").is_file() else "last.pt"
    assert f"{measured}, epoch 2:" in said and (measured == "last.pt" or run.stopper.best_epoch == 1)
    train.main(flags)
    assert (weights / "best.old.pt").read_bytes() == old  # a third run moves its predecessor's beside it


def test_bare_resume_finds_a_run_under_an_absolute_project(tmp_path):
    file = tmp_path / "runs" / "exp" / "weights" / "last.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert newest(f"{tmp_path}/runs/*/weights/last.pt") == file
    assert resume.resume_file(Namespace(resume=True, project=str(tmp_path / "runs"))) == file


# --resume -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def interrupted(tiny, cfg, tmp_path_factory):
    """last.pt of a run of one of two epochs."""
    folder = tmp_path_factory.mktemp("interrupted")
    train.main([*start(tiny, cfg, "--epochs", 1), "--project", str(folder)])
    return folder / "exp" / "weights" / "last.pt"


def options(interrupted, *flags):
    opt = training_parser("").parse_args(["--resume", str(interrupted), "--epochs", "2", *map(str, flags)])
    opt.script = "train.py"
    return resume.resumed_options(opt, interrupted)[0]


@pytest.mark.slow
def test_resume_takes_what_can_change_and_refuses_the_rest_by_name(interrupted, tiny):
    opt = options(interrupted, "--patience", 0, "--amp", "bf16", "--cache", "ram", "--data", tiny, "--workers", 0)
    assert (opt.patience, opt.amp, opt.cache, opt.data, opt.workers) == (0, "bf16", "ram", str(tiny), 0)
    assert options(interrupted, "--batch-size", 4).batch_size == 4  # the same as before: nothing to refuse
    for flag, value in (("--batch-size", 8), ("--nbs", 24), ("--optimizer", "Adam"), ("--imgsz", 96), ("--seed", 7)):
        with pytest.raises(UserError, match=f"^{flag}: a run that goes on keeps it"):
            options(interrupted, flag, value)


@pytest.mark.slow
def test_a_gpus_fp16_run_goes_on_on_a_cpu_without(interrupted, monkeypatch):
    data = checkpoint.read(interrupted)
    data["opt"]["amp"] = "fp16"
    monkeypatch.setattr(resume.checkpoint, "read", lambda path: data)
    opt = options(interrupted)
    assert amp_name(opt, torch.device("cpu")) == "off" and amp_name(opt, torch.device("cuda:0")) == "fp16"


@pytest.mark.slow
def test_a_run_with_sync_bn_goes_on_on_a_cpu_without(interrupted, monkeypatch):
    """There is no flag that takes --sync-bn back."""
    data = checkpoint.read(interrupted)
    data["opt"]["sync_bn"] = True
    monkeypatch.setattr(resume.checkpoint, "read", lambda path: data)
    assert options(interrupted, "--device", "cpu").sync_bn is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert options(interrupted, "--device", "0").sync_bn is True
    assert options(interrupted, "--device", "cpu", "--sync-bn").sync_bn is True  # and is refused where it starts


def test_the_defaults_of_a_data_yaml_may_name_weights_and_their_architecture(tiny, here):
    """cfg used to be dropped, as if the user had given other weights."""
    images = f"path: '{tiny.parent}'\ntrain: images/train\nval: images/val\nnames: [square, circle]\n"
    (here / "my.yaml").write_text(images + "defaults: {weights: w.pt, cfg: c.yaml}\n")
    opt = resolve(training_parser("").parse_args(["--data", "my.yaml"]))
    assert (opt.weights, opt.cfg) == ("w.pt", "c.yaml")
    opt = resolve(training_parser("").parse_args(["--data", "my.yaml", "--weights", "mine.pt"]))
    assert (opt.weights, opt.cfg) == ("mine.pt", "")


@pytest.mark.slow
def test_resume_across_scalers_and_with_fewer_gpus(interrupted, here, monkeypatch):
    """A file without a scaler's state, and with the RNG states of more GPUs than there are now."""
    data = checkpoint.read(interrupted)
    data["training"]["rng"]["cuda"] = [torch.get_rng_state()] * 4
    with pytest.raises(UserError, match="lies in no run's weights folder; put it back"):  # here would be the run
        torch.save(data, here / "last.pt")
        train.main(["--resume", str(here / "last.pt"), "--epochs", "2"])
    (here / "weights").mkdir()
    (here / "last.pt").rename(here / "weights/last.pt")
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = train.main(["--resume", str(here), "--epochs", "2", "--amp", "fp16", "--device", "cpu"])
    assert run.epoch == 1 and run.scaler.is_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    resume.restore_hooks(run, data["training"])
    assert len(restored[0]) == 2


@pytest.mark.slow
def test_resume_with_data_of_other_classes_is_refused(interrupted, tiny, tmp_path):
    other = tmp_path / "other.yaml"
    text = tiny.read_text().replace("path: .", f"path: {tiny.parent}")
    other.write_text(text.replace("[square, circle]", "[a, b, c]"))
    with pytest.raises(UserError, match="names 3 classes, not 2 as the run that goes on does; --data may name"):
        train.main(["--resume", str(interrupted), "--epochs", "2", "--data", str(other), "--device", "cpu"])


@pytest.mark.slow
def test_resume_knows_its_data_from_any_folder(interrupted, tiny, tmp_path, monkeypatch, capsys):
    """A relative path used to mean whatever has that name in the folder where the run is resumed."""
    run = tmp_path / "run" / "weights" / "last.pt"
    run.parent.mkdir(parents=True)
    shutil.copyfile(interrupted, run)
    monkeypatch.chdir(tmp_path)
    text = tiny.read_text().replace("path: .", f"path: '{tiny.parent}'")
    Path("tiny.yaml").write_text(text.replace("[square, circle]", "[cat, dog]"))
    resuming = ["--resume", str(run), "--epochs", "2", "--device", "cpu", "--workers", "0"]
    data = checkpoint.read(run)
    assert data["opt"]["data"] == str(tiny) and data["images"] == {"train": 12, "val": 6}
    with pytest.raises(UserError, match="tiny.yaml: calls class 0 'cat', not 'square' as the run that goes on does"):
        train.main([*resuming, "--data", "tiny.yaml"])
    data["opt"]["data"] = "tiny.yaml"  # as older versions stored it
    torch.save(data, run)
    with pytest.raises(UserError, match="last.pt: was trained on tiny.yaml, which calls class 0 'cat', not 'square'"):
        train.main(resuming)
    Path("tiny.yaml").unlink()
    with pytest.raises(UserError, match="last.pt: was trained on tiny.yaml, which is not there any more; give --data"):
        train.main(resuming)
    shutil.copytree(tiny.parent, tmp_path / "moved")  # the same set at another place, and it has grown
    for n in range(3):
        shutil.copyfile(tmp_path / "moved/images/train/000.png", tmp_path / f"moved/images/train/new{n}.png")
    assert train.main([*resuming, "--data", "moved/tiny.yaml"]).opt.data == str(tmp_path / "moved/tiny.yaml")
    said = capsys.readouterr().out
    assert "train has 15 images now, 12 when the run was saved" in said and "val has" not in said


@pytest.mark.slow
def test_resume_keeps_device_and_workers_unless_they_are_given(interrupted, monkeypatch, capsys):
    data = checkpoint.read(interrupted)
    data["opt"] |= {"device": "cpu", "workers": 3}
    monkeypatch.setattr(resume.checkpoint, "read", lambda path: data)
    assert (options(interrupted).device, options(interrupted).workers) == ("cpu", 3)
    assert options(interrupted, "--workers", 1).workers == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gone in ("5", "0,1", "mps"):
        data["opt"]["device"] = gone
        assert options(interrupted).device == ""
        assert "note: the device of the run is not here (--device" in capsys.readouterr().out
    assert options(interrupted, "--device", "7").device == "7"  # who asks for one is told


@pytest.mark.slow
@pytest.mark.parametrize("script", ["val", "prune", "finetune_pruned", "train", "train_sparsity", "benchmarks", "slim"])
def test_data_from_a_checkpoint_is_what_it_was_trained_on(script, tiny, here):
    """A yaml that is gone, or that names other classes by now, is said in one line, by every script that takes it."""
    main = importlib.import_module(script).main
    model = Model("yolov5n.yaml", nc=2, names={0: "square", 1: "circle"})
    flags = ["--weights", "mine.pt", "--device", "cpu"]
    checkpoint.save(here / "mine.pt", model, imgsz=64, opt={"data": str(here / "my.yaml"), "imgsz": 64})
    with pytest.raises(UserError, match="mine.pt: was trained on .*my.yaml, which is not there any more; give --data"):
        main(flags)
    text = tiny.read_text().replace("path: .", f"path: '{tiny.parent}'")
    (here / "my.yaml").write_text(text.replace("[square, circle]", "[square, dog]"))
    with pytest.raises(UserError, match="my.yaml, which calls class 1 'dog', not 'circle' by now; give the --data"):
        main(flags)
    assert not (here / "runs").exists()


def test_paths_are_stored_whole(tiny, cfg, here):
    shutil.copyfile(cfg, "my.yaml")
    (here / "w.pt").write_bytes(b"")
    relative = os.path.relpath(tiny, here)
    opt = resolve(training_parser("").parse_args(["--data", relative, "--cfg", "my.yaml", "--weights", "w.pt",
                                                  "--teacher", "t.pt"]))
    stored = [opt.data, opt.cfg, opt.weights, opt.teacher]
    assert all(map(os.path.isabs, stored)) and os.path.samefile(opt.data, tiny)
    assert resolve(training_parser("").parse_args(["--weights", "", "--cfg", "yolov5n.yaml"])).cfg == "yolov5n.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("text, words", [("momentum: 0", ""), ("momentum: 1", "'momentum' must be below 1")])
def test_a_momentum_of_0_is_one(tiny, cfg, here, text, words):
    (here / "hyp.yaml").write_text(text)
    flags = [*start(tiny, cfg, "--epochs", 1), "--hyp", "hyp.yaml", "--optimizer", "SGD"]
    if words:
        with pytest.raises(UserError, match=words):
            train.main(flags)
    else:
        train.main(flags)


# Devices --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def four_gpus(monkeypatch):
    """Four GPUs as far as PyTorch says; the list of those that were made the current one."""
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    return current


def test_torchruns_processes_take_the_gpus_of_the_flag(four_gpus):
    assert [str(device_of_rank("2,3", rank)) for rank in (0, 1)] == ["cuda:2", "cuda:3"]
    assert [str(device_of_rank("", rank)) for rank in range(4)] == [f"cuda:{i}" for i in range(4)]
    assert str(device_of_rank("cpu", 1)) == "cpu"
    with pytest.raises(UserError, match=r"there are 2 GPUs \(2, 3\); start 2 processes"):
        device_of_rank("2,3", 2)


def test_a_single_gpu_becomes_the_current_one(four_gpus):
    assert str(device.select_device("1")) == "cuda:1" and four_gpus == ["cuda:1"]
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2"):
        device.select_device("0,1")


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "train --weights '' --cfg {cfg} --data {tiny}", "val --weights m.pt --data {tiny}", "export --weights m.pt",
    "detect --weights m.pt --source {images}", "prune --weights m.pt --data {tiny}"])
def test_pixels_beyond_the_memory_are_refused_before_it_is_full(command, tiny, cfg, here, monkeypatch):
    """--imgsz 65536 ended by the system's hand, without a word."""
    checkpoint.save(here / "m.pt", Model(str(cfg), nc=2, names={0: "square", 1: "circle"}).eval(), imgsz=64)
    files = {"cfg": cfg, "tiny": tiny, "images": tiny.parent / "images/val/000.png"}
    script, *flags = (word.format(**files) for word in shlex.split(command))
    monkeypatch.setattr(device, "available_memory", lambda: 8e9)
    with pytest.raises(UserError, match="million pixels at once take .* GB at the least, 8 GB are free; give less"):
        importlib.import_module(script).main([*flags, "--imgsz", "65536", "--device", "cpu"])
    assert not list(here.rglob("*.png")) and not list(here.rglob("*.onnx"))


def test_processes_wait_for_the_main_one_longer_than_nccls_ten_minutes(monkeypatch):
    asked = {}
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **options: asked.update(options))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    for key, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setitem(os.environ, key, value)
    with distributed.process_group("cpu") as world:
        assert world.rank == 1
    assert asked["timeout"].total_seconds() > 3600


@pytest.mark.slow
def test_deterministic_asks_pytorch_for_it(tiny, cfg, here):
    try:
        train.main(start(tiny, cfg, "--epochs", 1, "--deterministic"))
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


# prune.py -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def weights(cfg, here, tiny):
    model = randomised(Model(str(cfg), nc=2, names={0: "square", 1: "circle"})).eval()
    checkpoint.save(here / "model.pt", model, imgsz=64, opt={"data": str(tiny), "imgsz": 64}, hyp={"mosaic": 1.0})
    return here / "model.pt"


@pytest.mark.slow
def test_an_image_size_between_strides_is_rounded_up(weights, tiny):
    folder = prune.main(["--weights", str(weights), "--data", str(tiny), "--imgsz", "70", "--workers", "0"])
    assert checkpoint.read(folder / "pruned_model.pt")["imgsz"] == 96


@pytest.mark.slow
def test_a_latency_out_of_reach_is_refused_and_its_batch_can_be_chosen(weights, tiny, here, monkeypatch):
    from models.formats import speed

    asked = []
    monkeypatch.setattr(speed, "torch_latency", lambda models, imgsz, device, batch: asked.append(batch) or [1.0, 0.9])
    with pytest.raises(UserError, match="it is still 0.900; nothing was written"):
        prune.main(["--weights", str(weights), "--data", str(tiny), "--target", "latency=0.5", "--latency-batch", "4"])
    assert set(asked) == {4} and not (here / "pruned_model.pt").exists()


def test_calibration_images_are_a_random_subset_as_training_sees_them(tiny):
    hyp = {"mosaic": 1.0, "scale": 0.5}
    opt = Namespace(weights="x.pt", data=str(tiny), imgsz=64, hyp=hyp, single_cls=False, batch_size=4, workers=0)
    images = TrainingSample(opt, Namespace(divisor=32, input_shape=(0, 3, 0, 0)), 6, torch.device("cpu"))
    first, second = (torch.cat([pixels for pixels, _ in images]) for _ in range(2))
    assert first.shape == (6, 3, 64, 64) and torch.equal(first, second)
    assert float((first * 255 == 114).all(1).float().mean()) < 0.5  # letterboxed, a quarter of 96 x 72 would be grey
    batches = list(images)
    assert [len(pixels) for pixels, _ in batches] == [4, 2]
    assert all(bool((targets[:, 0] < len(pixels)).all()) for pixels, targets in batches)


def test_validators_name_the_flag_and_the_parser_knows_what_was_given():
    from utils.parser import HelpfulParser

    parser = HelpfulParser("")
    parser.add_argument("--n", type=at_least(1))
    with pytest.raises(UserError, match="^--n 0: must be at least 1$"):
        parser.parse_args(["--n", "0"])
    assert parser.parse_args(["--n", "2"]).given == ["n"] and parser.parse_args([]).given == []


# Apple's GPUs ---------------------------------------------------------------------------------------------------------

def test_timings_wait_for_every_kind_of_gpu(monkeypatch):
    from utils.slimming.timing import synchronize

    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cuda:0", "mps", "cpu"):
        synchronize(torch.device(name))
    assert waited == ["cuda", "mps"]


def test_scores_leave_the_gpu_before_they_become_float64():
    """mps knows no float64."""
    from utils.slimming import group_mean
    from utils.slimming.graph import ChannelGraph

    class OnGpu:
        def cpu(self):
            return torch.ones(2)

        def double(self):
            raise TypeError("no float64 here")

    graph = ChannelGraph(norms={"bn": torch.arange(2).numpy()}, group=torch.arange(2).numpy())
    assert group_mean(graph, {"bn": OnGpu()}, graph.norms).tolist() == [1.0, 1.0]


# --batch-size -1 ------------------------------------------------------------------------------------------------------

def test_a_batch_that_fits_the_memory_is_on_the_line_through_what_was_measured():
    assert autobatch.fitting_batch({2: 300, 4: 400, 8: 600, 16: 1000}, 5000) == 16 + 80
    assert autobatch.fitting_batch({2: 300, 4: 400}, 250) == 1 and autobatch.fitting_batch({2: 300}, 1e9) == 2
    assert autobatch.fitting_batch({}, 1e9) == 1 and autobatch.fitting_batch({2: 5, 4: 5}, 1e15) == autobatch.MOST_BATCH


def test_a_batch_of_minus_1(cfg, monkeypatch, capsys):
    opt = training_parser("").parse_args(["--batch-size", "-1", "--multi-scale"])
    model, cpu, gpu = Model(str(cfg), nc=2), torch.device("cpu"), torch.device("cuda:0")
    assert autobatch.settle_batch(opt, model, 64, distributed.World(0, 1, cpu)).batch_size == 16
    assert capsys.readouterr().out == "--batch-size -1: 16 (only a GPU's memory is measured)\n"
    assert opt.batch_size == -1  # settings do not change
    with pytest.raises(UserError, match="with several give a number"):
        autobatch.settle_batch(opt, model, 64, distributed.World(0, 2, cpu))
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * 2**30, 16 * 2**30))
    monkeypatch.setattr(autobatch, "memory_per_batch",
                        lambda model, imgsz, *_: asked.append(imgsz) or {8: 2**30, 16: 2**31})
    assert autobatch.settle_batch(opt, model, 64, distributed.World(0, 1, gpu)).batch_size == 64
    assert asked == [96] and "64 (of 10.0 GiB)" in capsys.readouterr().out
    for wrong in ("0", "-2", "x"):
        with pytest.raises(UserError, match="--batch-size"):
            training_parser("").parse_args(["--batch-size", wrong])
    with pytest.raises(UserError, match="must be at least 1"):
        val.parse(["--batch-size", "-1"])


@pytest.mark.slow
def test_what_a_batch_takes_is_measured_until_the_memory_is_full(cfg, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: calls.append(1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def reserved(_):
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError
        return 100 * len(calls)

    monkeypatch.setattr(torch.cuda, "max_memory_reserved", reserved)
    model = Model(str(cfg), nc=2).eval()
    assert autobatch.memory_per_batch(model, 64, torch.device("cpu"), None) == {2: 100, 4: 200}
    assert not model.training and all(p.grad is None for p in model.parameters())
