"""A tiny causal language model of any Mixture-of-Experts family that transformers knows, with random weights; no download."""

from __future__ import annotations

import difflib
import inspect
import os
from typing import Any

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# What the configurations of transformers call their sizes: a family takes those it knows.
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 96,
    "ffn_hidden_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
DEPTHS = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "decoder_sparse_step": 1}
HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}
SIZES = {**WIDTHS, **DEPTHS, **HEADS, **EXPERTS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(family: str, tokens: int = 16) -> tuple[Any, dict[str, Any]]:
    """The model in eval mode, and the keyword arguments of one forward pass. ValueError: no such family."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if family not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(family, list(CONFIG_MAPPING.keys()), 1, 0.0)
        raise ValueError(f"{family!r} is neither a file nor a model type of transformers (did you mean {nearest[0]!r}?)")
    kind = CONFIG_MAPPING[family]
    if "text_config" in kind.sub_configs:
        raise ValueError(f"{family!r} is a model of several parts: name its text part, mostly {family + '_text'!r}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**_sizes(kind)), dtype=torch.float32)
    ids = torch.randint(3, SIZES["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    return model.eval(), {"input_ids": ids, "use_cache": False}


def _sizes(kind: type) -> dict[str, int]:
    """Those of SIZES that a configuration takes, under the names it takes them by."""
    known, alias = inspect.signature(kind).parameters, getattr(kind, "attribute_map", None) or {}
    names = {name: name if name in known else str(alias.get(name, "")) for name in SIZES}
    if "qk_rope_head_dim" in known:
        names["head_dim"] = ""  # there it is the width of the rotated part
    sizes = {written: SIZES[name] for name, written in names.items() if written in known}
    if "kv_lora_rank" in known:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # latent attention shares no heads
    return sizes
