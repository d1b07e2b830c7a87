"""The generated part of a CPU expert kernel: dtype, number of projections, activation and its derivatives.

Everything else (sizes, strides, biases, where the routing weight goes) is an argument of the call, so that one library serves
every layer of a model, and most models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moecompile.ir import expr
from moecompile.ir.expr import Expr
from moecompile.ir.spec import ExpertsSpec

ELEMENT = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}


def interleaved(spec: ExpertsSpec) -> int:
    """Whether the two projections are the even and odd columns of one matrix contiguous in n, as in gpt-oss: 1 if the first
    is the even one, -1 if the second is, 0 if they are not."""
    if len(spec.projections) != 2:
        return 0
    a, b = spec.projections
    alike = a.stacked and a.params == b.params and (a.e, a.n, a.k) == (b.e, b.n, b.k)
    return b.offset - a.offset if alike and a.n == 2 and abs(b.offset - a.offset) == 1 else 0


def swap_inputs(e: Expr) -> Expr:
    """The expression with its two inputs exchanged."""
    if e[0] == "in":
        return ("in", 1 - e[1])
    return e if e[0] == "const" else (e[0], *(swap_inputs(a) for a in e[1:]))


def source(spec: ExpertsSpec) -> str:
    """The C++ source of the library that runs the spec."""
    activation = swap_inputs(spec.activation) if interleaved(spec) < 0 else spec.activation
    count = len(spec.projections)
    derivatives = [expr.derivative(activation, i) for i in range(count)]
    return f"""\
// experts of {ELEMENT[spec.dtype]}, {count} projection{"s" * (count > 1)}, activation {expr.text(activation)}
#include "backward.h"
#include "math.h"

struct Activation {{
  MOE_INLINE V value(const V* h) {{
{_statements([activation], ["return {};"])}
  }}
  // The value, and in d[i] its derivative with respect to h[i].
  MOE_INLINE V backward(const V* h, V* d) {{
{_statements([*derivatives, activation], [*(f"d[{i}] = {{}};" for i in range(count)), "return {};"])}
  }}
}};

extern "C" __attribute__((visibility("default"))) int forward(const Call<{count}>* call) {{
  return experts_forward<{ELEMENT[spec.dtype]}, {count}, Activation>(*call);
}}
extern "C" __attribute__((visibility("default"))) int routed(RoutedCall<{count}>* call) {{
  return experts_routed<{ELEMENT[spec.dtype]}, {count}, Activation>(*call);
}}
extern "C" __attribute__((visibility("default"))) int backward(const Call<{count}>* call) {{
  return experts_backward<{ELEMENT[spec.dtype]}, {count}, Activation>(*call);
}}
"""


def _statements(results: Sequence[Expr], uses: Sequence[str]) -> str:
    """C++ lines that compute the expressions, every common part once."""
    lines: list[str] = []
    names: dict[Expr, str] = {}

    def name(e: Expr) -> str:
        if e not in names:
            if e[0] == "in":
                return f"h[{e[1]}]"
            value = f"splat({_literal(e[1])})" if e[0] == "const" else expr.OPS[e[0]].cpp.format(*map(name, e[1:]))
            names[e] = f"t{len(names)}"
            lines.append(f"const V {names[e]} = {value};")
        return names[e]

    for result, use in zip(results, uses, strict=True):
        lines.append(use.format(name(result)))
    return "\n".join(f"    {line}" for line in lines)


def _literal(value: float) -> str:
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{value!r}f" if any(c in repr(value) for c in ".e") else f"{value!r}.0f"
