"""What runs when Inductor cannot compile the backward of a graph of ours: that graph, as AOTAutograd traced it.

The backward is compiled when it is first needed, in the user's .backward(), where no other graph can be chosen any more: what
the forward saved belongs to this one.  It is a graph of plain operators and can be run as it is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._functorch._aot_autograd.utils import make_boxed_func

from moecompile.ir import surgery

log = logging.getLogger("moecompile.backend")


def guarded(compile_graph: Callable[..., Any], warn: bool) -> Callable[..., Any]:
    """Inductor's inner compiler, but that a backward which it cannot compile is run node by node, with a warning."""

    def compile_or_run(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        if not kwargs.get("is_backward") or _draws(gm):
            return compile_graph(gm, example_inputs, **kwargs)
        original = surgery.copy_of(gm)  # Inductor's passes change what they are given
        try:
            return compile_graph(gm, example_inputs, **kwargs)
        except Exception as e:
            said = str(e).strip().partition("\n")[0]
            message = f"moecompile: Inductor did not compile a backward, which runs node by node: {type(e).__name__}: {said}"
            log.info(message, exc_info=e)
            if warn:
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return make_boxed_func(original.forward)  # type: ignore[no-untyped-call]

    return compile_or_run


def _draws(gm: fx.GraphModule) -> bool:
    """May the graph draw the forward's random numbers again?  Only Inductor's own code draws the same."""
    return any(str(n.target).startswith("prims.inductor_") for n in gm.graph.nodes)
