"""Options: what is accepted, what is refused and in which words, and who wins."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch

from moecompile import config

OURS = [o for o in config.TABLE if not o.process]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in config.TABLE:
        monkeypatch.delenv(option.variable, raising=False)


def test_defaults() -> None:
    settings = config.resolve()
    assert (settings.fallback, settings.verify, settings.strict, settings.inner) == ("warn", 0, False, "inductor")
    assert (settings.router, settings.kernels, settings.mode, settings.inductor) == (True, "auto", "default", {})


@pytest.mark.parametrize("spelling", ["verify", "moe.verify"])
def test_prefix_is_optional(spelling: str) -> None:
    assert config.resolve(None, {spelling: 3}).verify == 3


@pytest.mark.parametrize("spelling", ["max_autotune", "max-autotune"])
def test_inductor_options_pass(spelling: str) -> None:
    assert config.resolve(None, {spelling: True, "cpp.threads": 2}).inductor == {"max_autotune": True, "cpp.threads": 2}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_are_inductors(mode: str) -> None:
    wanted = torch._inductor.list_mode_options(mode)
    assert config.resolve(mode).inductor == wanted
    assert config.resolve(None, {"mode": mode}).inductor == wanted


def test_an_option_refines_a_mode() -> None:
    patches = config.resolve(None, {"mode": "max-autotune", "max_autotune": False}).inductor
    assert patches["max_autotune"] is False and patches["coordinate_descent_tuning"] is True


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("max-autotun", None, "did you mean 'max-autotune'"),
        ("Default", None, "did you mean 'default'"),
        (None, {"falback": "warn"}, "did you mean 'fallback'"),
        (None, {"moe.verfy": 1}, "did you mean 'moe.verify'"),
        (None, {"cpp.thread": 1}, "did you mean 'cpp.threads'"),
        (None, {"epilogue-fusio": True}, "did you mean 'epilogue_fusion'"),
        (None, {"fallback": "errr"}, "did you mean 'error'"),
        (None, {"fallback": True}, "is a bool"),
        (None, {"verify": -1}, "negative"),
        (None, {"verify": True}, "is a bool"),
        (None, {"verify": 1.5}, "is a float"),
        (None, {"strict": 1}, "is a int"),
        (None, {"inner": "inductr"}, "did you mean 'inductor'"),
        (None, {"max_autotune": 3}, "needs a bool"),
        (None, {"cache_dir": "/x"}, "MOECOMPILE_CACHE_DIR"),
        (None, {3: 4}, "option 3 is a int, needs to be a name"),
        (None, {"verify": 1, "moe.verify": 2}, "given twice"),
        ("default", {"mode": "default"}, "given twice"),
    ],
)
def test_refusals_name_the_cure(mode: str | None, options: dict[Any, object] | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.resolve(mode, options)


def test_a_whole_number_is_a_float_option() -> None:
    assert config.resolve(None, {"cpu_gpu_bw": 16}).inductor == {"cpu_gpu_bw": 16.0}


def test_call_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_FALLBACK", "error")
    monkeypatch.setenv("MOECOMPILE_VERIFY", "5")
    monkeypatch.setenv("MOECOMPILE_STRICT", "yes")
    settings = config.resolve(None, {"fallback": "silent"})
    assert (settings.fallback, settings.verify, settings.strict, settings.router) == ("silent", 5, True, True)


@pytest.mark.parametrize("option", config.TABLE, ids=lambda o: o.name)
def test_an_empty_variable_counts_as_unset(option: config.Option, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (config.resolve(), config.cache_dir())
    monkeypatch.setenv(option.variable, "")
    assert (config.resolve(), config.cache_dir()) == before


@pytest.mark.parametrize(
    ("variable", "text"), [("VERIFY", "-1"), ("VERIFY", "two"), ("STRICT", "maybe"), ("INNER", "eagr"), ("MODE", "fast")]
)
def test_a_wrong_variable_is_refused(variable: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MOECOMPILE_{variable}", text)
    with pytest.raises(ValueError, match=text):
        config.resolve()


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_FALBACK", "error")
    with pytest.warns(UserWarning, match="did you mean 'MOECOMPILE_FALLBACK'"):
        config.resolve()


@pytest.mark.parametrize("option", OURS, ids=lambda o: o.name)
def test_no_option_hides_one_of_inductors(option: config.Option) -> None:
    assert option.name not in torch._inductor.config.get_config_copy()


def test_describe_tells_value_and_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_VERIFY", "5")
    lines = {line.split()[0]: line.split()[1:3] for line in config.describe(None, {"fallback": "error"}).splitlines()}
    assert lines["fallback"] == ["error", "call"]
    assert lines["verify"] == ["5", "environment"]
    assert lines["router"] == ["true", "default"]


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert config.cache_dir() == tmp_path / "moecompile"
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path / "mine"))
    assert config.cache_dir() == tmp_path / "mine"


def test_readme_holds_the_table() -> None:
    readme = pathlib.Path(__file__).resolve().parents[2] / "README.md"
    assert config.markdown() in readme.read_text(), (
        "paste what `python -c 'from moecompile import config; print(config.markdown())'` prints"
    )
