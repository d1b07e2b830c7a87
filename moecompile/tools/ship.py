"""`moecompile ship`: the packs that come with the package, chosen by compiling; for whoever makes a release.

A pack exported by `moecompile tune --export` on a GPU, put beside them, goes before them where it has the same shape.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from concurrent.futures import ProcessPoolExecutor

from moecompile.analysis.machine import MACHINES
from moecompile.autotune import offline, pack, source
from moecompile.autotune.entry import Compiled, InPacks
from moecompile.autotune.key import Problem
from moecompile.codegen.gpu import triton_missing
from moecompile.tools import tune

# The others have biases, another activation or the weight on the input: a problem does not say so, and what compiled without
# spills for a plain gated layer need not for theirs.
PLAIN = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "olmoe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layers", nargs="*", metavar="MODEL_OR_SHAPE", help=f"default: {', '.join(PLAIN)}")
    parser.add_argument("--for", nargs="+", choices=MACHINES, default=list(MACHINES), dest="machines", help="default: all")
    parser.add_argument("--train", action="store_true", help="the backward kernels too")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default: 1)")
    parser.add_argument("--out", type=pathlib.Path, default=source.SHIPPED, metavar="DIR", help="default: the package's packs")


def main(arguments: argparse.Namespace) -> int:
    try:
        return _main(arguments)
    except (ValueError, OSError) as error:
        print(f"moecompile ship: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace) -> int:
    missing = triton_missing()
    if missing:
        raise ValueError(missing)
    problems = [p for layer in arguments.layers or PLAIN for p in tune.problems_of(layer, None, arguments.train)]
    problems = [p for p in problems if p.kernel in offline.FORMS]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for arch in sorted({MACHINES[name].arch for name in arguments.machines}):
        names = [name for name in arguments.machines if MACHINES[name].arch == arch]
        work = [(problem, name) for name in names for problem in problems]
        with ProcessPoolExecutor(arguments.jobs) as pool:
            found = list(pool.map(_chosen, work))
        entries: list[InPacks] = [entry for entry in found if entry is not None]
        pack.write(arguments.out / f"{arch}.json", entries)
        print(
            f"{arguments.out / arch}.json: {len(entries)} of {len(work)} compiled without spills, for {', '.join(names)}",
            flush=True,
        )
    return 0


def _chosen(work: tuple[Problem, str]) -> Compiled | None:
    problem, name = work
    return offline.chosen(problem, MACHINES[name])
