"""Weights seen through a copy that lies otherwise in memory: what a view of the copy holds is found in the original."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from moecompile.recognize.mode import _through


def original(rng: random.Random) -> Tensor:
    """A view of a parameter: a slice, an expansion, dimensions in another order."""
    p = torch.arange(5 * 7 * 6).view(5, 7, 6)
    start = rng.randrange(3)
    p = [p, p[:, start : start + 4], p[start:, :, 1::2], p[:1].expand(3, -1, -1), p[..., start : start + 1]][rng.randrange(5)]
    return p.permute(rng.sample(range(3), 3))


def view(copy: Tensor, rng: random.Random) -> Tensor:
    """One expert's matrix or all experts', sliced and transposed; or another view that is no matrix of the original."""
    d = rng.randrange(3)
    at = rng.randrange(copy.shape[d])
    found = [
        lambda: copy,
        lambda: copy.select(d, at),
        lambda: copy.narrow(d, at, copy.shape[d] - at).transpose(0, 2),
        lambda: copy.narrow(d, at, 1),
        lambda: copy[..., at % copy.shape[2] :: 2],
        lambda: copy.flatten(0, 1)[at:],
        lambda: copy.diagonal(),
        lambda: copy.unflatten(1, (2, -1))[:, at % 2] if copy.shape[1] % 2 == 0 else copy,
    ]
    t = found[rng.randrange(len(found))]()
    return t if t.untyped_storage().data_ptr() == copy.untyped_storage().data_ptr() else copy  # flatten may copy


@pytest.mark.parametrize("seed", range(400))
def test_a_view_of_a_copy_is_the_view_of_the_original_or_none(seed: int) -> None:
    rng = random.Random(seed)
    of = original(rng)
    copy = of.contiguous() if rng.random() < 0.5 else torch.empty_like(of).copy_(of)
    t = view(copy, rng)
    found = _through(of, copy, t.storage_offset(), t.stride(), t.shape)
    if found is not None:
        assert torch.equal(of.as_strided(t.shape, found[1], found[0]), t)


def test_it_finds_slices_and_expansions() -> None:
    """The two layouts that autocast copies to dense tensors."""
    p = torch.arange(5 * 7 * 6).view(5, 7, 6)
    for of in (p[:, 2:6], p[1:2].expand(4, -1, -1)):
        copy = of.contiguous()
        assert _through(of, copy, 0, copy.stride(), copy.shape) == (of.storage_offset(), of.stride())
        one = copy[2].t()
        assert _through(of, copy, one.storage_offset(), one.stride(), one.shape) == (of[2].storage_offset(), of[2].t().stride())
