"""C++ source to a loaded library: the compiler, its flags, and the cache of what it built.

A library is named by the hash of all it depends on: source, headers, flags and CPU, and then the compiler.  The cache folder
is ours alone (0700, owner checked, as loading a library runs it), files appear in it by rename and end with a hash of the rest
(a torn library would not fail to load but end the process).

    the folder is not ours, full, read-only or gone    the library is built in a temporary folder, for this process
    the compiler is missing, fails or hangs            a library of another compiler, if the folder has one; else BuildError
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import hashlib
import importlib.resources
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from moecompile import config
from moecompile.errors import BuildError
from moecompile.ir.ops import ABI

NATIVE = ("-march=native",)
_FLAGS = ("-O3", "-std=gnu++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
_SECONDS = 300  # a compiler that takes longer is stuck
_ROOM = 4 << 20  # bytes that must be free for a build, which takes 1 MB
_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}
_failed: dict[str, str] = {}  # the key of what was not built, or the compiler that hangs: why.  A model has many layers alike


def load(source: str, target: tuple[str, ...] = NATIVE) -> ctypes.CDLL:
    """The library of this source, which may include the headers of kernels/cpu; built unless this process or the cache
    has it.  Raises BuildError, from then on without trying."""
    with _lock:
        found = _loaded.get(key := cache_key(source, target))
        if found is None:
            if key in _failed:
                raise BuildError(_failed[key])
            try:
                found = _loaded[key] = _library(key, source, target)
            except BuildError as e:
                _failed[key] = str(e)
                raise
        return found


def forget_failures() -> None:
    """Try again what was not built."""
    _failed.clear()


def entry(library: ctypes.CDLL, name: str) -> Callable[[Sequence[int]], int]:
    """The function of that name, which takes the address of an array of 64-bit integers."""
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p]

    def call(values: Sequence[int]) -> int:
        packed = array.array("q", values)  # 2 us for 80 values, a ctypes array 10 us
        return int(function(packed.buffer_info()[0]))

    return call


def address(library: ctypes.CDLL, name: str) -> int:
    """Where the function of that name is, for another library to call."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def headers() -> Path:
    """The folder of the headers."""
    return Path(str(importlib.resources.files("moecompile.kernels.cpu")))


def cache_key(source: str, target: tuple[str, ...] = NATIVE) -> str:
    """Hash of all that the library depends on but the compiler."""
    parts = [ABI, source, *_header_texts(), *_FLAGS, *target, _cpu(), str(_openmp())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@lru_cache(1)
def _header_texts() -> tuple[str, ...]:
    return tuple(f"{p.name}\n{p.read_text()}" for p in sorted(headers().glob("*.h")))


@lru_cache(8)
def _version(command: str) -> str:
    status, shown, _ = _run([command, "--version"])
    if status or "clang" in shown.lower():
        raise BuildError(f"the C++ compiler {command!r} is not GCC: install g++ or set CXX to it")
    return shown.partition("\n")[0]


def compiler() -> tuple[str, str]:
    """Path and version of the compiler: $CXX or g++. BuildError where there is none."""
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"no C++ compiler: {name!r} is not on PATH; install g++ or set CXX")
    return found, _version(found)


@lru_cache(1)
def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "cpu family", "model")
    return "\n".join(dict.fromkeys(line for line in lines if line.split(":")[0].strip() in wanted))


@lru_cache(1)
def _openmp() -> Path | None:
    """The OpenMP runtime that torch loaded: a second one would bring threads that spin against torch's."""
    torch.get_num_threads()
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    mapped = {line.split(maxsplit=5)[5] for line in maps if "/" in line}
    for name in ("libgomp", "libiomp5", "libomp"):
        for path in sorted(mapped):
            if Path(path).name.startswith(name) and Path(path).exists():
                return Path(path)
    return None


def _library(key: str, source: str, target: tuple[str, ...]) -> ctypes.CDLL:
    try:
        return _kept(cache_folder(), key, source, target)
    except OSError as e:
        _warn(e)
    try:
        with tempfile.TemporaryDirectory(prefix="moecompile-", ignore_cleanup_errors=True) as folder:
            return _kept(Path(folder), key, source, target)  # what is loaded outlives its file
    except OSError as e:
        raise BuildError(f"a kernel could be built neither in the cache folder nor in the temporary one: {e}") from e


