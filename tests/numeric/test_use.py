"""What users do with a compiled layer around and between its calls: the numbers stay eager's, and it stays fused."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import outcome
from tests.models.layer import Recipe
from tests.models.numbers import run, wrong

X = (2, 5, 16)


def layer(**parts: Any) -> tuple[nn.Module, Any]:
    module = Recipe(**parts).make()
    return module, outcome.compiled(module, "aot_eager", "auto")


def agree(call: Any, module: nn.Module, x: Tensor) -> None:
    assert not wrong(
        run(call, module, [x], train=False), run(module, module, [x], train=False), eps=float(torch.finfo(x.dtype).eps)
    )
    assert all(found.fused for found in outcome.layers())


@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("form", ["grouped", "batched", "loop_where"])
def test_autocast_to_float16(form: str, train: bool) -> None:
    module, call = layer(form=form)
    x = module.recipe.inputs(module)  # type: ignore[operator, union-attr]
    with torch.autocast("cpu", torch.float16):
        got, want = run(call, module, [x], train), run(module, module, [x], train)
    assert not wrong(got, want, eps=float(torch.finfo(torch.float16).eps)) and outcome.fused()


@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
def test_threads_call_one_model_at_once(train: bool) -> None:
    module, call = layer()
    xs = [torch.randn(X) for _ in range(4)]
    want = [module(x)[0].detach() for x in xs]
    start, failed = threading.Barrier(2), []

    def work(first: int) -> None:
        start.wait()
        try:
            for i in range(first, first + 12):
                with torch.set_grad_enabled(train):
                    y = call(xs[i % 4])[0]
                    torch.testing.assert_close(y.detach(), want[i % 4])
                    if train:
                        y.sum().backward()
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed and all(found.fused for found in outcome.layers())


def in_child(call: Any, x: Tensor, answers: Any) -> None:
    torch.set_num_threads(1)  # torch's own matmuls hang in a forked child otherwise
    with torch.no_grad():
        answers.put(call(x)[0].tolist())


def test_a_forked_child_calls_the_model_of_its_parent() -> None:
    _, call = layer()
    x = torch.randn(X)
    with torch.no_grad():
        want = call(x)[0]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=in_child, args=(call, x, answers))
    child.start()
    try:
        assert torch.equal(torch.tensor(answers.get(timeout=60)), want)
    finally:
        child.join(10)
        child.kill()


def test_a_call_under_inference_mode_and_then_training() -> None:
    module, call = layer()
    x = torch.randn(X)
    with torch.inference_mode():
        torch.testing.assert_close(call(x)[0], module(x)[0])
    assert not wrong(run(call, module, [x], train=True), run(module, module, [x], train=True), eps=1.2e-7)
    assert all(found.fused for found in outcome.layers())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda call: pickle.loads(pickle.dumps(call))], ids=["deepcopy", "pickle"])
def test_a_copy_has_weights_of_its_own(copied: Callable[[Any], Any]) -> None:
    module, call = layer()
    x = torch.randn(X)
    agree(call, module, x)
    other = copied(call)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    agree(other, other._orig_mod, x)
    agree(call, module, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_after_compilation(dtype: torch.dtype) -> None:
    module, call = layer()
    agree(call, module, torch.randn(X))
    module.to(dtype)
    agree(call, module, torch.randn(X, dtype=dtype))


def load(p: nn.Parameter, value: Tensor) -> nn.Parameter:
    p.data.copy_(value)
    return p


def other_memory(p: nn.Parameter, value: Tensor) -> nn.Parameter:
    p.data = value
    return p


def other_strides(p: nn.Parameter, value: Tensor) -> nn.Parameter:
    p.data = value.mT.contiguous().mT
    return p


@pytest.mark.parametrize(
    "change", [load, other_memory, other_strides, lambda p, value: nn.Parameter(value)], ids=lambda f: f.__name__
)
def test_weights_changed_between_calls(change: Callable[[nn.Parameter, Tensor], nn.Parameter]) -> None:
    module, call = layer()
    x = torch.randn(X)
    agree(call, module, x)
    for place in module.modules():
        for name, p in list(place.named_parameters(recurse=False)):
            setattr(place, name, change(p, torch.randn_like(p) / 4))
    agree(call, module, x)
