"""`moecompile tune`: measure kernels for a layer on this GPU and keep the best; explain, export and import what was kept."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Sequence

import torch

from moecompile.analysis.machine import MACHINES, Machine
from moecompile.autotune import bucket, pack, source, tuner
from moecompile.autotune.candidates import MOST, target_of
from moecompile.autotune.device import Device, machine_here
from moecompile.autotune.entry import Choice
from moecompile.autotune.family import BACKWARD, DECODE, FORWARD, LEADER
from moecompile.autotune.key import Key, Problem, environment_of, spec_of
from moecompile.autotune.measure import DeviceLost, Simulated, Timer
from moecompile.autotune.progress import Progress
from moecompile.autotune.store import Store
from moecompile.autotune.tuner import Budget, Outcome
from moecompile.codegen import gpu_choose
from moecompile.codegen.gpu import triton_missing
from moecompile.errors import BuildError
from moecompile.ir.spec import RouterSpec
from moecompile.kernels.gpu.config import YOUNGER

MODELS = {  # hidden, intermediate, experts, top_k
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "deepseek-v3": (7168, 2048, 256, 8),
    "olmoe": (2048, 1024, 64, 8),
    "gpt-oss-120b": (2880, 2880, 128, 4),
    "llama4-maverick": (5120, 8192, 128, 1),
}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "layer", nargs="?", metavar="MODEL_OR_SHAPE", help=f"{', '.join(MODELS)}, or a shape such as H2048,F768,E128,K8,bf16"
    )
    parser.add_argument("--budget", type=_seconds, default=60.0, metavar="60s", help="time to spend (default: 60s); 5m, 1h")
    parser.add_argument("--tokens", type=_counts, metavar="T,T,..", help="only for these token counts (default: any)")
    parser.add_argument("--train", action="store_true", help="the backward kernels too")
    parser.add_argument("--simulate", nargs="?", const="H200", choices=MACHINES, help="invent times for a GPU that is not here")
    parser.add_argument("--why", action="store_true", help="say what is stored for the layer, or why nothing is; measure nothing")
    parser.add_argument("--export", type=pathlib.Path, metavar="FILE", help="write what is stored into a pack; measure nothing")
    parser.add_argument("--import", type=pathlib.Path, metavar="FILE", dest="imported", help="take up a pack, and measure it here")


def main(arguments: argparse.Namespace) -> int:
    try:
        return _main(arguments)
    except (ValueError, OSError, MemoryError) as error:
        print(f"moecompile tune: {error}", file=sys.stderr)
        return 2
    except BuildError as error:
        print(f"moecompile tune: {error}", file=sys.stderr)
        return 1
    except DeviceLost as error:
        print(f"moecompile tune: the GPU stopped working: {error}\nWhat was measured is kept; run again to go on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept; run again to go on", file=sys.stderr)
        return _INTERRUPTED


def _main(arguments: argparse.Namespace) -> int:
    store = Store()
    if arguments.export:
        choices = [c for c in store.choices() if c.key.environment.timer == "device"]
        pack.write(arguments.export, choices)
        print(f"{arguments.export}: {len(choices)} configurations")
        return 0
    problems = _problems(arguments) if arguments.layer else []
    if arguments.imported:
        proposed = [c for c in pack.read(arguments.imported) if isinstance(c, Choice)]
        print(f"{pack.propose(proposed, store)} configurations taken up; each runs once it was measured on this machine")
        problems = problems or _in_order({c.key.problem for c in proposed})
    if not problems:
        raise ValueError("needs a model or a shape, such as H2048,F768,E128,K8,bf16")
    missing = _cannot_measure() if arguments.simulate is None else None
    if missing and arguments.imported:
        print(f"{missing}: they wait for the next tuning of their shapes")
        return 0
    if missing:
        print(f"moecompile tune: {missing}. Nothing was measured; --simulate shows how a run looks.", file=sys.stderr)
        return 1
    machine, timer = _timer(arguments.simulate)
    if arguments.why:
        for problem in problems:
            target = target_of(machine)
            print(f"{tuner.label(problem)}: {source.why(store, Key(problem, environment_of(target, timer.kind)), target)}")
        return 0
    wrong = store.refusal()
    if wrong:
        raise ValueError(wrong)
    print(
        f"{machine.name}{' (simulated: these times are invented)' if arguments.simulate else ''}: {len(problems)} kernels and"
        f" loads, at most {MOST} configurations each, {arguments.budget:g} s; kept in {store.path}"
    )
    start = time.monotonic()
    outcomes = tune_all(problems, machine, timer, store, Budget(arguments.budget, timer.now))
    _report(outcomes)
    print(f"{sum(o.measured for o in outcomes)} measurements in {time.monotonic() - start:.1f} s")
    return 0


def tune_all(problems: Sequence[Problem], machine: Machine, timer: Timer, store: Store, budget: Budget) -> list[Outcome]:
    """Tune each problem with its part of the budget; kernels that share row tiles take the height their leader chose."""
    progress = Progress(MOST * len(problems), sys.stderr)
    outcomes: list[Outcome] = []
    with contextlib.closing(progress):
        for i, problem in enumerate(problems):
            leader = LEADER.get(problem.kernel)
            of_leader = [o.choice for o in outcomes if o.problem == Problem(**{**vars(problem), "kernel": leader})]
            block_m = of_leader[0].config.block_m if of_leader and of_leader[0] else None
            part = budget.part(len(problems) - i)
            outcomes.append(tuner.tune(problem, machine, timer, store, part, progress, block_m))
    return outcomes


def _cannot_measure() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU here, and kernels are tuned on the GPU they run on"
    return triton_missing()


def _timer(simulated: str | None) -> tuple[Machine, Timer]:
    if simulated:
        return MACHINES[simulated], Simulated(MACHINES[simulated])
    device = torch.device("cuda", torch.cuda.current_device())
    machine = machine_here(device)
    return machine, Device(machine, device)


def _problems(arguments: argparse.Namespace) -> list[Problem]:
    """What runs for the layer: by bucket of rows per expert, in the order in which to tune."""
    return problems_of(arguments.layer, arguments.tokens, arguments.train)


def problems_of(layer: str, tokens: Sequence[int] | None, train: bool) -> list[Problem]:
    """Every kernel of a layer (a model's name, or its sizes) for every bucket, or those of the token counts."""
    dtype, sizes = _layer(layer)
    E, K = sizes["num_experts"], sizes["top_k"]
    wanted = bucket.BUCKETS if not tokens else sorted({bucket.bucket_of(t, K, E) for t in tokens})
    found = []
    for index in wanted:
        one = Problem("up", dtype, bucket=index, **sizes)
        spec = spec_of(one)
        decodes = not isinstance(spec, RouterSpec) and gpu_choose.decodes(spec, bucket.representative(index, K, E))
        kernels = (*DECODE, "router") if decodes else FORWARD
        if train:
            kernels = (*kernels, *(k for k in (*FORWARD, *BACKWARD) if k not in kernels))
        for kernel in kernels:
            router = {"hidden": 1, "intermediate": 1, "out_features": 1, "projections": 1} if kernel == "router" else {}
            kind = "float32" if kernel == "router" else dtype
            found.append(Problem(**{**vars(one), "kernel": kernel, "dtype": kind, **router}))
    return sorted(found, key=lambda p: p.kernel in ("router", "combine"))  # the budget goes to the large ones first


def _in_order(problems: Iterable[Problem]) -> list[Problem]:
    order = (*DECODE, *FORWARD, *BACKWARD)
    return sorted(problems, key=lambda p: (p.hidden, p.intermediate, p.num_experts, p.top_k, p.bucket, order.index(p.kernel)))


def _layer(text: str) -> tuple[str, dict[str, int]]:
    """dtype and sizes of a model's name or of "H2048,F768,E128,K8,bf16" (O: other output width; P1: no gate)."""
    dtype, letters = "bfloat16", {"P": 2}
    if text.lower() in MODELS:
        letters |= dict(zip("HFEK", MODELS[text.lower()], strict=True))
    else:
        for part in text.split(","):
            size = re.fullmatch(r"([HFEKOP])([1-9]\d{0,8})", part.strip())
            if size:
                letters[size[1]] = int(size[2])
            elif part.strip() in _DTYPES:
                dtype = _DTYPES[part.strip()]
            else:
                nearest = difflib.get_close_matches(text.lower(), MODELS, 1, 0.0)[0]
                raise ValueError(
                    f"{text!r}: {part!r} is neither a size such as H2048 nor one of {', '.join(_DTYPES)}, and no known model"
                    f" has that name (did you mean {nearest!r}?)"
                )
    lacking = [letter for letter in "HFEK" if letter not in letters]
    if lacking:
        raise ValueError(f"{text!r}: {', '.join(lacking)} is missing, needs H, F, E and K")
    if letters["K"] > letters["E"]:
        raise ValueError(f"{text!r}: K is {letters['K']}, needs at most E = {letters['E']}")
    names = {"H": "hidden", "F": "intermediate", "E": "num_experts", "K": "top_k", "P": "projections"}
    return dtype, {**{names[k]: letters[k] for k in names}, "out_features": letters.get("O", letters["H"])}


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, needs such as 60s, 5m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: needs whole numbers above 0, separated by commas")
    return [int(part) for part in text.split(",")]


def _report(outcomes: Sequence[Outcome]) -> None:
    print(f"{'kernel, load':42} {'us':>9} {'floor':>6} {'gain':>6}  configuration")
    for outcome in outcomes:
        name, choice = tuner.label(outcome.problem), outcome.choice
        if choice is None:
            print(f"{name:42} {'-':>9} {'-':>6} {'-':>6}  no time was left for a choice; run again to go on")
            continue
        share, gain = outcome.floor / choice.seconds, choice.default_seconds / choice.seconds
        plain = choice.config.plain()
        form = "".join(f" {axis}={plain[axis]}" for axis in YOUNGER if axis in plain)
        numbers = "/".join(str(v) for axis, v in plain.items() if axis not in YOUNGER) + form
        note = {"budget": "  (not all tried; run again to go on)", "stored": "  (stored before)"}.get(outcome.stopped, "")
        print(f"{name:42} {choice.seconds * 1e6:9.1f} {100 * share:5.0f}% {gain:5.2f}x  {numbers}{note}")
    print("configuration: block_m/block_n/block_k/warps/stages/group, form; gain: over what runs untuned, timed turn by turn")
