"""What was measured: one JSON file that grows by a cell at a time, a table, and plots."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import statistics
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass
class Results:
    """Records by key. A run that was cut off is taken up where it stopped, on the same device, versions and source.

    `environment` is what the records depend on, `described` what else is known of each run.
    """

    path: pathlib.Path
    environment: dict[str, Any]
    cells: dict[str, Record] = field(default_factory=dict)
    described: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def at(cls, folder: pathlib.Path, environment: dict[str, Any], described: dict[str, Any]) -> Results:
        """The results of this environment in a folder. Those of another one, or a file that cannot be read, are moved aside."""
        folder.mkdir(parents=True, exist_ok=True)
        found = cls(folder / "results.json", environment, described=[described])
        if not found.path.exists():
            return found
        try:
            held = json.loads(found.path.read_text())
            same = held["environment"] == environment
            cells, runs = dict(held["cells"]), list(held["runs"])
        except (ValueError, KeyError, TypeError):
            same = False
        if same:
            found.cells, found.described = cells, [*runs, described]
            return found
        number = next(n for n in itertools.count(1) if not (folder / f"results-{n}.json").exists())
        aside = found.path.rename(folder / f"results-{number}.json")
        print(f"{found.path} is of another device, version or source: kept as {aside}")
        return found

    def put(self, key: str, record: Record) -> None:
        """Keep a record, on disk before it returns."""
        self.cells[key] = record
        everything = {"environment": self.environment, "runs": self.described, "cells": self.cells}
        text = json.dumps(everything, indent=1, sort_keys=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(text + "\n")
        os.replace(draft, self.path)

    def timings(self) -> list[Record]:
        return [r for r in self.cells.values() if r["kind"] == "time" and r.get("seconds")]


def source_key() -> str:
    """Twelve letters of a hash of the compiler's and its kernels' sources: other sources are other measurements."""
    root = pathlib.Path(__file__).parents[2]
    files = sorted(p for name in ("moecompile", "kernels", "passes", "benchmarks/gpu") for p in (root / name).rglob("*.py"))
    found = hashlib.sha256()
    for path in files:
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def table(results: Results) -> str:
    """One line a cell: share of the floor, and the time of each contender."""
    lines = []
    grouped: dict[tuple[str, str, str, int], dict[str, Record]] = {}
    for r in results.timings():
        grouped.setdefault((r["layer"], r["mode"], r["routing"], r["tokens"]), {})[r["contender"]] = r
    for (layer, mode, routing, tokens), by in sorted(grouped.items()):
        floor = next(iter(by.values()))["floor"]
        times = "  ".join(f"{name} {r['seconds'] * 1e6:.1f} us ({floor / r['seconds']:.0%})" for name, r in sorted(by.items()))
        lines.append(f"{layer:16} {mode:8} {routing:8} T={tokens:<6} floor {floor * 1e6:9.1f} us  {times}")
    return "\n".join(lines)


def summary(results: Results) -> str:
    """The geometric mean of other contenders' times over ours, where both were measured."""
    ours = {(r["layer"], r["mode"], r["routing"], r["tokens"]): r["seconds"] for r in results.timings() if r["contender"] == "ours"}
    ratios: dict[str, list[float]] = {}
    for r in results.timings():
        key = (r["layer"], r["mode"], r["routing"], r["tokens"])
        if r["contender"] != "ours" and key in ours:
            ratios.setdefault(r["contender"], []).append(r["seconds"] / ours[key])
    return "\n".join(
        f"{name}: {statistics.geometric_mean(found):.2f} times as long as ours over {len(found)} cells"
        for name, found in sorted(ratios.items())
    )


def plot(results: Results) -> list[pathlib.Path]:
    """Share of the floor against tokens, one picture per mode and routing; none where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for mode, routing in sorted({(r["mode"], r["routing"]) for r in results.timings()}):
        records = [r for r in results.timings() if (r["mode"], r["routing"]) == (mode, routing)]
        names = sorted({r["layer"] for r in records})
        figure, axes = pyplot.subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 3.5), squeeze=False, sharey=True)
        for axis, name in zip(axes[0], names, strict=False):
            for contender in sorted({r["contender"] for r in records}):
                points = sorted(
                    (r["tokens"], r["floor"] / r["seconds"]) for r in records if (r["layer"], r["contender"]) == (name, contender)
                )
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=contender)
            axis.set(title=name, xscale="log", xlabel="tokens", ylim=(0, 1.1))
        axes[0][0].set_ylabel(f"share of the floor, {mode}, {routing}")
        axes[0][0].legend(fontsize=7)
        path = results.path.parent / f"{mode}-{routing}.png"
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written
