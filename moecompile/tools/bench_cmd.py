"""`moecompile bench`: run one of the benchmarks that lie beside the package in a checkout."""

from __future__ import annotations

import argparse
import difflib
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="which one; without a name they are listed")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")


def main(arguments: argparse.Namespace) -> int:
    found = {path.stem: path for path in FOLDER.glob("[a-z]*.py")} | {p.parent.name: p for p in FOLDER.glob("*/__main__.py")}
    found = dict(sorted(found.items()))
    if not found:
        print("moecompile bench: the benchmarks are not installed: run it from a checkout of the repository", file=sys.stderr)
        return 2
    if arguments.name is None:
        for name, path in found.items():
            print(f"{name:12} {path.read_text().splitlines()[0].strip(chr(34))}")
        return 0
    if arguments.name not in found:
        nearest = difflib.get_close_matches(arguments.name, found, 1, 0.0)[0]
        print(f"moecompile bench: no benchmark {arguments.name!r} (did you mean {nearest!r}?)", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", f"benchmarks.{arguments.name}", *arguments.rest]
    return subprocess.run(command, cwd=FOLDER.parent, check=False).returncode
