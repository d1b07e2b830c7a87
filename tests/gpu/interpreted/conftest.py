"""The tests of this folder run the generated kernels on CPU tensors, in Triton's interpreter.

The variable must be set before triton is imported, so they run in a process of their own, which tests/gpu/test_interpreted.py
starts; by hand:  TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreted

Every buffer that torch.empty gives holds NaN here: what is not written shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill fresh memory with NaN, and integers with their largest value."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks so small that the small layers of these tests have edges."""
    from moecompile.codegen import gpu
    from tests.gpu.interpreted import blocks

    gpu.set_config_source(blocks.small)
    yield
    gpu.set_config_source(None)
