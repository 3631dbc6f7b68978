"""A parser of command lines whose refusals are one line, and the validators of its values."""
from __future__ import annotations

import math
import re
import sys
from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
)
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import OneLineParser, UserError
from utils.yolov5_flags import FLAGS, INSTEAD, LEFT_OUT

MOST_FRACTIONS = 1000
MAY_BE_EMPTY = ("--weights", "--cfg", "--device")  # as in YOLOv5: from scratch, by the weights, the first GPU
# What main() of a script takes: the words of a command line, or its flags as run() gets them; None: the process's own.
Result = TypeVar("Result")
Argv = Sequence[str] | Mapping[str, Any] | None


class HelpfulParser(OneLineParser):
    """A parser that shows defaults, and refuses in one line a value, and a flag that another one makes meaningless.

    For the latter, apart() and needs() take flags as they are written: "--rect", "--no-st", or with a value,
    "--optimizer SGD". A flag may be written as any beginning that no other one has. like: the script of YOLOv5 whose
    flags this one takes: a beginning that means one of them there means it here, whatever other flags there are.
    """

    def __init__(self, description: str | None, like: str = ""):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)
        self.stock = FLAGS.get(like, ())
        self._apart: list[tuple[str, str, str]] = []
        self._needs: list[tuple[str, tuple[str, ...]]] = []

    def apart(self, flag: str, others: Collection[str], why: str) -> None:
        """Refuse `flag` together with one of the others; {} in `why` stands for that one."""
        self._apart += [(flag, other, why.format(other)) for other in others]

    def needs(self, flags: Collection[str], *others: str) -> None:
        """Refuse each of `flags` unless one of the others is on, given or by default."""
        self._needs += [(flag, others) for flag in flags]

    def _refuse_ignored(self, opt: Namespace) -> None:
        """UserError for flags of which one would have no effect."""
        words = [(action.dest in opt.given, word) for action in self._actions if hasattr(opt, action.dest)
                 for word in _written(action, getattr(opt, action.dest))]
        every, explicit = {word for _, word in words}, {word for was_given, word in words if was_given}
        for flag, other, why in self._apart:
            if flag in explicit and other in explicit:
                raise UserError(f"{flag}: {why}; leave one of the two out")
        for flag, others in self._needs:
            if flag in explicit and not every & set(others):
                raise UserError(f"{flag}: has no effect without {' or '.join(others)}")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ArgumentParser's; of Argv. `.given` lists the flags that were given, by the names of their values."""
        unset = object()
        words = self._words(args) if isinstance(args, Mapping) else sys.argv[1:] if args is None else args
        words = [self._in_full(word) if word.startswith("--") else word for word in words]
        self._refuse_empty(words)
        opt = super().parse_args(words, Namespace(**{a.dest: unset for a in self._actions if a.dest != "help"}))
        opt.given = [name for name, value in vars(opt).items() if value is not unset]
        for name in [name for name, value in vars(opt).items() if value is unset]:
            setattr(opt, name, deepcopy(self.get_default(name)))
        self._refuse_ignored(opt)
        return opt

    def _refuse_empty(self, words: Sequence[str]) -> None:
        """UserError for a flag whose value is '', as of a shell's variable that is not set: it would not be noticed."""
        flag = ""
        for word in words:
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                word = value if equals else flag
            action = self._option_string_actions.get(flag)
            if not word and action is not None and (action.nargs or flag not in MAY_BE_EMPTY):
                raise UserError(f"{flag}: is empty; give it a value, or leave it out")

    def _in_full(self, word: str) -> str:
        """An abbreviated flag in full; a full one, and a word that no flag begins with, as it is."""
        start, equals, value = word.partition("=")
        start = start.replace("_", "-")  # keyword arguments have no other way
        actions = {flag: action for action in self._actions for flag in action.option_strings}
        if start == "--" or start in actions:
            return start + equals + value
        stock = {flag.replace("_", "-"): flag for flag in self.stock}
        candidates = [stock[start]] if start in stock else [stock[flag] for flag in stock if flag.startswith(start)]
        if candidates and not actions.keys() & candidates:
            why = LEFT_OUT.get(candidates[0], ("leave it out",))[0]
            raise UserError(f"{candidates[0]}: YOLOv5 has it, it is left out here: {why}")
        matches: dict[int, str] = {}
        for flags in (candidates, actions):  # one name an action: --im is --imgsz and --img
            matches = {id(actions[flag]): flag for flag in reversed([*flags])
                       if flag in actions and flag.startswith(start)}
            if len(matches) == 1:
                return matches.popitem()[1] + equals + value
        return self.error(f"{start}: could be {', '.join(sorted(matches.values()))}") if matches else word

    def _words(self, flags: Mapping[str, Any]) -> list[str]:
        """Keyword arguments as a command line: {"imgsz": 320, "half": True} -> --imgsz=320 --half.

        None, False and an empty list are as if they were not there, but for a flag that has a --no- form.
        """
        actions, words = {action.dest: action for action in self._actions}, []
        for name, value in flags.items():
            action, flag = actions.get(name), f"--{name.replace('_', '-')}"
            if value is True or value is False and isinstance(action, BooleanOptionalAction):
                words.append(flag if value else f"--no-{flag[2:]}")
            elif isinstance(value, (list, tuple)):
                words += [flag, *map(str, value)] if value else []
            elif value is not None and value is not False:
                words.append(f"{flag}={value}")
            elif action is None and flag not in {flag.replace("_", "-") for flag in self.stock}:
                words.append(flag)  # which is refused, as any word that no flag begins with
        return words

    def error(self, message: str) -> Any:
        """Raise UserError; what a validator below refuses is said in its own words."""
        refused = re.fullmatch(r"argument (--[\w-]+)\S*: (.*: (?:must|give) .*)", message)
        if refused:
            raise UserError(f"{refused[1]} {refused[2]}")
        super().error(message)


