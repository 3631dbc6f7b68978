"""The command line: flags that go together or not, beginnings of flags, YOLOv5's names, keyword arguments."""
from __future__ import annotations

import pytest

import benchmarks
import detect
import export
import finetune_pruned
import prune
import slim
import train
import train_sparsity
import val
from prune import pruning_parser
from slim import pipeline_parser
from utils.errors import UserError
from utils.options import training_parser
from utils.parser import HelpfulParser
from utils.yolov5_flags import FLAGS, LEFT_OUT

W = ["--weights", "x.pt"]
PARSERS = {
    "train": lambda argv: training_parser("").parse_args(argv),
    "sparsity": lambda argv: train_sparsity.parse([*argv, "--resume", "x"]),
    "slim": lambda argv: pipeline_parser().parse_args(argv),
    "prune": lambda argv: pruning_parser().parse_args(argv),
    "val": val.parse,
    "detect": lambda argv: detect.parse([*W, "--source", "x", *argv]),
    "export": lambda argv: export.parse([*W, *argv]),
    "benchmarks": lambda argv: benchmarks.parse([*W, *argv])}


@pytest.mark.parametrize("script, flags, words", [
    ("train", "--rect --image-weights", "--image-weights: draws images, --rect keeps their order; leave one"),
    ("train", "--adam --optimizer SGD", "--adam: means --optimizer AdamW, not --optimizer SGD; leave one"),
    ("slim", "--optimizer Adam --adam", "--adam: means --optimizer AdamW, not --optimizer Adam"),
    ("train", "--nosave --save-period 3", "--nosave: keeps no checkpoint that --save-period asks for"),
    ("train", "--noval --patience 9", "--noval: --patience counts"),
    ("train", "--single-cls --label-smoothing .1", "--single-cls leaves no classes to smooth"),
    ("sparsity", "--teacher-weight 2", "--teacher-weight: has no effect without --teacher"),
    ("sparsity", "--no-st --sr .01", "--no-st: trains without sparsity, --sr asks for some"),
    ("sparsity", "--no-st --target flops=.5", "--no-st: trains without sparsity"),
    ("sparsity", "--sparsity l1 --target flops=.5", "--sparsity l1: knows no --target"),
    ("sparsity", "--sparsity l1 --target-sparsity .5", "--sparsity l1: knows no --target-sparsity"),
    ("sparsity", "--target flops=.5 --target-sparsity .5", "--target: --target-sparsity says it in another way"),
    ("sparsity", "--sr .01 --shrink", "--shrink: has no effect without --target-sparsity or --target"),
    ("sparsity", "--no-per-flop", "--no-per-flop: has no effect without --target-sparsity"),
    ("prune", "--percent .5 --target flops=.5", "--percent: --target finds out how much to cut"),
    ("prune", "--percent .5 --sweep .1:.5:.1", "--percent: --sweep has percents of its own"),
    ("prune", "--sensitivity --strict", "--sensitivity: only shows, --strict is for a cut"),
    ("prune", "--sweep .1:.5:.1 --recalibrate 9", "--sweep: only shows"),
    ("prune", "--latency-batch 4 --target flops=.5", "--latency-batch: has no effect without --target latency"),
    ("val", "--save-conf", "--save-conf: has no effect without --save-txt"),
    ("detect", "--save-conf", "--save-conf: has no effect without --save-txt"),
    ("detect", "--save-format 1", "--save-format: has no effect without --save-txt"),
    ("export", "--conf-thres .5", "--conf-thres: has no effect without --nms"),
    ("export", "--nms --include ncnn", "--nms: has no effect without --include onnx"),
    ("export", "--nms --int8-sensitivity", "--nms: leaves out boxes"),
    ("benchmarks", "--hard-fail .29 --noval", "--hard-fail 0.29: is about mAP, --noval measures none"),
    ("export", "--half --int8-sensitivity", "--half: a file has one precision"),
    ("export", "--calibration-images 9", "--calibration-images: has no effect without --int8"),
    ("export", "--include ncnn --dynamic", "--dynamic: has no effect without --include onnx or"),
    ("benchmarks", "--half --precisions int8", "--half: fp16 and nothing else"),
])
def test_of_two_flags_none_is_ignored_silently(script, flags, words):
    with pytest.raises(UserError) as refused:
        PARSERS[script](flags.split())
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("script, flags", [
    ("train", "--adam --optimizer AdamW"), ("train", "--noval --patience 0"), ("train", "--rect --multi-scale"),
    ("train", "--nosave --save-period -1"), ("sparsity", "--no-st"), ("sparsity", "--sparsity target --shrink"),
    ("sparsity", "--st --sr .01"), ("sparsity", "--target flops=.5 --sr .01 --no-per-flop --percent .2"),
    ("sparsity", "--teacher x.pt --teacher-weight 2"), ("prune", "--sensitivity --percent .3"),
    ("prune", "--latency-batch 4 --target latency=.5"), ("prune", "--sweep .1:.5:.1 --latency-batch 2"),
    ("val", "--save-conf --save-txt"), ("export", "--dynamic"), ("export", "--include all --opset 13"),
    ("export", "--int8-sensitivity --seed 1")])
