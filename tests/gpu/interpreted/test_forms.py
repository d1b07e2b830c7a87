"""The forms a grouped product may take: each by itself and together, at the edges, against float64 and against the plain form.

Run as tests/gpu/test_interpreted.py does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from moecompile.codegen import gpu, gpu_choose, gpu_layout, gpu_tickets
from moecompile.codegen.gpu_choose import Target
from moecompile.ir.spec import ExpertsSpec, OutOfRange, RouterSpec, WeightOn
from moecompile.kernels.gpu.config import Config, Kernel
from tests.gpu import layers
from tests.gpu.interpreted import agree, blocks
from tests.gpu.interpreted.blocks import ROWS

OF_FAMILY = {  # the axes that a family has
    "up": ("swap", "persistent", "tma"),
    "down": ("swap", "persistent", "tma", "split"),
    "grad_rows": ("persistent",),
    "decode_down": ("split", "pdl"),
}
FORMS: dict[str, dict[str, int]] = {
    "swap": {"swap": 1},
    "persistent": {"persistent": 1},
    "two programs a processor": {"persistent": 2},
    "tma": {"tma": 1},
    "split in 2": {"split": 2, "pdl": 1},
    "split in 4": {"split": 4},
    "swapped, persistent, tma": {"swap": 1, "persistent": 1, "tma": 1},
    "swapped, split, tma": {"swap": 1, "split": 2, "tma": 1},
}
LOADS = ("random", "one", "half", "all")
SIZES = ((33, 17, 21), (16, 32, 16), (1, 1, 1))  # H, F, O
ROWS_OF_16_BYTES = (24, 40, 48)


def layer(**given: Any) -> Any:
    return layers.make(**{"E": 3, "K": 2, "H": 24, "F": 40, **given})


def use(form: dict[str, int], patch: pytest.MonkeyPatch) -> None:
    """Small blocks, every family in this form as far as it has the axes, on a device of one processor, so that persistent programs
    take several tiles each."""

    def source(family: str, spec: ExpertsSpec | RouterSpec, tokens: int, target: Target) -> Config | None:
        config = blocks.small(family, spec, tokens, target)
        axes = {name: value for name, value in form.items() if name in OF_FAMILY.get(family, ())}
        return dataclasses.replace(config, **axes) if config else None

    gpu.set_config_source(source)
    small = dataclasses.replace(gpu_choose.INTERPRETER, processors=1)
    patch.setattr(gpu_choose, "target_of", lambda device: small)
    patch.setattr(gpu_tickets, "_TICKETS", {})


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    found = FORMS[request.param]
    use(found, monkeypatch)
    return found


@pytest.mark.parametrize(
    "tokens,load", [*((t, "holes") for t in (0, 1, ROWS - 1, ROWS, ROWS + 1)), *((ROWS + 1, load) for load in LOADS)]
)
def test_tokens_and_load(tokens: int, load: str, form: dict[str, int]) -> None:
    spec = layer()
    agree.forward(spec, layers.inputs(spec, tokens, load))
    if load in ("holes", "one"):
        agree.training(spec, layers.inputs(spec, tokens, load))


@pytest.mark.parametrize(
    "layout,sizes",
    [*((layout, ROWS_OF_16_BYTES) for layout in layers.LAYOUTS), *(("stacked", sizes) for sizes in SIZES)],
    ids=str,
)
def test_sizes_and_layouts(sizes: tuple[int, int, int], layout: str, form: dict[str, int]) -> None:
    H, F, O = sizes
    spec = layer(E=2, H=H, F=F, O=O, layout=layout, bias=True)
    agree.forward(spec, layers.inputs(spec, ROWS + 1, "holes"))


@pytest.mark.parametrize("on,dtype", ((WeightOn.INPUT, torch.bfloat16), (WeightOn.OUTPUT, torch.float16)), ids=str)
def test_half_precision(on: WeightOn, dtype: torch.dtype, form: dict[str, int]) -> None:
    spec = layer(H=40, F=24, dtype=dtype, on=on, bias=True)
    agree.training(spec, layers.inputs(spec, ROWS + 3, "holes"))


@pytest.mark.parametrize("tokens", (2, ROWS + 1))
def test_a_token_of_nan_stays_alone(tokens: int, form: dict[str, int]) -> None:
    agree.nan_stays_alone(layer(E=8, bias=True), tokens)


@pytest.mark.parametrize("tokens", (1, 2))
def test_few_tokens(tokens: int, form: dict[str, int]) -> None:
    """The decode path, with fewer slots than parts as well."""
    for top_k in (1, 3):
        spec = layer(E=16, K=top_k, F=18, O=33, out_of_range=OutOfRange.INDEX, bias=True)
        agree.forward(spec, layers.inputs(spec, tokens))


def test_a_run_repeats_bit_for_bit_and_leaves_every_ticket_at_zero(form: dict[str, int]) -> None:
    impl = agree.IMPLEMENTATION
    for spec, tokens in ((layer(), 2 * ROWS + 1), (layer(E=8, K=4), 1)):
        given = layers.inputs(spec, tokens, "holes")
        call = (given.x, given.weights, given.ids, given.params, [], spec.text(), "")
        first = impl.experts(*call)
        assert all(torch.equal(first, impl.experts(*call)) for _ in range(2))
        if "split" in form:
            assert gpu_tickets._TICKETS and all((held == 0).all() for held in gpu_tickets._TICKETS.values())


def test_only_the_last_to_draw_ends_a_sum_and_puts_its_ticket_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its last program kept back, the last tile's ticket says how many have drawn, and every other is at zero."""
    split = 4
    use({"split": split}, monkeypatch)
    run = Kernel.run

    def one_less(kernel: Kernel, function: str, grid: tuple[int, ...], *args: Any) -> None:
        run(kernel, function, (*grid[:-1], grid[-1] - (kernel.config.split > 1)), *args)

    two_by_two = layer(E=1, K=1, F=64, O=2 * ROWS), ROWS + 1, [0, 0, 0, split - 1]
    of_decode = layer(E=16, K=split, O=2 * ROWS), 2, [split - 1] * 4
    for spec, tokens, left in (two_by_two, of_decode):
        given = layers.inputs(spec, tokens)
        agree.forward(spec, given)
        held = gpu_tickets._TICKETS[torch.device("cpu"), 0, len(left)]
        assert (held == 0).all()
        with monkeypatch.context() as patch:
            patch.setattr(Kernel, "run", one_less)
            agree.IMPLEMENTATION.experts(given.x, given.weights, given.ids, given.params, [], spec.text(), "")
        assert held.tolist() == left
        held.zero_()


