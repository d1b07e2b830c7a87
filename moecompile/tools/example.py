"""The Python file that a command is given: example() -> (module or function, inputs).  It is run: open it before you trust it."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from typing import Any


def load(file: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What example() returns. ValueError or OSError, in a sentence, where the file is not such a file; what example() itself raises
    is the user's, with its traceback."""
    try:
        scope = runpy.run_path(file)
    except SyntaxError as e:
        raise ValueError(f"{e.filename}:{e.lineno}: {e.msg}") from e
    except ImportError as e:
        raise ValueError(f"{file}: {e}") from e
    if "example" not in scope:
        raise ValueError(f"{file}: has no function example() -> (module or function, inputs)")
    found = scope["example"]()
    if not (isinstance(found, tuple) and len(found) == 2 and callable(found[0]) and isinstance(found[1], (tuple, list))):
        shown = ", ".join(type(part).__name__ for part in found) if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"{file}: example() returns ({shown}), needs (module or function, tuple of inputs)")
    return found[0], tuple(found[1])
