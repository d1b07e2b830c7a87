"""Few tokens, without a permutation: up per pair, down per token over its K experts.

Every weight of a chosen expert is read once per pair that chose it, by matrix-vector products; the combine is the loop of the
down kernel, so no row of the experts' output is ever stored.  Where few programs would be left, several share a token's experts
and draw tickets as in down.py.

decode_down may be launched before decode_up has ended: the first thing that each of its programs does is to wait until all of
decode_up is done and can be seen (griddepcontrol.wait), so what is saved is the launch; decode_up, for its part, says at its
start that its successor may be launched once all its programs have begun.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moecompile.kernels.gpu.config import Kernel

EXPERT = """\
    e64 = tl.load(IDS + pair).to(tl.int64)
{% if wraps %}
    e64 = tl.where(e64 < 0, e64 + E, e64)
{% endif %}
    live = (e64 >= 0) & (e64 < E)
"""

UP = '''\
@triton.jit
def decode_up(X, {{ weights }}{% if on_input %}SCALE, {% endif %}IDS, Y):
    """Y[pair] = activation(X[token] W0[e]^T, ..). Grid: (R, F / BN)."""
{% if signals %}
    tl.extra.cuda.gdc_launch_dependents()
{% endif %}
    pair = tl.program_id(0)
{{ expert }}
    if not live:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = X + (pair // K).to(tl.int64) * H + k
{% if on_input %}
    scale = tl.load(SCALE + pair).to(tl.float32)
{% endif %}
{% if interleaved %}
    both = tl.program_id(1) * (2 * BN) + tl.arange(0, 2 * BN)  # gate and up columns alternate in memory
    w_at = {{ W[0].base() }} + both[:, None] + {{ W[0].along("k[None, :]") }}
    acc = tl.zeros((2 * BN, BK), tl.float32)
{% else %}
{% for w in W %}
    {{ w.name }}_at = {{ w.base() }} + {{ w.at("n[:, None]", "k[None, :]") }}
    acc{{ loop.index0 }} = tl.zeros((BN, BK), tl.float32)
{% endfor %}
{% endif %}
    for k0 in range(0, H, BK):
        x = {{ load("x_at + k0", H % BK and "k0 + k < H") }}
{% if on_input %}
        x = x.to(tl.float32) * scale
{% endif %}
        x = x.to({{ dtype }}).to(tl.float32)[None, :]
{% if interleaved %}
        w = {{ load("w_at" ~ W[0].step("k0"), F % BN and "(both < 2 * F)[:, None]", H % BK and "(k0 + k < H)[None, :]") }}
        acc += w.to(tl.float32) * x
    h0, h1 = tl.split(tl.reshape(tl.sum(acc, 1), (BN, 2)))
{% else %}
{% for w in W %}
        {{ w.name }} = {{ load(w.name ~ "_at" ~ w.step("k0"), F % BN and "(n < F)[:, None]", H % BK and "(k0 + k < H)[None, :]") }}
        acc{{ loop.index0 }} += {{ w.name }}.to(tl.float32) * x
{% endfor %}
{% for w in W %}
    h{{ loop.index0 }} = tl.sum(acc{{ loop.index0 }}, 1)
{% endfor %}
{% endif %}
{% for b in B if b %}
    h{{ b.index }} += {{ load(b.base() ~ " + " ~ b.at("n"), F % BN and "n < F") }}.to(tl.float32)
{% endfor %}
{{ activation }}
    {{ store("Y + pair.to(tl.int64) * F + n", "y.to(Y.dtype.element_ty)", F % BN and "n < F") }}
'''

DOWN = '''\
@triton.jit
def decode_down(Y, {{ weights }}{% if on_output %}SCALE, {% endif %}IDS, {% if split > 1 %}PARTS, TICKETS, {% endif %}OUT):
    """OUT[t] = sum over k of {% if on_output %}SCALE[t,k] * {% endif %}Y[t,k] D[e]^T\
{% if split > 1 %}, every {{ split }}th k by another program{% endif %}. Grid: (T, O / BN{% if split > 1 %}, SPLIT{% endif %})."""
{% if waits %}
    tl.extra.cuda.gdc_wait()
{% endif %}
    token = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    out = tl.zeros((BN,), tl.float32)
{% if split > 1 %}
    part = tl.program_id(2)
{% endif %}
    for slot in {{ "range(part, K, SPLIT)" if split > 1 else "range(K)" }}:
        pair = token * K + slot
{{ expert | indent(4, first=true) }}
        if live:
            d_at = {{ D.base() }} + {{ D.at("n[:, None]", "k[None, :]") }}
            y_at = Y + pair.to(tl.int64) * F + k
            acc = tl.zeros((BN, BK), tl.float32)
            for k0 in range(0, F, BK):
                y = {{ load("y_at + k0", F % BK and "k0 + k < F") }}.to(tl.float32)[None, :]
                d = {{ load("d_at" ~ D.step("k0"), O % BN and "(n < O)[:, None]", F % BK and "(k0 + k < F)[None, :]") }}
                acc += d.to(tl.float32) * y
            total = tl.sum(acc, 1)
{% if DB %}
            total += {{ load(DB.base() ~ " + " ~ DB.at("n"), O % BN and "n < O") }}.to(tl.float32)
{% endif %}
{% if on_output %}
            total *= tl.load(SCALE + pair).to(tl.float32)
{% endif %}
            out += total
{% if wraps %}
        else:
            out += float("nan")
{% endif %}
{% if split > 1 %}
    parts_at = PARTS + token.to(tl.int64) * {{ split * O }} + n
    {{ store("parts_at + part * O", "out", O % BN and "n < O") }}
    tl.debug_barrier()
    ticket_at = TICKETS + token * tl.num_programs(1) + tl.program_id(1)
    if tl.atomic_add(ticket_at, 1, sem="acq_rel", scope="gpu") < SPLIT - 1:
        return
    tl.store(ticket_at, 0)
    out = {{ load("parts_at", O % BN and "n < O", cache=".cg") }}
    for i in range(1, SPLIT):
        out += {{ load("parts_at + i * O", O % BN and "n < O", cache=".cg") }}
{% endif %}
    {{ store("OUT + token.to(tl.int64) * O + n", "out.to(OUT.dtype.element_ty)", O % BN and "n < O") }}
'''


def launch_up(
    kernel: Kernel, columns: int, x: Tensor, params: Sequence[Tensor], scale: Tensor | None, ids: Tensor, y: Tensor
) -> None:
    """x [T,H], ids [T,K] -> y [R,F] in pair order; rows of skipped pairs are not written."""
    grid = (ids.numel(), -(-columns // kernel.config.block_n))
    kernel.run("decode_up", grid, x, *params, *([] if scale is None else [scale]), ids, y)


def tickets(kernel: Kernel, out: Tensor) -> int:
    """How many tickets launch_down needs: one for each block of out [T,O], 0 where no sum is split."""
    return out.shape[0] * -(-out.shape[1] // kernel.config.block_n) if kernel.config.split > 1 else 0


def launch_down(
    kernel: Kernel,
    y: Tensor,
    params: Sequence[Tensor],
    scale: Tensor | None,
    ids: Tensor,
    out: Tensor,
    shared: Sequence[Tensor] = (),
) -> None:
    """y [R,F] in pair order -> out [T,O]. `shared` as for down.launch, with room for the parts [T,split,O]."""
    split = kernel.config.split
    grid = (out.shape[0], -(-out.shape[1] // kernel.config.block_n), *([split] if split > 1 else []))
    kernel.run("decode_down", grid, y, *params, *([] if scale is None else [scale]), ids, *shared, out)
