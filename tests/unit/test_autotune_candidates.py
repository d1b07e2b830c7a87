"""Which configurations are tried, and what runs when none was."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from moecompile.analysis.machine import MACHINES, Machine
from moecompile.autotune import bucket, entry, family
from moecompile.autotune.candidates import MOST, _form_pays, candidates, closed_form, estimate, floor_seconds, refusal, target_of
from moecompile.autotune.key import Problem, problem_of, spec_of
from moecompile.codegen import gpu_choose
from moecompile.ir.spec import ExpertsSpec
from moecompile.kernels.gpu.config import YOUNGER, Config

H200 = MACHINES["H200"]
SHAPES = {  # hidden, intermediate, experts, top_k, output, projections
    "qwen3": (2048, 768, 128, 8, 2048, 2),
    "mixtral": (4096, 14336, 8, 2, 4096, 2),
    "tiny": (5, 3, 1, 1, 7, 1),
}


def problem(kernel: str, index: int, shape: str = "qwen3", dtype: str = "bfloat16") -> Problem:
    return Problem(kernel, dtype, *SHAPES[shape], bucket=index)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("kernel", family.AXES)
def test_at_most_twelve_that_fit_the_default_first(machine: Machine, kernel: str) -> None:
    target = target_of(machine)
    for shape, index, dtype in itertools.product(SHAPES, (0, 5), ("bfloat16", "float32")):
        one = problem(kernel, index, shape, dtype)
        found = candidates(one, machine)
        assert 1 <= len(found) <= MOST == 12
        assert len(set(found)) == len(found)
        assert found[0] == closed_form(one, target)
        for config in found:
            assert refusal(one, config, target) is None, f"{one}: {config}"
            assert family.check(kernel, dataclasses.asdict(config)) is None, "the store would not read it back"


def test_what_cannot_fit_is_refused_with_the_reason() -> None:
    target = target_of(H200)
    assert "shared memory" in str(refusal(problem("up", 3), Config(128, 128, 128, 8, 5), target))
    assert "registers" in str(refusal(problem("up", 3), Config(128, 128, 64, 4, 2), target))
    assert refusal(problem("down", 3), Config(128, 128, 64, 8, 3), target) is None
    assert "registers" in str(refusal(problem("grad_z", 3), Config(128, 128, 64, 8, 3), target))
    small = dataclasses.replace(target, shared_memory=65536)
    assert refusal(problem("down", 3), Config(128, 128, 64, 8, 3), small) is not None


@pytest.mark.parametrize(
    ("arch", "block_m", "shared"),
    [("sm_80", 16, 73728), ("sm_80", 64, 49152), ("sm_90", 16, 73728), ("sm_90", 64, 73728), ("sm_100", 16, 73728),
     ("gfx942", 16, 73728), ("gfx942", 64, 49152)],
)  # fmt: skip
def test_shared_memory_is_what_the_compiler_said(arch: str, block_m: int, shared: int) -> None:
    """Compiled offline with Triton 3.7.1; sm_100 with 64 rows takes 16 bytes more than its tiles."""
    config = Config(block_m, 128, 128 if block_m == 16 else 64, 4, 3)
    assert family.shared_bytes(problem("down", 1), config, gpu_choose.TARGETS[arch]) == shared


def test_row_tiles_of_a_fixed_height() -> None:
    for kernel, height in itertools.product(family.GROUPED, (16, 32, 64, 128)):
        found = candidates(problem(kernel, 3), H200, block_m=height)
        assert {c.block_m for c in found} == {height}
        assert all(refusal(problem(kernel, 3), c, target_of(H200)) is None for c in found)


FORMS = {  # forms that the list has: kernel, bucket of rows per expert, shape, machine
    ("up", 2, "qwen3", "H200"): {"swap", "tma", "persistent"},
    ("up", 6, "qwen3", "H200"): {"tma", "persistent"},
    ("up", 6, "qwen3", "A100"): {"persistent"},
    ("up", 2, "qwen3", "MI300X"): {"persistent"},
    ("down", 1, "mixtral", "H200"): {"swap", "tma", "persistent", "split"},
    ("down", 1, "mixtral", "MI300X"): {"persistent"},
    ("grad_rows", 6, "qwen3", "H200"): {"persistent"},
    ("grad_z", 6, "qwen3", "H200"): set(),
    ("decode_down", 0, "mixtral", "H200"): {"split", "pdl"},
    ("decode_down", 0, "mixtral", "MI300X"): set(),
}


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_every_form_that_the_machine_has_is_tried_once(case: tuple[str, int, str, str]) -> None:
    kernel, index, shape, machine = case
    found = candidates(problem(kernel, index, shape), MACHINES[machine])
    assert all(name not in YOUNGER for name in found[0].plain()), "the closed form is the plain form"
    forms = [tuple((n, v) for n, v in c.plain().items() if n in YOUNGER) for c in found]
    assert {name for form in forms for name, _ in form} == FORMS[case]
    assert len({f for f in forms if f}) == len([f for f in forms if f])


@pytest.mark.parametrize("kernel", family.FORMS)
def test_a_form_is_made_of_the_axes(kernel: str) -> None:
    plain = closed_form(problem(kernel, 1), target_of(H200))
    for form in family.FORMS[kernel]:
        assert family.check(kernel, dataclasses.asdict(dataclasses.replace(plain, **form))) is None
    for name in YOUNGER:
        tried = {form.get(name, getattr(plain, name)) for form in family.FORMS[kernel]} | {getattr(plain, name)}
        assert tried == set(family.AXES[kernel][name]), name


PAYS = [  # kernel, bucket, shape, form, does it pay on a H200
    ("down", 0, "mixtral", {"persistent": 1}, False), ("down", 6, "mixtral", {"persistent": 1}, True),
    ("up", 6, "qwen3", {"persistent": 2}, False),  # of 147,456 bytes of operands one program fits
    ("down", 0, "mixtral", {"split": 4}, True), ("down", 3, "qwen3", {"split": 4}, False),
    ("down", 1, "mixtral", {"swap": 1}, True), ("down", 5, "mixtral", {"swap": 1}, False),
    ("decode_down", 0, "mixtral", {"split": 2}, False), ("decode_down", 0, "mixtral", {"split": 2, "block_n": 64}, True),
    ("decode_down", 0, "mixtral", {"split": 4, "block_n": 64}, False), ("decode_down", 0, "mixtral", {"pdl": 1}, True),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "index", "shape", "form", "pays"), PAYS, ids=str)
def test_a_form_is_tried_where_it_can_pay(kernel: str, index: int, shape: str, form: dict[str, int], pays: bool) -> None:
    one = problem(kernel, index, shape)
    assert _form_pays(one, dataclasses.replace(closed_form(one, target_of(H200)), **form), H200) is pays


@pytest.mark.parametrize(
    ("kernel", "form", "machine", "why"),
    [("up", {"swap": 1}, "A100", "sm >= 90"), ("down", {"tma": 1}, "MI300X", "sm >= 90 for tensor descriptors"),
     ("down", {"split": 2}, "MI300X", "barrier"), ("decode_down", {"pdl": 1}, "A100", "dependent launches")],
)  # fmt: skip
def test_a_form_that_the_machine_lacks_is_refused_with_the_reason(
    kernel: str, form: dict[str, int], machine: str, why: str
) -> None:
    one, target = problem(kernel, 1), target_of(MACHINES[machine])
    plain = closed_form(one, target)
    assert refusal(one, plain, target) is None
    assert why in str(refusal(one, dataclasses.replace(plain, **form), target))
    assert refusal(one, dataclasses.replace(closed_form(one, target_of(H200)), **form), target_of(H200)) is None


def test_descriptors_want_rows_of_16_bytes() -> None:
    config = dataclasses.replace(closed_form(problem("up", 3, "tiny"), target_of(H200)), tma=1)
    assert "16 bytes" in str(refusal(problem("up", 3, "tiny"), config, target_of(H200)))


@pytest.mark.parametrize(
    ("arch", "family_", "config", "shared"),
    [
        ("sm_80", "down", Config(16, 128, 128, 4, 4, swap=1), 110592),
        ("sm_90", "down", Config(16, 128, 128, 4, 4, swap=1), 147456),
        ("sm_90", "up", Config(16, 64, 128, 4, 4, swap=1), 147456),
        ("sm_90", "up", Config(128, 128, 64, 8, 3, persistent=1), 180224),
        ("sm_90", "down", Config(128, 128, 64, 8, 3, persistent=1), 131072),
    ],
)
def test_shared_memory_of_a_form_is_what_the_compiler_said(arch: str, family_: str, config: Config, shared: int) -> None:
    """Compiled offline with Triton 3.7.1 and 3.6.0."""
    assert family.shared_bytes(problem(family_, 1), config, gpu_choose.TARGETS[arch]) == shared


def test_the_list_tries_more_than_one_tile() -> None:
    for kernel in family.GEMMS:
        found = candidates(problem(kernel, 4), H200)
        assert len({(c.block_m, c.block_n, c.block_k) for c in found}) >= 4


def test_later_candidates_are_not_estimated_faster() -> None:
    one = problem("grad_matrix", 5)
    times = [estimate(one, c, H200) for c in candidates(one, H200)[1:]]
    assert all(a <= b * 1.06 for a, b in itertools.pairwise(times))
    assert min(times) >= floor_seconds(one, H200) * 0.999


def test_buckets_are_those_of_the_kernels() -> None:
    for tokens in (0, 1, 8, 9, 33, 128, 129, 512, 2048, 8192, 32768):
        index = bucket.bucket_of(tokens, 8, 128)
        assert bucket.representative(index, 8, 128) == gpu_choose.representative(tokens, 8, 128)
    assert [bucket.name(i) for i in (0, 6)] == ["<=0.5", ">512"]
    assert {bucket.bucket_of(bucket.representative(i, 8, 128), 8, 128) for i in bucket.BUCKETS} == set(bucket.BUCKETS)


@pytest.mark.parametrize("kernel", family.AXES)
def test_a_problem_is_its_specs_problem(kernel: str) -> None:
    one = problem(kernel, 3)
    if kernel == "router":
        one = dataclasses.replace(one, dtype="float32", hidden=1, intermediate=1, out_features=1, projections=1)
    tokens = bucket.representative(3, one.top_k, one.num_experts)
    assert problem_of(kernel, spec_of(one), tokens) == one


def test_some_layers_are_not_tuned() -> None:
    spec = spec_of(problem("up", 3))
    assert isinstance(spec, ExpertsSpec) and problem_of("up", spec, 512) is not None
    separate = dataclasses.replace(spec.down, params=tuple(range(1, 129)), shape=(2048, 768), e=0)
    assert problem_of("up", dataclasses.replace(spec, down=separate), 512) is None
    assert problem_of("up", dataclasses.replace(spec, dtype=torch.float64), 512) is None


def test_every_family_of_the_table_can_be_stored() -> None:
    for kernel in family.AXES:
        one = problem(kernel, 3)
        key = entry.Key(one, entry.Environment("sm_90", 132, "2.13.0", "3.7.1", "0.1.0", "device"))
        for config in candidates(one, H200):
            item = entry.Measurement(key, config, 1e-4, "")
            assert entry.from_text(entry.to_text(item)) == item
