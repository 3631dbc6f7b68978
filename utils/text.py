"""Text files that people and other programs write: one decoding for all of them."""
from __future__ import annotations

import codecs
from pathlib import Path

from utils.errors import UserError

# Byte order marks and the encoding that each tells. UTF-32's begins like UTF-16's, so it comes first.
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
         (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def decoded(data: bytes, path: str | Path) -> str:
    """The text of a file's bytes: as its byte order mark says, UTF-16 where every second byte is 0, else UTF-8.

    The mark itself is left out. UserError, which names `path`, the encoding and the place, where the bytes are not
    such a text: a guess would put wrong characters into names and paths.
    """
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", ""))
    if not encoding:
        start = data[:64]
        pairs = len(start) // 2
        if pairs and not any(start[1:2 * pairs:2]):
            encoding = "utf-16-le"
        elif pairs and not any(start[:2 * pairs:2]):
            encoding = "utf-16-be"
        else:
            encoding = "utf-8"
    try:
        return data[len(mark):].decode(encoding)
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not {encoding.upper()} (byte 0x{data[error.start]:02x}); "
                        "save the file as UTF-8") from None


def read_text(path: Path, what: str = "") -> str:
    """A whole text file, with line ends as \\n. `what` names its flag for the error where there is no such file.

    UserError also where it can't be read or decoded.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{what} {path}: no such file".strip()) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    return decoded(data, path).replace("\r\n", "\n").replace("\r", "\n")
