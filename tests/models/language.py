"""Whole causal language models: small configurations of transformers' families, and three written by hand with loops.

Every model maps input_ids [B,S] to logits [B,S,V].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, LAYERS = 64, 2
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


@dataclass(frozen=True)
class Language:
    """moe_layers: how many MoE layers it has. router: whether the form of its router is in the grammar."""

    name: str
    make: Callable[[], nn.Module]
    moe_layers: int = LAYERS
    router: bool = True
    loop: bool = False

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model in eval mode with seeded weights; routers' scores lie apart, selection biases are not zero."""
        torch.manual_seed(seed)
        model = self.make()
        with torch.no_grad():
            for name, t in [*model.named_parameters(), *model.named_buffers()]:
                if t.is_floating_point() and "inv_freq" not in name and "norm" not in name and "A_log" not in name:
                    t.copy_(torch.randn_like(t) * (0.05 if "bias" in name else 0.2))
        return model.to(dtype).eval()


def _hf(name: str, cls: str, config: str, moe_layers: int = LAYERS, router: bool = True, **sizes: Any) -> Language:
    def make() -> nn.Module:
        made = getattr(transformers, config)(**(COMMON | sizes))
        model: nn.Module = getattr(transformers, cls)(made)
        return model

    return Language(name, make, moe_layers, router)


FAMILIES = [
    _hf("mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, intermediate_size=24),
    _hf(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        intermediate_size=40,
    ),
    _hf(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        intermediate_size=40,
        norm_topk_prob=True,
        head_dim=16,
    ),
    _hf("olmoe", "OlmoeForCausalLM", "OlmoeConfig", num_experts=8, num_experts_per_tok=2, intermediate_size=24),
    _hf("deepseek_v2", "DeepseekV2ForCausalLM", "DeepseekV2Config", **DEEPSEEK, topk_method="group_limited_greedy"),
    _hf("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", **DEEPSEEK),
    _hf(
        "gpt_oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=24,
        head_dim=16,
    ),
    _hf(
        "granitemoe", "GraniteMoeForCausalLM", "GraniteMoeConfig", num_local_experts=4, num_experts_per_tok=2, intermediate_size=24
    ),
    _hf(
        "phimoe",
        "PhimoeForCausalLM",
        "PhimoeConfig",
        router=False,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=24,
    ),
    _hf(
        "jamba",
        "JambaForCausalLM",
        "JambaConfig",
        moe_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        intermediate_size=24,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_d_conv=2,
        mamba_expand=1,
        mamba_dt_rank=4,
    ),
    _hf(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size=24,
        intermediate_size_mlp=40,
        head_dim=16,
        interleave_moe_layer_step=1,
    ),
    _hf(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        moe_intermediate_size=24,
        intermediate_size=40,
        head_dim=16,
    ),
]


# ---------------------------------------------------------------- written by hand, with a loop over the experts


class Expert(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class ModuleLoop(nn.Module):
    """A ModuleList of experts, one-hot masks, index_add_: as transformers 4 wrote Mixtral."""

    def __init__(self, hidden: int = 32, inner: int = 24, experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, inner) for _ in range(experts))
        self.k = k

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length, hidden = hidden_states.shape
        x = hidden_states.view(-1, hidden)
        probabilities = F.softmax(self.gate(x), dim=1, dtype=torch.float)
        weights, chosen = torch.topk(probabilities, self.k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros((batch * length, hidden), dtype=x.dtype, device=x.device)
        mask = F.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(mask[e])
            rows = x[None, token].reshape(-1, hidden)
            out.index_add_(0, token, (expert(rows) * weights[token, slot, None]).to(x.dtype))
        return out.reshape(batch, length, hidden)


class StackedLoop(nn.Module):
    """Stacked parameters with biases, GELU, `out[token] +=`: softmax over the chosen."""

    def __init__(self, hidden: int = 32, inner: int = 24, experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts)
        self.up = nn.Parameter(torch.zeros(experts, hidden, inner))
        self.up_bias = nn.Parameter(torch.zeros(experts, inner))
        self.down = nn.Parameter(torch.zeros(experts, inner, hidden))
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.k = k

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, 1)
        values, ids = self.router(x).topk(self.k, dim=-1)
        weights = values.softmax(-1)
        out = torch.zeros_like(x)
        for e in range(self.up.shape[0]):
            token, slot = torch.where(ids == e)
            h = F.gelu(x[token] @ self.up[e] + self.up_bias[e], approximate="tanh")
            out[token] += weights[token, slot].unsqueeze(1) * (h @ self.down[e] + self.down_bias[e])
        return out.view_as(hidden_states)


class SigmoidLoop(nn.Module):
    """Sigmoid scores with a selection bias, a shared expert, nonzero() and separate experts: after DeepSeek's first code."""

    def __init__(self, hidden: int = 32, inner: int = 24, experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(experts, hidden))
        self.correction_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)
        self.experts = nn.ModuleList(Expert(hidden, inner) for _ in range(experts))
        self.shared = Expert(hidden, inner)
        self.k = k

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])
        scores = F.linear(x.float(), self.gate.float()).sigmoid()
        ids = torch.topk(scores + self.correction_bias, self.k, dim=-1)[1]
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * 2.5
        y = torch.zeros_like(x)
        for i in range(len(self.experts)):
            token, slot = (ids == i).nonzero(as_tuple=True)
            y[token] += self.experts[i](x[token]) * weights[token, slot, None].type_as(x)
        return (y + self.shared(x)).view(shape)


class Decoder(nn.Module):
    """Causal attention and an MoE layer."""

    def __init__(self, moe: nn.Module, hidden: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.moe, self.heads = nn.RMSNorm(hidden), nn.RMSNorm(hidden), moe, heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(self.norm_2(x))


class LoopLM(nn.Module):
    def __init__(self, moe: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList(Decoder(moe()) for _ in range(LAYERS))
        self.head = nn.Linear(32, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


LOOPS = [
    Language(name, lambda moe=moe: LoopLM(moe), loop=True)
    for name, moe in (("module_loop", ModuleLoop), ("stacked_loop", StackedLoop), ("sigmoid_loop", SigmoidLoop))
]
MODELS = FAMILIES + LOOPS


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Ids without the padding, first and last tokens of the vocabulary."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
