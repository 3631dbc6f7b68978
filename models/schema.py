"""What a checkpoint must hold, key by key: declared here once, and checked before anybody reads one of them.

A form is a Kind, a list of one form (any number of these), a tuple of forms (one of these), or a dict of forms by key,
in which the key `...` stands for all that are not named. A key may be missing, unless its form is Needed.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORMAT = "yolov5-slimming/1"
# Of a file: values, each counted wherever it is reached from; levels of nesting; the largest whole number.
MOST_VALUES, DEEPEST, LARGEST = 1_000_000, 32, 10 ** 9
LEAVES = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Kind:
    """A test of a value, and what it asks for, in words."""

    what: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Needed:
    """A form whose key must be there."""

    form: Any


# Kinds of values ------------------------------------------------------------------------------------------------------

def is_number(value: Any) -> bool:
    """A finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int = 0, most: int = LARGEST) -> Kind:
    """Whole numbers from `least` to `most`."""
    return Kind(f"a whole number from {least} to {most}",
                lambda value: is_number(value) and isinstance(value, int) and least <= value <= most)


def number(least: float = -math.inf, most: float = math.inf) -> Kind:
    """Finite numbers from `least` to `most`."""
    limits = "" if least == -math.inf else f" from {least:g}" + ("" if most == math.inf else f" to {most:g}")
    return Kind(f"a finite number{limits}", lambda value: is_number(value) and least <= value <= most)


def one_of(*words: str) -> Kind:
    """One of these words."""
    return Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def tensor(dtypes: Iterable[torch.dtype], dim: int | None = None) -> Kind:
    """Tensors of these types, and of so many dimensions."""
    types = tuple(dtypes)
    shape = "" if dim is None else f" with {dim} dimension"
    return Kind(f"a tensor of {str(types[0]).removeprefix('torch.')}{shape}", lambda value: (
        isinstance(value, Tensor) and value.dtype in types and dim in (None, value.dim())))


def maybe(form: Any) -> tuple:
    """The form, or None."""
    return Kind("None", lambda value: value is None), form


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return all(map(_plain, value)) if isinstance(value, (list, tuple)) else not isinstance(value, Tensor)


FLOATS = torch.float32, torch.float16, torch.bfloat16, torch.float64
INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool
LIST = Kind("a list", lambda value: isinstance(value, (list, tuple)))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
ANY = Kind("anything", lambda value: True)
PLAIN = Kind("plain data without tensors", _plain)
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
SIZE, FRACTION, RATES = maybe(whole(1, 65_536)), maybe(number(0, 1)), maybe({...: number(0)})
WEIGHT, VALUES = tensor(FLOATS + INTEGERS), tensor(FLOATS, 1)
MASK, BYTES = tensor([torch.bool], 1), tensor([torch.uint8], 1)
SHORTCUTS = maybe(one_of("skip", "joint"))
TARGET = Kind("flops, params or latency, and a number between 0 and 1", lambda value: (
    isinstance(value, (list, tuple)) and len(value) == 2 and value[0] in ("flops", "params", "latency")
    and is_number(value[1]) and 0 < value[1] < 1))

# The file -------------------------------------------------------------------------------------------------------------

