"""The cost model against numbers worked out by another program, and its own laws."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch

from moecompile.analysis import cost
from moecompile.analysis.machine import MACHINES, Machine, known, measured
from moecompile.ir import expr
from moecompile.ir.spec import ExpertsSpec, OutOfRange, Weight, WeightOn

H200 = MACHINES["H200"]
MIXTRAL = cost.Shape(4096, 14336, 8, 2, 4096)
QWEN = cost.Shape(2048, 768, 128, 8, 2048)
DEEPSEEK = cost.Shape(7168, 2048, 256, 8, 7168)
OLMOE = cost.Shape(2048, 1024, 64, 8, 2048)
LLAMA4 = cost.Shape(5120, 8192, 128, 1, 5120)

# H200 at 788 TFLOP/s and 4.3 TB/s: T, forward floor, four kernels, forward + backward floor, 4 + 5 kernels; microseconds.
FLOORS = [
    (QWEN, 1, 17.681, 17.710, 316.174, 316.262),
    (QWEN, 32, 245.486, 246.401, 772.167, 774.972),
    (QWEN, 2048, 284.944, 343.500, 876.049, 1055.556),
    (QWEN, 32768, 3161.271, 3452.212, 9440.207, 10012.070),
    (MIXTRAL, 8, 590, 590, 1836, 1837),
    (MIXTRAL, 2048, 1832, 1847, 5494, 5521),
    (DEEPSEEK, 128, 5155, 5168, 15.6e3, 15.6e3),
    (OLMOE, 512, 188, 204, 572, 622),
    (LLAMA4, 32, 1663, 1664, 10.8e3, 10.8e3),
]


def experts_spec(H: int, F: int, E: int, K: int, dtype: torch.dtype = torch.bfloat16) -> ExpertsSpec:
    up = [Weight((0,), (E, 2 * F, H), i * F * H, 2 * F * H, H, 1) for i in range(2)]
    return ExpertsSpec(
        num_experts=E, top_k=K, hidden=H, intermediate=F, out_features=H, projections=tuple(up), projection_bias=(None, None),
        activation=("mul", expr.silu(("in", 0)), ("in", 1)), down=Weight((1,), (E, H, F), 0, H * F, F, 1), down_bias=None,
        weight_on=WeightOn.OUTPUT, out_of_range=OutOfRange.SKIP, dtype=dtype, out_dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize(("shape", "tokens", "least", "kernels", "train", "train_kernels"), FLOORS)
def test_floors_agree_with_the_published_table(shape, tokens, least, kernels, train, train_kernels) -> None:  # type: ignore[no-untyped-def]
    forward, backward = cost.forward(shape, tokens, H200), cost.backward(shape, tokens, H200)
    saving = cost.forward(shape, tokens, H200, save=True)
    found = (forward.least, forward.pipeline, saving.least + backward.least, saving.pipeline + backward.pipeline)
    assert [x * 1e6 for x in found] == pytest.approx([least, kernels, train, train_kernels], rel=4e-3)


def test_bound_and_ridge() -> None:
    assert cost.forward(QWEN, 512, H200).bound == "memory"
    assert cost.forward(QWEN, 8192, H200).bound == "compute"
    assert cost.ridge(QWEN, H200) == pytest.approx(183, abs=0.5)


def test_distinct_experts_of_one_token_is_top_k() -> None:
    assert sympy.simplify(cost.DISTINCT.subs(cost.T, 1) - cost.K) == 0
    assert float(cost.DISTINCT.subs({cost.T: 32, cost.E: 128, cost.K: 8})) == pytest.approx(QWEN.distinct(32))
    assert QWEN.distinct(32) == pytest.approx(111.8, abs=0.05)


def test_counted_experts_replace_the_expected_ones() -> None:
    uniform, skewed = (cost.work(cost.FORWARD, QWEN, 32, distinct=d)["down"][1] for d in (None, 40.0))
    assert uniform - skewed == pytest.approx((QWEN.distinct(32) - 40) * 2048 * 768 * 2)


def test_forward_flops_are_six_t_k_h_f() -> None:
    flops, _ = cost.work((cost.LEAST_FORWARD,), dataclasses.replace(QWEN, router=False), 100)["forward"]
    assert flops == 6 * 100 * 8 * 2048 * 768
    kernels = cost.work(cost.BACKWARD, QWEN, 100)
    assert sum(f for f, _ in kernels.values()) == 12 * 100 * 8 * 2048 * 768


def test_saved_bytes() -> None:
    assert cost.saved_bytes(QWEN, 2048) == 2 * 2048 * 2048 + 4 * 2048 * 8 * 768 + 12 * 2048 * 8


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 300, 32768])
def test_a_pipeline_is_never_under_its_floor(machine: Machine, tokens: int) -> None:
    for shape in (MIXTRAL, QWEN, DEEPSEEK, OLMOE, LLAMA4, cost.Shape(64, 32, 4, 4, 96, 1)):
        for floor in (cost.forward(shape, tokens, machine), cost.backward(shape, tokens, machine)):
            assert floor.least <= floor.pipeline * (1 + 1e-9)


def test_spec_gives_the_shape_and_the_times() -> None:
    spec = experts_spec(2048, 768, 128, 8)
    shape = cost.shape_of(spec)
    assert shape == dataclasses.replace(QWEN, router=False)
    assert cost.predict(spec, 512, H200) == cost.forward(shape, 512, H200).pipeline
    assert cost.predict(spec, 512, H200, train=True) > 2 * cost.predict(spec, 512, H200)
    assert cost.share_of_floor(spec, 512, H200, 2 * cost.forward(shape, 512, H200).least) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="positive"):
        cost.share_of_floor(spec, 512, H200, 0.0)
    assert cost.shape_of(experts_spec(8, 8, 2, 1, torch.float32)).weight_bytes == 4


def test_gain_of_fusion_grows_with_rows_until_arithmetic_hides_it() -> None:
    spec = experts_spec(2048, 768, 128, 8)
    gains = [cost.expected_gain(spec, t, H200) for t in (1, 128, 2048)]
    assert 1.0 <= gains[0] < gains[1] < gains[2]
    assert 1.1 < gains[2] < 1.3
    assert cost.expected_gain(experts_spec(4096, 14336, 8, 2), 32768, H200) < 1.1
    assert cost.expected_gain(spec, 0, H200) >= 1.0


def test_padding_efficiency() -> None:
    found = [round(100 * cost.padding_efficiency(QWEN, 512, m)) for m in (16, 32, 64, 128)]
    assert found == [81, 69, 50, 25]
    assert cost.padding_efficiency(cost.Shape(8, 8, 2, 2, 8), 5, 4) == 5 / 8


def test_known_machines_go_by_the_word() -> None:
    assert known("NVIDIA H200") is H200
    assert known("NVIDIA A100-SXM4-80GB") is MACHINES["A100"]
    assert known("NVIDIA H2000 Laptop") is None


def test_measured_cpu_gives_two_positive_numbers() -> None:
    found = measured("cpu", torch.float32, 128, 2)
    assert found.measured and found.flops > 0 and found.bandwidth > 0
    assert found is measured("cpu", torch.float32, 128, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_default_machine_without_a_gpu_is_this_cpu() -> None:
    spec = experts_spec(64, 32, 8, 2)
    assert cost.default_machine().name == "cpu"
    assert cost.expected_gain(spec, 512, cost.default_machine()) >= 1.0


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="K <= E"):
        cost.Shape(8, 8, 2, 3, 8)
    with pytest.raises(ValueError, match="negative"):
        cost.forward(QWEN, -1, H200)
