"""What was measured: one JSON file that grows by a cell at a time, a table, and plots."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass
class Results:
    """Records by key. A run that was cut off is taken up where it stopped, on the same device and versions."""

    path: pathlib.Path
    environment: dict[str, Any]
    cells: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: pathlib.Path, environment: dict[str, Any]) -> Results:
        """The results of this environment in a folder. ValueError where the folder holds another environment's."""
        folder.mkdir(parents=True, exist_ok=True)
        found = cls(folder / "results.json", environment)
        if found.path.exists():
            held = json.loads(found.path.read_text())
            if held["environment"] != environment:
                raise ValueError(f"{found.path} was measured in {held['environment']}; give another folder for {environment}")
            found.cells = held["cells"]
        return found

    def put(self, key: str, record: Record) -> None:
        """Keep a record, on disk before it returns."""
        self.cells[key] = record
        text = json.dumps({"environment": self.environment, "cells": self.cells}, indent=1, sort_keys=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(text + "\n")
        os.replace(draft, self.path)

    def timings(self) -> list[Record]:
        return [r for r in self.cells.values() if r["kind"] == "time" and r.get("seconds")]


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
    """Share of the floor against tokens, one picture per mode with uniform routing; none where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for mode in sorted({r["mode"] for r in results.timings()}):
        records = [r for r in results.timings() if r["mode"] == mode and r["routing"] == "uniform"]
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
        axes[0][0].set_ylabel(f"share of the floor, {mode}")
        axes[0][0].legend(fontsize=7)
        path = results.path.parent / f"{mode}.png"
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written