def _kept(folder: Path, key: str, source: str, target: tuple[str, ...]) -> ctypes.CDLL:
    """The library of that key, built if the folder does not have it. BuildError is about the compiler, OSError about the folder."""
    try:
        cxx, version = compiler()
        library = folder / f"{key}-{hashlib.sha256(f'{cxx} {version}'.encode()).hexdigest()[:8]}.so"
        if not _whole(library):
            _build(library, cxx, source, target)
    except BuildError:
        others = [p for p in folder.glob(f"{key}-*.so") if _whole(p)]
        if not others:
            raise
        library = others[0]
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink(missing_ok=True)  # foreign: the next process builds it again
        raise


def _build(library: Path, cxx: str, source: str, target: tuple[str, ...]) -> None:
    _sweep(library.parent)
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent, ignore_cleanup_errors=True) as name:
        work = Path(name)
        _find_room(work)
        (work / "kernel.cpp").write_text(source)
        try:
            _make([cxx, *_FLAGS, *target, f"-I{headers()}", "-c", "kernel.cpp", "-o", "kernel.o"], work)
            openmp = _openmp()
            _make([cxx, "-shared", "kernel.o", *([str(openmp)] if openmp else ["-fopenmp"]), "-o", "kernel.so"], work)
        except BuildError as e:
            if not work.exists():
                raise OSError(f"{work} was removed during a build") from e
            raise
        with open(work / "kernel.so", "r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        (work / "kernel.so").chmod(0o700)  # the umask may let the group write
        os.replace(work / "kernel.so", library)


def _find_room(folder: Path) -> None:
    """OSError on a full disk: a compiler does not report that in a way to be relied on."""
    try:
        (folder / "room").write_bytes(bytes(_ROOM))
        (folder / "room").unlink()
    except OSError as e:
        raise OSError(f"{folder.parent} has no room for a build: {e.strerror}") from e


def _make(command: list[str], folder: Path) -> None:
    """Run a command that makes the file it names last."""
    status, _, said = _run(command, folder)
    if status or not (folder / command[-1]).is_file():
        how = f"failed with status {status}" if status else f"made no {command[-1]}"
        last = "\n".join(said.strip().splitlines()[-20:])
        raise BuildError(f"{' '.join(command)} {how}:\n{last}")


def _run(command: list[str], folder: Path | None = None) -> tuple[int, str, str]:
    """Status, output and errors of a compiler. BuildError where it does not run or not end."""
    if command[0] in _failed:
        raise BuildError(_failed[command[0]])
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | ({"TMPDIR": str(folder)} if folder else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as e:
        raise BuildError(f"the C++ compiler {command[0]!r} does not run: {e}") from e
    with process:
        try:
            out, err = process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired as e:
            _failed[command[0]] = f"the C++ compiler {command[0]!r} did not end within {_SECONDS} s and is not tried again"
            raise BuildError(_failed[command[0]]) from e
        finally:
            if process.poll() is None:  # the compiler is the driver's child
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def cache_folder() -> Path:
    """cpu/ in the user's cache folder (config.cache_dir). OSError where there is none that only the user can write."""
    try:
        folder = config.cache_dir() / "cpu"
    except RuntimeError as e:  # no home
        raise OSError(str(e)) from e
    for place in (folder.parent, folder):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    status, above = folder.lstat(), folder.parent.stat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise OSError(f"{folder} belongs to user {status.st_uid}")
    if status.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others (mode {status.st_mode & 0o777:o}, needs 700)")
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise OSError(f"{folder.parent} can be written by others (mode {above.st_mode & 0o777:o}, needs 700)")
    return folder


_warned = False


def _warn(why: OSError) -> None:
    global _warned
    if not _warned:
        _warned = True
        cure = "MOECOMPILE_CACHE_DIR can name another folder"
        warnings.warn(f"moecompile: kernels are built anew in every process: {why}; {cure}", stacklevel=2)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left."""
    for left in folder.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 12 * _SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _whole(library: Path) -> bool:
    """Is this one of our libraries, with nothing missing?"""
    try:
        status = library.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return False
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]
