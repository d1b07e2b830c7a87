"""Building C++: what is cached, and what a user is told when it cannot be built."""

from __future__ import annotations

import pathlib
import warnings

import pytest

from moecompile.codegen import build_cpp
from moecompile.errors import BuildError

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build_cpp, "_loaded", {})
    monkeypatch.setattr(build_cpp, "_warned", False)
    return tmp_path / "cpu"


def test_a_library_is_built_once(own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_cpp.load(SOURCE % 42).answer() == 42
    assert [p.suffix for p in own_cache.iterdir()] == [".so"] and own_cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(build_cpp, "_loaded", {})
    monkeypatch.setattr(build_cpp, "_run", None)  # a second build would call it
    assert build_cpp.load(SOURCE % 42).answer() == 42


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no-such-compiler.*install"):
        build_cpp.load(SOURCE % 1)


def test_a_compiler_error_is_shown() -> None:
    with pytest.raises(BuildError, match="this_is_no_type"):
        build_cpp.load("this_is_no_type x;\n")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_a_torn_library_is_built_again(kept: float, own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading half a library ends the process by SIGBUS."""
    build_cpp.load(SOURCE % 3)
    (built,) = own_cache.iterdir()
    content = built.read_bytes()
    built.unlink()  # this process has it mapped
    built.write_bytes(content[: int(len(content) * kept)])
    built.chmod(0o700)
    monkeypatch.setattr(build_cpp, "_loaded", {})
    assert build_cpp.load(SOURCE % 3).answer() == 3
    assert len(built.read_bytes()) == len(content)


def test_a_library_that_does_not_load_is_an_error_once(own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, but made for another machine: removed, so that the next process builds it."""
    run = build_cpp._run
    monkeypatch.setattr(
        build_cpp, "_run", lambda command, folder: (run(command, folder), (folder / "kernel.so").write_bytes(b"foreign"))
    )
    with pytest.raises(BuildError, match="does not load"):
        build_cpp.load(SOURCE % 6)
    monkeypatch.setattr(build_cpp, "_run", run)
    assert build_cpp.load(SOURCE % 6).answer() == 6


@pytest.mark.parametrize("spoil", ["writable by all", "a file"])
def test_a_folder_that_is_not_ours_is_not_used(own_cache: pathlib.Path, spoil: str) -> None:
    if spoil == "a file":
        own_cache.write_text("")
    else:
        own_cache.mkdir()
        own_cache.chmod(0o777)
    with pytest.warns(UserWarning, match="built anew in every process"):
        assert build_cpp.load(SOURCE % 4).answer() == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert build_cpp.load(SOURCE % 5).answer() == 5
    assert own_cache.is_file() or not list(own_cache.iterdir())
