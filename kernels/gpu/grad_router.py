"""Gradient of the logits, and of the bias where it reaches the weights, from the gradient of the K weights of each token.

The scores and the weights are computed again from the logits, for the ids that were chosen; the K gradients go back through
the steps that made the weights, to their experts' lanes, and through the scores.  The choice itself has no gradient.  The
gradients of what balancing losses read (softmax summed over tokens, squared logsumexp) are added to them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu.config import Kernel
from moecompile.kernels.gpu.router import programs

SOURCE = '''\
@triton.jit(do_not_specialize=["T"])
def grad_router(GRAD, LOGITS, {% if bias %}BIAS, {% endif %}IDS, \
{% if stats %}DPROBS, DSQUARES, {% endif %}DLOGITS, {% if bias %}PARTS, {% endif %}T):
    """DLOGITS [T,E] of GRAD and IDS [T,K]{% if bias %}; PARTS[program] = the sum of what reaches each expert's choice{% endif %}. \
Grid: (T / BM,)."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    token64 = token.to(tl.int64)
    expert = tl.arange(0, LANES)
    slot = tl.arange(0, SLOTS)
    used = (slot < K)[None, :]
    live = (token < T)[:, None]
    inside = live{% if E != LANES %} & (expert < E)[None, :]{% endif %}

    at = token64[:, None] * E + expert[None, :]
    logits = tl.load(LOGITS + at, mask=inside, other=-float("inf")).to(tl.float32)
{% if source != "logits" %}
    z = {{ rounded("logits", score_dtype) }}
{% include "router_score" %}
{% endif %}
{% if bias %}
    choice = score + tl.load(BIAS + expert{% if E != LANES %}, mask=expert < E, other=0.0{% endif %}).to(tl.float32)[None, :]
    choice = {{ rounded("choice", choice_dtype) }}
{% endif %}
    w0 = tl.zeros((BM, SLOTS), tl.float32)
    for i in range(K):
        e = tl.load(IDS + token64 * K + i, mask=token < T, other=-1).to(tl.int32)[:, None]
        chosen = tl.sum(tl.where(expert[None, :] == e, {{ source }}, 0.0), 1)[:, None]
        w0 = tl.where((slot == i)[None, :], chosen, w0)
{% include "router_post" %}
    g = tl.load(GRAD + token64[:, None] * K + slot[None, :], mask=live & used, other=0.0).to(tl.float32)
{% for step in post | reverse %}
{% set y, i = "w%d" % loop.revindex, loop.revindex0 %}
{% if step.name == "softmax" %}
    g = {{ y }} * (g - tl.sum(tl.where(used, g * {{ y }}, 0.0), 1)[:, None])
{% elif step.name == "sigmoid" %}
    g = g * {{ y }} * (1.0 - {{ y }})
{% elif step.name == "scale" %}
    g = g * {{ number(step.factor) }}
{% elif step.name == "normalise" %}
    shared = tl.sum(tl.where(used, g * {{ y }}, 0.0), 1)[:, None]
{% if step.least %}
    shared = tl.where(total{{ i }} >= {{ number(step.least) }}, shared, 0.0)
{% endif %}
    g = (g - shared) / {{ "least" if step.least else "total" }}{{ i }}
{% endif %}
{% endfor %}
    d = tl.zeros((BM, LANES), tl.float32)
    for i in range(K):
        e = tl.load(IDS + token64 * K + i, mask=token < T, other=-1).to(tl.int32)[:, None]
        d += tl.where(expert[None, :] == e, tl.sum(tl.where((slot == i)[None, :], g, 0.0), 1)[:, None], 0.0)
{% if bias %}
    {{ store("PARTS + tl.program_id(0).to(tl.int64) * E + expert", "tl.sum(tl.where(live, d, 0.0), 0)", \
E != LANES and "expert < E") }}
{% endif %}
{% if source == "logits" or score == "identity" %}
{% elif score == "softmax" %}
    d = score * (d - tl.sum(d * score, 1)[:, None])
{% elif score == "sigmoid" %}
    d = d * score * (1.0 - score)
{% else %}
    slope = tl.where(z > 20.0, 1.0, 1.0 / (1.0 + tl.exp(-z)))
    d = tl.where(d == 0.0, 0.0, d * slope / (2.0 * score))  # eager has 0 / 0 where an unchosen score underflows
{% endif %}
{% if stats %}
{% include "router_softmax" %}
    dshare = tl.load(DPROBS + expert{% if E != LANES %}, mask=expert < E, other=0.0{% endif %})[None, :]
    dlse = 2.0 * lse * tl.load(DSQUARES)
    d += share * (dshare - tl.sum(dshare * share, 1)[:, None] + dlse)
{% endif %}
    tl.store(DLOGITS + at, d.to(DLOGITS.dtype.element_ty), mask=inside)
'''


def launch(
    kernel: Kernel,
    grad: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    dstats: Sequence[Tensor],
    dlogits: Tensor,
    parts: Tensor | None,
) -> None:
    """grad, ids [T,K], logits [T,E] -> dlogits [T,E]; with a bias [E] that reaches the weights also parts [programs,E].
    `dstats`, for a kernel with statistics: the gradients of the summed softmax [E] and of the sum of squares []."""
    given = [grad, logits, *([] if bias is None else [bias]), ids, *dstats, dlogits, *([] if parts is None else [parts])]
    kernel.run("grad_router", (programs(kernel, logits.shape[0]),), *given, logits.shape[0])
