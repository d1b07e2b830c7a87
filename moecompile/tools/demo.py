"""The demo: train a small OLMoE on real text with eager, Inductor and moe, then read and write with it, and with a DeepSeek-V3.

The three contenders start from one seed and take turns step by step, so that whatever slows the machine slows them alike.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor

from moecompile.tools import demo_models, demo_text
from moecompile.tools.progress import Progress

NAMES = ("eager", "inductor", "moe")
BATCH, LENGTH = 8, 128  # sequences and their tokens in one training step
PROMPT, REPLY = 256, 256  # tokens read at once, then written one by one
READINGS = 8  # times the prompt is read
AFTER = 2.4  # seconds of compilation for reading and writing, both models, per second of it for training


def _not_compiled(*_: object) -> Tensor:
    raise AssertionError("converse() comes first")


@dataclass
class Contender:
    """One model under one compiler, and what was measured of it, in seconds per call."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer | None = None
    losses: list[float] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)  # the first call of each phase: compilation
    seconds: dict[str, list[float]] = field(default_factory=dict)
    text: Tensor = field(default_factory=lambda: torch.empty(1, 0, dtype=torch.int64))
    read: Callable[..., Tensor] = field(default=_not_compiled)
    write: Callable[..., Tensor] = field(default=_not_compiled)
    step: Callable[..., Tensor] = field(default=_not_compiled)
    token: Tensor = field(default_factory=lambda: torch.empty(1, 0, dtype=torch.int64))  # the last one written
    cache: Any = None

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.name == "eager" else torch.compile(function, backend=self.name, dynamic=False)

    def rate(self, phase: str, tokens: int) -> float:
        """Tokens per second, from the median."""
        return tokens / statistics.median(self.seconds[phase])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=200, help="training steps at most (200)")
    parser.add_argument(
        "--limit", type=float, default=270.0, help="seconds to stay within: where compilation is slow, less is trained (270)"
    )
    parser.add_argument("--backends", default=",".join(NAMES), help="contenders, the first is what others are compared with")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the loss curves (out)")
    parser.add_argument("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    inductor.cpp.vec_isa_ok = True  # take the vector instructions from the CPU's flags: trying them out takes 10 s, for all alike
    names = arguments.backends.split(",")
    text = demo_text.corpus()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {len(text) / 1e6:.1f} MB of Python's own sources")

    model = demo_models.olmoe(arguments.seed)
    print(f"\nOLMoE, {_size(model)}: training, {BATCH} x {LENGTH} tokens a step")
    contenders = [Contender(name, copy.deepcopy(model)) for name in names]
    train(contenders, text, arguments.steps, arguments.limit, arguments.seed)
    print_losses(contenders)
    plot_losses(contenders, arguments.out / "loss.png")

    print(f"\nOLMoE as trained: reading {PROMPT} tokens, writing {REPLY}")
    prompt = text[100_000 : 100_000 + PROMPT].long()[None]
    converse(contenders, prompt)
    rows = [("OLMoE training", "train", BATCH * LENGTH), ("OLMoE prefill", "prefill", PROMPT), ("OLMoE decode", "decode", 1)]
    print_rates(contenders, rows)

    other = demo_models.deepseek_v3(arguments.seed)
    print(f"\nDeepSeek-V3, {_size(other)}: reading and writing")
    others = [Contender(name, copy.deepcopy(other)) for name in names]
    if start + arguments.limit - time.monotonic() < sum(c.first[p] for c in contenders for p in ("prefill", "decode")):
        print(f"not measured: it would take longer than --limit {arguments.limit:.0f} s")
    else:
        converse(others, prompt)
        print_rates(others, [("DeepSeek-V3 prefill", "prefill", PROMPT), ("DeepSeek-V3 decode", "decode", 1)])

    author = contenders[-1]
    written = invent(author, prompt, arguments.seed)
    if "moe" in names:
        from moecompile import report

        for title, subject in (("OLMoE", model), ("DeepSeek-V3", other)):
            with torch.no_grad():
                found = report.explain(subject.eval(), input_ids=prompt, use_cache=False)
            print(f"\nexplain({title}): {found}")

    print(f"\nwritten by OLMoE after {len(author.losses)} steps, compiled by {author.name}, after the bar:\n")
    print(demo_text.readable(prompt[0, -80:]) + "|" + demo_text.readable(written))
    print(f"\n{time.monotonic() - start:.0f} s in all, of them {_compile_seconds(contenders + others):.0f} s in first calls")
    return 0


def train(contenders: list[Contender], text: Tensor, steps: int, limit: float, seed: int) -> None:
    """Train all on the same batches, in turns, until the steps or the time for them are used up.

    After training, four graphs a contender are still to be compiled. That takes AFTER times as long as the training graphs
    took (measured); what this leaves of the limit is for training, within bounds.
    """
    generator = torch.Generator().manual_seed(seed)
    for c in contenders:
        c.optimizer = torch.optim.AdamW(c.model.parameters(), lr=1e-3, weight_decay=0.01)
        c.step = c.compiled(_loss_of(c.model))
    started, seconds = 0.0, 0.0
    with Progress("training", steps) as bar:
        for i in range(steps):
            ids = demo_text.batch(text, BATCH, LENGTH, generator)
            for c in contenders:
                if i == 0:
                    bar.to(0, f"first step of {c.name}")
                begin = time.perf_counter()
                loss = c.step(ids)
                loss.backward()
                assert c.optimizer is not None
                c.optimizer.step()
                c.optimizer.zero_grad()
                c.losses.append(loss.item())
                _note(c, "train", time.perf_counter() - begin)
            if i == 0:
                first = sum(c.first["train"] for c in contenders)
                started, seconds = time.monotonic(), min(max(limit - first - AFTER * first, 15.0), 60.0)
            bar.to(i + 1, "loss " + ", ".join(f"{c.losses[-1]:.3f}" for c in contenders))
            if time.monotonic() - started > seconds:
                break


def converse(contenders: list[Contender], prompt: Tensor) -> None:
    """Read the prompt, then write REPLY tokens, greedily: each contender's text, and its seconds per call of either kind."""
    for c in contenders:
        c.read, c.write = c.compiled(_reader(c.model.eval())), c.compiled(_writer(c.model))
    with torch.no_grad(), Progress("reading and writing", READINGS + REPLY) as bar:
        for i in range(READINGS):
            for c in contenders:
                bar.to(i, f"reading, {c.name}")
                c.cache = _cache(c.model)
                begin = time.perf_counter()
                c.text = c.token = c.read(prompt, c.cache).argmax(-1, keepdim=True)
                _note(c, "prefill", time.perf_counter() - begin)
        for i in range(REPLY - 1):
            position = torch.tensor([[PROMPT + i]])
            for c in contenders:
                begin = time.perf_counter()
                c.token = c.write(c.token, c.cache, position).argmax(-1, keepdim=True)
                _note(c, "decode", time.perf_counter() - begin)
                c.text = torch.cat([c.text, c.token], 1)
            bar.to(READINGS + i + 1, "writing")
        bar.to(READINGS + REPLY)
    for c in contenders[1:]:
        same = int((c.text == contenders[0].text).int().cumprod(1).sum())
        print(f"{c.name} writes the same as {contenders[0].name} for {same} of {REPLY} bytes")


@torch.no_grad()
def invent(c: Contender, prompt: Tensor, seed: int, temperature: float = 0.7) -> Tensor:
    """REPLY tokens drawn from the model's distribution, by the graphs that converse() compiled."""
    generator = torch.Generator().manual_seed(seed)
    cache = _cache(c.model)
    logits, tokens = c.read(prompt, cache), []
    for i in range(REPLY):
        tokens.append(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if i < REPLY - 1:
            logits = c.write(tokens[-1], cache, torch.tensor([[PROMPT + i]]))
    return torch.cat(tokens, 1)


def _cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=PROMPT + REPLY)


def _loss_of(model: Any) -> Callable[[Tensor], Tensor]:
    def loss(ids: Tensor) -> Tensor:
        out: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return out

    return loss


def _reader(model: Any) -> Callable[[Tensor, Any], Tensor]:
    def read(prompt: Tensor, cache: Any) -> Tensor:
        logits: Tensor = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]

    return read


