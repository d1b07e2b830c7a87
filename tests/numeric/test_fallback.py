"""Whatever fails, wherever: the original result bit for bit, one warning, and later calls as before."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import compile_fx

from moecompile import backend, report
from moecompile.codegen import cpu
from moecompile.ir import ops
from moecompile.runtime import backward, fallback
from moecompile.runtime.dispatch import Dispatch
from tests.models import ALL, Example, outcome
from tests.models.layer import Recipe
from tests.models.numbers import run, wrong


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("on purpose")


def no_memory(*_: Any, **__: Any) -> Any:
    raise MemoryError("on purpose")


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The CPU's kernels fail when they are called, and none is built."""
    backend.bind()
    monkeypatch.setattr(fallback, "_REGIONS", {})
    monkeypatch.setattr(cpu, "prepare_experts", lambda *_: None)
    for name in ("experts", "routed_experts", "experts_train", "experts_bwd"):
        monkeypatch.setattr(cpu.CpuImplementation, name, fails)
    yield monkeypatch
    torch._dynamo.reset()


def call_of(module: nn.Module, inner: str = "aot_eager", **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend=backend.moe, options={"inner": inner, **options})


def same(module: nn.Module, call: Any, x: Tensor, train: bool, inner: str = "aot_eager") -> None:
    """call(x) and all gradients are bit for bit those of the module compiled without us."""
    got = run(call, module, [x], train)
    torch._dynamo.reset()
    want = run(torch.compile(module, backend=inner), module, [x], train)
    for name, value in want.values.items():
        assert torch.equal(got.values[name], value), name


def ours(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "moecompile" in str(w.message)]


# ---------------------------------------------------------------- while compiling

