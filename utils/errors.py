"""How a script ends: a user's mistake is one line and exit code 2, a number that is not finite is exit code 3."""
from __future__ import annotations

import gc
import io
import re
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

LONGEST_MESSAGE = 2000  # characters of a message


class UserError(Exception):
    """Something the user can mend. The message is one line that names the file or flag and says how."""


class NonFiniteError(Exception):
    """A training, or a file's weights, hold a NaN or an infinity. The message is one line that names where."""


class Interrupted(Exception):
    """A signal ended the script. The message is one line that says how to go on; the exit code is the shell's."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class OneLineParser(ArgumentParser):
    """An ArgumentParser that refuses a command line with a UserError, in argparse's words and without its usage."""

    def error(self, message: str) -> Any:
        """Raise the UserError."""
        raise UserError(f"{message.removeprefix('argument ')}; --help shows the flags")


def run_cli(main: Callable[[], object]) -> None:
    """Run a script's main and turn its expected failures into one line on stderr and an exit code.

    A letter that the system's encoding lacks, in a class or a file name, is printed as its number: \\u8272.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    loud = threading.excepthook
    # TensorBoard writes in a thread, which hands its OSError on to the next call: no need to print it twice.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else loud(args)
    try:
        main()
    except UserError as error:
        _end(f"error: {_innermost(error)}", 2)
    except NonFiniteError as error:
        _end(f"stopped: {error}", 3)
    except Interrupted as error:
        _end(str(error), error.code)
    except KeyboardInterrupt:
        _end("interrupted; a training run goes on with --resume", 130)
    except Exception as error:  # of OpenCV, too
        mend = _environment(error)
        if not mend:
            raise
        _end(f"error: {mend}", 2)
    finally:
        gc.freeze()  # Python's last collection would look at all of PyTorch for a second, to free what ends anyway


def _end(message: str, code: int) -> None:
    """One line, whatever of a user's file is quoted in it."""
    line = " ".join(message.splitlines())
    print(line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]} ...", file=sys.stderr)
    sys.exit(code)


def _innermost(error: UserError) -> str:
    """The message itself: one that comes from a loader's worker carries the worker's traceback."""
    text = str(error)
    if not text.startswith("Caught UserError"):
        return text
    return text.strip().splitlines()[-1].partition("UserError: ")[2] or text


def first_line(error: Exception, length: int = 160) -> str:
    """The first line of an error's message, as far as it fits; its type where there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]


def _environment(error: Exception) -> str:
    """What the machine, not this program, ran out of, and the mend; empty for anything else."""
    first, going_on = first_line(error, 120), "; a training goes on with --resume"
    full = "out of memory", "can't allocate memory", "Insufficient memory"
    if isinstance(error, MemoryError) or any(words in first for words in full):
        return (f"out of memory ({first}); go on with --resume and fewer --workers, "
                "or start again with a smaller --batch-size or --imgsz")
    if "DataLoader worker" in str(error):
        return (f"a loader process died ({first}): out of memory, or /dev/shm is too small "
                f"(docker run --shm-size 8g); give fewer --workers, or 0{going_on}")
    shared_memory = r"unable to (open|allocate|write|resize|mmap).*(shm|shared memory|/torch_)"
    if re.search(rf"{shared_memory}|No space left on device", str(error)):
        return f"no space left, on the disk or in /dev/shm ({first}); free some, or give --workers 0{going_on}"
    if isinstance(error, UnicodeEncodeError):  # of a path
        return f"{error.object[:200]}: has letters that this system's encoding lacks; start with PYTHONUTF8=1"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the system'}: {error.strerror}{going_on}"
    return ""
