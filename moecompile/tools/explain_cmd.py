"""`moecompile explain`: what the backend makes of a model, layer by layer."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import torch

from moecompile.tools import example


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="FILE|FAMILY", help="Python with example() -> (model, inputs), or a transformers model type"
    )
    parser.add_argument("--out", type=pathlib.Path, help="also write the report here, as .json or .html")
    parser.add_argument("--train", action="store_true", help="explain the training graph instead of the inference graph")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of a family's weights")
    parser.add_argument("--experts", metavar="NAME", help="experts implementation of a family: grouped_mm, batched_mm, eager")


def main(arguments: argparse.Namespace) -> int:
    """Exit code 0; 1 where a layer was declined; 2 where the model could not be had."""
    try:
        model, inputs, named = load(arguments)
        if arguments.out is not None and arguments.out.suffix not in (".json", ".html"):
            raise ValueError(f"--out {arguments.out}: a report is written as .json or .html")
        if arguments.out is not None and not arguments.out.resolve().parent.is_dir():
            raise ValueError(f"--out {arguments.out}: there is no folder {arguments.out.resolve().parent}")
    except (ValueError, OSError) as error:
        print(f"moecompile explain: {error}", file=sys.stderr)
        return 2
    from moecompile import report

    with torch.set_grad_enabled(arguments.train):
        found = report.explain(model, *inputs, out=arguments.out, **named)
    print(found)
    return 0 if found.fused == len(found.layers) and not found.breaks else 1


def load(arguments: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model with the inputs of one call, by position and by name. ValueError: neither a file nor a family."""
    if arguments.model.endswith(".py"):
        if arguments.experts:
            raise ValueError(f"--experts is for a transformers family, not for {arguments.model}")
        return *example.load(arguments.model), {}
    from moecompile.tools import families

    model, named = families.build(arguments.model)
    model.to(getattr(torch, arguments.dtype)).train(arguments.train)
    if arguments.experts:
        model.set_experts_implementation(arguments.experts)
    return model, (), named
