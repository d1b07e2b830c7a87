"""Small causal language models of two Mixture-of-Experts families, built from transformers; nothing is downloaded."""

from __future__ import annotations

import os
from typing import Any

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

LETTERS = 256  # the vocabulary: bytes
LENGTH = 512  # longest context


def olmoe(seed: int = 0) -> Any:
    """OLMoE: softmax router over 32 experts of which 4 are chosen, in every layer."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=LETTERS,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=LENGTH,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config)


def deepseek_v3(seed: int = 0) -> Any:
    """DeepSeek-V3: one dense layer, then sigmoid routers with a selection bias and limited groups, and a shared expert."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=LETTERS,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        max_position_embeddings=LENGTH,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return DeepseekV3ForCausalLM(config)
