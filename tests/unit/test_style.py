"""House rules that a program can check."""

from __future__ import annotations

import ast
import pathlib
import warnings

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CODE = ("moecompile", "passes", "kernels", "tests", "benchmarks")
SUFFIXES = (".py", ".md", ".toml", ".h", ".cpp", ".txt", ".sh")
LONG = 500  # lines; a longer file has to say why


def files() -> list[pathlib.Path]:
    found = [p for top in CODE for p in (ROOT / top).rglob("*") if p.suffix in SUFFIXES]
    found += [p for p in ROOT.iterdir() if p.suffix in SUFFIXES]
    return sorted(p for p in found if "__pycache__" not in p.parts)


FILES = files()
PYTHON = [p for p in FILES if p.suffix == ".py"]


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_text_is_ascii(path: pathlib.Path) -> None:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        assert line.isascii(), f"{name(path)}:{number}: {line.decode()}"


@pytest.mark.parametrize("path", [p for p in FILES if p != pathlib.Path(__file__)], ids=name)
def test_nothing_is_left_to_do(path: pathlib.Path) -> None:
    marks = ("TODO", "FIXME", "XXX")
    left = [f"{name(path)}:{i}" for i, line in enumerate(path.read_text().splitlines(), 1) if any(m in line for m in marks)]
    assert not left


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_a_file_says_what_it_is(path: pathlib.Path) -> None:
    source = path.read_text()
    is_golden = "# RUN:" in source
    assert is_golden or ast.get_docstring(ast.parse(source)), f"{name(path)} has no docstring"


@pytest.mark.parametrize("path", [p for p in PYTHON if p.relative_to(ROOT).parts[0] in ("moecompile", "passes")], ids=name)
def test_no_file_of_ours_is_trusted_code(path: pathlib.Path) -> None:
    """Caches hold JSON: no pickle, no eval, no exec of what lies on a disk."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{name(path)}:{node.lineno}: {node.func.id}()"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "marshal", "shelve"} & set(names), f"{name(path)}:{node.lineno}: {names}"


def test_every_test_is_run() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads toml by itself")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    found = {"/".join(p.relative_to(ROOT).parts[:2]) for p in (ROOT / "tests").rglob("test_*.py")}
    assert found == set(listed)


def test_long_files_are_reported() -> None:
    for path in FILES:
        lines = len(path.read_text().splitlines())
        if lines > LONG and path.name != "LICENSE":
            warnings.warn(f"{name(path)} has {lines} lines, over {LONG}: does it have one subject?", stacklevel=1)
