"""Model yamls: reading and checking them."""
from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from models.schema import is_number, tree, whole
from utils.errors import UserError
from utils.text import read_yaml_mapping

MODEL_FOLDER = Path(__file__).resolve().parent
MOST_VALUES = 100_000  # values in a description


def read_yaml(cfg: str | Path | dict) -> dict:
    """A model description as a dict. A name is looked for as given, then in models/ and models/hub/."""
    if isinstance(cfg, dict):
        try:
            return _checked(tree(cfg, MOST_VALUES), "the model's yaml")
        except ValueError as error:
            raise UserError(f"the model's yaml: {error}") from None
    name = Path(cfg).name
    for path in (Path(cfg), MODEL_FOLDER / cfg, MODEL_FOLDER / name, MODEL_FOLDER / "hub" / name):
        if path.is_file():
            break
    else:
        models = ", ".join(sorted(p.name for p in MODEL_FOLDER.glob("*.yaml")))
        raise UserError(f"--cfg {cfg}: no such file; the models here are {models}")
    return _checked(read_yaml_mapping(path, "--cfg"), str(path))


def _checked(data: dict, where: str) -> dict:
    """The description, if it has everything that a model needs, in the right types. UserError otherwise."""
    if not {"backbone", "head", "anchors"} <= data.keys():
        raise UserError(f"{where}: a model yaml needs the keys nc, anchors, backbone and head")
    for key in ("depth_multiple", "width_multiple"):
        if not is_number(data.get(key, 1.0)) or not 0 < data.get(key, 1.0) < 100:
            raise UserError(f"{where}: {key} must be a number above 0, not {str(data[key])[:40]}")
    for key, most in (("nc", 100_000), ("ch", 1000)):
        if key in data and not whole(1, most).fits(data[key]):
            raise UserError(f"{where}: {key} must be a whole number from 1 to {most}, not {str(data[key])[:40]}")
    anchors = data["anchors"]
    is_list_of_lists = isinstance(anchors, list) and all(isinstance(level, list) for level in anchors)
    if not whole(1, 100).fits(anchors) and not is_list_of_lists:
        raise UserError(f"{where}: anchors must be a number up to 100, or a list of widths and heights per level, "
                        f"not {str(anchors)[:40]!r}")
    both = all(isinstance(data[key], list) for key in ("backbone", "head"))
    for i, row in enumerate(data["backbone"] + data["head"] if both else [None]):
        if not _is_row(row):
            raise UserError(f"{where}: row {i} must be [from, number, module, args], not {str(row)[:60]}")
    if not data["head"] or data["head"][-1][2] != "Detect":
        raise UserError(f"{where}: the last row of the head must be Detect")
    return data


def _is_row(row: Any) -> bool:
    """Is this [from, number, module, args]?"""
    if not isinstance(row, list) or len(row) != 4:
        return False
    return whole(1).fits(row[1]) and isinstance(row[2], str) and isinstance(row[3], list)


def check_cfg(own: dict, path: str) -> None:
    """Raise UserError, with the first difference, where a yaml is not the checkpoint's own."""
    other = read_yaml(path)
    for key in ("depth_multiple", "width_multiple"):
        if other.get(key, 1.0) != own.get(key, 1.0):
            raise UserError(f"--cfg {path}: {key} is {other.get(key, 1.0)}, the checkpoint's is {own.get(key, 1.0)}; "
                            "leave --cfg out")
    rows, own_rows = other["backbone"] + other["head"], own["backbone"] + own["head"]
    for i, (a, b) in enumerate(zip_longest(rows, own_rows, fillvalue="nothing")):
        if str(a) != str(b):
            raise UserError(f"--cfg {path}: row {i} is {a}, the checkpoint's is {b}; "
                            "leave --cfg out, the checkpoint knows its model")
