"""The `moe-opt` command: print a graph between passes.

    moe-opt FILE                     the graph as captured, and after every pass of the pipeline
    moe-opt FILE -p pass-a,pass-b    after these passes, in this order
    moe-opt --list                   the pipeline, one pass a line

FILE is Python with a function example() -> (module or function, inputs); it is run as it is, so open it before you trust it.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from moecompile.tools import example


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-opt", description="Print the graph of FILE's example() between passes.")
    parser.add_argument("file", nargs="?", metavar="FILE", help="Python with example() -> (module or function, inputs)")
    parser.add_argument("-p", "--passes", metavar="NAME,..", help="passes to run, in this order (default: the pipeline)")
    parser.add_argument("-l", "--last", action="store_true", help="print only the graph after the last pass")
    parser.add_argument("--list", action="store_true", help="list the pipeline")
    given = parser.parse_args(arguments)
    from moecompile.passes import PASSES, pipeline

    if given.list:
        for entry in pipeline():
            after = f", after {', '.join(entry.after)}" if entry.after else ""
            summary = (sys.modules[entry.function.__module__].__doc__ or "").splitlines()[0]
            print(f"{entry.phase.name.lower()}  {entry.name}{after}: {summary}")
        return 0
    if given.file is None:
        parser.error("FILE or --list is needed")
    names = [entry.name for entry in pipeline()] if given.passes is None else [n for n in given.passes.split(",") if n]
    for name in names:
        if name not in PASSES:
            nearest = difflib.get_close_matches(name, PASSES, 1, 0.0)
            parser.error(f"unknown pass {name!r} (did you mean {nearest[0]!r}?); moe-opt --list prints them all")
    try:
        gm = capture(given.file)
    except (ValueError, OSError) as error:
        print(f"moe-opt: {error}", file=sys.stderr)
        return 2
    show(gm, names, given.last)
    return 0


def capture(file: str) -> fx.GraphModule:
    """The Dynamo graph of the file's example(). ValueError where there is no single graph."""
    import torch
    from torch._dynamo.exc import TorchDynamoException

    function, inputs = example.load(file)
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(function, backend=record, fullgraph=True)
    try:
        compiled(*inputs)
    except TorchDynamoException as e:
        said = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise ValueError(f"{file}: Dynamo does not capture example() in one graph: {said}") from e
    if len(graphs) != 1:
        raise ValueError(f"{file}: example() gives {len(graphs)} graphs, needs 1")
    return graphs[0]


def show(gm: fx.GraphModule, names: Sequence[str], only_last: bool = False) -> None:
    """Print the graph as captured and after each pass, with what the pass says of the layers it met."""
    import moecompile.ir.ops  # noqa: F401 (defines the moe.* ops)
    from moecompile.ir import printer
    from moecompile.passes import PASSES, Context

    if not only_last or not names:
        print(f"// captured\n{printer.text(gm)}")
    context = Context()
    for name in names:
        before = len(context.entries)
        gm = PASSES[name].run(gm, context)
        if not only_last or name == names[-1]:
            print(f"\n// after {name}")
            for entry in context.entries[before:]:
                print(f"// {entry.status} {entry.form or entry.node}{': ' + entry.reason if entry.reason else ''}")
            print(printer.text(gm))


if __name__ == "__main__":
    sys.exit(main())
