"""Numeric tests run poisoned: what torch.empty returns is filled with NaN, so a row that nobody wrote shows."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Iterator

import pytest
import torch

POISONED = ("numeric", "fuzz")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fixed seed before every test; and, under tests/numeric and tests/fuzz, poisoned memory."""
    torch.manual_seed(0)
    here = pathlib.Path(__file__).parent
    poisoned = pathlib.Path(request.path).relative_to(here).parts[0] in POISONED
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lru_cache.*")  # Dynamo, of functions inside transformers
        if poisoned:
            torch.use_deterministic_algorithms(True, warn_only=True)
            assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
