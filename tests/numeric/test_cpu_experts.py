"""The C++ expert kernels, forward and backward, against float64; plain PyTorch in the same dtype is the measure of the error."""

from __future__ import annotations

import dataclasses
import itertools
import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moecompile.codegen import build_cpp
from moecompile.codegen.cpu import CpuImplementation, supports_experts
from moecompile.ir import ops, reference
from moecompile.ir.spec import OutOfRange, WeightOn
from tests.models.cpu_layers import ACTIVATIONS, LAYOUTS, Case

POISON = "-DMOE_POISON"  # the kernel's own memory starts as NaN
QUICK = "-O1"  # half the time to build, where the optimiser is not the subject
CPU = CpuImplementation((*build_cpp.NATIVE, POISON))
QUICKLY_BUILT = CpuImplementation((*build_cpp.NATIVE, POISON, QUICK))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLACK = 3.0

SHAPES = [
    *(Case(E=E, K=K, T=T) for (E, K), T in itertools.product([(1, 1), (2, 1), (7, 3), (7, 7)], [0, 1, 2, 5, 97])),
    *(Case(E=2, K=1, T=T) for T in (191, 193, 293)),  # the row block is 96
    Case(E=64, K=8, T=1),
    Case(E=64, K=64, T=3, H=32, F=32),
    *(Case(T=50, load=load, bias=True) for load in ("one", "half")),
    *(Case(T=40, E=3, H=H, F=F, O=O, bias=True) for H, F, O in [(1, 1, 1), (33, 17, 5), (31, 64, 130), (65, 97, 257)]),
    Case(E=2, K=1, T=9, H=2100, F=530),  # more than one block of k
    *(Case(E=7, K=3, T=T, H=300, F=421, O=131, bias=True) for T in (1, 2)),  # few rows, and several of a weight in a page
]
CASES = [
    *(dataclasses.replace(case, dtype=dtype) for case in SHAPES for dtype in DTYPES),
    *(Case(layout=layout, dtype=dtype, bias=True, F=F, H=H)
      for layout in LAYOUTS for dtype, F, H in zip(DTYPES, (96, 31, 300), (64, 70, 33), strict=True)),
    *(Case(weight_on=on, dtype=dtype, bias=True, layout=layout, K=1 if on is WeightOn.INPUT else 2)
      for on in WeightOn for dtype in DTYPES for layout in ("rows", "interleaved_columns")),
    Case(weight_on=WeightOn.INPUT, K=3, H=333, layout="columns"),
    *(Case(out_dtype=a, dtype=b) for a in DTYPES for b in DTYPES if a != b),
    *(Case(out_of_range=OutOfRange.INDEX, dtype=dtype) for dtype in DTYPES),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The layers are too small for more; the tests of threads set their own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(implementation: ops.Implementation, case: Case, grad: Tensor, saved: Tensor, x, weights, ids, params) -> list[Tensor]:  # type: ignore[no-untyped-def]
    needs = [True, weights is not None, *[True] * len(params)]
    return implementation.experts_bwd(grad, x, weights, ids, params, (), case.spec().text(), "", saved, needs)


def equal(a: Tensor, b: Tensor) -> bool:
    """Equal, and NaN at the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def run(case: Case, implementation: ops.Implementation, x, weights, ids, params, grad) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The output, then the gradients of x, weights and every parameter."""
    text = case.spec().text()
    out, saved = implementation.experts_train(x, weights, ids, params, (), text, "")
    assert equal(out, implementation.experts(x, weights, ids, params, (), text, "")), "training changes the output"
    return [out, *gradients(implementation, case, grad.to(out.dtype), saved, x, weights, ids, params)]


def truth(case: Case, dtype: torch.dtype, x, weights, ids, params, grad) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The same by the reference in `dtype`."""
    out_dtype = torch.float64 if dtype == torch.float64 else case.spec().out_dtype
    spec = dataclasses.replace(case.spec(), dtype=dtype, out_dtype=out_dtype)
    x, params = x.to(dtype), [p.to(dtype) for p in params]
    weights = weights.double() if dtype == torch.float64 else weights

    def forward(x: Tensor, w: Tensor | None, p) -> Tensor:  # type: ignore[no-untyped-def]
        return reference.experts(spec, x, w, ids, p)

    out = forward(x, weights, params)
    return [out, *ops.gradients(forward, grad.to(out.dtype), x, weights, params, [True] * (2 + len(params)))]


def check(case: Case, found: list[Tensor], x, weights, ids, params, grad) -> None:  # type: ignore[no-untyped-def]
    exact = truth(case, torch.float64, x, weights, ids, params, grad)
    eager = truth(case, case.dtype, x, weights, ids, params, grad)
    names = ["out", "dx", "dweights", *(f"dparam{i}" for i in range(len(params)))]
    for name, ours, right, theirs in zip(names, found, exact, eager, strict=True):
        assert ours.shape == right.shape and ours.dtype == theirs.dtype and ours.is_contiguous(), name
        if not right.numel():
            continue
        eps = max(torch.finfo(case.dtype).eps, torch.finfo(theirs.dtype).eps)
        scale = float(right.abs().max())
        if name == "dweights":  # a sum of O products that may cancel
            scale += float(grad.norm(dim=-1).max() * exact[0].norm(dim=-1).max())
        allowed = SLACK * float((theirs.double() - right).abs().max()) + 4 * eps * scale
        error = float((ours.double() - right).abs().max())
        assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g} (largest value {scale:.3g})"
        untouched = right == 0
        if untouched.any() and name.startswith("dparam"):
            assert bool((ours[untouched].abs() <= allowed).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_those_of_float64(case: Case) -> None:
    assert supports_experts(case.spec()) is None
    given = case.inputs()
    grad = torch.randn(case.T, case.O or case.H)
    check(case, run(case, CPU, *given, grad), *given, grad)


@pytest.mark.parametrize(
    "case",
    [
        *(Case(activation=name, bias=True, F=50) for name in ACTIVATIONS),
        Case(activation="clamped_glu", dtype=torch.bfloat16, bias=True, layout="interleaved_columns"),
    ],
    ids=str,
)
def test_activations_and_their_derivatives(case: Case) -> None:
    given = case.inputs()
    grad = torch.randn(case.T, case.H)
    check(case, run(case, QUICKLY_BUILT, *given, grad), *given, grad)


TARGETS = [
    *((("-march=native", "-mno-avx512bf16"), torch.bfloat16),),
    *((("-march=x86-64-v3",), dtype) for dtype in DTYPES),
    *((("-march=x86-64",), dtype) for dtype in DTYPES),
]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86")
@pytest.mark.parametrize("target, dtype", TARGETS, ids=str)
def test_other_instruction_sets(target: tuple[str, ...], dtype: torch.dtype) -> None:
    implementation = CpuImplementation((*target, POISON, QUICK))
    for case in (
        Case(T=41, E=3, H=67, F=45, O=70, dtype=dtype, bias=True),
        Case(T=17, layout="interleaved_columns", dtype=dtype, bias=True),
        Case(T=7, layout="columns", E=2, H=33, F=600, dtype=dtype, weight_on=WeightOn.INPUT),
        Case(T=1, H=300, F=421, O=131, dtype=dtype, bias=True),
    ):
        given = case.inputs()
        grad = torch.randn(case.T, case.O or case.H)
        check(case, run(case, implementation, *given, grad), *given, grad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_ids_out_of_range_are_skipped(dtype: torch.dtype) -> None:
    case = Case(bias=True, T=20)
    x, weights, ids, params = case.inputs()
    ids[3] = -1
    ids[4, 0], ids[5, 1], ids[6, 0] = case.E, 1000, -case.E
    ids, grad = ids.to(dtype), torch.randn(case.T, case.H)
    found = run(case, CPU, x, weights, ids, params, grad)
    check(case, found, x, weights, ids, params, grad)
    assert not found[0][3].any() and not found[1][3].any() and not found[2][3].any()


def test_ids_that_index() -> None:
    case = Case(out_of_range=OutOfRange.INDEX, T=20)
    x, weights, ids, params = case.inputs()
    ids[3:9] -= case.E
    grad = torch.randn(case.T, case.H)
    check(case, run(case, CPU, x, weights, ids, params, grad), x, weights, ids, params, grad)
    for wrong in (case.E, -case.E - 1):
        ids[7, 1] = wrong
        with pytest.raises(IndexError, match=f"{wrong}"):
            CPU.experts(x, weights, ids, params, (), case.spec().text(), "")


def test_an_expert_twice_in_one_token() -> None:
    case = Case(T=20, bias=True)
    x, weights, ids, params = case.inputs()
    ids[::2] = 1
    grad = torch.randn(case.T, case.H)
    check(case, run(case, CPU, x, weights, ids, params, grad), x, weights, ids, params, grad)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_token(dtype: torch.dtype, layout: str) -> None:
    case = Case(T=50, H=65, F=33, dtype=dtype, layout=layout)
    x, weights, ids, params = case.inputs()
    clean = run(case, CPU, x, weights, ids, params, torch.ones(case.T, case.H))
    x[7] = float("nan")
    found = run(case, CPU, x, weights, ids, params, torch.ones(case.T, case.H))
    for before, after in zip(clean[:3], found[:3], strict=True):
        assert after[7].isnan().all()
        keep = torch.arange(case.T) != 7
        assert torch.equal(before[keep], after[keep])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "interleaved_columns"])
def test_every_run_is_the_same(dtype: torch.dtype, layout: str) -> None:
    case = Case(T=130, E=5, F=300, H=150, dtype=dtype, layout=layout, bias=True)
    given, grad = case.inputs(), torch.randn(case.T, case.H)
    first = run(case, CPU, *given, grad)
    for i in range(20):
        torch.set_num_threads(1 + i % 3)
        assert all(torch.equal(a, b) for a, b in zip(first, run(case, CPU, *given, grad), strict=True))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_others(dtype: torch.dtype, layout: str) -> None:
    case = Case(T=120, E=3, H=70, F=50, dtype=dtype, layout=layout)
    x, weights, ids, params = case.inputs()
    text = case.spec().text()

    def of(rows: Tensor) -> Tensor:
        return CPU.experts(x[rows], weights[rows], ids[rows], params, (), text, "")

    everything, order = of(torch.arange(120)), torch.randperm(120)
    assert torch.equal(of(order), everything[order])
    assert torch.equal(torch.cat([of(torch.arange(7)), of(torch.arange(7, 120))]), everything)


def test_parameters_in_any_memory() -> None:
    for layout in ("rows", "columns", "interleaved_columns", "separate"):
        case = Case(T=20, H=40, F=24, layout=layout, bias=True)
        x, weights, ids, params = case.inputs()
        grad = torch.randn(case.T, case.H)
        right = run(case, CPU, x, weights, ids, params, grad)
        turned = [p.mT.contiguous().mT if p.dim() > 1 else p for p in params]
        sliced = [torch.stack([p, p], -1)[..., 0] for p in params]
        unaligned = [torch.cat([p.new_zeros(1), p.flatten()])[1:].view(p.shape) for p in params]
        mixed = [t if i % 2 else p for i, (t, p) in enumerate(zip(turned, params, strict=True))]
        for other in (turned, sliced, unaligned, mixed):
            found = run(case, CPU, x, weights, ids, list(other), grad)
            for a, b in zip(found, right, strict=True):
                torch.testing.assert_close(a, b)


def test_inputs_in_any_memory() -> None:
    case = Case(T=20, H=40)
    x, weights, ids, params = case.inputs()
    grad = torch.randn(case.T, 1).expand(case.T, case.H)
    right = run(case, CPU, x, weights, ids, params, grad.contiguous())
    wide = torch.randn(case.T, 3 * case.H)
    wide[:, case.H : 2 * case.H] = x
    for rows in (wide[:, case.H : 2 * case.H], x.t().contiguous().t()):
        found = run(case, CPU, rows, weights.t().contiguous().t(), ids.t().contiguous().t(), params, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    same = x[:1].expand(case.T, case.H)
    found = run(case, CPU, same, weights, ids, params, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, run(case, CPU, same.contiguous(), weights, ids, params, grad), strict=True))


def test_only_what_is_needed_is_computed() -> None:
    case = Case(T=20, layout="separate", bias=True)
    x, weights, ids, params = case.inputs()
    text, grad = case.spec().text(), torch.randn(case.T, case.H)
    _, saved = CPU.experts_train(x, weights, ids, params, (), text, "")
    everything = CPU.experts_bwd(grad, x, weights, ids, params, (), text, "", saved, [True] * (2 + len(params)))
    for chosen in ([0], [1], [2], [2, 3, 4, 5, 8], [len(params)], [len(params) + 1]):
        needs = [i in chosen for i in range(2 + len(params))]
        found = CPU.experts_bwd(grad, x, weights, ids, params, (), text, "", saved, needs)
        for need, a, b in zip(needs, found, everything, strict=True):
            assert torch.equal(a, b) if need else a.numel() == 0


def test_bias_of_another_dtype() -> None:
    case = Case(T=9, bias=True, dtype=torch.bfloat16)
    x, weights, ids, params = case.inputs()
    text = case.spec().text()
    wide = [p.float() if p.dim() == 2 else p for p in params]
    out, saved = CPU.experts_train(x, weights, ids, wide, (), text, "")
    assert torch.equal(out, CPU.experts(x, weights, ids, params, (), text, ""))
    found = gradients(CPU, case, torch.ones_like(out), saved, x, weights, ids, wide)
    assert [g.dtype for g in found[2:]] == [p.dtype for p in wide]


def test_through_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops._BOUND, "cpu", CPU)
    case = Case(T=12)
    x, weights, ids, params = case.inputs()
    leaves = [t.requires_grad_() for t in (x, weights, *params)]
    out = torch.ops.moe.experts(x, weights, ids, params, (), case.spec().text(), "")
    out.sum().backward()
    right = run(case, CPU, x.detach(), weights.detach(), ids, [p.detach() for p in params], torch.ones(()).expand(out.shape))
    assert all(torch.equal(a, b) for a, b in zip([out, *(t.grad for t in leaves)], right, strict=True))


def test_refusals_say_why() -> None:
    spec = Case().spec()
    assert "float64" in (supports_experts(dataclasses.replace(spec, dtype=torch.float64)) or "")
    shared = dataclasses.replace(spec, projections=(spec.projections[0], spec.projections[0]))
    assert "share" in (supports_experts(shared) or "")
    broadcast = dataclasses.replace(spec, down=dataclasses.replace(spec.down, e=0))
    assert "more than once" in (supports_experts(broadcast) or "")
