"""What is measured, in order of interest, so that a run that is cut off has measured what matters most.

A cell is (layer, forward or forward and backward, routing, tokens, contender).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from benchmarks.gpu.layers import LAYERS, TOKENS

TRAINED = ("Qwen3-30B-A3B", "OLMoE", "Mixtral-8x7B", "gpt-oss-120b")  # the others' weights and gradients do not fit
KEY_TOKENS = (8, 512, 8192)  # decode, the ridge, prefill: for what is slow to compile, and for skewed routing
SECOND = ("grouped_mm+inductor", "compiled", "liger")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement."""

    layer: str
    mode: str  # "forward" or "train"
    routing: str
    tokens: int
    contender: str

    @property
    def key(self) -> str:
        return f"{self.layer} {self.mode} {self.routing} T={self.tokens} {self.contender}"


def cells(smoke: bool) -> Iterator[Cell]:
    """Ours and the nearest form beside it over all layers; then the others where they tell most; then the rest of them."""
    if smoke:
        for tokens in (1, 512, 8192):
            for contender in ("ours", "grouped_mm"):
                yield Cell("Qwen3-30B-A3B", "forward", "uniform", tokens, contender)
        yield Cell("Qwen3-30B-A3B", "train", "uniform", 8192, "ours")
        return
    yield from _over(("ours", "grouped_mm"), lambda tokens: True)
    yield from _over(SECOND, lambda tokens: tokens in KEY_TOKENS)
    yield from _over(SECOND, lambda tokens: tokens not in KEY_TOKENS)


def _over(contenders: tuple[str, ...], wanted: Callable[[int], bool]) -> Iterator[Cell]:
    for layer in LAYERS:
        for mode, routing in (("forward", "uniform"), ("train", "uniform"), ("forward", "zipf")):
            if mode == "train" and layer not in TRAINED:
                continue
            for tokens in TOKENS if mode == "forward" else TOKENS[3:]:
                if (routing == "zipf" and tokens not in KEY_TOKENS) or not wanted(tokens):
                    continue
                for contender in contenders:
                    yield Cell(layer, mode, routing, tokens, contender)


def builds(smoke: bool) -> list[tuple[str, str, int]]:
    """(layer, mode, tokens) of every cell of ours, once."""
    return list(dict.fromkeys((c.layer, c.mode, c.tokens) for c in cells(smoke) if c.contender == "ours"))
