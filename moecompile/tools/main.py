"""The `moecompile` command: explain, tune, ship, bench, config, demo.  Each is a module with add_arguments() and main()."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "explain": ("explain_cmd", "what the backend makes of a model: which layers are fused, by which kernel, and why not"),
    "tune": ("tune", "measure kernels on this machine and keep the best"),
    "ship": ("ship", "choose kernels' numbers by compiling for GPUs that are not here, into packs that ship"),
    "bench": ("bench_cmd", "one MoE layer under eager, Inductor and moe, taking turns"),
    "config": ("config_cmd", "every option: its value and where that comes from"),
    "demo": ("demo", "train and run small models with eager, Inductor and moe, side by side"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="moecompile", description="Tools of the torch.compile backend for Mixture-of-Experts.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line)
        if name in given[:1]:  # the others stay unloaded: torch alone takes seconds
            tool = importlib.import_module(f"moecompile.tools.{module}")
            tool.add_arguments(command)
            command.set_defaults(main=tool.main)
    parsed = parser.parse_args(given)
    status: int = parsed.main(parsed)
    return status


if __name__ == "__main__":
    sys.exit(main())
