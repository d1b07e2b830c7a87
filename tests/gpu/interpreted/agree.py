"""One call of the experts, forward and backward, held against float64."""

from __future__ import annotations

from moecompile.codegen import gpu
from moecompile.ir.spec import ExpertsSpec
from tests.gpu import layers

IMPLEMENTATION = gpu.GpuImplementation()


def forward(spec: ExpertsSpec, given: layers.Inputs) -> None:
    """The inference path."""
    text = spec.text()
    out = IMPLEMENTATION.experts(given.x, given.weights, given.ids, given.params, [], text, "")
    _close("output", spec, out, layers.expected(spec, given))


def training(spec: ExpertsSpec, given: layers.Inputs, needs: list[bool] | None = None) -> None:
    """The training path: output and every gradient; `needs` for x, weights and each parameter."""
    text = spec.text()
    needs = needs or [True, given.weights is not None, *(True for _ in given.params)]
    out, saved = IMPLEMENTATION.experts_train(given.x, given.weights, given.ids, given.params, [], text, "")
    _close("output", spec, out, layers.expected(spec, given))
    found = IMPLEMENTATION.experts_bwd(given.grad, given.x, given.weights, given.ids, given.params, [], text, "", saved, needs)
    wanted = layers.expected_gradients(spec, given, needs)
    names = ["x", "weights", *(f"params[{i}]" for i in range(len(given.params)))]
    for name, need, got, want in zip(names, needs, found, wanted, strict=True):
        assert got.is_contiguous(), name
        assert need or got.numel() == 0, f"a gradient of {name} nobody asked for"
        _close(f"gradient of {name}", spec, got, want)


def nan_stays_alone(spec: ExpertsSpec, tokens: int) -> None:
    """Both forward paths with the last token NaN: that token's output is NaN, every other as without it."""
    given = layers.inputs(spec, tokens)
    given.x[-1] = float("nan")
    want = layers.expected(spec, given)[:-1]
    for run in (IMPLEMENTATION.experts, lambda *a: IMPLEMENTATION.experts_train(*a)[0]):
        out = run(given.x, given.weights, given.ids, given.params, [], spec.text(), "")
        _close("output", spec, out[:-1], want)
        assert out[-1].isnan().all()


def _close(name: str, spec: ExpertsSpec, got: object, want: object) -> None:
    error = layers.error(got, want)  # type: ignore[arg-type]
    allowed = layers.tolerance(spec.dtype, spec.hidden + spec.intermediate)
    assert error <= allowed, f"{name} is off by {error:.1e} of its largest value, allowed {allowed:.1e}"
