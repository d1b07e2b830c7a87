"""An activation, or its derivatives, as lines of float32 arithmetic in Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moecompile.ir import expr
from moecompile.ir.expr import Expr


def number(value: float) -> str:
    """A number as Triton reads it."""
    return f'float("{value}")' if math.isinf(value) or math.isnan(value) else repr(float(value))


def _folded(e: Expr) -> Expr:
    """Operations on numbers alone carried out: tl functions want a block."""
    if e[0] in ("in", "const"):
        return e
    args = tuple(_folded(a) for a in e[1:])
    if all(a[0] == "const" for a in args):
        return expr.const(float(expr.OPS[e[0]].torch(*(a[1] for a in args))))
    return (e[0], *args)


def splice(results: Sequence[tuple[str, Expr]], indent: str = "    ") -> str:
    """Lines that assign each (name, expression of h0, h1, ..); subexpressions used more than once, or long, get a name."""
    wanted = [(name, _folded(e)) for name, e in results]
    uses: dict[Expr, int] = {}

    def count(e: Expr) -> None:
        uses[e] = uses.get(e, 0) + 1
        if uses[e] == 1:
            for a in e[1:] if e[0] not in ("in", "const") else ():
                count(a)

    for _, e in wanted:
        count(e)
    lines: list[str] = []
    known: dict[Expr, str] = {}

    def spell(e: Expr, top: bool = False) -> str:
        if e in known:
            return known[e]
        if e[0] == "in":
            return f"h{e[1]}"
        if e[0] == "const":
            return f"({number(e[1])})" if e[1] < 0 else number(e[1])
        text = expr.OPS[e[0]].triton.format(*(spell(a) for a in e[1:]))
        if not top and (uses[e] > 1 or len(text) > 60):
            known[e] = f"t{len(known)}"
            lines.append(f"{indent}{known[e]} = {_bare(text)}")
            return known[e]
        return text

    for name, e in wanted:
        text = spell(e, top=uses[e] == 1)
        lines.append(f"{indent}{name} = {_bare(text)}")
    return "\n".join(lines)


def _bare(text: str) -> str:
    """Without the parentheses that enclose all of it."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1] if text.startswith("(") else text
