"""Random layers, loads and sizes, against float64.

Run as tests/gpu/test_interpreted.py does. MOE_GPU_FUZZ: how many cases (1000); a failing case names its seed, and
MOE_GPU_FUZZ_SEED=n runs that one alone.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from moecompile.codegen import gpu_choose
from moecompile.ir.spec import Groups, OutOfRange, RouterSpec, WeightOn
from tests.gpu import layers
from tests.gpu.interpreted import agree, test_permute, test_router

CASES = int(os.environ.get("MOE_GPU_FUZZ", "1000"))
ONE = os.environ.get("MOE_GPU_FUZZ_SEED")
BLOCK = 50  # cases of one test


def fuzz_router(r: random.Random) -> None:
    count = r.choice((1, 1, 2, 3, 4))
    experts = count * r.randint(2, 9)
    kept = r.randint(1, count)
    top_k = r.randint(1, min(8, experts // count * kept))
    groups = None if count == 1 else Groups(count, kept, r.choice(("max", "top2")), r.choice((0.0, float("-inf"))))
    score = r.choice(("softmax", "sigmoid", "sqrtsoftplus"))
    post = [step for step in (("normalise", r.choice((0.0, 1e-20)), r.choice((0.0, 1e-9))), ("scale", 2.5)) if r.random() < 0.5]
    source = "score" if groups is not None else r.choice(("score", "choice", "logits"))
    if source == "logits":
        post = [("softmax",), *(p for p in post if p[0] == "scale")]
    spec = RouterSpec(experts, top_k, score, torch.float32, groups is None and r.random() < 0.5, groups, source, tuple(post), True)
    test_router.check(spec, *test_router.drawn(spec, r.randint(0, 13), r.randrange(2**31)))


def fuzz_permute(r: random.Random) -> None:
    drawn, few = r.choice(list(test_permute.IDS)), r.random() < 0.5
    test_permute.check(r.randint(1, 20), drawn, few, (r.randint(1, 120),), (r.choice((1, 4, 16)),))


def fuzz_experts(r: random.Random, train: bool) -> None:
    experts = r.randint(1, 6)
    spec = layers.make(
        E=experts,
        K=r.randint(1, min(3, experts)),
        H=r.randint(1, 24),
        F=r.randint(1, 24),
        O=r.randint(1, 24),
        layout=r.choice(layers.LAYOUTS),
        activation=r.choice(list(layers.ACTIVATIONS.values())),
        bias=r.random() < 0.4,
        on=r.choice(list(WeightOn)),
        out_of_range=OutOfRange.SKIP,
        dtype=r.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16)),
    )
    given = layers.inputs(
        spec, r.choice((0, 1, 2, 3, 5, 8, 13, 17)), r.choice(("random", "one", "half", "holes")), r.randrange(2**31)
    )
    if not train:
        agree.forward(spec, given)
        return
    few = gpu_choose.FEW_PAIRS
    gpu_choose.FEW_PAIRS = r.choice((few, few, 0))
    try:
        agree.training(spec, given)
    finally:
        gpu_choose.FEW_PAIRS = few


def case(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    kind = seed % 20
    if kind < 9:
        fuzz_router(r)
    elif kind < 15:
        fuzz_permute(r)
    else:
        fuzz_experts(r, train=kind >= 18)


@pytest.mark.parametrize("block", [ONE] if ONE else range(0, CASES, BLOCK))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fuzz(block: int | str) -> None:
    for seed in [int(block)] if ONE else range(int(block), min(int(block) + BLOCK, CASES)):
        try:
            case(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
