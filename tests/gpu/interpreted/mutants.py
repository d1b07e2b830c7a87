"""Ways to break the kernels: (template, what is there, what is put in its place).

Each replaces one piece of a template's text. What no result can show is not listed (tile order, hints for alignment).
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`before` must occur in the template; only its occurrence number `which` is replaced."""

    name: str
    template: str
    before: str
    after: str
    which: int = 0


LIVE = "row < tl.load(OFFSETS + e + 1)"
MUTANTS = (
    # which tile, which rows
    Mutant("tile: rows past the expert's end", "tile", LIVE, "row >= 0"),
    Mutant("tile: one row too many", "tile", LIVE, "row <= tl.load(OFFSETS + e + 1)"),
    Mutant("tile: last row lost", "tile", LIVE, "row < tl.load(OFFSETS + e + 1) - 1"),
    Mutant("tile: end of the next expert", "tile", "OFFSETS + e + 1", "OFFSETS + e + 2"),
    Mutant("tile: no early exit", "tile", "if e < 0:", "if e < -1:"),
    Mutant("tile: last tile skipped", "tile", "if e < 0:", "if (e < 0) | (tile == tiles - 1):"),
    Mutant("tile: neighbour's tile", "tile", "TILE_MAP + tile * 2)", "TILE_MAP + (tile // 2) * 2)"),
    Mutant("tile: first column only", "tile", "column = pid % (GROUP * N_TILES) // height", "column = pid * 0"),
    Mutant("tile: short band as if full", "tile", "tl.minimum(tiles - band, GROUP)", "tiles * 0 + GROUP"),
    # permutation
    Mutant(
        "permute: unstable rank",
        "permute",
        "tl.cumsum(mine.to(tl.int32), 0) - 1",
        "tl.sum(mine.to(tl.int32), 0) - tl.cumsum(mine.to(tl.int32), 0)",
    ),
    Mutant("permute: rank from one", "permute", "tl.cumsum(mine.to(tl.int32), 0) - 1", "tl.cumsum(mine.to(tl.int32), 0)"),
    Mutant("permute: start counts the expert itself", "permute", "(pair_e < e)", "(pair_e <= e)"),
    Mutant(
        "permute: skipped pairs left as they were", "permute", "mask=(pair_e == E) & (pair < R)", "mask=(pair_e == E) & (pair < 0)"
    ),
    Mutant("permute: padding lanes count", "permute", "mask=pair < R, other=E)", "mask=pair < R, other=0)"),
    Mutant("count: padding lanes count", "permute", "mask=pair < R, other=E)", "mask=pair < R, other=0)", 1),
    Mutant("scan: inclusive", "permute", "tl.cumsum(counts, 0) - counts", "tl.cumsum(counts, 0)"),
    Mutant("scan: no carry", "permute", "total += tl.sum(counts, 0)", "total = tl.sum(counts, 0)"),
    Mutant("scatter: counts pairs after it", "permute", "(other[None, :] < pair[:, None])", "(other[None, :] > pair[:, None])"),
    Mutant("scatter: counts itself", "permute", "(other[None, :] < pair[:, None])", "(other[None, :] <= pair[:, None])"),
    Mutant("scatter: forgets earlier chunks", "permute", "tl.load(COUNTS + pair_e * chunks + chunk, mask=live, other=0)", "0"),
    Mutant("schedule: tiles rounded down", "schedule", "(counts + (BM - 1)) // BM", "counts // BM"),
    Mutant("schedule: last offset forgotten", "schedule", "if e == E - 1:", "if e == E:"),
    Mutant("schedule: unused tiles unmarked", "schedule", "mask=i < bound)", "mask=i < 0)"),
    Mutant("schedule: every tile starts at the first row", "schedule", "start + i * BM", "start + i * 0"),
    Mutant("ids: negative taken", "clean", "(pair_e >= 0) & (pair_e < E)", "pair_e < E"),
    Mutant("ids: past E taken", "clean", "(pair_e >= 0) & (pair_e < E)", "pair_e >= 0"),
    Mutant("ids: no wrap", "clean", "pair_e + E, pair_e)", "pair_e, pair_e)"),
    Mutant(
        "schedule: one tile too few in use", "schedule", "tl.store(OFFSETS + E + 1, used)", "tl.store(OFFSETS + E + 1, used - 1)"
    ),
    Mutant(
        "schedule: one tile too many in use", "schedule", "tl.store(OFFSETS + E + 1, used)", "tl.store(OFFSETS + E + 1, used + 1)"
    ),
    # programs that take many tiles, or part of one
    Mutant("programs: last tile lost", "programs", "tiles * N_TILES - tl", "tiles * N_TILES - 1 - tl"),
    Mutant("programs: every other tile", "programs", "tl.num_programs(0), flatten", "tl.num_programs(0) * 2, flatten"),
    Mutant(
        "programs: all begin at the first tile", "programs", "pid = done + tl.program_id(0)", "pid = done + tl.program_id(0) * 0"
    ),
    Mutant("programs: columns of one row tile only", "programs", "tiles * N_TILES - tl", "tiles - tl"),
    Mutant("programs: parts and tiles mixed up", "programs", "tl.program_id(0) // SPLIT", "tl.program_id(0) % SPLIT"),
    Mutant("programs: every program the first part", "programs", "tl.program_id(0) % SPLIT", "tl.program_id(0) % SPLIT * 0"),
    # GEMM 1
    Mutant("up: wrong token", "up", "(pair // K)", "(pair % K)"),
    Mutant("up: activation forgets the bias", "up", "acc{{ b.index }} += ", "acc{{ b.index }} += 0.0 * "),
    Mutant("up: weight on the input forgotten", "up", "x.to(tl.float32) * scale", "x.to(tl.float32)"),
    Mutant("up: gate and up swapped", "up", "h{{ loop.index0 }} = acc", "h{{ loop.length - 1 - loop.index0 }} = acc"),
    Mutant("up: kept gate and up swapped", "up", "~ loop.index0 * F ~", "~ (loop.length - 1 - loop.index0) * F ~"),
    Mutant("up: k mask dropped", "up", 'H % BK and "(k0 + k < H)[None, :]"', "0"),
    Mutant("up: last step of the sum skipped", "up", "range(0, H, BK)", "range(0, H - BK, BK)"),
    Mutant(
        "up: columns stored past the end",
        "up",
        'y.to(Y.dtype.element_ty)", "live[:, None]", F % BN and "(n < F)[None, :]"',
        'y.to(Y.dtype.element_ty)", "live[:, None]"',
    ),
    Mutant("up: alternate columns swapped", "up", "acc0, acc1 = tl.split", "acc1, acc0 = tl.split"),
    Mutant("up: swapped and not swapped back", "up", "acc{{ loop.index0 }} = tl.trans(acc{{ loop.index0 }})", "pass"),
    Mutant("up: swapped alternate columns not swapped back", "up", "acc = tl.trans(acc)", "pass"),
    Mutant("up: descriptor at the first columns", "up", 'w.tile("column * BN", "k0")', 'w.tile("0", "k0")'),
    Mutant("up: descriptor at the first step", "up", 'w.tile("column * BN", "k0")', 'w.tile("column * BN", "0")'),
    Mutant("up: descriptor of alternate columns in half steps", "up", '"column * (2 * BN)"', '"column * BN"'),
    # GEMM 2 and combine
    Mutant("down: last step of the sum skipped", "down", "range(0, F, BK)", "range(0, F - BK, BK)"),
    Mutant("down: bias forgotten", "down", "acc += ", "acc += 0.0 * "),
    Mutant("down: k mask dropped", "down", 'F % BK and "(k0 + k < F)[None, :]"', "0"),
    Mutant("down: swapped and not swapped back", "down", "acc = tl.trans(acc)", "pass"),
    Mutant("down: descriptor at the first columns", "down", 'D.tile("column * BN", "k0")', 'D.tile("0", "k0")'),
    Mutant("down: parts overlap", "down", "tl.minimum(part * SPAN + SPAN, F)", "tl.minimum(part * SPAN + SPAN + BK, F)"),
    Mutant("down: parts run past the end", "down", "tl.minimum(part * SPAN + SPAN, F)", "part * SPAN + SPAN + 0 * F"),
    Mutant("down: every part from the start", "down", "range(part * SPAN,", "range(0 * part,"),
    Mutant("down: parts in one place", "down", 'store("parts_at + part * O"', 'store("parts_at"'),
    Mutant(
        "down: parts of masked rows", "down", '"parts_at + part * O", "acc", "live[:, None]"', '"parts_at + part * O", "acc", "1"'
    ),
    Mutant("down: ticket drawn too early", "down", "< SPLIT - 1", "< SPLIT - 2"),
    Mutant("down: ticket never the last", "down", "< SPLIT - 1", "< SPLIT"),
    Mutant("down: ticket not put back", "down", "tl.store(ticket_at, 0)", "tl.store(ticket_at, SPLIT)"),
    Mutant("down: one ticket for all", "down", "TICKETS + pid", "TICKETS + 0 * pid"),
    Mutant("down: first part twice", "down", '"parts_at + i * O"', '"parts_at + 0 * O"'),
    Mutant("down: last part left out", "down", "range(1, SPLIT)", "range(1, SPLIT - 1)"),
    Mutant("combine: weight forgotten", "combine", "scale * y", "y"),
    Mutant("combine: last slot lost", "combine", "range(K)", "range(K - 1)"),
    Mutant("combine: skipped rows added", "combine", "tl.where(row >= 0, scale * y, 0.0)", "scale * (y + 1.0)"),
    Mutant("combine: last column block lost", "combine", '"n < N"', '"n < N - BN"'),
    # decode
    Mutant("decode up: wrong token", "decode_up", "(pair // K)", "(pair % K)"),
    Mutant("decode up: k mask dropped", "decode_up", 'H % BK and "k0 + k < H"', "0"),
    Mutant("decode up: last step of the sum skipped", "decode_up", "range(0, H, BK)", "range(0, H - BK, BK)"),
    Mutant("decode up: weight on the input forgotten", "decode_up", "x.to(tl.float32) * scale", "x.to(tl.float32)"),
    Mutant("decode up: bias forgotten", "decode_up", "h{{ b.index }} += ", "h{{ b.index }} += 0.0 * "),
    Mutant("decode up: alternate columns swapped", "decode_up", "h0, h1 = tl.split", "h1, h0 = tl.split"),
    Mutant("decode up: half of the alternate columns", "decode_up", "(2 * BN) + tl.arange", "BN + tl.arange"),
    Mutant("decode up: alternate columns past the end", "decode_up", '"(both < 2 * F)[:, None]"', '"(both < F)[:, None]"'),
    Mutant("decode down: weight forgotten", "decode_down", "total *= ", "total += 0.0 * "),
    Mutant("decode down: last slot lost", "decode_down", "range(K)", "range(K - 1)"),
    Mutant("decode down: bias forgotten", "decode_down", "total += ", "total += 0.0 * "),
    Mutant("decode down: last step of the sum skipped", "decode_down", "range(0, F, BK)", "range(0, F - BK, BK)"),
    Mutant("decode down: slots of one part", "decode_down", "range(part, K, SPLIT)", "range(part * 0, K, SPLIT)"),
    Mutant("decode down: slots by one", "decode_down", "range(part, K, SPLIT)", "range(part, K)"),
    Mutant("decode down: parts in one place", "decode_down", 'store("parts_at + part * O"', 'store("parts_at"'),
    Mutant("decode down: ticket drawn too early", "decode_down", "< SPLIT - 1", "< SPLIT - 2"),
    Mutant("decode down: ticket not put back", "decode_down", "tl.store(ticket_at, 0)", "tl.store(ticket_at, SPLIT)"),
    Mutant("decode down: one ticket for all columns", "decode_down", "+ tl.program_id(1)\n", "+ tl.program_id(1) * 0\n"),
    Mutant("decode down: one ticket for all tokens", "decode_down", "token * tl.num_programs(1)", "token * 0"),
    Mutant("decode down: last part left out", "decode_down", "range(1, SPLIT)", "range(1, SPLIT - 1)"),
    Mutant("decode: id E taken", "expert", "(e64 < E)", "(e64 <= E)"),
    Mutant("decode: negative id taken", "expert", "(e64 >= 0) & ", ""),
    # backward
    Mutant("grad_z: wrong token", "grad_z", "(pair // K)", "(pair % K)"),
    Mutant("grad_z: weight forgotten", "grad_z", "acc *= scale", "acc *= 1.0"),
    Mutant("grad_z: kept rows not weighted", "grad_z", '"(scale * y)" if on_output', '"(1.0 * y)" if on_output'),
    Mutant("grad_z: partial sums after weighting", "grad_z", "acc * y, 0.0)", "acc * scale * y, 0.0)"),
    Mutant("grad_z: derivatives swapped", "grad_z", '"(acc * dh" ~ loop.index0', '"(acc * dh" ~ (loop.length - 1 - loop.index0)'),
    Mutant("grad_z: projections swapped", "grad_z", "h{{ loop.index0 }} = ", "h{{ loop.length - 1 - loop.index0 }} = "),
    Mutant("grad_z: last step of the sum skipped", "grad_z", "range(0, O, BK)", "range(0, O - BK, BK)"),
    Mutant("grad_z: all partial sums in one place", "grad_z", "* N_TILES + column", "* N_TILES"),
    Mutant("grad_rows: only the first projection", "grad_rows", "range(0, {{ depth }}, BK)", "range(0, {{ F }}, BK)"),
    Mutant("grad_rows: k mask dropped", "grad_rows", 'depth % BK and "(k0 + k < %d)[None, :]" % depth', "0"),
    Mutant("grad_rows: columns of the first projection", "grad_rows", '"(k + %d)" % first if first', '"(k + %d)" % 0 if first'),
    Mutant("grad_z: alternate columns swapped", "grad_z", "tl.join(dz0, dz1)", "tl.join(dz1, dz0)"),
    Mutant("grad_z: alternate columns past the end", "grad_z", 'F % BN and "(both < %d)', '0 and "(both < %d)'),
    Mutant("grad_z: half of the alternate columns", "grad_z", "both = column * (2 * BN)", "both = column * BN"),
    Mutant("grad_rows: partial sums of the wrong token", "grad_rows", "// K).to(tl.int64)", "% K).to(tl.int64)"),
    Mutant("grad_weights: bias forgotten", "grad_weights", "total += ", "total += 0.0 * "),
    Mutant("grad_weights: first partial sum only", "grad_weights", "(j < %d)", "(j < %d - 1)"),
    Mutant(
        "grad_weights: skipped pairs read", "grad_weights", '{{ load("at", "live[:, None]"', '{{ load("at + 1", "live[:, None]"'
    ),
    Mutant("grad_matrix: first rows only", "grad_matrix", "range(start, end, BM)", "range(start, tl.minimum(end, start + BM), BM)"),
    Mutant(
        "grad_matrix: stale rows", "grad_matrix", "pair = tl.load(ORDER + row + BM, mask=row + BM < end, other=0)", "pair = pair"
    ),
    Mutant("grad_matrix: rows of the next expert", "grad_matrix", "live = row < end", "live = row < end + 1"),
    Mutant("grad_matrix: weight on the input forgotten", "grad_matrix", "b.to(tl.float32) * scale[:, None]", "b.to(tl.float32)"),
    Mutant("grad_matrix: columns of the first projection", "grad_matrix", '" + " ~ a_column ~', '" + " ~ "n" ~'),
    Mutant("grad_vector: columns of the first projection", "grad_vector", '" + " ~ a_column ~', '" + " ~ "n" ~'),
    Mutant(
        "grad_matrix: columns past the end",
        "grad_matrix",
        '"acc.to(DW.dtype.element_ty)", N % BN and "(n < N)[:, None]"',
        '"acc.to(DW.dtype.element_ty)", 0',
    ),
    Mutant("grad_matrix: main gradient overwritten", "grad_matrix", "sums{{ i }} += ", "sums{{ i }} += 0.0 * "),
    Mutant("grad_matrix: main gradient of an empty expert touched", "grad_matrix", "if start == end:", "if start > end:"),
    Mutant("grad_matrix: main gradient twice", "grad_matrix", "sums{{ i }} += ", "sums{{ i }} += 2.0 * "),
    Mutant("grad_matrix: halves of a tile swapped", "grad_matrix", "sums0, sums1 = ", "sums1, sums0 = "),
    Mutant(
        "grad_matrix: second half past the end",
        "grad_matrix",
        '"sums%d" % i, N % BN and "(n < N)[:, None]", M % BK',
        '"sums%d" % i, N % BN and "(n < N)[:, None]", 0',
    ),
    Mutant("grad_vector: main gradient overwritten", "grad_vector", "    acc += {{ load(", "    acc += 0.0 * {{ load("),
    Mutant("grad_vector: main gradient of an empty expert touched", "grad_vector", "if start == end:", "if start > end:"),
    Mutant("grad_vector: weight forgotten", "grad_vector", "a.to(tl.float32) * tl.load", "a.to(tl.float32) + 0.0 * tl.load"),
    Mutant("grad_vector: rows of the next expert", "grad_vector", "live = row < end", "live = row < end + 1"),
    # router
    Mutant("router: ties to the higher expert", "router", "(lanes - 1 - lane)", "lane"),
    Mutant("router: NaN as its bits say", "router", "tl.where(value != value, 0x7FFFFFFF, bits)", "bits"),
    Mutant("router: negative scores not reversed", "router", "bits ^ 0x7FFFFFFF, bits)", "bits, bits)"),
    Mutant("router: bias forgotten", "router", "choice = score + ", "choice = score + 0.0 * "),
    Mutant("router: biased scores as weights", "router", "{{ source }}", "choice"),
    Mutant("router: one expert twice", "router", "key = tl.where(hit, LEAST, key)", "key = tl.where(hit & (i > 0), LEAST, key)"),
    Mutant("router: second best of a group forgotten", "router", "value += unpacked(second)", "value += 0.0"),
    Mutant("router: one group too few", "router", "range({{ groups.top_k }})", "range({{ groups.top_k }} - 1)"),
    Mutant("router: groups not filled", "router", "== 1, choice, ", "== 1, choice, choice + 0.0 * "),
    Mutant(
        "router: sum over padding",
        "router_post",
        'tl.sum(tl.where(used, " ~ w ~ ", 0.0), 1)[:, None]"',
        'tl.sum(tl.where(used, " ~ w ~ ", 1.0), 1)[:, None]"',
    ),
    Mutant("router: scale forgotten", "router_post", "number(step.factor)", "number(1.0)"),
    Mutant("router: eps forgotten", "router_post", "number(step.eps)", "number(0.0)"),
    Mutant("router: least forgotten", "router_post", "number(step.least)", "number(0.0)"),
    Mutant("router: rows past the end", "router", "(token < T)[:, None] & used", "(token < T + 1)[:, None] & used"),
    Mutant("router: sign of the logits", "router_score", "tl.exp(-z)", "tl.exp(z)"),
    # router backward
    Mutant("grad_router: gradient of another slot", "grad_router", "(slot == i)[None, :], g, 0.0", "(slot == 0)[None, :], g, 0.0"),
    Mutant(
        "grad_router: weight of another slot",
        "grad_router",
        "(slot == i)[None, :], chosen, w0",
        "(slot >= i)[None, :], chosen, w0 + 1",
    ),
    Mutant("grad_router: last slot lost", "grad_router", "range(K)", "range(K - 1)", 1),
    Mutant("grad_router: softmax forgets the sum", "grad_router", "(d - tl.sum(d * score, 1)[:, None])", "d"),
    Mutant("grad_router: slope of the sigmoid", "grad_router", "d * score * (1.0 - score)", "d * score"),
    Mutant("grad_router: slope of softplus", "grad_router", "tl.exp(-z)", "tl.exp(z)"),
    Mutant(
        "grad_router: underflow divided",
        "grad_router",
        "tl.where(d == 0.0, 0.0, d * slope / (2.0 * score))",
        "d * slope / (2.0 * score)",
    ),
    Mutant("grad_router: normalisation as a constant", "grad_router", "(g - shared) / ", "g / "),
    Mutant("grad_router: clamped sum as if free", "grad_router", "shared, 0.0)", "shared, shared)"),
    Mutant(
        "grad_router: kept softmax as a constant", "grad_router", "g = {{ y }} * (g - tl.sum", "g = {{ y }} * (g - 0.0 * tl.sum"
    ),
    Mutant("grad_router: slope of the last sigmoid", "grad_router", "g * {{ y }} * (1.0 - {{ y }})", "g * {{ y }}"),
    Mutant("grad_router: scale forgotten", "grad_router", "number(step.factor)", "number(1.0)"),
    Mutant("grad_router: bias forgotten", "grad_router", "choice = score + ", "choice = score + 0.0 * "),
    Mutant(
        "grad_router: partial sums of tokens past the end", "grad_router", "tl.where(live, d, 0.0)", "d + tl.where(live, 0.0, 1.0)"
    ),
    Mutant("grad_router: partial sums in one place", "grad_router", "tl.program_id(0).to(tl.int64) * E", "0 * E"),
    Mutant("grad_router: rows past the end", "grad_router", "mask=inside)", "mask=inside | True)"),
    # router statistics
    Mutant("stats: choices of tokens past the end", "router", "live & (key == LEAST)", "(key == LEAST)"),
    Mutant("stats: experts not chosen", "router", "(key == LEAST), 1, 0", "(key == LEAST), 0, 1"),
    Mutant("stats: softmax of tokens past the end", "router", "tl.where(live, share, 0.0)", "tl.where(live, share, 1.0)"),
    Mutant("stats: partial sums in one place", "router", "tl.program_id(0).to(tl.int64) * E", "0 * E"),
    Mutant("stats: logsumexp not squared", "router", "lse * lse", "lse"),
    Mutant("stats: squares of tokens past the end", "router", "lse * lse, 0.0", "lse * lse, 1.0"),
    Mutant("stats: largest logit forgotten", "router_softmax", "lse = top + ", "lse = "),
    Mutant("stats: softmax not normalised", "router_softmax", "share = share / total", "share = share / 1.0"),
    Mutant("grad stats: sum forgotten", "grad_router", "(dshare - tl.sum(dshare * share, 1)[:, None] + dlse)", "(dshare + dlse)"),
    Mutant("grad stats: z-loss forgotten", "grad_router", " + dlse)", ")"),
    Mutant("grad stats: half of a square", "grad_router", "2.0 * lse", "lse"),
    Mutant("grad stats: weights forgotten", "grad_router", "d += share * ", "d = share * "),
)
