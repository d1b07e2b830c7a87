"""Small causal language models of two Mixture-of-Experts families, built from transformers; nothing is downloaded."""

from __future__ import annotations

import os
from typing import Any

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

SIZE: dict[str, Any] = {
    "vocab_size": 256,  # bytes
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def olmoe(seed: int = 0) -> Any:
    """OLMoE: softmax router over 32 experts of which 4 are chosen, in every layer."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(seed)
    config = OlmoeConfig(
        **SIZE,
        intermediate_size=128,
        num_experts=32,
        norm_topk_prob=True,
    )
    return OlmoeForCausalLM(config)


def deepseek_v3(seed: int = 0) -> Any:
    """DeepSeek-V3: one dense layer, then sigmoid routers with a selection bias and limited groups, and a shared expert."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    config = DeepseekV3Config(
        **SIZE,
        intermediate_size=512,
        moe_intermediate_size=128,
        first_k_dense_replace=1,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=32,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
    )
    return DeepseekV3ForCausalLM(config)
