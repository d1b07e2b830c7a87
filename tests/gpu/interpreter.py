"""Whether Triton's interpreter works here."""

from __future__ import annotations


def missing() -> str | None:
    """Why kernels cannot be interpreted here, or None."""
    try:
        import numpy
        import triton
    except ImportError as error:
        return f"the interpreter needs triton and numpy: {error}"
    versions = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        # its scalars are arrays of one element, which numpy 2.4 no longer takes for numbers
        return f"the interpreter of triton {triton.__version__} needs numpy < 2.4, got {numpy.__version__}"
    return None
