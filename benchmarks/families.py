"""Every MoE family of transformers under backend="moe": agreement with eager, what was fused, and why not.

python -m benchmarks.families                               all blocks, in the implementation from_pretrained picks
python -m benchmarks.families 'qwen*' --impl batched_mm     some, in another implementation
python -m benchmarks.families --dtype bfloat16 --json out/families.json

The blocks (router, experts, shared experts; tiny, random weights) come from a file that builds them: `--blocks PATH`, a
module with FAMILIES and build(family, impl, dtype).  One line per block: the largest relative difference of outputs and
gradients to eager in train mode, layers fused, routers fused, and the reason where one was not.  Exit status 1 if a
block is wrong or raises.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import pathlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from moecompile import report

BLOCKS = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tools" / "hf_moe_blocks.py"


@dataclass
class Result:
    """What became of one block. `forward` and `backward`: largest difference to eager over the largest value."""

    name: str
    impl: str
    forward: float = float("nan")
    backward: float = float("nan")
    layers: int = 0
    fused: int = 0
    routers: int = 0
    reasons: list[str] = field(default_factory=list)
    failure: str = ""

    def verdict(self, limit: float) -> str:
        if self.failure:
            return "FAILED"
        if not (self.forward <= limit and self.backward <= limit):
            return "WRONG"
        if self.fused and self.fused == self.layers:
            return "fused" if self.routers == self.fused else "experts"
        return "declined" if self.layers else "not seen"


def load(path: pathlib.Path) -> ModuleType:
    """The module that builds the blocks. FileNotFoundError says what to give."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the module that builds the blocks by --blocks PATH")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def run(call: Callable[..., Any], module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a fixed random combination of them in all parameters and floating-point inputs."""

    def leaf(t: Any) -> Any:
        return t.detach().clone().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t

    given = tree_map(leaf, (args, kwargs))
    copies = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, given)  # some blocks write to their input
    torch.manual_seed(0)  # jitter and Gumbel noise
    outputs = [t for t in tree_leaves(call(*copies[0], **copies[1])) if isinstance(t, Tensor)]
    generator = torch.Generator().manual_seed(1)
    loss = sum((t.float() * torch.randn(t.shape, generator=generator)).sum() for t in outputs if t.requires_grad)
    leaves = [t for t in [*tree_leaves(given), *module.parameters()] if isinstance(t, Tensor) and t.requires_grad]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
    return [t.detach() for t in outputs], grads


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest |got - want| over the largest |want| of each tensor; infinite where shapes, integers or NaN differ."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or (not b.is_floating_point() and not torch.equal(a, b)):
            return float("inf")
        if b.is_floating_point() and b.numel():
            if not torch.equal(a.isnan(), b.isnan()):
                return float("inf")
            gap = (a.double() - b.double()).nan_to_num(0).abs().max().item()
            worst = max(worst, gap / (b.double().nan_to_num(0).abs().max().item() or 1.0))
    return worst


def measure(blocks: ModuleType, family: Any, impl: str, dtype: torch.dtype, inner: str) -> Result:
    impl = family.default if impl == "default" or family.own else impl
    result = Result(family.name, impl)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        block = blocks.build(family, impl, dtype)
        module = block.module.train()
        want = run(module, module, block.args, block.kwargs)
        call = torch.compile(module, backend="moe", options={"inner": inner, "fallback": "silent"})
        got = run(call, module, block.args, block.kwargs)
        result.forward, result.backward = difference(got[0], want[0]), difference(got[1], want[1])
    except Exception as e:
        result.failure = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    found = report.last()
    result.layers, result.fused = len(found.layers), found.fused
    result.routers = sum(e.router is not None for e in found.layers if e.status == "fused")
    said = [e.reason or e.router_reason for e in found.layers if e.status != "fused" or e.router is None]
    result.reasons = list(dict.fromkeys([*said, *(found.breaks if result.fused == 0 else [])]))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="names or patterns; all when none is given")
    parser.add_argument("--blocks", type=pathlib.Path, default=BLOCKS, help=f"the module that builds them ({BLOCKS})")
    parser.add_argument("--impl", default="default", help="default, grouped_mm or batched_mm")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--inner", default="aot_eager", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--json", type=pathlib.Path, help="also write the results there")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        blocks = load(a.blocks)
    except FileNotFoundError as e:
        print(e, file=sys.stderr)
        return 2
    dtype = getattr(torch, a.dtype)
    limit = 64 * torch.finfo(dtype).eps  # sums of some 40 products, forward and backward
    wanted = a.families or ["*"]
    chosen = [f for name, f in blocks.FAMILIES.items() if any(fnmatch.fnmatch(name, w) for w in wanted)]
    results = []
    print(f"{'block':28} {'impl':10} {'':9} {'forward':8} {'gradient':8} fused of layers, routers; reason", flush=True)
    for family in chosen:
        r = measure(blocks, family, a.impl, dtype, a.inner)
        results.append(r)
        line = f"{r.name:28} {r.impl:10} {r.verdict(limit):9} {r.forward:<8.1e} {r.backward:<8.1e} "
        line += f"{r.fused} of {r.layers}, {r.routers}"
        print("; ".join([line, *filter(None, [r.failure, *r.reasons])])[:400], flush=True)
    verdicts = [r.verdict(limit) for r in results]
    counts = {v: verdicts.count(v) for v in ("fused", "experts", "declined", "not seen", "WRONG", "FAILED")}
    whole = counts["fused"] + counts["experts"]
    print(f"\n{whole} of {len(results)} blocks fused ({counts['fused']} with their router), " + _rest(counts))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return int(counts["WRONG"] + counts["FAILED"] > 0)


def _rest(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[v]} {v.lower()}" for v in ("declined", "not seen", "WRONG", "FAILED"))


if __name__ == "__main__":
    sys.exit(main())
