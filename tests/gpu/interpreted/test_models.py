"""The whole backend on CPU tensors with the GPU's kernels: small models of transformers and a layer with balancing losses.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moecompile.codegen import gpu, target
from moecompile.ir import ops
from moecompile.runtime.dispatch import Dispatch
from tests.models import outcome
from tests.models.balance import Balanced, Case, H, as_transformers_writes_it, z_loss
from tests.models.numbers import run, wrong

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40,
    "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, intermediate_size=20, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def deepseek_v3() -> Any:
    config = transformers.DeepseekV3Config(
        **SIZES, intermediate_size=20, moe_intermediate_size=12, n_routed_experts=8, n_group=4, topk_group=2, n_shared_experts=1,
        first_k_dense_replace=0, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


class Counting(gpu.GpuImplementation):
    """Counts which ops reach the kernels."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def route(self, *args: Any) -> Any:
        self.calls["route"] += 1
        return super().route(*args)

    def route_stats(self, *args: Any) -> Any:
        self.calls["route_stats"] += 1
        return super().route_stats(*args)

    def route_bwd(self, *args: Any) -> Any:
        self.calls["route_bwd"] += 1
        return super().route_bwd(*args)

    def experts(self, *args: Any) -> Any:
        self.calls["experts"] += 1
        return super().experts(*args)

    def experts_train(self, *args: Any) -> Any:
        self.calls["experts_train"] += 1
        return super().experts_train(*args)

    def experts_bwd(self, *args: Any) -> Any:
        self.calls["experts_bwd"] += 1
        return super().experts_bwd(*args)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """The GPU's kernels in the place of the CPU's; memory is not poisoned, transformers' own would be."""
    torch.use_deterministic_algorithms(False)
    target.bind_all()
    before, found = ops._BOUND["cpu"], Counting()
    ops.bind("cpu", Dispatch(found))
    monkeypatch.setattr(target, "supports_experts", lambda spec, device, train, kernels: gpu.supports_experts(spec, train))
    monkeypatch.setattr(target, "supports_router", lambda spec, device, kernels: gpu.supports_router(spec))
    torch._dynamo.reset()
    yield found
    ops._BOUND["cpu"] = before
    torch._dynamo.reset()


@pytest.mark.parametrize("make", (mixtral, deepseek_v3), ids=("mixtral", "deepseek-v3"))
def test_a_model_computes_and_learns_as_it_did(make: Any, kernels: Counting) -> None:
    torch.manual_seed(0)
    model = make().float()
    layers = sum(".experts" in name and name.endswith("experts") for name, _ in model.named_modules())
    tokens = torch.randint(0, 40, (1, 7))
    compiled = torch.compile(model, backend="moe", options={"strict": True})

    with torch.no_grad():
        want, got = model(tokens).logits, compiled(tokens).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert kernels.calls["experts"] == layers and kernels.calls["route"] == layers

    def gradients(forward: Any) -> list[torch.Tensor]:
        model.zero_grad()
        forward(tokens).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, ours = gradients(model), gradients(compiled)
    assert len(plain) == len(ours)
    for g, w in zip(ours, plain, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-6 + 1e-4 * float(w.abs().max()))
    assert kernels.calls["experts_train"] == layers and kernels.calls["experts_bwd"] == layers


def test_balancing_losses_cost_one_kernel_each_way(kernels: Counting) -> None:
    """The sums of transformers' loss and of the z-loss, and their gradients, come from the router's kernels."""

    def losses(m: Balanced, z: torch.Tensor, ids: torch.Tensor) -> object:
        return as_transformers_writes_it(m, z, ids), z_loss(m, z, ids)

    module = Balanced(Case("losses", losses, "choices, probabilities, squared logsumexp"))
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(0))
    compiled = outcome.compiled(module, "inductor", "auto", fullgraph=True)
    for train in (False, True):
        assert not wrong(run(compiled, module, [x], train), run(module, module, [x], train))
        assert outcome.statistics()[-1] == module.case.expect
    assert kernels.calls == {"route_stats": 2, "route_bwd": 1, "experts": 1, "experts_train": 1, "experts_bwd": 1}
