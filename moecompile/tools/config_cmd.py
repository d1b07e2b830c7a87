"""`moecompile config`: the options in force, and where each value comes from."""

from __future__ import annotations

import argparse
import sys

from moecompile import config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="as if given in torch.compile(options=...)")
    parser.add_argument("--mode", help="as if given in torch.compile(mode=...)")
    parser.add_argument("--markdown", action="store_true", help="the table of the README")


def main(arguments: argparse.Namespace) -> int:
    if arguments.markdown:
        print(config.markdown())
        return 0
    try:
        options = dict(_pair(text) for text in arguments.options)
        print(config.describe(arguments.mode, options))
    except ValueError as error:
        print(f"moecompile config: {error}", file=sys.stderr)
        return 2
    return 0


def _pair(text: str) -> tuple[str, str | int | float | bool]:
    """ "verify=3" -> ("verify", 3)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not NAME=VALUE")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, int(value)
    except ValueError:
        return name, value
