"""Text files that people and other programs write: one decoding for all of them, and one reader for each kind."""
from __future__ import annotations

import codecs
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError, first_line

# Byte order marks and the encoding that each tells. UTF-32's begins like UTF-16's, so it comes first.
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
         (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
NO_FILES = ("idna", "punycode")  # encodings of names; decoding a file takes minutes
LARGEST_YAML = 2**20     # bytes; ImageNet's 21,841 names take half of it
MOST_VALUES = 50_000     # in a yaml, counting what an alias stands for wherever it stands
TOO_MANY = f"holds more than {MOST_VALUES:,} values"
MOST_DIGITS = 100        # of a whole number in a yaml
TAG = "tag:yaml.org,2002:"


def decoded(data: bytes, path: str | Path, declared: str = "utf-8") -> str:
    """The text of a file's bytes: as its byte order mark says, UTF-16 where bytes are 0, else as `declared`.

    declared: the encoding that the file itself names (XML), else UTF-8. The mark itself is left out. UserError, which
    names `path`, the encoding and the place, where the bytes are not such a text: a guess would put wrong characters
    into names and paths.
    """
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", ""))
    body = data[len(mark):]
    if not encoding and b"\0" in data:
        first, second = data[::2].count(0), data[1::2].count(0)
        # In UTF-16 it is nearly always the same one of two bytes, and of many letters.
        many = max(first, second) > len(data) / 16
        encoding = "utf-16-le" if many and second > 4 * first else "utf-16-be" if many and first > 4 * second else ""
        if not encoding:
            raise UserError(f"{path}: is not a text file")
    encoding = encoding or declared
    try:
        if codecs.lookup(encoding).name in NO_FILES:
            raise LookupError
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        line = body[:error.start].count(b"\n") + 1
        byte = f" (byte 0x{body[error.start]:02x})" if error.start < len(body) else ""
        raise UserError(f"{path}: line {line} is not {encoding.upper()}{byte}; save the file as UTF-8") from None
    except (LookupError, ValueError):
        raise UserError(f"{path}: says that it is {encoding[:40]!r}, which is no encoding; save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: is not a text file")
    return text


def read_bytes(path: Path, what: str = "") -> bytes:
    """A whole file. `what` names its flag for the error where there is no such file.

    UserError where it can't be read, or is none: reading a pipe or a device might never end.
    """
    if not os.path.isfile(path):
        reason = "can't be read (not a file)" if os.path.exists(path) else "no such file"
        raise UserError(f"{what} {path}: {reason}".strip())
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); mend its permissions") from None


def read_text(path: Path, what: str = "") -> str:
    """A whole text file, with line ends as \\n. `what` names its flag for the error where there is no such file.

    UserError also where it can't be read or decoded.
    """
    return decoded(read_bytes(path, what), path).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, what: str = "") -> list[str]:
    """The lines of a list that hold something, without the spaces and quotes around them, and without # comments.

    A file beside the list may be called like a comment or with quotes. UserError as read_text().
    """
    lines = []
    for line in map(str.strip, read_text(path, what).split("\n")):
        if line.startswith(("#", "'", '"')) and not os.path.exists(path.parent / line):
            quoted = len(line) > 2 and line[0] == line[-1] != "#"
            line = line[1:-1].strip() if quoted else "" if line[0] == "#" else line
        lines += [line] if line else []
    return lines


def read_json(path: Path, what: str = "") -> Any:
    """What a JSON file holds. UserError as read_text(), and where it is none."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path}: not readable as JSON ({first_line(error, 80)})".strip()) from None


# Yaml -----------------------------------------------------------------------------------------------------------------

def read_yaml_mapping(path: Path, what: str, texts: Collection[str] = ()) -> dict:
    """A yaml file that must be a mapping, such as hyper-parameters; `what` names the flag for the error.

    Keys and values below the keys in `texts` are read as they are written: `on`, `010` and `12:30` are texts there.
    Whatever the file holds: UserError, or plain values of a size that can be printed, copied and counted.
    """
    if os.path.isfile(path) and os.path.getsize(path) > LARGEST_YAML:
        raise UserError(f"{path}: has more than {LARGEST_YAML:,} bytes, which no such yaml needs; is it another file?")
    text = read_text(path, what)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            for key, value in root.value:
                if isinstance(key, yaml.ScalarNode) and key.value in texts and value.tag != f"{TAG}null":
                    _keep_text(value)
        data = loader.construct_document(root) if root else None
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {problem}" if mark and problem else first_line(error)
        reason = "nested too deep" if isinstance(error, RecursionError) else reason
        raise UserError(f"{path}: not a readable yaml ({reason})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping 'key: value'")
    return data


def _keep_text(node: yaml.Node) -> None:
    """Make every key and value below a node a text, but for an empty value and `~`."""
    if not isinstance(node, yaml.ScalarNode):
        for child in _children(node):
            if child.tag != f"{TAG}merge" or isinstance(node, yaml.SequenceNode):
                _keep_text(child)
    elif node.tag != f"{TAG}null" or node.value not in ("", "~"):
        node.tag = f"{TAG}str"


def _children(node: yaml.Node) -> list[yaml.Node]:
    """The values of a list; the keys and values of a mapping."""
    return [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else list(node.value)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without what it reads in silence or fails on. All it raises for a text is YAMLError.

    It refuses keys that are given twice, an alias inside of what it stands for, aliases that make the text too large,
    and scalars that are not of the type that they look like or name.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.nodes = 0
        self.sizes: dict[int, int] = {}  # of the collections that are composed: the number of values in them

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.nodes += 1
        if self.nodes > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=TOO_MANY, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        node = super().compose_sequence_node(anchor)
        self._weigh(node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge"):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value[:40]}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        self._weigh(node)
        return node

    def _weigh(self, node: yaml.Node) -> None:
        """Refuse a node that is in itself, or too large with its aliases written out."""
        size = 1
        for child in _children(node):
            if not isinstance(child, yaml.ScalarNode) and id(child) not in self.sizes:  # it is still being composed
                raise yaml.MarkedYAMLError(problem="an alias stands in what it is for", problem_mark=node.start_mark)
            size += self.sizes.get(id(child), 1)
        if size > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=TOO_MANY, problem_mark=node.start_mark)
        self.sizes[id(node)] = size

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if node.tag == f"{TAG}int" and len(node.value) > MOST_DIGITS:
                raise ValueError
            value = super().construct_object(node, deep)
            if isinstance(value, str) and b"\0" in value.encode("utf-8", "surrogateescape"):  # and others fail
                raise ValueError
            return value
        except yaml.YAMLError:
            raise
        except Exception:  # its constructors raise what int(), datetime and dict lookups do
            what = f"{str(node.value)[:40]!r} is no {node.tag.removeprefix(TAG)}"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from None
