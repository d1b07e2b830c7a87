"""moe::_route on CPU: aten makes the scores, one pass in C++ makes ids and weights of them.

The scores are aten's own because ids have to be those of aten.topk bit for bit, and a score that differs in its last bit can
change a choice.  From there on additions, comparisons and roundings are exact, and top-k is the same library algorithm.  That
it is the same is tested once per process and shape of router: where torch was built with another C++ library, aten does it.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import torch
from torch import Tensor

from moecompile.codegen import build_cpp
from moecompile.ir import reference
from moecompile.ir.spec import RouterSpec, router_from_text

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as enum Dtype of call.h
_STEPS = {"softmax": 0, "sigmoid": 1, "cast": 2, "scale": 3, "normalise": 4}  # as enum Step of router.h
_SOURCE = """\
// router: from scores to ids and weights
#include "router.h"

extern "C" __attribute__((visibility("default"))) int run(const RouterCall* call) {
  route(*call);
  return 0;
}
"""


def supports_router(spec: RouterSpec) -> str | None:
    """Why the CPU router cannot run the spec, or None."""
    if spec.score_dtype not in _DTYPES:
        return f"router scores are {spec.score_dtype}, not float32, bfloat16 or float16"
    for step in spec.post:
        if step[0] == "cast" and step[1] not in _DTYPES:
            return f"router weights are {step[1]}, not float32, bfloat16 or float16"
    g = spec.groups
    if g is not None and g.score == "top2" and spec.num_experts // g.count < 2:
        return "groups of one expert have no second best score"
    return None


def prepare_router(spec: RouterSpec) -> None:
    """Build and load the router now. Raises BuildError."""
    _router(spec.text())


def route(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """logits [..., E], bias [E] -> weights [..., K], ids [..., K] int64."""
    return _router(spec).run(logits, bias)


_routers: dict[str, Router] = {}
_lock = threading.Lock()


def _router(spec: str) -> Router:
    found = _routers.get(spec)
    if found is None:
        with _lock:
            found = _routers.get(spec)
            if found is None:
                found = _routers[spec] = Router(router_from_text(spec))
    return found


class Router:
    """The router of one spec."""

    def __init__(self, spec: RouterSpec) -> None:
        self.spec = spec
        self._run = build_cpp.entry(build_cpp.load(_SOURCE), "run")
        g = spec.groups
        self._groups = (g.count, g.top_k, g.score == "top2", _bits(g.fill)) if g else (0, 0, 0, 0)
        self._weights_from = ("score", "choice", "logits").index(spec.weights_from)
        steps = [_step(step) for step in spec.post]
        self._steps = (ctypes.c_int64 * (3 * len(steps) + 1))(*[value for step in steps for value in step])
        self.exact = self._same_top_k()

    def run(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        s = self.spec
        if not self.exact or logits.dtype not in _DTYPES or (bias is not None and bias.dtype not in _DTYPES):
            return reference.route(s, logits, bias)
        score = reference.scores(s, logits).contiguous()
        choice_dtype = s.score_dtype if bias is None else torch.promote_types(s.score_dtype, bias.dtype)
        read = {"score": s.score_dtype, "logits": logits.dtype}.get(s.weights_from, choice_dtype)
        shape = (*logits.shape[:-1], s.top_k)
        weights = torch.empty(shape, dtype=s.weights_dtype(read))
        ids = torch.empty(shape, dtype=torch.int64)
        logits = logits.contiguous() if s.weights_from == "logits" else logits
        bias = bias if bias is None else bias.contiguous()
        call = (
            *(score.numel() // s.num_experts, s.num_experts, s.top_k, torch.get_num_threads(), 2 if s.first else s.sorted),
            *(score.data_ptr(), 0 if bias is None else bias.data_ptr(), logits.data_ptr()),
            *(_DTYPES[s.score_dtype], 0 if bias is None else _DTYPES[bias.dtype], _DTYPES[logits.dtype], _DTYPES[choice_dtype]),
            *self._groups,
            *(self._weights_from, ctypes.addressof(self._steps), len(s.post)),
            *(weights.data_ptr(), _DTYPES[weights.dtype], ids.data_ptr()),
        )
        self._run(call)
        return weights, ids

    def _same_top_k(self) -> bool:
        """Whether ids with many ties and NaN are aten's."""
        s, g = self.spec, torch.Generator().manual_seed(0)
        plain = RouterSpec(s.num_experts, s.top_k, "identity", torch.float32, False, None, "score", (), s.sorted, s.first)
        rows = torch.randint(-4, 5, (64, s.num_experts), generator=g).float()
        rows[rows == 4] = float("nan")
        twin = object.__new__(Router)
        twin.__dict__ = dict(self.__dict__, spec=plain, exact=True, _groups=(0, 0, 0, 0), _weights_from=0)
        return torch.equal(twin.run(rows, None)[1], reference.route(plain, rows, None)[1])


def _bits(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _step(step: tuple[Any, ...]) -> tuple[int, int, int]:
    if step[0] == "cast":
        return _STEPS["cast"], _DTYPES[step[1]], 0
    a, b = (*(float(v) for v in step[1:]), 0.0, 0.0)[:2]
    return _STEPS[step[0]], _bits(a), _bits(b)