def test_flags_that_belong_together_are_taken(script, flags):
    PARSERS[script](flags.split())


@pytest.mark.parametrize("script, words", [
    ("train", ["--resume", ""]), ("train", ["--data="]), ("train", ["--hyp", ""]), ("train", ["--teacher", ""]),
    ("train", ["--img", ""]), ("train", ["--optim="]), ("slim", ["--project", ""]), ("val", ["--weights", ""]),
    ("detect", ["--weights", "a.pt", ""]), ("detect", ["--source", ""]), ("export", ["--data", "", "--int8"]),
    ("prune", ["--keep", ""])])
def test_a_flag_of_an_empty_value_is_refused(script, words):
    """A shell makes it of a variable that is not set. --resume would start a new run."""
    with pytest.raises(UserError, match=r"^--[a-z0-9-]+: is empty; give it a value, or leave it out$"):
        PARSERS[script](words)


def test_yolov5s_empty_values_mean_what_they_mean_there():
    opt = training_parser("").parse_args(["--weights", "", "--cfg", "", "--device", ""])
    assert (opt.weights, opt.cfg, opt.device) == ("", "", "")


@pytest.mark.parametrize("script, flags, words", [
    ("prune", "--sweep .1:.9:1e400", "give first:last:step"), ("train", "--imgsz 100000", "--imgsz 100000: must be at"),
    ("detect", "--img 64 70000", "--imgsz 70000: must be at most 65536"),
    ("export", "--opset 99", "must be at most 20")])
def test_numbers_beyond_what_can_be_are_refused(script, flags, words):
    with pytest.raises(UserError) as refused:
        PARSERS[script](flags.split())
    assert words in str(refused.value)


def test_every_flag_of_the_tables_exists():
    """A pair with a flag that is misspelt would never be refused."""
    made: list[HelpfulParser] = []
    init = HelpfulParser.__init__

    def noted(self, *args, **options):
        made.append(self)
        init(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HelpfulParser, "__init__", noted)
        for parse in PARSERS.values():
            parse([])
    for parser in made:
        known = {option for action in parser._actions for option in action.option_strings}
        named = {word for flag, other, _ in parser._apart for word in (flag, other)}
        named |= {word for flag, others in parser._needs for word in (flag, *others)}
        assert {word.split()[0] for word in named} <= known
    assert len(made) == len(PARSERS)


# Beginnings of flags, and YOLOv5's names ------------------------------------------------------------------------------

class _Parser(Exception):
    """Carries a parser out of the main() that has made it."""


def parser_of(main) -> HelpfulParser:
    def stop(parser, *_):
        raise _Parser(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HelpfulParser, "parse_args", stop)
        with pytest.raises(_Parser) as found:
            main()
    return found.value.args[0]


SCRIPTS = {script.__name__: script for script in (
    train, train_sparsity, finetune_pruned, slim, prune, val, detect, export, benchmarks)}
LIKE = {"train": "train.py", "train_sparsity": "train.py", "finetune_pruned": "train.py", "slim": "train.py",
        "prune": "", **{name: f"{name}.py" for name in ("val", "detect", "export", "benchmarks")}}
every_script = pytest.mark.parametrize("name", list(SCRIPTS))


def actions(parser: HelpfulParser) -> dict[str, int]:
    return {flag: id(action) for action in parser._actions for flag in action.option_strings}


def beginnings(flags) -> set[str]:
    return {flag[:length] for flag in flags for length in range(3, len(flag) + 1)}


@every_script
def test_what_means_a_flag_in_yolov5_means_it_here_or_is_refused(name):
    parser, stock = parser_of(SCRIPTS[name].main), FLAGS.get(LIKE[name], ())
    assert parser.stock == stock
    known = actions(parser)
    for start in beginnings(stock):
        meant = [flag for flag in stock if flag == start] or [flag for flag in stock if flag.startswith(start)]
        whole = {known.get(flag, flag) for flag in meant}
        if len(whole) > 1:
            continue  # ambiguous there, too
        if meant[0] in known:
            assert known[parser._in_full(start)] == known[meant[0]], start
            assert parser._in_full(f"{start}=5").endswith("=5")
        else:
            with pytest.raises(UserError, match=f"^{meant[0]}: YOLOv5 has it, it is left out here: "):
                parser._in_full(start)


