"""Memory kept for gradients is handed out again only when nobody holds it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from moecompile.runtime import kept_memory

SHAPE = (512, 1024)  # 2 MiB of float32


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    kept_memory.release()
    yield
    kept_memory.release()


def make() -> torch.Tensor:
    return kept_memory.empty(SHAPE, torch.float32)


def test_torch_counts_uses_of_a_storage_as_expected() -> None:
    assert kept_memory._counts_uses()


def test_a_dead_tensors_memory_serves_the_next() -> None:
    first = make()
    address = first.data_ptr()
    del first
    again = make()
    assert again.data_ptr() == address and again.shape == SHAPE and again.is_contiguous()
    assert kept_memory.kept() == again.nbytes


@pytest.mark.parametrize(
    "hold", [lambda t: t, lambda t: t[3:5], lambda t: t.numpy(), lambda t: t.untyped_storage(), lambda t: t.detach()]
)
def test_what_somebody_holds_is_left_alone(hold) -> None:  # type: ignore[no-untyped-def]
    first = make()
    address, held = first.data_ptr(), hold(first)
    del first
    gc.collect()
    second = make()
    assert second.data_ptr() != address
    del held, second


def test_a_held_gradient_keeps_its_values_while_more_are_made() -> None:
    first = make().fill_(1.0)
    others = [make().fill_(float(i)) for i in range(2, 6)]
    assert bool((first == 1.0).all()) and len({t.data_ptr() for t in (first, *others)}) == 5


def test_another_dtype_of_the_same_size_may_have_it() -> None:
    address = make().data_ptr()
    other = kept_memory.empty((1024, 1024), torch.bfloat16)
    assert other.data_ptr() == address and other.dtype == torch.bfloat16


def test_a_storage_that_was_resized_is_forgotten() -> None:
    first = make()
    first.untyped_storage().resize_(0)
    del first
    again = make()
    assert again.untyped_storage().nbytes() == again.numel() * 4


def test_no_more_than_the_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory, "_limit", lambda: 5 << 20)
    held = [make() for _ in range(4)]
    assert kept_memory.kept() == 4 << 20
    held.clear()
    kept_memory.empty((1024, 1024), torch.float32)  # 4 MiB: the two free blocks make room
    assert kept_memory.kept() == 4 << 20


def test_deterministic_algorithms_still_fill_with_nan() -> None:
    make().fill_(1.0)
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(make().isnan().all())
    finally:
        torch.use_deterministic_algorithms(False)


def test_small_tensors_are_torchs() -> None:
    kept_memory.empty((16,), torch.float32)
    assert kept_memory.kept() == 0
