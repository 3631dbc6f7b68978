"""Where a setting comes from when its flag is not given.

A flag beats the recipe of the weights: a model that was trained here keeps it, whatever data it is given. That beats
the data yaml's `defaults:` section (the built-in set carries its own), and that beats YOLOv5's defaults.
"""
from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.distributed import first_process
from utils.data.config import DataConfig, other_names, read_data, set_of_classes
from utils.errors import UserError
from utils.files import ROOT
from utils.options import BUILT_IN_DATA, CACHES, HYP_FOR, LEAST, MOST_EPOCHS, STOCK_DATA, STOCK_WEIGHTS
from utils.text import read_yaml_mapping

# What holds when neither a flag nor the data yaml says otherwise: YOLOv5's defaults.
DEFAULTS: dict[str, Any] = {"weights": STOCK_WEIGHTS, "cfg": "", "imgsz": 640, "epochs": 100, "batch_size": 16,
                            "nbs": None, "optimizer": "SGD", "cache": "auto", "hyp": None}
CHOICES = {"optimizer": HYP_FOR, "cache": CACHES}
RECIPE = ("data", "imgsz", "single_cls", "optimizer", "hyp")
BELOW_1 = ("momentum", "warmup_momentum")  # hyper-parameters
# They stand in YOLOv5's files, old or new, and have no effect here.
IGNORED_HYP = {"anchors", "label_smoothing", "iou_t", "giou"}


def resolve(opt: Namespace, checkpoint: dict[str, Any] | None = None) -> Namespace:
    """Fill in what was not given, and print where it comes from; returns a new Namespace of plain values.

    `checkpoint`: read()'s dict of opt.weights. In the result .hyp is a dict, and paths of files are absolute: who goes
    on with the run may be in another folder. Raises UserError for settings that can't be.
    """
    opt = Namespace(**{name: value for name, value in vars(opt).items() if name != "given"})
    if getattr(opt, "adam", False):
        opt.optimizer = opt.optimizer or "AdamW"
    weights = getattr(opt, "weights", None)
    file = str((weights[0] if isinstance(weights, list) else weights) or "the default weights")
    trained = trained_recipe(opt, checkpoint or {}, file)
    # Whoever reads images checks that they are there.
    config = read_data(opt.data or trained.get("data") or ROOT / BUILT_IN_DATA, needed=())
    defaults = checked_defaults(config)
    # The architecture is one setting in two flags: who names one does not want the other's default.
    if weights or getattr(opt, "cfg", None):
        defaults = {key: "" if key in ("weights", "cfg") else value for key, value in defaults.items()}
    sources = {f"from {file}": _fill(opt, trained), f"from {config.file.name}": _fill(opt, defaults),
               "by default": _fill(opt, {**DEFAULTS, "data": BUILT_IN_DATA})}
    opt.data, opt.single_cls = str(config.file), bool(opt.single_cls)
    if hasattr(opt, "hyp"):
        sources["by default"] |= _fill(opt, {"hyp": HYP_FOR[opt.optimizer]})
        opt.hyp = read_hyp(opt.hyp)
    for key in ("weights", "cfg"):
        if isinstance(value := getattr(opt, key, None), str):
            setattr(opt, key, absolute(value))
    for source, values in sources.items():
        if (flags := [_flag(key, values[key]) for key in RECIPE if values.get(key)]) and first_process():
            print(f"{source}: {', '.join(flags)}")
    return opt


def _fill(opt: Namespace, values: Mapping[str, Any]) -> dict[str, Any]:
    """Give options that have none their values; returns these."""
    new = {key: value for key, value in values.items()
           if hasattr(opt, key) and getattr(opt, key) is None and value is not None}
    vars(opt).update(new)
    return new


def _flag(key: str, value: Any) -> str:
    """A setting as its flag, such as --imgsz 320; hyper-parameters that are in no file with the first of them."""
    value = f"(lr0 {value.get('lr0')}, ...)" if isinstance(value, dict) else "" if value is True else value
    return f"--{key.replace('_', '-')} {value}".rstrip()


