"""MoE layers in torch.export programs: the same passes on an exported graph.

The result is a GraphModule to run, to compile, or to export again (and then to save, or to hand to AOTInductor).  Its moe.* ops
are custom ops: import moecompile.exported before such a program is loaded, and they run by this machine's kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from moecompile import backend, config


def fuse(program: torch.export.ExportedProgram, options: dict[str, Any] | None = None) -> fx.GraphModule:
    """The program as a module whose MoE layers are moe.* ops, as torch.compile(backend="moe") would make them.

    `options` as for torch.compile; ValueError for an unknown one.  `moecompile.report.last()` says what was fused.
    """
    settings = config.resolve(None, options)
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    _give_values(gm)
    rewritten = backend.rewrite(gm, settings)
    if rewritten is None:
        return gm
    rewritten.graph._codegen = gm.graph._codegen
    rewritten.recompile()
    return rewritten


def _give_values(gm: fx.GraphModule) -> None:
    """Parameters of an exported module carry no value in their meta: give them fake ones."""
    leaves = (v for n in gm.graph.nodes for v in tree_leaves(n.meta.get("val")))
    mode = next((v.fake_mode for v in leaves if isinstance(v, FakeTensor)), None)
    if mode is None:
        return
    for n in gm.graph.nodes:
        if n.op == "get_attr" and "val" not in n.meta:
            found: Any = gm
            for part in str(n.target).split("."):
                found = getattr(found, part)
            if isinstance(found, Tensor):
                n.meta["val"] = mode.from_tensor(found, static_shapes=True)


backend.bind()
