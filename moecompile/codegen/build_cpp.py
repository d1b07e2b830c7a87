"""C++ source to a loaded library: the compiler, its flags, and the cache of what it built.

A library is named by the hash of all it depends on: source, headers, compiler version, flags and CPU.  The cache folder is
ours alone (0700, owner checked, as loading a library runs it), files appear in it by rename and end with a hash of the rest (a
torn library would not fail to load but end the process), and where there is no such folder a private temporary one serves.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import hashlib
import importlib.resources
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
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
_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}


def load(source: str, target: tuple[str, ...] = NATIVE) -> ctypes.CDLL:
    """The library of this source, which may include the headers of kernels/cpu; built unless this process or the cache
    has it.  Raises BuildError."""
    with _lock:
        found = _loaded.get(key := cache_key(source, target))
        if found is None:
            found = _loaded[key] = _open(_library(key, source, target))
        return found


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
    """Hash of all that the library depends on."""
    parts = [ABI, source, *_header_texts(), *compiler(), *_FLAGS, *target, _cpu(), str(_openmp())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@lru_cache(1)
def _header_texts() -> tuple[str, ...]:
    return tuple(f"{p.name}\n{p.read_text()}" for p in sorted(headers().glob("*.h")))


@lru_cache(8)
def _version(command: str) -> str:
    try:
        shown = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as e:
        raise BuildError(f"the C++ compiler {command!r} does not run: {e}") from e
    if shown.returncode or "clang" in shown.stdout.lower():
        raise BuildError(f"the C++ compiler {command!r} is not GCC: install g++ or set CXX to it")
    return shown.stdout.partition("\n")[0]


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


def _library(key: str, source: str, target: tuple[str, ...]) -> Path:
    folder = cache_folder()
    library = folder / f"{key}.so"
    if _ours(library) and _whole(library):
        return library
    try:
        work = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    except OSError:
        folder = _private_folder(f"{folder} cannot be written")
        library, work = folder / f"{key}.so", Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        (work / "kernel.cpp").write_text(source)
        cxx = compiler()[0]
        _run([cxx, *_FLAGS, *target, f"-I{headers()}", "-c", "kernel.cpp", "-o", "kernel.o"], work)
        openmp = _openmp()
        _run([cxx, "-shared", "kernel.o", "-o", "kernel.so", *([str(openmp)] if openmp else ["-fopenmp"])], work)
        with open(work / "kernel.so", "r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        os.replace(work / "kernel.so", library)
    except OSError as e:
        raise BuildError(f"a kernel could not be written to {folder}: {e}") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return library


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as e:
        raise BuildError(f"{command[0]} failed: {e}") from e
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise BuildError(f"{' '.join(command)} failed with status {done.returncode}:\n{last}")


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as e:
        library.unlink(missing_ok=True)  # torn or foreign: the next process builds it again
        raise BuildError(f"a built kernel does not load: {e}") from e


def cache_folder() -> Path:
    """cpu/ in the user's cache folder (config.cache_dir), or a private temporary folder where that one is not ours."""
    try:
        folder = config.cache_dir() / "cpu"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except (OSError, RuntimeError) as e:
        return _private_folder(str(e))
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return _private_folder(f"{folder} belongs to user {status.st_uid}")
    if status.st_mode & 0o022:
        return _private_folder(f"{folder} can be written by others (mode {status.st_mode & 0o777:o}, needs 700)")
    return folder


@lru_cache(1)
def _private() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="moecompile-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_warned = False


def _private_folder(why: str) -> Path:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"moecompile: kernels are built anew in every process: {why}", stacklevel=2)
    return _private()


def _whole(library: Path) -> bool:
    content = library.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _ours(file: Path) -> bool:
    try:
        status = file.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