@every_script
def test_a_beginning_that_one_flag_has_is_that_flag(name):
    parser = parser_of(SCRIPTS[name].main)
    known = actions(parser)
    for start in beginnings(known):
        meant = {known[flag] for flag in known if flag.startswith(start)}
        if start in known or len(meant) == 1 and not any(f.startswith(start) for f in {*parser.stock} - known.keys()):
            assert known[parser._in_full(start)] in meant, start
        elif len(meant) > 1 and not any(flag.startswith(start) for flag in parser.stock):
            with pytest.raises(UserError, match=f"^{start}: could be --"):
                parser._in_full(start)
    for other in ("--", "--nonsense", "x", "--x y"):
        assert parser._in_full(other) == other


@pytest.mark.parametrize("short, whole", [
    ("--batch 16", "batch_size"), ("--img 64", "imgsz"), ("--img-size 64", "imgsz"), ("--name x", "name"),
    ("--weights x.pt", "weights"), ("--conf 0.25", "conf_thres"), ("--iou 0.65", "iou_thres")])
def test_the_names_that_everybody_types(short, whole):
    """In every script that has the flag, whatever flags are added to it."""
    taken = 0
    for name, script in SCRIPTS.items():
        parser = parser_of(script.main)
        if whole in {action.dest for action in parser._actions} and name != "export":
            required = [word for action in parser._actions if action.required and action.dest != whole
                        for word in (action.option_strings[0], "x")]
            assert parser.parse_args([*required, *short.split()]).given.count(whole) == 1
            taken += 1
    assert taken >= 2


def test_an_ambiguous_beginning_means_yolov5s_flag():
    parser = HelpfulParser("", like="val.py")
    for flag in ("--batch-size", "--batch-norm", "--conf-thres", "--confusing"):
        parser.add_argument(flag, type=float)
    opt = parser.parse_args(["--batch", "4", "--conf=.5"])
    assert (opt.batch_size, opt.conf_thres, opt.batch_norm, opt.confusing) == (4, 0.5, None, None)
    assert parser.parse_args(["--batch-n", "2"]).batch_norm == 2


def test_what_is_left_out_is_a_flag_of_yolov5s():
    assert set(LEFT_OUT) <= {flag for flags in FLAGS.values() for flag in flags}
    for argv in (["--evolve"], ["--evolve", "300"], ["--evolve=300"], ["--resume_evolve", "x"]):
        with pytest.raises(UserError, match="left out here: no evolution") as refused:
            training_parser("").parse_args(argv)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("script, flag", [(export, "--include"), (slim, "--export")])
@pytest.mark.parametrize("name, words", [("engine", "give onnx, and the file to trtexec"), ("pb", "give yolov5, and"),
                                         ("coreml", "give torchscript, and"), ("nonsense", "")])
def test_a_format_of_yolov5s_names_what_is_here(script, flag, name, words):
    with pytest.raises(UserError, match=f"{flag}.*{name}.*{words}"):
        parser_of(script.main).parse_args([flag, name])


# From Python ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ({"imgsz": 64, "batch_size": 8, "adam": True}, "--imgsz 64 --batch-size 8 --adam"),
    ({"weights": "", "cfg": None, "rect": False, "keep": []}, "--weights="),
    ({"freeze": [0, 1]}, "--freeze 0 1"), ({"freeze": 10}, "--freeze 10"), ({"name": "-x"}, "--name=-x"),
    ({"single_cls": True}, "--single-cls"), ({"single_cls": False}, "--no-single-cls"),
    ({"resume": True}, "--resume"), ({"resume": "x"}, "--resume x"), ({"cache": True}, "--cache"),
    ({"batch": 4, "img": 64}, "--batch 4 --img 64"), ({"quad": False, "upload_dataset": None}, ""), ({}, "")])
def test_keyword_arguments_are_flags(flags, words):
    parser = train_sparsity_parser() if "keep" in flags else training_parser("")
    assert vars(parser.parse_args(flags)) == vars(parser.parse_args(words.split()))


def train_sparsity_parser() -> HelpfulParser:
    return parser_of(train_sparsity.main)


@pytest.mark.parametrize("flags, words", [
    ({"imgz": 64}, "unrecognized arguments: --imgz"), ({"nonsense": False}, "unrecognized arguments: --nonsense"),
    ({"quad": True}, "--quad: YOLOv5 has it"), ({"upload_dataset": True}, "--upload_dataset: YOLOv5 has it"),
    ({"imgsz": "big"}, "--imgsz"), ({"adam": True, "optimizer": "SGD"}, "leave one of the two out")])
def test_keyword_arguments_are_refused_as_flags_are(flags, words):
    with pytest.raises(UserError, match=words):
        training_parser("").parse_args(flags)


@every_script
def test_every_script_is_a_function(name, monkeypatch):
    """run() is main() with the flags, and looks at no command line."""
    monkeypatch.setattr("sys.argv", ["x", "--nonsense"])
    with pytest.raises(UserError, match="unrecognized arguments: --typo=1"):
        required = {"weights": "x", "source": "x"} if name == "detect" else {"weights": "x"}
        SCRIPTS[name].run(**required, typo=1)
