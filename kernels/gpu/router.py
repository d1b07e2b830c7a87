"""Scores, bias, groups, top-k, normalise and scale of one block of tokens, in registers.

The top-k is taken of packed keys: an order-preserving integer of the float in the high word, the lane counted from the end
in the low word.  So every key differs, ties go to the lower expert, NaN counts as the largest, and ids are unique and in
range whatever the bits of the logits.  What balancing losses need is summed by block of tokens on the way; the sums of the
blocks are added in order afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu.config import Kernel

SCORE = """\
{% if score == "softmax" %}
    score = tl.exp(z - tl.max(z, 1)[:, None])
    score = score / tl.sum(score, 1)[:, None]
{% elif score == "sigmoid" %}
    score = 1.0 / (1.0 + tl.exp(-z))
{% elif score == "sqrtsoftplus" %}
    grown = tl.exp(tl.minimum(z, 20.0, propagate_nan=tl.PropagateNan.ALL))
    sum1 = 1.0 + grown
    softplus = tl.where(sum1 == 1.0, grown, tl.log(sum1) * (grown / tl.where(sum1 == 1.0, 1.0, sum1 - 1.0)))
    score = tl.sqrt(tl.where(z > 20.0, z, softplus))
{% else %}
    score = z
{% endif %}
    score = {{ rounded("score", score_dtype) }}
"""

POST = """\
{% for step in post %}
{% set w, y = "w%d" % loop.index0, "w%d" % loop.index %}
{% if step.name == "softmax" %}
    {{ y }} = tl.exp({{ w }} - tl.max(tl.where(used, {{ w }}, -float("inf")), 1)[:, None])
    {{ y }} = {{ rounded(y ~ " / tl.sum(tl.where(used, " ~ y ~ ", 0.0), 1)[:, None]", step.dtype) }}
{% elif step.name == "sigmoid" %}
    {{ y }} = {{ rounded("1.0 / (1.0 + tl.exp(-" ~ w ~ "))", step.dtype) }}
{% elif step.name == "cast" %}
    {{ y }} = {{ rounded(w, step.dtype) }}
{% elif step.name == "scale" %}
    {{ y }} = {{ rounded(w ~ " * " ~ number(step.factor), step.dtype) }}
{% else %}
    total{{ loop.index0 }} = {{ rounded("tl.sum(tl.where(used, " ~ w ~ ", 0.0), 1)[:, None]", step.dtype) }}
{% if step.eps %}
    total{{ loop.index0 }} = {{ rounded("total" ~ loop.index0 ~ " + " ~ number(step.eps), step.dtype) }}
{% endif %}
{% if step.least %}
    least{{ loop.index0 }} = tl.maximum(total{{ loop.index0 }}, {{ number(step.least) }}, propagate_nan=tl.PropagateNan.ALL)
{% endif %}
    {{ y }} = {{ rounded(w ~ (" / least" if step.least else " / total") ~ loop.index0, step.dtype) }}
{% endif %}
{% endfor %}
"""

SOFTMAX = """\
    top = tl.max(logits, 1)[:, None]
    share = tl.exp(logits - top)
    total = tl.sum(share, 1)[:, None]
    share = share / total
    lse = top + tl.log(total)
"""

SOURCE = '''\
@triton.jit
def packed(value, lane, lanes: tl.constexpr):
    """int64 keys that sort as `value` does, NaN last, then by descending lane."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(value != value, 0x7FFFFFFF, bits)
    return bits.to(tl.int64) * 4294967296 + (lanes - 1 - lane)
{% if groups %}


@triton.jit
def unpacked(key):
    """The value of a key."""
    bits = (key >> 32).to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)
{% endif %}


