"""Buckets of rows per expert, as the kernels' choice has them: the only way in which the number of tokens enters a key.

Seven buckets, so that a layer is tuned once for all token counts.
"""

from __future__ import annotations

from moecompile.codegen import gpu_choose

BUCKETS = tuple(range(len(gpu_choose.BUCKETS) + 1))


def bucket_of(tokens: int, top_k: int, num_experts: int) -> int:
    """The bucket's index in BUCKETS. No tokens fall into the first."""
    return gpu_choose.bucket(tokens * top_k / num_experts)


def representative(bucket: int, top_k: int, num_experts: int) -> int:
    """The number of tokens that stands for a bucket: what fills it, or lies well in the last one, which has no end."""
    last = gpu_choose.BUCKETS[-1]
    rows = (*gpu_choose.BUCKETS, 2 * last)[bucket]
    return gpu_choose.representative(max(1, int(rows * num_experts / top_k)), top_k, num_experts)


def name(bucket: int) -> str:
    if bucket < len(gpu_choose.BUCKETS):
        return f"<={gpu_choose.BUCKETS[bucket]:g}"
    return f">{gpu_choose.BUCKETS[-1]:g}"