@pytest.mark.parametrize("left", (-1, 1))
def test_a_ticket_that_is_not_zero_shows(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last to draw adds the parts: with a ticket too many or too few nobody does, or somebody too early."""
    use({"split": 2}, monkeypatch)
    spec = layer()
    given = layers.inputs(spec, ROWS)
    call = (given.x, given.weights, given.ids, given.params, [], spec.text(), "")
    agree.IMPLEMENTATION.experts(*call)
    for held in gpu_tickets._TICKETS.values():
        held += left
    assert not layers.error(agree.IMPLEMENTATION.experts(*call), layers.expected(spec, given)) < 1e-3


def test_parts_are_added_in_order_whoever_is_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits with the programs of each tile run backwards."""
    use({"split": 4}, monkeypatch)
    spec = layer(F=80)
    given = layers.inputs(spec, ROWS + 1)
    call = (given.x, given.weights, given.ids, given.params, [], spec.text(), "")
    forwards = agree.IMPLEMENTATION.experts(*call)
    backwards = gpu_text_with(monkeypatch, "programs", "% SPLIT\n", "% SPLIT\n    part = SPLIT - 1 - part\n")
    assert torch.equal(forwards, agree.IMPLEMENTATION.experts(*call)) and backwards


def gpu_text_with(monkeypatch: pytest.MonkeyPatch, template: str, before: str, after: str) -> bool:
    """Generate from a changed template from now on; whether it was changed."""
    import jinja2

    from moecompile.codegen import gpu_text

    texts = {**gpu_text.TEMPLATES, template: gpu_text.TEMPLATES[template].replace(before, after)}
    monkeypatch.setattr(gpu_text._ENVIRONMENT, "loader", jinja2.DictLoader(texts))
    gpu_text._ENVIRONMENT.cache.clear()  # type: ignore[union-attr]
    gpu_text.experts_text.cache_clear()
    gpu._builder.cache_clear()
    return before in gpu_text.TEMPLATES[template]


def test_tickets_are_kept_for_each_number_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    use({}, monkeypatch)
    x, split = torch.ones(1), Config(16, 16, 16, 4, 2, split=2)
    assert gpu_tickets.shared(Config(16, 16, 16, 4, 2), x, (5, 7), 0) == []
    parts, first = gpu_tickets.shared(split, x, (5, 7), 3)
    assert parts.shape == (5, 2, 7) and parts.dtype == torch.float32
    assert gpu_tickets.shared(split, x, (1, 7), 4)[1] is first
    more = gpu_tickets.shared(split, x, (5, 7), 9)[1]
    assert len(more) >= 9 and more.dtype == torch.int32 and not more.any()
    assert len(first) >= 4 and not first.any()


def test_a_graph_that_is_captured_gets_tickets_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    use({}, monkeypatch)
    x, split = torch.ones(1), Config(16, 16, 16, 4, 2, split=2)
    outside = gpu_tickets.shared(split, x, (5, 7), 4)[1]
    monkeypatch.setattr(gpu_tickets, "capturing", lambda device: True)
    first, second = (gpu_tickets.shared(split, x, (5, 7), 4)[1] for _ in range(2))
    assert len({t.data_ptr() for t in (outside, first, second)}) == 3 and not first.any()


def launches(monkeypatch: pytest.MonkeyPatch, spec: ExpertsSpec, given: layers.Inputs) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The grid and the first weight of each kernel that one forward call launches."""
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    run = Kernel.run

    def note(kernel: Kernel, function: str, grid: tuple[int, ...], *args: Any) -> None:
        found[function] = (grid, args[1])
        run(kernel, function, grid, *args)

    monkeypatch.setattr(Kernel, "run", note)
    agree.forward(spec, given)
    return found


def test_persistent_programs_are_as_many_as_the_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    use({"persistent": 2}, monkeypatch)
    spec = layer()
    assert launches(monkeypatch, spec, layers.inputs(spec, 3 * ROWS))["up"][0] == (2,)
    one = layer(E=1, K=1, F=12, O=12)
    assert launches(monkeypatch, one, layers.inputs(one, 3))["up"][0] == (1,), "never more programs than tiles"


@pytest.mark.parametrize(
    ("layout", "described"),
    [(layout, layout != "separate") for layout in layers.LAYOUTS],
)
def test_weights_come_by_descriptors_where_they_can(layout: str, described: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    use({"tma": 1}, monkeypatch)
    spec = layer(layout=layout)
    found = launches(monkeypatch, spec, layers.inputs(spec, ROWS))
    assert isinstance(found["up"][1], TensorDescriptor) is described
    assert isinstance(found["down"][1], TensorDescriptor) is described


def test_a_weight_that_no_descriptor_can_hold_is_read_by_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    use({"tma": 1}, monkeypatch)
    spec = layer(layout="split", F=48)
    given = layers.inputs(spec, ROWS)
    odd = torch.empty(given.params[0].numel() + 1)
    given.params[0] = odd[1:].view_as(given.params[0]).copy_(given.params[0])  # starts at 4 bytes
    given.params[2] = given.params[2][:1].expand(3, -1, -1)  # every expert has the same
    agree.forward(spec, given)
    layouts, _ = gpu_layout.read_layouts(spec, given.params)
    config = Config(16, 16, 16, 4, 2, tma=1)
    reasons = [gpu_choose.no_descriptors(f, spec, layouts, config, gpu_choose.TARGETS["sm_90"]) for f in ("up", "down", "grad_z")]
    assert "16 bytes" in str(reasons[0]) and "expanded" in str(reasons[1]) and "no such form" in str(reasons[2])
