"""Who may import whom, and what may be called what."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TREES = {"moecompile": "moecompile", "passes": "moecompile.passes", "kernels": "moecompile.kernels"}

# From the bottom up: a module imports from its own row's part and from the rows above it in this list, never below.
LAYERS = (
    ("errors", "config"),
    ("ir",),
    ("recognize", "analysis", "kernels"),
    ("passes", "runtime"),
    ("codegen",),
    ("autotune",),
    ("report",),
    ("backend",),
    ("exported",),
    ("tools",),
)
RANK = {part: rank for rank, row in enumerate(LAYERS) for part in row}


def modules() -> Iterator[tuple[str, pathlib.Path]]:
    """Every module of the package by its dotted name."""
    for folder, package in TREES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), path


MODULES = dict(modules())


def part(module: str) -> str:
    """moecompile.ir.spec -> ir; moecompile -> "" (the front door)."""
    return ([*module.split("."), ""])[1]


def imports(source: str, where: str) -> Iterator[tuple[str, int]]:
    """The modules of ours that the text imports, with line numbers; imports within functions count as well."""
    for node in ast.walk(ast.parse(source, where)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "moecompile":
                    yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}:{node.lineno}: relative import, ours are absolute"
            if node.module and node.module.split(".")[0] == "moecompile":
                for name in node.names:
                    full = f"{node.module}.{name.name}"
                    yield (full if full in MODULES else node.module), node.lineno


def refusal(importer: str, imported: str) -> str | None:
    """Why the one may not import the other, or None."""
    below, above = part(imported), part(importer)
    if not above or not below or above == below:
        return None  # the front door; __version__; neighbours in one folder
    if above == "kernels" and imported not in ("moecompile.ir.spec", "moecompile.ir.expr", "moecompile.ir"):
        return "kernels see only ir.spec and ir.expr"
    if above == "passes" and below in ("kernels", "codegen", "runtime"):
        return "passes decide the shape of the program and know no kernel"
    if below in ("backend", "tools"):
        return None if below == "backend" and above in ("exported", "tools") else f"nothing imports {below}"
    if above == "config" and below == "errors":
        return None
    if RANK[above] <= RANK[below]:
        return f"{above} lies below or beside {below}"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    path = MODULES[module]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {imported}: {why}"
        for imported, line in imports(path.read_text(), str(path))
        if (why := refusal(module, imported))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [m for m in MODULES if part(m)])
def test_every_module_has_a_layer(module: str) -> None:
    assert part(module) in RANK, f"{part(module)} is not in LAYERS"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("moecompile.ir.ops", "moecompile.runtime.dispatch"),
        ("moecompile.kernels.cpu.mlp", "moecompile.ir.ops"),
        ("moecompile.passes.fuse", "moecompile.kernels.cpu"),
        ("moecompile.passes.fuse", "moecompile.runtime"),
        ("moecompile.report", "moecompile.backend"),
        ("moecompile.config", "moecompile.ir"),
        ("moecompile.recognize.walk", "moecompile.analysis"),
    ],
)
def test_the_rules_bite(importer: str, imported: str) -> None:
    assert refusal(importer, imported)


def test_the_front_door_imports_nothing_of_ours() -> None:
    """`import moecompile` is cheap: its module level imports no part of the compiler."""
    tree = ast.parse((ROOT / "moecompile" / "__init__.py").read_text())
    names = [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
    assert not [n for n in names if n.split(".")[0] in ("moecompile", "torch")]


def folders(*tops: str) -> Iterator[pathlib.Path]:
    for top in tops:
        for path in [ROOT / top, *sorted((ROOT / top).rglob("*"))]:
            if path.is_dir() and "__pycache__" not in path.parts:
                yield path


def test_the_package_list_equals_the_folders() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads toml by itself")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = []
    for top, package in TREES.items():
        for folder in folders(top):
            if any(folder.glob("*.py")):
                assert (folder / "__init__.py").exists(), f"{folder} holds modules but no __init__.py"
                found.append(".".join([package, *folder.relative_to(ROOT / top).parts]))
    assert sorted(listed) == sorted(found)


def test_no_folder_hides_another_package() -> None:
    """With the root on sys.path a folder of one of these names would be found in place of the real thing."""
    assert not [f for f in folders(*TREES, "tests", "benchmarks") if f.name in ("triton", "torch", "test")]


def test_files_are_named_by_their_subject() -> None:
    shelves = ("utils", "util", "common", "helpers", "helper", "misc")
    assert not [p for f in folders(*TREES, "tests", "benchmarks") for p in f.iterdir() if p.stem in shelves]


def test_kernels_init_is_a_docstring() -> None:
    """transformers tries `import kernels`: with the root on sys.path it gets ours, which must then be harmless."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_the_backend_is_registered_in_one_place() -> None:
    """The entry point is enough: register_backend under the same name raises "duplicate name"."""
    uses = [m for m, path in MODULES.items() if "register_backend" in path.read_text()]
    assert not uses, f"{uses} call register_backend"
