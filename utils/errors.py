"""How a script ends: a user's mistake is one line and exit code 2, a number that is not finite is exit code 3."""
from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message is one line that names the file or flag and says how."""


class NonFiniteError(Exception):
    """Training met a NaN or an infinity. The message is one line that names the batch and what helps."""


def run_cli(main: Callable[[], object]) -> None:
    """Run a script's main and turn its expected failures into one line on stderr and an exit code."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        print("interrupted; a training run goes on with --resume", file=sys.stderr)
        sys.exit(130)