def trained_recipe(opt: Namespace, saved: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The settings of RECIPE that made a checkpoint (read()'s dict of `file`), as far as they still apply.

    Hyper-parameters belong to their optimizer: with another one they do not apply. Empty for files of other programs.
    """
    earlier = saved.get("opt") or {}
    recipe = {"imgsz": saved.get("imgsz"), **{key: earlier.get(key) for key in RECIPE if earlier.get(key)}}
    if getattr(opt, "optimizer", None) not in (None, earlier.get("optimizer")):
        recipe.pop("hyp", None)
    config = None if opt.data else trained_data(saved, file, bool(opt.single_cls))
    return {**recipe, "data": str(config.file) if config else None}


def absolute(text: str) -> str:
    """The absolute path of a file or folder that is there; other text, such as a name to look for, as it is."""
    return str(Path(text).absolute()) if text and Path(text).exists() else text


def trained_data(saved: Mapping[str, Any], file: str, single_cls: bool = False) -> DataConfig | None:
    """The data set that a checkpoint (read()'s dict of `file`) was trained on; None where it does not say.

    UserError where its yaml is gone, or names other classes by now, which --single-cls takes as one.
    """
    recorded = (saved.get("opt") or {}).get("data")
    if not recorded:
        return None
    # The last one: of a repository that lies elsewhere now.
    places = (Path(recorded), ROOT / recorded, ROOT / "data" / Path(recorded).name)
    data = next((place for place in places if place.is_file()), None)
    if data is None:
        raise UserError(f"{file}: was trained on {recorded}, which is not there any more; give --data")
    config = read_data(data, needed=())
    single_cls = single_cls or bool(saved["opt"].get("single_cls"))
    other = "" if single_cls else other_names(config.names, saved.get("names") or config.names)
    if other:
        raise UserError(f"{file}: was trained on {data}, which {other} by now; give the --data it was trained on")
    return config


def data_of_model(saved: Mapping[str, Any], file: str, names: Mapping[int, str], single_cls: bool = False) -> str:
    """The data yaml to measure a model on where --data is not given: the one that it was trained on, else the built-in
    set or YOLOv5's coco128, if that has its classes.

    saved: read()'s dict of `file`, or what formats.load() knows of it. UserError where there is none.
    """
    own_data = trained_data(saved, file, single_cls or bool((saved.get("opt") or {}).get("single_cls")))
    data_file = own_data.file if own_data else set_of_classes(names, (BUILT_IN_DATA, STOCK_DATA))
    if data_file is None:
        raise UserError(f"--data: {file} does not say what it was trained on; give the data yaml of its "
                        f"{len(names)} classes: --data my.yaml")
    return str(data_file)


def checked_defaults(config: DataConfig) -> dict[str, Any]:
    """The settings of a data yaml's `defaults:`. UserError for those that can't be."""
    defaults, where = config.defaults, f"{config.file}: defaults"
    if unknown := [str(key) for key in defaults if key not in DEFAULTS]:
        raise UserError(f"{where} has unknown keys {', '.join(sorted(unknown))}; known are {', '.join(DEFAULTS)}")
    for key, value in defaults.items():
        if key in LEAST:
            most = MOST_EPOCHS if key == "epochs" else 2**31 - 1
            if isinstance(value, bool) or not isinstance(value, int) or not LEAST[key] <= value <= most:
                raise UserError(f"{where}: {key} must be a whole number from {LEAST[key]} to {most}, not {value!r}")
        elif not isinstance(value, str):
            raise UserError(f"{where}: {key} must be a text, not {value!r}")
        elif key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{where}: {key} must be one of {', '.join(CHOICES[key])}, not {value!r}")
    weights = defaults.get("weights", "")
    if Path(weights).name != weights and not Path(weights).is_file():
        raise UserError(f"{where}: weights: there is no {weights}; give its name alone to fetch it")
    return defaults


def hyp_file(hyp: str | Path) -> Path:
    """The file that --hyp means, absolute if it is there. It is looked for as given, then in data/hyps/: VOC, say."""
    places = (Path(hyp), ROOT / hyp, ROOT / "data/hyps" / hyp, ROOT / f"data/hyps/hyp.{hyp}.yaml")
    return next((place.absolute() for place in places if place.is_file()), Path(hyp))


def read_hyp(hyp: str | Path | dict) -> dict[str, float]:
    """Hyper-parameters with every key present and numeric."""
    reference = read_yaml_mapping(ROOT / HYP_FOR["SGD"], "--hyp")
    if not isinstance(hyp, dict):
        hyp = read_yaml_mapping(hyp_file(hyp), "--hyp")
    if unknown := hyp.keys() - reference.keys() - IGNORED_HYP:
        raise UserError(f"--hyp: unknown '{min(map(str, unknown))}'; known are {', '.join(reference)}")
    values = dict(reference)
    for key in hyp.keys() & reference.keys():
        if isinstance(hyp[key], bool) or not isinstance(hyp[key], (int, float)):
            raise UserError(f"--hyp: '{key}' must be a number, not {hyp[key]!r}")
        if not 0 <= hyp[key] < math.inf:
            raise UserError(f"--hyp: '{key}' must not be negative nor infinite, but is {hyp[key]:g}")
        if key in BELOW_1 and hyp[key] >= 1:
            raise UserError(f"--hyp: '{key}' must be below 1, but is {hyp[key]:g}")
        values[key] = float(hyp[key])
    return values