# A training's options. Those that are not named here have no effect on a resumed run, nor on another script.
OPTIONS: dict[Any, Any] = {
    **dict.fromkeys(("weights", "cfg", "data", "teacher", "project", "name", "script"), maybe(TEXT)),
    **dict.fromkeys(("batch_size", "nbs", "round_to"), SIZE), "imgsz": maybe(whole(32, 65_536)),
    **dict.fromkeys(("patience", "masked_val"), maybe(whole())), "epochs": maybe(whole(1, LARGEST // 1000)),
    **dict.fromkeys(("seed", "save_period"), maybe(whole(-2 ** 63, 2 ** 63))),
    **dict.fromkeys(("rect", "nosave", "noval", "noautoanchor", "noplots", "multi_scale", "image_weights", "sync_bn",
                     "cos_lr", "deterministic", "single_cls", "adam", "shrink", "per_flop", "layers"), maybe(FLAG)),
    **dict.fromkeys(("percent", "target_sparsity", "label_smoothing"), FRACTION),
    **dict.fromkeys(("sr", "sr_bias", "teacher_weight"), maybe(number(0))),
    "optimizer": maybe(one_of("SGD", "Adam", "AdamW")), "amp": maybe(one_of("off", "bf16", "fp16")),
    "cache": maybe(one_of("auto", "ram", "disk", "none")), "shortcuts": SHORTCUTS, "target": maybe(TARGET),
    "freeze": [whole()], "keep": [TEXT], "only": [TEXT], "hyp": maybe((TEXT, {...: number(0)})), ...: PLAIN}
SPARSE = maybe({"score": Needed(VALUES), "dead": Needed(MASK), "settled": FLAG, "share": number(0, 1)})
HOOKS = {"SparsityHook": {"history": Needed([VALUES]), "target": SPARSE, "done": FLAG, ...: ANY},
         "GradualCut": {"target": SPARSE, ...: ANY}, "ImageWeights": {"class_map": Needed([number()]), ...: ANY},
         ...: {...: ANY}}
TRAINING_STATE: dict[Any, Any] = {
    "epoch": Needed(whole()), "batches_done": whole(), "mean": VALUES, "updates": Needed(whole()),
    "optimizer": Needed({"state": Needed({...: {...: maybe((WEIGHT, number()))}}),
                         "param_groups": Needed([{"params": Needed([whole()]), ...: ANY}])}),
    "scaler": Needed({...: number(0)}), "stopper": Needed({"best": Needed(number()), "best_epoch": Needed(whole())}),
    "rng": Needed({"torch": Needed(BYTES), "cuda": Needed([BYTES])}),
    "hooks": Needed(([{...: ANY}], HOOKS)),  # a list before hooks had names
    ...: ANY}
MODEL: dict[Any, Any] = {  # all other entries tell where it came from
    "yaml": Needed({...: PLAIN}), "names": Needed({...: TEXT}), "masks": Needed({...: MASK}),
    "state_dict": Needed({...: WEIGHT}), "ema": maybe({...: WEIGHT})}
CHECKPOINT: dict[Any, Any] = {
    **MODEL, "opt": maybe(OPTIONS), "hyp": RATES, "training": maybe(TRAINING_STATE), "imgsz": OPTIONS["imgsz"],
    **dict.fromkeys(("data", "folder", "parent"), maybe(TEXT)), "gradual": FLAG,
    "metrics": maybe({"difference": maybe(number(0)), ...: ANY}),
    "sparsity": {"round_to": SIZE, "shortcuts": SHORTCUTS, "layers": FLAG, ...: ANY}, "to_cut": {...: MASK},
    "shrunk": {"before": Needed({...: MASK}), "done": FLAG, "difference": maybe(number(0)), ...: ANY}, ...: ANY}


def checked(data: Any) -> dict[str, Any]:
    """A copy of what a file holds, of the form CHECKPOINT and with parts that fit together.

    ValueError, with the first key that does not fit.
    """
    data = tree(data)
    require(data, CHECKPOINT)
    names, masks, state = data["names"], data["masks"], data["state_dict"]
    if list(names) != list(range(len(names))) or data["yaml"].get("nc", len(names)) != len(names):
        raise ValueError("'names' must be numbered from 0, a name for each of the yaml's nc classes")
    if data.get("training") and not data.get("ema"):
        raise ValueError("'ema' is missing")
    fused = not any(key.endswith(".running_mean") for key in state)
    for name, mask in masks.items():
        weight = state.get(f"{name}.weight")
        if int(mask.sum()) != len(weight) if weight is not None and weight.dim() else not fused and mask.any():
            raise ValueError(f"'masks.{name}' does not fit the weights")
    for name, mask in data.get("shrunk", {}).get("before", {}).items():
        if name not in masks or len(masks[name]) != len(mask) or bool((masks[name] & ~mask).any()):
            raise ValueError(f"'shrunk.before.{name}' does not fit 'masks'")
    for name, mask in data.get("to_cut", {}).items():
        if len(mask) != state.get(f"{name}.weight", mask.new_empty(0)).numel():
            raise ValueError(f"'to_cut.{name}' does not fit the weights")
    return data


def tree(data: Any, most: int = MOST_VALUES) -> Any:
    """A copy of nested mappings and lists in which nothing is shared, so that printing or copying it ends.

    Tensors stay what they are. ValueError where it is cyclic, too deep or too large, or holds something else.
    """
    budget = most

    def copy(value: Any, where: str, depth: int) -> Any:
        nonlocal budget
        budget -= 1
        if budget < 0 or depth > DEEPEST:
            raise ValueError(f"'{where}' is nested too deeply, or without end")
        if isinstance(value, dict):
            return {copy(key, where, depth): copy(inner, _below(where, key), depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            items = [copy(inner, where, depth + 1) for inner in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, Tensor):
            return sound(value, where)
        if not isinstance(value, LEAVES) or (isinstance(value, int) and not -2 ** 63 <= value < 2 ** 64):
            raise ValueError(f"'{where}' must be plain data, not {_shown(value)}")
        return value

    return copy(data, "", 0)


def sound(value: Tensor, where: str) -> Tensor:
    """The tensor. ValueError where it is of an unusual kind, or says that it is larger than its numbers."""
    if value.layout != torch.strided or value.is_quantized or value.is_complex():
        raise ValueError(f"'{where}' is a tensor of an unusual kind ({value.layout}, {value.dtype})")
    if value.is_meta or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"'{where}' has fewer numbers than its shape {tuple(value.shape)}")
    return value


def has(value: Any, form: Any) -> bool:
    """Does a value have a form?"""
    try:
        require(value, form)
    except ValueError:
        return False
    return True


def _below(where: str, key: Any) -> str:
    """The name of a value under a key, for a message, never long."""
    return f"{where[:60]}.{str(key)[:40]}" if where else str(key)[:40]


def _shown(value: Any) -> str:
    """A value for a message, never long."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (str, float, bool, type(None))) or (isinstance(value, int) and abs(value) < 2 ** 64):
        return repr(value[:40] if isinstance(value, str) else value)
    return "a number beyond 64 bits" if isinstance(value, int) else f"a {type(value).__name__}"


def require(value: Any, form: Any, where: str = "") -> None:
    """ValueError, with the key, where a value does not have a form."""
    if isinstance(form, tuple):
        if not any(has(value, choice) for choice in form[:-1]):
            require(value, form[-1], where)
    elif isinstance(form, list):
        require(value, LIST, where)
        for inner in value:
            require(inner, form[0], where)
    elif isinstance(form, dict):
        require(value, MAPPING, where)
        for key, inner in form.items():
            if isinstance(inner, Needed) and key not in value:
                raise ValueError(f"'{_below(where, key)}' is missing")
        for key, part in value.items():
            inner = form.get(key, form.get(..., ANY))
            require(part, inner.form if isinstance(inner, Needed) else inner, _below(where, key))
    elif not form.fits(value):
        raise ValueError(f"'{where}' must be {form.what}, not {_shown(value)}")