def _written(action: Action, value: Any) -> list[str]:
    """A flag as it can be written for this value, alone and with the value; [] where it is off."""
    if isinstance(action, BooleanOptionalAction):
        return [action.option_strings[0 if value else 1]]
    if value in (None, "", [], False) or isinstance(value, (int, float)) and not value > 0:
        return []
    values = value if isinstance(value, list) else value[:1] if isinstance(value, tuple) else [value]
    return [name for flag in action.option_strings for name in (flag, *(f"{flag} {one}" for one in values))]


def from_python(main: Callable[[Argv], Result]) -> Callable[..., Result]:
    """A script's run(): its main() with keyword arguments, which are the flags with _ for -, as in YOLOv5."""
    def run(**flags: Any) -> Result:
        return main(flags)

    return run


class _Formatter(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default in (None, False, SUPPRESS, "") else super()._get_help_string(action)


# Validators: argparse's type= -----------------------------------------------------------------------------------------

def at_least(least: float, kind: Callable[[str], Any] = int, most: float = 2**31 - 1) -> Callable[[str], Any]:
    """Numbers from `least` to `most`, whole ones unless `kind` is float."""
    def parse(text: str) -> Any:
        if not (value := kind(text)) >= least:
            raise ArgumentTypeError(f"{text}: must be at least {least}")
        if value > most:
            raise ArgumentTypeError(f"{text}: must be at most {most}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def images_a_batch(text: str) -> int:
    """Whole numbers from 1 on, and -1, which asks a GPU."""
    return -1 if text == "-1" else at_least(1)(text)


images_a_batch.__name__ = "int"  # argparse names it where the text is no number

def fraction(zero: bool = True, one: bool = True, hint: str = "") -> Callable[[str], float]:
    """Numbers between 0 and 1; whether 0 and 1 themselves are among them."""
    def parse(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
            limits = f"{'at least' if zero else 'above'} 0 and {'at most' if one else 'below'} 1"
            raise ArgumentTypeError(f"{text}: must be {limits}{f' ({hint})' if hint else ''}")
        return value

    parse.__name__ = "float"
    return parse


def fractions(text: str) -> list[float]:
    """'0.1:0.8:0.1', first:last:step, -> [0.1, 0.2, ... 0.8]."""
    try:
        first, last, step = map(float, text.split(":"))
    except ValueError:
        first = last = step = 0.0
    if not 0 < first <= last < 1 or not 0 < step < math.inf:
        raise ArgumentTypeError(f"{text}: give first:last:step between 0 and 1, such as 0.1:0.8:0.1")
    if (last - first) / step > MOST_FRACTIONS:
        raise ArgumentTypeError(f"{text}: give a larger step; at most {MOST_FRACTIONS} values are shown")
    return [round(first + i * step, 6) for i in range(int((last - first) / step + 1e-6) + 1)]


def named_fraction(names: Collection[str], hint: str) -> Callable[[str], tuple[str, float]]:
    """'flops=0.5' -> ("flops", 0.5), for these names and numbers between 0 and 1; of a speedup, above 1."""
    def parse(text: str) -> tuple[str, float]:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name == "speedup" and name in names and not 1 < value < math.inf:
            raise ArgumentTypeError(f"{text}: give speedup=2 for twice as fast, a number above 1")
        if name not in names or (name != "speedup" and not 0 < value < 1):
            raise ArgumentTypeError(f"{text}: give {hint}, a number between 0 and 1")
        return name, value

    return parse


def format_name(text: str) -> str:
    """A format of --include. Those that only YOLOv5 has are refused with what to do instead."""
    if text in INSTEAD:
        raise ArgumentTypeError(f"{text}: give {INSTEAD[text]} (docs/deploy.md shows how)")
    return text


def as_latency(target: tuple[str, float] | None) -> tuple[str, float] | None:
    """A target of speedup as one of latency: twice as fast is half of the milliseconds. Others stay what they are."""
    return ("latency", 1 / target[1]) if target and target[0] == "speedup" else target


def path_or_none(text: str) -> str:
    """An absolute path; '' for 'none'."""
    return "" if text == "none" else str(Path(text).absolute())


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Names and values of flags -> a command line. None and False: the flag is not given; True: it takes no value."""
    words: list[str] = []
    for name, value in values.items():
        if value is not None and value is not False:
            arguments = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, arguments)]
    return words
