"""From what every pair's row is, an expression, to the experts' spec and parameters, or the reason why not."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from moecompile.errors import Unsupported, need
from moecompile.ir import expr as X
from moecompile.ir.spec import ExpertsSpec, OutOfRange, Weight, WeightOn
from moecompile.recognize.roles import PairExpr, Ref, Stack, Weights, holds

# ---------------------------------------------------------------- per-expert expressions into one


@dataclass(frozen=True)
class Stacks:
    """The same place in the expression of each expert."""

    each: tuple[Stack, ...]


def merge(exprs: list[PairExpr]) -> PairExpr:
    """E expressions of one structure as one, whose matrices are stacks over the experts."""
    first = exprs[0]
    if len({(type(e), e[0] if isinstance(e, tuple) else None, len(e) if isinstance(e, tuple) else 0) for e in exprs}) != 1:
        raise Unsupported("the experts of the loop are not alike")
    if first[0] in ("mm", "bias"):
        rest = [merge([e[2] for e in exprs])] if first[0] == "mm" else []
        return (first[0], _stacked([e[1] for e in exprs]), *rest, 0)
    if first[0] == "weight":
        a = first[1]
        for e in exprs:
            same = e[1].ref is a.ref and e[1].tree == a.tree and e[1].routing is a.routing and e[1].dense == a.dense
            same = same and (a.ref is not None or a.tree is not None or e[1].base is a.base)
            need(same, "the experts of the loop are weighted by different values")
        return first
    out: list[Any] = [first[0]]
    for parts in zip(*(e[1:] for e in exprs), strict=True):
        if isinstance(parts[0], tuple):
            out.append(merge(list(parts)))
        else:
            need(all(p is parts[0] or p == parts[0] for p in parts), "the experts of the loop are not alike")
            out.append(parts[0])
    return tuple(out)


def _stacked(each: list[Stack]) -> Stack | Stacks:
    a = each[0]
    alike = all(s.strides == a.strides and s.sizes == a.sizes and s.shape == a.shape and s.cast == a.cast for s in each)
    need(alike, "the experts' weights differ in shape or layout")
    need(all(s.e is None for s in each), "a loop over experts multiplies by all experts' weights at once")
    if all(s.ref is a.ref for s in each):
        step = each[1].offset - a.offset if len(each) > 1 else math.prod(a.shape)
        regular = step >= 0 and all(s.offset == a.offset + i * step for i, s in enumerate(each))
        need(regular, "expert e of the loop does not use the e-th weights")
        return dataclasses.replace(a, e=step, experts=len(each))
    need(len({id(s.ref) for s in each}) == len(each), "two experts share their weights")
    need(all(s.offset == a.offset for s in each), "the experts' weights differ in layout")
    return Stacks(tuple(each))


# ---------------------------------------------------------------- the expression of one pair into a spec


class Experts:
    """Reads weight * (down(activation(projections(row))) + bias) in any arrangement that means the same."""

    def __init__(self, experts: int) -> None:
        self.num_experts = experts
        self.weights: Weights | None = None
        self.weight_on = WeightOn.NOWHERE
        self.row: Ref | None = None
        self.row_expr: PairExpr | None = None
        self.projections: list[tuple[Any, Any, int, int, int]] = []  # stack, bias, start, step, length
        self.activation: Any = None
        self.down: Any = None
        self.down_bias: Any = None
        self.sentinel = 0
        self.outer_sentinel = 0  # the same, where it masks a pair's weight or output
        self.clamped = 0
        self.by_index = False
        self.dtypes: set[torch.dtype] = set()
        self.casts: dict[torch.dtype, bool] = {}  # dtypes that values are cast to: only after the last matmul?
        self._uses: dict[int, list[tuple[Stack, set[int]]]] = {}  # parameter -> the rows of which stack are read from it
        self._refs: list[tuple[Ref, torch.dtype | None]] = []

    def read(self, e: PairExpr) -> None:
        scale, rest = 1.0, []
        for f in self._factors(e):
            if f[0] == "const":
                scale *= f[1]
            elif f[0] == "weight":
                need(self.weights is None, "a pair is weighted twice")
                self.weights, self.weight_on = f[1], WeightOn.OUTPUT
            else:
                rest.append(f)
        need(len(rest) == 1, "the experts' outputs are multiplied by something that is not a routing weight")
        e = rest[0]
        e = self._strip(e)
        e, self.down_bias = self._split_bias(e)
        need(e[0] == "mm", f"the last step of the experts is {_name(e)}, not a matmul")
        self._note_mm(e)
        self.down = e[1]
        inner = self._strip(e[2])
        inner = self._weight_inside(inner)
        self.activation = self._activation(inner)
        need(self.projections, "only one matmul is done with the experts' weights")
        if scale != 1.0:
            need(self.down_bias is None, "the experts' outputs are scaled after a bias")
            self.activation = ("mul", self.activation, ("const", scale))
        assert self.row_expr is not None
        self._read_row(self.row_expr)
        if self.clamped:
            need(self.outer_sentinel == self.clamped, "ids are clamped, and what was out of range is not masked")
        if self.sentinel:
            need(self.sentinel == self.num_experts, f"ids from {self.sentinel} are masked, there are {self.num_experts} experts")

    # -------- pieces

    def _strip(self, e: PairExpr) -> PairExpr:
        """e without casts and sentinel masks around it."""
        while e[0] in ("cast", "sentinel"):
            if e[0] == "sentinel":
                need(self.sentinel in (0, e[1]), "two different sentinels")
                self.sentinel = e[1]
            else:
                self.casts[e[1]] = self.casts.get(e[1], True) and self.down is None
            e = e[2]
        return e

    def _strip_outer(self, e: PairExpr) -> PairExpr:
        inner = self._strip(e)
        if e is not inner and self.sentinel:
            self.outer_sentinel = self.sentinel
        return inner

    def _factors(self, e: PairExpr) -> list[PairExpr]:
        """What e is the product of, seen through casts and masks."""
        e = self._strip_outer(e)
        if e[0] == "mul":
            return self._factors(e[1]) + self._factors(e[2])
        if e[0] == "div" and e[2][0] == "const" and e[2][1]:
            return [*self._factors(e[1]), ("const", 1.0 / e[2][1])]
        return [e]

    def _unweighted(self, a: PairExpr, b: PairExpr, on: WeightOn) -> PairExpr | None:
        """Of a product a * b the factor that is not the routing weight, which is noted; None where neither is it."""
        for weight, rest in ((b, a), (a, b)):
            if weight[0] == "weight":
                need(self.weights is None, "a pair is weighted twice")
                self.weights, self.weight_on = weight[1], on
                return rest
        return None

    def _split_bias(self, e: PairExpr) -> tuple[PairExpr, Any]:
        if e[0] == "add":
            a, b = self._strip(e[1]), self._strip(e[2])
            if b[0] == "bias":
                return a, b[1]
            if a[0] == "bias":
                return b, a[1]
        return e, None

    def _note_mm(self, e: PairExpr) -> None:
        self.by_index = self.by_index or e[3] != 0
        if e[3] > 0:
            need(self.clamped in (0, e[3]), "ids are clamped twice")
            self.clamped = e[3]
        if isinstance(e[1], Stacks):
            self.num_experts = self.num_experts or len(e[1].each)
            need(len(e[1].each) == self.num_experts, "the experts' weights differ in the number of experts")
        for s in e[1].each if isinstance(e[1], Stacks) else (e[1],):
            self.dtypes.add(s.cast or s.ref.tensor.dtype)
            if not isinstance(e[1], Stacks):
                need(s.e is not None, "one matrix serves all experts")
                self.num_experts = self.num_experts or s.experts
                need(s.experts == self.num_experts, "the experts' weights differ in the number of experts")

    def _weight_inside(self, e: PairExpr) -> PairExpr:
        """A weight on the activation counts as one on the output where the down projection is linear."""
        while e[0] == "mul" and self.down_bias is None and self.weights is None:
            a, b = self._strip(e[1]), self._strip(e[2])
            rest = self._unweighted(a, b, WeightOn.OUTPUT)
            if rest is None:
                return e
            e = rest
        return e

    def _activation(self, e: PairExpr) -> Any:
        e = self._strip(e)
        projection = self._projection(e)
        if projection is not None:
            if projection not in self.projections:
                self.projections.append(projection)
            return ("in", self.projections.index(projection))
        if e[0] == "const":
            return ("const", e[1])
        need(e[0] in X.OPS, f"{_name(e)} between the experts' matmuls")
        return (e[0], *(self._activation(a) for a in e[1:]))

    def _projection(self, e: PairExpr) -> tuple[Any, Any, int, int, int] | None:
        """Some of the rows of a weight stack times the token's row, with their bias."""
        start, step, length = 0, 1, -1
        while e[0] in ("slice", "cast", "sentinel"):
            if e[0] == "slice":
                start, step, length = e[2] + start * e[3], step * e[3], e[4] if length < 0 else length
                e = e[1]
            else:
                e = self._strip(e)
        inner, bias = self._split_bias(e)
        if inner[0] == "slice" and bias is not None:
            raise Unsupported("a bias is added after the features were split")
        inner = self._strip(inner)
        if inner[0] != "mm":
            return None
        self._note_mm(inner)
        row = inner[2]
        need(self.row_expr is None or self.row_expr == row, "the projections read different rows")
        self.row_expr = row
        size = (inner[1].each[0] if isinstance(inner[1], Stacks) else inner[1]).sizes[0]
        return inner[1], bias, start, step, size if length < 0 else length

    def _read_row(self, e: PairExpr) -> None:
        e = self._strip(e)
        if e[0] == "mul":
            rest = self._unweighted(self._strip(e[1]), self._strip(e[2]), WeightOn.INPUT)
            if rest is None:
                raise Unsupported("the experts' input is multiplied by something that is not a routing weight")
            e = rest
        need(e[0] == "row", f"the experts' input is {_name(e)}, not rows of tokens")
        self.row = e[1]

    # -------- the spec

    def params(self) -> list[tuple[Ref, torch.dtype | None]]:
        return self._refs

    def _param(self, s: Stack, rows: set[int]) -> int:
        """The parameter through which these rows of a stack are read. Reads of one that overlap get one each: the gradients
        of a parameter given twice are added up, those of one given once are written once."""
        for i, (ref, _) in enumerate(self._refs):
            same = ref is s.ref and all(used == s and not (taken & rows) for used, taken in self._uses[i])
            if same:
                self._uses[i].append((s, rows))
                return i
        dtype = next(iter(self.dtypes))  # of the matrices; under autocast a bias may have been added in a wider one
        self._refs.append((s.ref, dtype if s.ref.tensor.dtype != dtype else None))
        self._uses[len(self._refs) - 1] = [(s, rows)]
        return len(self._refs) - 1

    def _weight(self, stack: Any, start: int = 0, step: int = 1, length: int = -1) -> Weight:
        each = stack.each if isinstance(stack, Stacks) else (stack,)
        s = each[0]
        n, k = (*s.strides, 0)[:2]
        rows = set(range(start, s.sizes[0] if length < 0 else start + length * step, step))
        params = tuple(self._param(one, rows) for one in each)
        return Weight(params, s.shape, s.offset + start * n, (s.e or 0) if not isinstance(stack, Stacks) else 0, n * step, k)

    def spec(self, k: int, out_of_range: OutOfRange, out_dtype: torch.dtype) -> ExpertsSpec:
        need(len(self.dtypes) == 1, f"the experts' weights are of several dtypes: {sorted(map(str, self.dtypes))}")
        compute = next(iter(self.dtypes))
        for dtype, outside in self.casts.items():
            exact = holds(dtype, compute) or (outside and holds(dtype, out_dtype))
            need(exact, f"values are rounded to {dtype} inside the layer, which computes in {compute}")
        F = self.projections[0][4]
        need(all(p[4] == F for p in self.projections), "the projections differ in width")
        up = self.projections[0][0].each[0] if isinstance(self.projections[0][0], Stacks) else self.projections[0][0]
        down = self.down.each[0] if isinstance(self.down, Stacks) else self.down
        need(down.sizes[1] == F, f"the down projection reads {down.sizes[1]} features, the activation gives {F}")
        projections = tuple(self._weight(p[0], *p[2:]) for p in self.projections)
        biases = tuple(None if p[1] is None else self._weight(p[1], *p[2:]) for p in self.projections)
        return ExpertsSpec(
            self.num_experts,
            k,
            up.sizes[1],
            F,
            down.sizes[0],
            projections,
            biases,
            self.activation,
            self._weight(self.down),
            None if self.down_bias is None else self._weight(self.down_bias),
            self.weight_on,
            out_of_range,
            compute,
            out_dtype,
        )


def _name(e: PairExpr) -> str:
    return {"row": "a row of tokens", "mm": "a matmul", "weight": "a routing weight"}.get(e[0], str(e[0]))
