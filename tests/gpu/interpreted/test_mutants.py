"""Every way of mutants.py to break a kernel is noticed by a short list of checks, or at most one in twenty is not.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import pytest
import torch

from moecompile.codegen import gpu, gpu_choose, gpu_router_text, gpu_text
from moecompile.ir.spec import OutOfRange, RouterSpec, WeightOn
from moecompile.kernels.gpu import decode, permute
from tests.gpu import layers
from tests.gpu.interpreted import (
    agree,
    test_forms,
    test_main_gradient,
    test_permute,
    test_router,
    test_router_backward,
    test_router_stats,
)
from tests.gpu.interpreted.mutants import MUTANTS, Mutant

ROUTER_TEXTS = (gpu_router_text.router_text, gpu_router_text.grad_router_text)
SECONDS = 300  # a mutant that runs longer is noticed, too
ELSEWHERE = {"schedule": (permute, "SCHEDULE"), "clean": (permute, "CLEAN"), "expert": (decode, "EXPERT")}


def layer(**given: Any) -> Any:
    return layers.make(**{"E": 3, "K": 2, "H": 20, "F": 18, "O": 17, "bias": True, **given})


def token() -> None:
    """The decode path, with and without a weight on the input, skipped ids among them."""
    for on in (WeightOn.OUTPUT, WeightOn.INPUT):
        spec = layer(E=8, K=4, on=on)
        given = layers.inputs(spec, 1)
        given.ids = torch.tensor([[3, 8, -1, 2]])
        agree.forward(spec, given)
    spec = layer(E=8, layout="interleaved-transposed")
    agree.forward(spec, layers.inputs(spec, 1))
    agree.nan_stays_alone(layer(E=8), 2)


def many() -> None:
    """A few rows for each expert, then one expert with two tiles, and every tile in use."""
    spec = layer()
    given = layers.inputs(spec, 6, "holes")
    agree.forward(spec, given)
    agree.training(spec, given)
    spec = layer(E=1, K=1, F=33, bias=False)
    agree.training(spec, layers.inputs(spec, 17))
    agree.nan_stays_alone(layer(), 5)
    for layout in ("interleaved-transposed", "split"):
        spec = layer(layout=layout)
        agree.forward(spec, layers.inputs(spec, 5))
        agree.training(spec, layers.inputs(spec, 5))


def on_input() -> None:
    spec = layer(E=2, H=36, on=WeightOn.INPUT)
    agree.training(spec, layers.inputs(spec, 5, "holes"))


def main_gradients() -> None:
    test_main_gradient.check(test_main_gradient.layer(), 3)
    test_main_gradient.check(test_main_gradient.layer(layout="separate", bias=False), 3)


def wrapped() -> None:
    for tokens in (1, 3):
        spec = layer(E=8, out_of_range=OutOfRange.INDEX)
        given = layers.inputs(spec, tokens)
        given.ids[0] = torch.tensor([-1, -8])
        agree.training(spec, given)
        agree.forward(spec, given)


def permutations() -> None:
    for few in (True, False):
        for drawn in ("random", "skipped"):
            test_permute.check(5, drawn, few, (100,), (16,))
    test_permute.test_more_chunks_than_one_step_of_the_scan_takes()


def routers() -> None:
    names = ("mixtral", "deepseek-v3", "deepseek-v2", "sqrtsoftplus", "gpt-oss", "groups of no power of two")
    for name in names:
        spec = test_router.ROUTERS[name]
        test_router.check(spec, *test_router.drawn(spec, 5))
    small = RouterSpec(6, 3, "sigmoid", torch.float32, False, None, "score", (("normalise", 0.5, 3.0),), True)
    test_router.check(small, test_router.drawn(small, 5)[0] - 2, None)
    test_router.check(dataclasses.replace(small, post=(("normalise", 0.5, 0.0),)), test_router.drawn(small, 5)[0], None)
    test_router.test_ids_are_in_range_and_unique_for_any_bits("mixtral")
    test_router.test_ties_go_to_the_lower_expert_and_a_zero_has_no_sign()
    test_router.test_negative_choices_are_ordered()
    test_router.test_nan_is_the_largest_as_in_topk()


def router_statistics() -> None:
    for name in ("mixtral", "groups of no power of two"):
        spec = test_router.ROUTERS[name]
        test_router_stats.check(spec, *test_router.drawn(spec, 5))
    spec = test_router.ROUTERS["olmoe"]
    test_router_stats.check_gradients(spec, *test_router.drawn(spec, 5))


def router_gradients() -> None:
    for name in ("mixtral", "olmoe", "deepseek-v3", "sqrtsoftplus", "gpt-oss", "llama4", "weights from the choice"):
        spec = test_router_backward.DIFFERENTIABLE[name]
        test_router_backward.check(spec, *test_router.drawn(spec, 5))
    for spec in test_router_backward.MORE.values():
        test_router_backward.check(spec, *test_router.drawn(spec, 3))
    test_router_backward.test_scores_that_underflow_have_no_slope()


def forms() -> None:
    """Each form of the grouped products, several tiles for each program, sums of no whole number of parts."""
    for form in ({"swap": 1, "tma": 1}, {"persistent": 1, "tma": 1}, {"persistent": 2}, {"swap": 1, "split": 2}, {"split": 4}):
        with pytest.MonkeyPatch.context() as patch:
            test_forms.use(form, patch)
            for layout in ("stacked", "interleaved-transposed") if "split" not in form else ("stacked",):
                spec = layers.make(E=3, K=2, H=24, F=48 if "split" in form else 40, layout=layout, bias=True)
                given = layers.inputs(spec, 17, "one" if layout == "stacked" else "random")
                agree.forward(spec, given)


def shared_sums() -> None:
    """Sums of the decode path in more parts than slots, and who ends a sum."""
    with pytest.MonkeyPatch.context() as patch:
        test_forms.use({"split": 2}, patch)
        spec = layer(E=16, K=3, F=18, O=33)
        agree.forward(spec, layers.inputs(spec, 2))
        test_forms.test_only_the_last_to_draw_ends_a_sum_and_puts_its_ticket_back(patch)


CHECKS: dict[str, tuple[Callable[[], None], ...]] = {
    "router": (routers, router_statistics),
    "router_softmax": (router_statistics,),
    "router_score": (routers,),
    "router_post": (routers,),
    "grad_router": (router_gradients, router_statistics),
    "permute": (permutations,),
    "schedule": (permutations,),
    "programs": (forms,),
    "up": (many, on_input, forms),
    "down": (shared_sums, many, on_input, forms),
    "clean": (permutations, wrapped),
    "decode_up": (token,),
    "decode_down": (token, shared_sums),
    "expert": (token,),
    "grad_matrix": (many, on_input, main_gradients),
    "grad_vector": (many, on_input, main_gradients),
}


@pytest.fixture
def fresh() -> Iterator[None]:
    """No text or kernel of another test is found, and none of this one stays."""
    yield
    forget()


def forget() -> None:
    for cached in (gpu_text.experts_text, gpu_text.permute_text, *ROUTER_TEXTS, gpu_choose.choose, gpu._builder):
        cached.cache_clear()
    gpu_text._ENVIRONMENT.cache.clear()  # type: ignore[union-attr]


def broken(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, key = ELSEWHERE.get(mutant.template, (None, ""))
    before = getattr(owner, key) if owner else gpu_text.TEMPLATES[mutant.template]
    parts = before.split(mutant.before)
    assert len(parts) > mutant.which + 1, f"{mutant.name}: the template no longer says {mutant.before!r}"
    at = mutant.which + 1
    after = mutant.before.join(parts[:at]) + mutant.after + mutant.before.join(parts[at:])
    if owner:
        monkeypatch.setattr(owner, key, after)
    else:
        texts = {**gpu_text.TEMPLATES, mutant.template: after}
        monkeypatch.setattr(gpu_text._ENVIRONMENT, "loader", jinja2.DictLoader(texts))
    forget()


def killed(mutant: Mutant) -> bool:
    """Run the checks in a forked child: a mutant may write where it likes, or never end."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            for check in CHECKS.get(mutant.template, (many, on_input)):
                check()
        except BaseException:  # a wrong number, an index out of bounds, a text that does not parse: noticed
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@pytest.mark.filterwarnings("ignore")
def test_the_checks_pass_on_the_kernels_as_they_are(fresh: None) -> None:
    for check in {c for checks in (*CHECKS.values(), (many, on_input)) for c in checks}:
        start = time.perf_counter()
        check()
        print(f"{check.__name__}: {time.perf_counter() - start:.1f} s")


@pytest.mark.filterwarnings("ignore")
def test_mutants_are_killed(fresh: None) -> None:
    survivors = []
    for mutant in MUTANTS:
        with pytest.MonkeyPatch.context() as patch:
            broken(mutant, patch)
            if not killed(mutant):
                survivors.append(mutant.name)
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} mutants killed; survivors: {survivors}")
    assert len(MUTANTS) >= 40
    assert len(survivors) <= len(MUTANTS) // 20, survivors
