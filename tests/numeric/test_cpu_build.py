"""Building C++: what is cached, and what a user is told when it cannot be built."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from moecompile import backend
from moecompile.codegen import build_cpp
from moecompile.errors import BuildError

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build_cpp, "_loaded", {})
    monkeypatch.setattr(build_cpp, "_failed", {})
    monkeypatch.setattr(build_cpp, "_warned", False)
    return tmp_path / "cpu"


def test_a_library_is_built_once(own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_cpp.load(SOURCE % 42).answer() == 42
    assert [p.suffix for p in own_cache.iterdir()] == [".so"] and own_cache.stat().st_mode & 0o777 == 0o700
    next_process(monkeypatch)
    monkeypatch.setattr(build_cpp, "_build", None)  # a second build would call it
    assert build_cpp.load(SOURCE % 42).answer() == 42


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077], ids=oct)
def test_a_library_is_found_again_under_any_umask(umask: int, own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(umask)
    try:
        build_cpp.load(SOURCE % 7)
    finally:
        os.umask(before)
    next_process(monkeypatch)
    monkeypatch.setattr(build_cpp, "_build", None)  # a second build would call it
    assert build_cpp.load(SOURCE % 7).answer() == 7


def next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cpp, "_loaded", {})
    monkeypatch.setattr(build_cpp, "_failed", {})
    build_cpp._version.cache_clear()


# ---------------------------------------------------------------- the compiler

COMPILERS = {
    "fails": ('echo "no license" >&2; exit 3', "failed with status 3:\nno license"),
    "makes nothing": (r'printf "junk \xff\xfe" >&2', "made no kernel.o"),
    "makes junk": (r'for last; do :; done; echo junk > "$last"', "neither in the cache folder nor in the temporary one"),
    "hangs": ("sleep 1000 & sleep 1000", "did not end within 1 s"),
}


def wrapper(folder: pathlib.Path, body: str) -> str:
    """A compiler that tells its version and then does something else."""
    script = folder / "cxx"
    script.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "g++ of a test"; exit; fi\n{body}\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("what", COMPILERS)
@pytest.mark.filterwarnings("ignore:.*built anew")
def test_a_broken_compiler(what: str, own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is blamed, tried once for layers alike, and leaves nothing behind."""
    body, said = COMPILERS[what]
    monkeypatch.setenv("CXX", wrapper(own_cache.parent, f"echo $$ >> {own_cache.parent}/calls; {body}"))
    monkeypatch.setattr(build_cpp, "_SECONDS", 1)
    with pytest.raises(BuildError, match=said):
        build_cpp.load(SOURCE % 1)
    calls = (own_cache.parent / "calls").read_text()
    with pytest.raises(BuildError, match=said):
        build_cpp.load(SOURCE % 1)
    assert (own_cache.parent / "calls").read_text() == calls and not list(own_cache.iterdir())


def test_a_compiler_that_hangs_is_killed_with_its_children(own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not tried for other kernels, until the backend is reset."""
    child = own_cache.parent / "child"
    monkeypatch.setenv("CXX", wrapper(own_cache.parent, f"sleep 1000 & echo $! > {child}; wait"))
    monkeypatch.setattr(build_cpp, "_SECONDS", 1)
    for i in range(2):
        with pytest.raises(BuildError, match="not tried again"):
            build_cpp.load(SOURCE % i)
    status = pathlib.Path(f"/proc/{child.read_text().strip()}/stat")
    assert not status.exists() or status.read_text().split()[2] in "ZX"
    monkeypatch.delenv("CXX")
    backend.reset()
    assert build_cpp.load(SOURCE % 0).answer() == 0


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no-such-compiler.*install"):
        build_cpp.load(SOURCE % 1)


@pytest.mark.parametrize("body", ["", "exit 1"], ids=["no compiler", "it fails"])
def test_a_warm_cache_needs_no_compiler(body: str, own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_cpp.load(SOURCE % 8)
    next_process(monkeypatch)
    monkeypatch.setenv("CXX", wrapper(own_cache.parent, body) if body else "no-such-compiler")
    assert build_cpp.load(SOURCE % 8).answer() == 8
    with pytest.raises(BuildError):
        build_cpp.load(SOURCE % 9)


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
    next_process(monkeypatch)
    assert build_cpp.load(SOURCE % 3).answer() == 3
    assert len(built.read_bytes()) == len(content)


def test_a_library_that_does_not_load_is_built_elsewhere(own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, but made for another machine: removed, so that the next process builds it."""
    make = build_cpp._build

    def foreign(library: pathlib.Path, *given: Any) -> None:
        make(library, *given)
        if library.parent == own_cache:
            library.write_bytes(b"foreign")

    monkeypatch.setattr(build_cpp, "_build", foreign)
    with pytest.warns(UserWarning, match="built anew in every process"):
        assert build_cpp.load(SOURCE % 6).answer() == 6
    assert not list(own_cache.iterdir())


# ---------------------------------------------------------------- the cache folder


def a_file(folder: pathlib.Path) -> None:
    folder.write_text("")


def writable_by_all(folder: pathlib.Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def parent_writable_by_all(folder: pathlib.Path) -> None:
    folder.parent.chmod(0o777)


@pytest.mark.parametrize("spoil", [a_file, writable_by_all, parent_writable_by_all], ids=lambda f: f.__name__)
def test_a_folder_that_is_not_ours_is_not_used(own_cache: pathlib.Path, spoil: Callable[[pathlib.Path], None]) -> None:
    spoil(own_cache)
    built_anew()
    assert own_cache.is_file() or not list(own_cache.iterdir())


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["write_bytes", "write_text", "chmod"])
def test_a_folder_that_cannot_be_written(where: str, error: int, own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(pathlib.Path, where)

    def fails(path: pathlib.Path, *given: Any) -> Any:
        if own_cache in path.parents:
            raise OSError(error, os.strerror(error), str(path))
        return right(path, *given)

    monkeypatch.setattr(pathlib.Path, where, fails)
    built_anew()
    assert not list(own_cache.iterdir())


def test_a_folder_that_vanishes(own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two kernels it is made again; during a build the kernel is built elsewhere."""
    build_cpp.load(SOURCE % 1)
    shutil.rmtree(own_cache)
    assert build_cpp.load(SOURCE % 2).answer() == 2 and len(list(own_cache.iterdir())) == 1
    run = build_cpp._run

    def vanishing(command: list[str], folder: pathlib.Path | None = None) -> Any:
        if folder is not None and own_cache in folder.parents:
            shutil.rmtree(own_cache)
        return run(command, folder)

    monkeypatch.setattr(build_cpp, "_run", vanishing)
    built_anew()


def test_without_any_folder_the_kernel_is_not_built(own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_file(own_cache)
    monkeypatch.setattr(tempfile, "tempdir", str(own_cache))
    with pytest.warns(UserWarning, match="built anew"), pytest.raises(BuildError, match="neither in the cache folder"):
        build_cpp.load(SOURCE % 1)


def test_what_a_killed_build_left_is_removed(own_cache: pathlib.Path) -> None:
    old, new = own_cache / "build-old", own_cache / "build-new"
    for left in (old, new):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    own_cache.chmod(0o700)
    build_cpp.load(SOURCE % 1)
    assert new.exists() and not old.exists()


def built_anew() -> None:
    """Kernels are built, and one warning says that they are not kept."""
    with pytest.warns(UserWarning, match="built anew in every process"):
        assert build_cpp.load(SOURCE % 4).answer() == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_cpp.load(SOURCE % 5).answer() == 5
