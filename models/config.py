"""Model yamls: reading and checking them."""
from __future__ import annotations

from copy import deepcopy
from itertools import zip_longest
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.text import read_yaml_mapping

FOLDER = Path(__file__).resolve().parent


def read_yaml(cfg: str | Path | dict) -> dict:
    """A model description as a dict. A name is looked for as given, then in models/ and models/hub/."""
    if isinstance(cfg, dict):
        return _checked(deepcopy(cfg), "the model's yaml")
    for path in (Path(cfg), FOLDER / cfg, FOLDER / Path(cfg).name, FOLDER / "hub" / Path(cfg).name):
        if path.is_file():
            break
    else:
        known = ", ".join(sorted(p.name for p in FOLDER.glob("*.yaml")))
        raise UserError(f"--cfg {cfg}: no such file; the models here are {known}")
    return _checked(read_yaml_mapping(path, "--cfg"), str(path))


def _checked(data: Any, where: str) -> dict:
    """The description, if it has everything that a model needs, in the right types. UserError otherwise."""
    if not isinstance(data, dict) or not {"backbone", "head", "anchors"} <= data.keys():
        raise UserError(f"{where}: a model yaml needs the keys nc, anchors, backbone and head")
    for key in ("depth_multiple", "width_multiple"):
        if not isinstance(data.get(key, 1.0), (int, float)) or not 0 < data.get(key, 1.0) < 100:
            raise UserError(f"{where}: {key} must be a number above 0, not {data[key]!r}")
    anchors = data["anchors"]
    is_list_of_lists = isinstance(anchors, list) and all(isinstance(level, list) for level in anchors)
    if not isinstance(anchors, int) and not is_list_of_lists:
        raise UserError(f"{where}: anchors must be a number, or a list of widths and heights per level, "
                        f"not {str(anchors)[:40]!r}")
    if not isinstance(data.get("nc", 1), int) or not 0 < data.get("nc", 1) <= 100_000:
        raise UserError(f"{where}: nc must be the number of classes, not {data['nc']!r}")
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
    return isinstance(row[1], int) and isinstance(row[2], str) and isinstance(row[3], list)


def check_cfg(own: dict, path: str) -> None:
    """Raise UserError, with the first difference, where a yaml is not the checkpoint's own."""
    given = read_yaml(path)
    for key in ("depth_multiple", "width_multiple"):
        if given.get(key, 1.0) != own.get(key, 1.0):
            raise UserError(f"--cfg {path}: {key} is {given.get(key, 1.0)}, the checkpoint's is {own.get(key, 1.0)}; "
                            "leave --cfg out")
    rows, own_rows = given["backbone"] + given["head"], own["backbone"] + own["head"]
    for i, (a, b) in enumerate(zip_longest(rows, own_rows, fillvalue="nothing")):
        if str(a) != str(b):
            raise UserError(f"--cfg {path}: row {i} is {a}, the checkpoint's is {b}; "
                            "leave --cfg out, the checkpoint knows its model")