@triton.jit(do_not_specialize=["T"])
def router(LOGITS, {% if bias %}BIAS, {% endif %}WEIGHTS, IDS, {% if stats %}COUNTS, PROBS, SQUARES, {% endif %}T):
    """WEIGHTS and IDS [T,K] of LOGITS [T,E]\
{% if stats %}; by program the choices and the summed softmax of each expert, and the sum of squared logsumexp{% endif %}. \
Grid: (T / BM,)."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    lane = tl.arange(0, LANES)
{% if groups %}
    expert = lane // {{ group_lanes }} * {{ group_size }} + lane % {{ group_lanes }}
    real = (lane // {{ group_lanes }} < {{ groups.count }}) & (lane % {{ group_lanes }} < {{ group_size }})
{% else %}
    expert = lane
    real = lane < E
{% endif %}
    at = LOGITS + token.to(tl.int64)[:, None] * E + expert[None, :]
    logits = tl.load(at, mask=(token < T)[:, None] & real[None, :], other=-float("inf")).to(tl.float32)
    z = {{ rounded("logits", score_dtype) }}
{% include "router_score" %}
{% if bias %}
    choice = score + tl.load(BIAS + expert, mask=real, other=0.0).to(tl.float32)[None, :]
    choice = {{ rounded("choice", choice_dtype) }}
{% else %}
    choice = score
{% endif %}
{% if groups %}
    key = tl.where(real[None, :], packed(choice, lane[None, :], LANES), LEAST)
    key = tl.reshape(key, (BM, {{ group_rows }}, {{ group_lanes }}))
    best = tl.max(key, 2)
    value = unpacked(best)
{% if groups.score == "top2" %}
    second = tl.max(tl.where(key == best[:, :, None], LEAST, key), 2)
    value += unpacked(second)
    value = {{ rounded("value", choice_dtype) }}
{% endif %}
    group = tl.arange(0, {{ group_rows }})
    rank = tl.where((group < {{ groups.count }})[None, :], packed(value, group[None, :], {{ group_rows }}), LEAST)
    kept = tl.zeros((BM, {{ group_rows }}), tl.int32)
    for _ in range({{ groups.top_k }}):
        top = tl.max(rank, 1)[:, None]
        kept = tl.where(rank == top, 1, kept)
        rank = tl.where(rank == top, LEAST, rank)
    spread = tl.broadcast_to(kept[:, :, None], (BM, {{ group_rows }}, {{ group_lanes }}))
    choice = tl.where(tl.reshape(spread, (BM, LANES)) == 1, choice, {{ number(groups.fill) }})
{% endif %}
    key = tl.where(real[None, :], packed(choice, lane[None, :], LANES), LEAST)
    slot = tl.arange(0, SLOTS)
    w0 = tl.zeros((BM, SLOTS), tl.float32)
    chosen = tl.zeros((BM, SLOTS), tl.int32)
    for i in range(K):
        top = tl.max(key, 1)[:, None]
        hit = key == top
        w0 = tl.where((slot == i)[None, :], tl.sum(tl.where(hit, {{ source }}, 0.0), 1)[:, None], w0)
        chosen = tl.where((slot == i)[None, :], tl.sum(tl.where(hit, expert[None, :], 0), 1)[:, None], chosen)
        key = tl.where(hit, LEAST, key)
    used = (slot < K)[None, :]
{% include "router_post" %}
    at = token.to(tl.int64)[:, None] * K + slot[None, :]
    mask = (token < T)[:, None] & used
    tl.store(WEIGHTS + at, w{{ post | length }}.to(WEIGHTS.dtype.element_ty), mask=mask)
    tl.store(IDS + at, chosen.to(IDS.dtype.element_ty), mask=mask)
{% if stats %}
{% include "router_softmax" %}
    live = (token < T)[:, None]
    at = tl.program_id(0).to(tl.int64) * E + expert
    tl.store(COUNTS + at, tl.sum(tl.where(live & (key == LEAST), 1, 0), 0), mask=real)
    tl.store(PROBS + at, tl.sum(tl.where(live, share, 0.0), 0), mask=real)
    tl.store(SQUARES + tl.program_id(0), tl.sum(tl.sum(tl.where(live, lse * lse, 0.0), 1), 0))
{% endif %}
'''


def launch(kernel: Kernel, logits: Tensor, bias: Tensor | None, weights: Tensor, ids: Tensor, sums: Sequence[Tensor] = ()) -> None:
    """logits [T,E], bias [E] -> weights [T,K], ids [T,K]; `sums`, for a kernel with statistics: counts and softmax
    [programs,E], squares [programs]."""
    grid = (programs(kernel, logits.shape[0]),)
    kernel.run("router", grid, logits, *([] if bias is None else [bias]), weights, ids, *sums, logits.shape[0])


def programs(kernel: Kernel, tokens: int) -> int:
    """Blocks of tokens, each with a row of partial sums."""
    return -(-tokens // kernel.config.block_m)