STAGES = {
    "binding kernels": "moecompile.backend.target.bind_all",
    "copying": "moecompile.ir.surgery.copy_of",
    "walking": "moecompile.passes.fuse_experts.walk",
    "finding layers": "moecompile.passes.fuse_experts.layers",
    "asking for support": "moecompile.codegen.target.supports_experts",
    "cutting out": "moecompile.ir.surgery.cut",
    "reading the router": "moecompile.passes.fuse_router.router_of",
    "verifying": "moecompile.ir.verifier.verify",
    "reporting": "moecompile.report.add",
    "registering": "moecompile.runtime.fallback.register",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_while_compiling(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Recipe().make(), torch.randn(5, 16)
    backend.bind.cache_clear()
    monkeypatch.setattr(STAGES[stage], fails)
    call = call_of(module, kernels="reference")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(module, call, x, train=True)
    assert len(ours(caught)) == 1 and "on purpose" in ours(caught)[0]
    backend.bind.cache_clear()


@pytest.mark.parametrize("options", [{"strict": True}, {"fallback": "error"}], ids=str)
def test_a_failure_while_compiling_can_be_fatal(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STAGES["walking"], fails)
    with pytest.raises(Exception, match=r"in fuse-experts.*on purpose"):
        call_of(Recipe().make(), **options)(torch.randn(5, 16))


def test_a_rewritten_graph_that_does_not_compile_is_not_called_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = backend.lower

    def only_originals(gm: torch.fx.GraphModule, *rest: Any) -> Any:
        return fails() if any(n.target is torch.ops.moe.experts.default for n in gm.graph.nodes) else lower(gm, *rest)

    monkeypatch.setattr(backend, "lower", only_originals)
    with pytest.warns(RuntimeWarning, match="compiling the rewritten graph failed"):
        call_of(Recipe().make(), kernels="reference")(torch.randn(5, 16))
    (entry,) = report.last_reports()
    assert entry.status == "declined" and "on purpose" in entry.reason


@pytest.fixture
def broken_backward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor spoils a backward graph, as half of its passes would, and then fails."""
    right = compile_fx.compile_fx_inner

    def inner(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_backward"):
            return right(gm, example_inputs, **kwargs)
        for n in gm.graph.nodes:
            if n.op == "output":
                n.args = (tuple(None for _ in n.args[0]),)
        return fails()

    monkeypatch.setattr(compile_fx, "compile_fx_inner", inner)
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def test_a_backward_that_does_not_compile_runs_node_by_node(broken_backward: None) -> None:
    """It is compiled when it is first needed: no other graph can be chosen then."""
    module, x = Recipe().make(), torch.randn(5, 16)
    call = call_of(module, "inductor", kernels="reference")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [run(call, module, [x], train=True) for _ in range(2)]
    assert len(ours(caught)) == 1 and "did not compile a backward" in ours(caught)[0] and "on purpose" in ours(caught)[0]
    want = run(module, module, [x], train=True)
    assert not any(wrong(g, want) for g in got)


@pytest.mark.parametrize("options", [{"strict": True}, {"fallback": "error"}], ids=str)
def test_a_backward_that_does_not_compile_can_be_fatal(options: dict[str, Any], broken_backward: None) -> None:
    y = call_of(Recipe().make(), "inductor", kernels="reference", **options)(torch.randn(5, 16))[0]
    with pytest.raises(Exception, match="on purpose"):
        y.sum().backward()


def test_a_backward_that_draws_random_numbers_is_not_run_node_by_node() -> None:
    """Only Inductor's own code draws those of the forward again."""

    def graph(seed: Tensor) -> Tensor:
        return torch.ops.prims.inductor_random.default([4], seed, "rand")

    gm = fx.symbolic_trace(graph)
    with pytest.raises(RuntimeError, match="on purpose"):
        backward.guarded(fails, warn=True)(gm, [], is_backward=True)


# ---------------------------------------------------------------- while running

NAMES = (
    *("form-grouped-index_add", "form-grouped-on-input", "form-hf_grouped-sentinels", "form-hf_batched-sentinels"),
    *("form-hf_batched-bf16", "form-batched-bias", "form-einsum-sum", "form-loop_where-index_put", "form-loop_mask-sentinels"),
    *("form-dense", "router-R1_per_expert_scale", "router-R1_top1_argmax-bf16", "router-R1_top1_max-bf16"),
    *("around-autocast", "around-autocast-loop", "sizes-1-1-16-24-batched", "sizes-4-1-16-24-batched"),
)
AT_RUN_TIME = [e for e in ALL if e.name in NAMES]

# x is cast once for all experts, and its gradients added so.
ROUNDED = ("around-autocast-loop",)


@pytest.mark.parametrize("example", AT_RUN_TIME, ids=str)
def test_a_failing_kernel_in_every_form(example: Example, unbuilt: pytest.MonkeyPatch) -> None:
    """The original nodes get back what they read, whatever shape and dtype the op has it in."""
    module = example.recipe.make()
    x = example.recipe.inputs(module)
    inner = "aot_eager" if "autocast" in example.name else "eager"
    call = call_of(module, inner, fallback="silent")
    got, want = run(call, module, [x], train=True), run(module, module, [x], train=True)
    assert fallback.COUNTS["fallback"] and outcome.fused()
    if example.name in ROUNDED:
        assert not wrong(got, want, eps=float(torch.finfo(torch.bfloat16).eps))
    else:
        assert all(torch.equal(got.values[name], value) for name, value in want.values.items())


@pytest.mark.parametrize("form", ["grouped", "batched", "loop_where"])
def test_a_failing_kernel_with_symbolic_sizes(form: str, unbuilt: pytest.MonkeyPatch) -> None:
    module = Recipe(form=form).make()
    torch._dynamo.reset()
    call = torch.compile(module, backend=backend.moe, dynamic=True, options={"inner": "eager", "fallback": "silent"})
    for shape in ((2, 5, 16), (3, 4, 16)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(call(x)[0], module(x)[0])
    assert fallback.COUNTS["fallback"] == 2


@pytest.mark.parametrize("error", [fails, no_memory])
@pytest.mark.parametrize("where", ["routed_experts", "experts", "experts_train", "experts_bwd"])
def test_a_failing_kernel_warns_once(where: str, error: Any, unbuilt: pytest.MonkeyPatch) -> None:
    unbuilt.setattr(cpu.CpuImplementation, where, error)
    train = where in ("experts_train", "experts_bwd")
    if where == "experts":  # alone in the graph
        unbuilt.setattr("moecompile.passes.join_router._join", lambda gm: None)
    if where == "experts_bwd":
        unbuilt.setattr(cpu.CpuImplementation, "experts_train", lambda self, *a: ops.Reference().experts_train(*a))
    module, x = Recipe().make(), torch.randn(5, 16)
    call = call_of(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            run(call, module, [x], train)
    assert len(ours(caught)) == 1 and "on purpose" in ours(caught)[0]
    assert fallback.COUNTS["fallback"] == (2 if where == "experts_bwd" else 3)
    same(module, call, x, train)


def test_a_failing_kernel_can_be_silent_or_fatal(unbuilt: pytest.MonkeyPatch) -> None:
    """And models that differ only in that do not share it."""
    module, x = Recipe().make(), torch.randn(5, 16)
    options = {"inner": "eager"}
    silent = torch.compile(module, backend=backend.moe, options={**options, "fallback": "silent"})
    fatal = torch.compile(lambda x: module(x), backend=backend.moe, options={**options, "fallback": "error"})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        want = silent(x)[0]
        with pytest.raises(RuntimeError, match="on purpose"):
            fatal(x)
        assert torch.equal(silent(x)[0], want)


def test_a_backward_never_reads_what_a_failed_forward_saved(unbuilt: pytest.MonkeyPatch) -> None:
    """The kernel fails forward, is forgiven by a reset, and would then read nothing but zeros backward."""
    module, x = Recipe().make(), torch.randn(5, 16)
    call = call_of(module, fallback="silent")
    y = call(x)[0]
    unbuilt.setattr(cpu.CpuImplementation, "experts_bwd", lambda *a: pytest.fail("the kernel read what it had not saved"))
    fallback.reset()
    y.sum().backward()
    got = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x)[0].sum().backward()
    for g, p in zip(got, module.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)


def test_the_reference_is_no_failure(unbuilt: pytest.MonkeyPatch) -> None:
    call_of(Recipe().make(), kernels="reference")(torch.randn(5, 16))
    assert not report.last().fallback_calls


def test_a_model_is_not_kept_alive() -> None:
    """What is kept of a layer knows no weights."""
    module = Recipe().make()
    call = call_of(module, kernels="reference")
    run(call, module, [torch.randn(5, 16)], train=True)
    weights = [weakref.ref(p) for p in module.parameters()]
    del module, call
    torch._dynamo.reset()
    gc.collect()
    assert not any(w() is not None for w in weights)


# ---------------------------------------------------------------- verify


class Broken:
    """Kernels that are right but for one result, which is a little off."""

    def __init__(self, what: str) -> None:
        self.what, self.right = what, ops.Reference()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)

    def route(self, *given: Any) -> Any:
        weights, ids = self.right.route(*given)
        if self.what == "ids":
            ids = (ids + 1) % 4
        return (weights * 1.01 if self.what == "weights" else weights), ids

    def experts(self, *given: Any) -> Any:
        return self.right.experts(*given) * (1.001 if self.what == "experts" else 1)

    def experts_train(self, *given: Any) -> Any:
        out, saved = self.right.experts_train(*given)
        return out * (1.001 if self.what == "experts" else 1), saved

    def experts_bwd(self, *given: Any) -> Any:
        found = self.right.experts_bwd(*given)
        if self.what.isdecimal():
            found[int(self.what)] = found[int(self.what)] * 1.001
        return found


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    backend.bind()
    monkeypatch.setattr(fallback, "_REGIONS", {})
    monkeypatch.setattr(cpu, "prepare_experts", lambda *_: None)
    bound = dict(ops._BOUND)
    yield lambda what: ops.bind("cpu", Dispatch(Broken(what)))
    ops._BOUND.update(bound)


@pytest.mark.parametrize("what", ["experts", "weights", "ids"])
def test_verify_finds_a_broken_forward(what: str, kernels: Any) -> None:
    kernels(what)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="verify: the forward"):
        call_of(Recipe().make(), verify=1)(torch.randn(9, 16))


@pytest.mark.parametrize("what", ["0", "1", "2", "3"], ids=["x", "weights", "up", "down"])
def test_verify_finds_a_broken_gradient(what: str, kernels: Any) -> None:
    kernels(what)
    module = Recipe().make()
    call = call_of(module, verify=1)
    with pytest.warns(RuntimeWarning, match="verify: the backward"):
        run(call, module, [torch.randn(9, 16)], train=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_passes_what_is_right_and_stops(dtype: torch.dtype, kernels: Any) -> None:
    kernels("")
    recipe = Recipe(dtype=dtype)
    module = recipe.make()
    call = call_of(module, verify=2, fallback="error")
    found = [run(call, module, [recipe.inputs(module)], train=True).values for _ in range(4)]
    counts = [r.verified for name, r in fallback._REGIONS.items() if not name.startswith("route:")]
    assert counts == [{"forward": 2, "backward": 2}]
    assert all(torch.equal(found[0][name], value) for more in found[1:] for name, value in more.items())


@pytest.mark.parametrize("logits", [[0.0, 0, 0, 0], [1, 1, 1, 0], [float("nan"), 0, 1, 2], [float("-inf")] * 4], ids=str)
def test_verify_takes_any_of_equal_choices(logits: list[float], kernels: Any) -> None:
    kernels("")
    module = Recipe().make()
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[:, 0] = torch.tensor(logits)
        call_of(module, verify=1, fallback="error")(torch.ones(3, 16))
