"""Tables of addresses and CUDA graphs, with a capture that is only claimed: there is no GPU here.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moecompile.codegen import gpu_tables
from moecompile.errors import CaptureError
from moecompile.runtime import fallback
from moecompile.runtime.dispatch import Dispatch
from tests.gpu import layers
from tests.gpu.interpreted import agree

SPEC = layers.make(E=4, K=2, H=20, F=12, layout="separate")


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Claims that the current stream captures, or that it does not; no table is known before."""
    gpu_tables._TABLES.clear()
    gpu_tables._CAPTURED.clear()
    yield lambda on: monkeypatch.setattr(gpu_tables, "capturing", lambda device: on)
    gpu_tables._TABLES.clear()
    gpu_tables._CAPTURED.clear()


def call(given: layers.Inputs) -> Tensor:
    return agree.IMPLEMENTATION.experts(given.x, given.weights, given.ids, given.params, [], SPEC.text(), "")


@pytest.mark.parametrize("tokens", (1, 20))
def test_first_use_under_capture_names_the_cure(tokens: int, capture: Callable[[bool], None]) -> None:
    given = layers.inputs(SPEC, tokens)
    capture(True)
    with pytest.raises(CaptureError, match=r"4 separate expert parameters .* run the layer once .* before capture"):
        call(given)
    capture(False)
    before = call(given)
    capture(True)
    assert torch.equal(call(given), before)


def test_what_a_graph_reads_outlives_every_other_table(capture: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tables, "LIMIT", 3)
    given = layers.inputs(SPEC, 2)
    capture(False)
    call(given)
    capture(True)
    call(given)
    kept = [gpu_tables.table(given.params[i : i + 4]) for i in (0, 4, 8)]
    capture(False)
    for seed in range(1, 4):
        call(layers.inputs(SPEC, 2, seed=seed))
    assert len(gpu_tables._TABLES) == 3
    again = [gpu_tables.table(given.params[i : i + 4]) for i in (0, 4, 8)]
    assert all(a is b for a, b in zip(kept, again, strict=True))


def test_a_table_is_no_part_of_the_memory_of_this_threads_graph(
    capture: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool of a graph that is warmed up takes what its thread allocates, and overwrites what it does not know."""
    makers, made = [], gpu_tables._made

    def noted(*key: object) -> Tensor:
        makers.append(threading.get_ident())
        return made(*key)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_tables, "_made", noted)
    capture(False)
    call(layers.inputs(SPEC, 2))
    assert len(makers) == 3 and threading.get_ident() not in makers


@pytest.mark.parametrize("what", ("experts", "experts_train", "experts_bwd"))
def test_the_error_reaches_the_caller_and_breaks_nothing(what: str, capture: Callable[[bool], None]) -> None:
    """A fallback to the original code would fail in the capture as well, and stay."""
    given, name = layers.inputs(SPEC, 3), f"capture {what}"
    dispatch = Dispatch(agree.IMPLEMENTATION)
    arguments = (given.x, given.weights, given.ids, given.params, [], SPEC.text(), name)
    saved = torch.zeros(6, 24)
    capture(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CaptureError):
            if what == "experts_bwd":
                dispatch.experts_bwd(given.grad, *arguments, saved, [True] * (2 + len(given.params)))
            else:
                getattr(dispatch, what)(*arguments)
    assert not fallback.region(name).broken