def _writer(model: Any) -> Callable[[Tensor, Any, Tensor], Tensor]:
    def write(token: Tensor, cache: Any, position: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=token, past_key_values=cache, use_cache=True, position_ids=position).logits
        return logits[:, -1]

    return write


def _note(c: Contender, phase: str, seconds: float) -> None:
    """The first call compiles and is kept apart."""
    if phase not in c.first:
        c.first[phase] = seconds
    else:
        c.seconds.setdefault(phase, []).append(seconds)


def print_losses(contenders: list[Contender]) -> None:
    """Twelve rows of the curves, side by side, each with a bar for the last contender."""
    steps = len(contenders[0].losses)
    print("step   " + "".join(f"{c.name:>10}" for c in contenders) + "   loss in nats per byte")
    for i in sorted({round(k * (steps - 1) / 11) for k in range(12)}):
        losses = [c.losses[i] for c in contenders]
        print(f"{i:<7}" + "".join(f"{x:10.4f}" for x in losses) + "   " + "#" * round(losses[-1] * 8))
    apart = max(abs(c.losses[i] - contenders[0].losses[i]) for c in contenders for i in range(steps))
    print(f"largest difference between the curves: {apart:.2g}")


def plot_losses(contenders: list[Contender], path: pathlib.Path) -> None:
    """The curves as a picture, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture of the curves: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for c, style in zip(contenders, ("-", "--", ":", "-."), strict=False):
        axes.plot(c.losses, style, label=c.name, linewidth=2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    print(f"the curves as a picture: {path}")


def print_rates(contenders: list[Contender], rows: list[tuple[str, str, int]]) -> None:
    """Tokens per second and what that is relative to the first contender; seconds of the first call."""
    print(f"{'tokens/s (first call)':22}" + "".join(f"{c.name:>24}" for c in contenders))
    for title, phase, tokens in rows:
        base = contenders[0].rate(phase, tokens)
        cells = [f"{c.rate(phase, tokens):,.0f} {c.rate(phase, tokens) / base:.2f}x ({c.first[phase]:.1f} s)" for c in contenders]
        print(f"{title:22}" + "".join(f"{cell:>24}" for cell in cells))


def _compile_seconds(contenders: list[Contender]) -> float:
    return sum(sum(c.first.values()) for c in contenders if c.name != "eager")


def _size(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
