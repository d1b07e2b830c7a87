"""explain(): what matched, what was declined, why, and what it is worth."""

from __future__ import annotations

import dataclasses
import html
import json
import logging
import pathlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._logging._internal import trace_structured

from moecompile.config import Settings
from moecompile.ir import expr
from moecompile.ir.spec import MoESpec
from moecompile.passes import Entry
from moecompile.runtime import fallback

log = logging.getLogger("moecompile.match")

_REPORTS: list[GraphReport] = []
_WARNED: set[str] = set()


@dataclass
class GraphReport:
    """One compiled graph."""

    nodes_before: int
    nodes_after: int
    layers: list[Entry]


@dataclass
class Report:
    """What torch.compile(model, backend="moe") did with a model."""

    graphs: list[GraphReport] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)  # why Dynamo broke or skipped, with the cure where one is known
    fallback_calls: int = 0  # calls of fused layers that ran the original code, their kernel having failed

    @property
    def layers(self) -> list[Entry]:
        return [e for g in self.graphs for e in g.layers]

    @property
    def fused(self) -> int:
        return sum(e.status == "fused" for e in self.layers)

    def __str__(self) -> str:
        lines = [f"{self.fused} of {len(self.layers)} MoE layers fused in {len(self.graphs)} graph(s)"]
        for i, g in enumerate(self.graphs):
            if not g.layers:
                continue
            lines.append(f"graph {i}: {g.nodes_before} nodes, {g.nodes_after} after fusion")
            lines += [f"  {line}" for e in g.layers for line in _lines(e)]
        if not self.layers and not self.breaks:
            lines.append("no MoE layer found: compiled as with Inductor")
        lines += [f"not captured: {b}" for b in self.breaks]
        if self.fallback_calls:
            lines.append(f"{self.fallback_calls} calls ran the original code because a kernel failed")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as written by save()."""
        return {
            "fused": self.fused,
            "layers": len(self.layers),
            "graphs": [
                {"nodes_before": g.nodes_before, "nodes_after": g.nodes_after, "layers": [_plain(e) for e in g.layers]}
                for g in self.graphs
            ],
            "breaks": self.breaks,
            "fallback_calls": self.fallback_calls,
        }

    def save(self, path: str | pathlib.Path) -> None:
        """Write the report as JSON, or as one self-contained HTML file, by the path's suffix (.json, .html)."""
        path = pathlib.Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        elif path.suffix in (".html", ".htm"):
            path.write_text(_page(self))
        else:
            raise ValueError(f"{path.name}: a report is written as .json or .html")


def _lines(e: Entry) -> list[str]:
    where = _source_line(e.stack_trace)
    if e.status != "fused":
        return [f"declined {e.node}: {e.reason}", *([f"    {where}"] if where else [])]
    assert e.spec is not None
    s = e.spec
    out = [f"fused {e.node}: {e.form}" + (f"; runs as {e.kernel}" if e.kernel else "")]
    out.append(
        f"    E={s.num_experts} K={s.top_k} H={s.hidden} F={s.intermediate} {str(s.dtype).removeprefix('torch.')}, "
        f"activation {expr.text(s.activation)}, weight on {s.weight_on.value}"
    )
    if e.router is not None:
        r = e.router
        steps = " ".join(str(step[0]) for step in r.post)
        groups = f", best {r.groups.top_k} of {r.groups.count} groups" if r.groups else ""
        out.append(
            f"    router fused: {r.score}{' + bias' if r.bias else ''}{groups}, top {r.top_k} of {r.num_experts} {steps}".rstrip()
        )
        if e.statistics or e.statistics_reason:
            sums = e.statistics or f"nothing: {e.statistics_reason}"
            out.append(f"    for balancing losses it sums {sums}")
    else:
        out.append(f"    router left as it is: {e.router_reason or 'not asked for'}")
    gain = expected_gain(e)
    if gain:
        out.append(f"    {gain}")
    if where:
        out.append(f"    {where}")
    return out


def expected_gain(e: Entry) -> str:
    """What the cost model expects of fusion, in words; empty where it has nothing to say."""
    from moecompile.analysis import cost

    if e.spec is None:
        return ""
    what = e.spec if e.router is None else MoESpec(e.router, e.spec)
    gains = {t: cost.expected_gain(what, t, cost.default_machine()) for t in (1, 512)}
    return "expected by the cost model: " + ", ".join(f"{g:.2f}x at {t} tokens" for t, g in gains.items())


def _source_line(stack_trace: str) -> str:
    """The user's line: the innermost frame of a stack trace."""
    found = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s+(.+)', stack_trace)
    if not found:
        return ""
    path, line, _, code = found[-1]
    return f"{path}:{line}: {code.strip()}"


