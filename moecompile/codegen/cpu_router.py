"""moe::_route on CPU: aten makes the scores, one pass in C++ makes ids and weights of them.

The scores are aten's own because ids have to be those of aten.topk bit for bit, and a score that differs in its last bit can
change a choice.  From there on additions, comparisons and roundings are exact, and top-k is the same library algorithm.  That
it is the same is tested once per process and shape of router: where torch was built with another C++ library, aten does it.
Together with its experts (cpu_routed) a softmax is C++ too, and of few tokens the logits themselves tell, nearly always, what
aten's scores would choose (router.h).
"""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import torch
from torch import Tensor

from moecompile.codegen import build_cpp
from moecompile.codegen.cpu_experts import DTYPES
from moecompile.ir import reference
from moecompile.ir.spec import RouterSpec, router_from_text

_STEPS = {"softmax": 0, "sigmoid": 1, "cast": 2, "scale": 3, "normalise": 4}  # as enum Step of router.h
UNSURE = 3  # as enum Status of call.h
FEW = 8192  # scores: fewer are computed in C++ where they may, more cost aten less than asking it twice would
_SOURCE = """\
// router: from scores to ids and weights
#include "router.h"

extern "C" __attribute__((visibility("default"))) int run(const RouterCall* call) {
  return route(*call);
}
"""


def supports_router(spec: RouterSpec) -> str | None:
    """Why the CPU router cannot run the spec, or None."""
    if spec.score_dtype not in DTYPES:
        return f"router scores are {spec.score_dtype}, not float32, bfloat16 or float16"
    for step in spec.post:
        if step[0] == "cast" and step[1] not in DTYPES:
            return f"router weights are {step[1]}, not float32, bfloat16 or float16"
    g = spec.groups
    if g is not None and g.score == "top2" and spec.num_experts // g.count < 2:
        return "groups of one expert have no second best score"
    return None


def prepare_router(spec: RouterSpec) -> None:
    """Build and load the router now. Raises BuildError."""
    router(spec.text())


def route(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """logits [..., E], bias [E] -> weights [..., K], ids [..., K] int64."""
    return router(spec).run(logits, bias)


_routers: dict[str, Router] = {}
_lock = threading.Lock()


def router(spec: str) -> Router:
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
        library = build_cpp.load(_SOURCE)
        self._run, self.address = build_cpp.entry(library, "run"), build_cpp.address(library, "run")
        g = spec.groups
        self._groups = (g.count, g.top_k, g.score == "top2", _bits(g.fill)) if g else (0, 0, 0, 0)
        self._weights_from = ("score", "choice", "logits").index(spec.weights_from)
        steps = [_step(step) for step in spec.post]
        self._steps = (ctypes.c_int64 * (3 * len(steps) + 1))(*[value for step in steps for value in step])
        plain = spec.score == "softmax" and spec.score_dtype == torch.float32 and not spec.bias and g is None
        self._softmax = plain and _same_scores_of_same(spec.num_experts)
        self.exact = self._same_top_k()

    def run(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        kept: list[Any] = []
        call = self.call(logits, bias, kept)
        if call is None:
            return reference.route(self.spec, logits, bias)
        shape = (*logits.shape[:-1], self.spec.top_k)
        weights = torch.empty(shape, dtype=self.weights_dtype(logits, bias))
        ids = torch.empty(shape, dtype=torch.int64)
        self._run([*call, weights.data_ptr(), DTYPES[weights.dtype], ids.data_ptr()])
        return weights, ids

    def call(
        self, logits: Tensor, bias: Tensor | None, kept: list[Any], own: bool = False, scored: bool = True
    ) -> list[int] | None:
        """struct RouterCall up to where the results go; what it points into is appended to `kept`. None: aten is to do it.

        own: a softmax is the kernel's, whatever the number of tokens.  scored: aten's is there too, for the choice.
        """
        s = self.spec
        if not self.exact or logits.dtype not in DTYPES or (bias is not None and bias.dtype not in DTYPES):
            return None
        own = own and self._softmax
        tokens = logits.numel() // s.num_experts
        score = None
        if scored or not own or tokens * s.num_experts > FEW:
            score = reference.scores(s, logits).contiguous()
        logits = logits.contiguous() if own or s.weights_from == "logits" else logits
        bias = bias if bias is None else bias.contiguous()
        kept += (score, logits, bias)
        choice_dtype = s.score_dtype if bias is None else torch.promote_types(s.score_dtype, bias.dtype)
        return [
            *(tokens, s.num_experts, s.top_k, torch.get_num_threads(), 2 if s.first else s.sorted),
            *(0 if score is None else score.data_ptr(), 0 if bias is None else bias.data_ptr(), logits.data_ptr(), own),
            *(DTYPES[s.score_dtype], 0 if bias is None else DTYPES[bias.dtype], DTYPES[logits.dtype], DTYPES[choice_dtype]),
            *self._groups,
            *(self._weights_from, ctypes.addressof(self._steps), len(s.post)),
        ]

    def weights_dtype(self, logits: Tensor, bias: Tensor | None) -> torch.dtype:
        s = self.spec
        choice = s.score_dtype if bias is None else torch.promote_types(s.score_dtype, bias.dtype)
        return s.weights_dtype({"score": s.score_dtype, "logits": logits.dtype}.get(s.weights_from, choice))

    def _same_top_k(self) -> bool:
        """Whether ids with many ties and NaN are aten's."""
        s, g = self.spec, torch.Generator().manual_seed(0)
        plain = RouterSpec(s.num_experts, s.top_k, "identity", torch.float32, False, None, "score", (), s.sorted, s.first)
        rows = torch.randint(-4, 5, (64, s.num_experts), generator=g).float()
        rows[rows == 4] = float("nan")
        twin = object.__new__(Router)
        twin.__dict__ = dict(self.__dict__, spec=plain, exact=True, _groups=(0, 0, 0, 0), _weights_from=0)
        return torch.equal(twin.run(rows, None)[1], reference.route(plain, rows, None)[1])


def _same_scores_of_same(num_experts: int) -> bool:
    """Whether aten's softmax gives equal logits equal scores, wherever they stand."""
    rows = torch.randint(3, (64, num_experts), generator=torch.Generator().manual_seed(0)).float()
    scores, rows = torch.softmax(rows, -1), rows.long()
    most, least = (torch.zeros(64, 3).scatter_reduce(1, rows, scores, how, include_self=False) for how in ("amax", "amin"))
    return torch.equal(most, least)


def _bits(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _step(step: tuple[Any, ...]) -> tuple[int, int, int]:
    if step[0] == "cast":
        return _STEPS["cast"], DTYPES[step[1]], 0
    a, b = (*(float(v) for v in step[1:]), 0.0, 0.0)[:2]
    return _STEPS[step[0]], _bits(a), _bits(b)
