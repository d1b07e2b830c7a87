"""500 generated modules: each is fused, or declined with a reason; none is wrong, none crashes."""

from __future__ import annotations

import pytest

from tests.fuzz.check import Tally, check
from tests.fuzz.draw import draw

CASES, CHUNK = 500, 50


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_generated_modules(first: int) -> None:
    tally = Tally([check(seed) for seed in range(first, first + CHUNK)])
    assert not tally.failures, "\n".join(map(str, tally.failures))
    assert tally.count("impossible") < CHUNK / 3
    assert tally.fused_share > 0.5, tally.reasons()


def test_a_seed_is_a_case() -> None:
    assert draw(17) == draw(17)
    assert len({str(draw(seed)) for seed in range(100)}) == 100