def _plain(e: Entry) -> dict[str, Any]:
    d = dataclasses.asdict(dataclasses.replace(e, spec=None, router=None, op=None))
    del d["op"]
    d["spec"] = json.loads(e.spec.text()) if e.spec else None
    d["router"] = json.loads(e.router.text()) if e.router else None
    d["source"] = _source_line(e.stack_trace)
    d["expected_gain"] = expected_gain(e)
    return d


def _page(r: Report) -> str:
    rows = []
    for e in r.layers:
        cells = (
            e.status,
            e.node,
            e.form,
            e.reason or e.router_reason,
            _source_line(e.stack_trace),
            e.spec.text() if e.spec else "",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("status", "node", "form", "reason", "source", "spec"))
    style = "body{font:14px sans-serif;margin:2em}td,th{border:1px solid #ccc;padding:4px 8px;text-align:left;vertical-align:top}"
    return (
        f"<!doctype html><meta charset=utf-8><title>moecompile</title><style>{style}</style>"
        f"<h1>{r.fused} of {len(r.layers)} MoE layers fused</h1><table><tr>{head}</tr>{''.join(rows)}</table>"
        + "".join(f"<p>not captured: {html.escape(b)}</p>" for b in r.breaks)
        + "\n"
    )


# ---------------------------------------------------------------- what the backend tells


def add(before: fx.GraphModule, after: fx.GraphModule, entries: list[Entry]) -> None:
    """Note one compiled graph."""
    found = GraphReport(len(before.graph.nodes), len(after.graph.nodes), entries)
    _REPORTS.append(found)
    for e in entries:
        log.info("%s", "; ".join(_lines(e)))
    if entries:
        payload = json.dumps({"layers": [_plain(e) for e in entries]})
        trace_structured("artifact", metadata_fn=lambda: {"name": "moecompile", "encoding": "json"}, payload_fn=lambda: payload)


def withdraw() -> None:
    """Forget the graph noted last: it is traced again."""
    _REPORTS.pop()


def decline_last(reason: str) -> None:
    """The layers of the graph noted last run as they were written after all."""
    for entry in _REPORTS[-1].layers:
        entry.status, entry.reason = "declined", reason


def internal_failure(doing: str, e: Exception, settings: Settings) -> None:
    """Say that the compiler itself failed and the original graph is used."""
    first = str(e).splitlines()[0] if str(e) else ""
    message = f"moecompile: {doing} failed, the original graph is compiled: {type(e).__name__}: {first}"
    log.info(message, exc_info=e)
    if settings.fallback != "silent":
        warn_once(message)


def warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def reset() -> None:
    """Forget all graphs and which warnings were given."""
    _REPORTS.clear()
    _WARNED.clear()


def last_reports() -> list[Entry]:
    """The layers of every graph compiled since torch._dynamo.reset()."""
    return [e for g in _REPORTS for e in g.layers]


def last() -> Report:
    """A report on every graph compiled since torch._dynamo.reset()."""
    return Report(list(_REPORTS), _breaks(), fallback.COUNTS["fallback"])


# ---------------------------------------------------------------- explain


def explain(
    model: Callable[..., Any],
    *args: Any,
    out: str | pathlib.Path | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Compile `model` for these inputs, run it once, and report every MoE layer: fused and how, or declined and why.

    `out`: also write the report there (.json or .html).  The rest of the graph runs as it is, so this takes seconds.
    """
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    reset()
    counters.clear()
    compiled = torch.compile(model, backend="moe", options={"fallback": "silent", **(options or {}), "inner": "eager"})
    compiled(*args, **kwargs)
    found = last()
    if found.breaks and _has_loop(model):
        found.breaks = list(dict.fromkeys([_LOOP, *found.breaks]))
    dynamo.reset()
    if out is not None:
        found.save(out)
    return found


_LOOP = 'transformers\' loop over the experts that were hit cannot be captured: model.set_experts_implementation("grouped_mm")'


def _has_loop(model: object) -> bool:
    """Whether a part of the model is set to transformers' loop over experts."""
    for part in model.modules() if isinstance(model, nn.Module) else ():
        asked, can_be_set = (
            getattr(part, name, None) for name in ("get_experts_implementation", "_can_set_experts_implementation")
        )
        if asked is not None and "eager" in asked().values() and (can_be_set is None or can_be_set()):
            return True
    return False


def _breaks() -> list[str]:
    """Why Dynamo broke the graph or skipped a frame, where that may have hidden a layer."""
    from torch._dynamo.utils import counters

    said: dict[str, None] = {}
    for kind in ("graph_break", "unimplemented"):
        for reason in counters[kind]:
            loop = re.search(r"experts?_hit|expert_idx", str(reason))
            said[_LOOP if loop else " ".join(str(reason).split()).partition(" Hint: ")[0][:300]] = None
    return list(said)
