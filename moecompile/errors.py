"""What users meet, and what only we may meet."""

from __future__ import annotations


class Unsupported(Exception):
    """A layer of the user's model that we cannot replace: the original code runs, counted and explained."""


class BuildError(Exception):
    """A kernel could not be built or loaded here (no compiler, a compiler error, no permission to write the cache)."""


class VerifyError(Exception):
    """Our own bug: a graph, spec or number that no correct pass or kernel can produce. Names the pass or kernel."""


class CaptureError(RuntimeError):
    """The user's call: what a CUDA graph cannot hold was to happen while one was captured. Says what to do before."""


def need(condition: object, reason: str) -> None:
    """Unsupported, for this reason, unless the condition holds."""
    if not condition:
        raise Unsupported(reason)
