"""Flags that another one makes meaningless are refused in one line; those that belong together are not."""
from __future__ import annotations

import pytest

import benchmarks
import detect
import export
import train_sparsity
import val
from prune import pruning_parser
from slim import pipeline_parser
from utils.errors import UserError
from utils.options import training_parser
from utils.parser import HelpfulParser

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


def test_every_flag_of_the_tables_exists():
    """A pair with a flag that is misspelt would never be refused."""
    made: list[HelpfulParser] = []
    init = HelpfulParser.__init__

    def noted(self, *args):
        made.append(self)
        init(self, *args)

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
