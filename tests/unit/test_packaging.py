"""A wheel built from this tree, used from outside of it."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIPPED = (".h", ".cpp", ".json", ".typed", ".py")

USER = """
import pathlib, sys
import torch

assert "moecompile" not in sys.modules and "moe" in torch._dynamo.list_backends()
model = torch.nn.Linear(4, 4)
x = torch.randn(2, 4)
torch.testing.assert_close(torch.compile(model, backend="moe")(x), model(x))
import moecompile, moecompile.kernels.cpu, moecompile.passes
print(pathlib.Path(moecompile.__file__).parent, pathlib.Path(moecompile.passes.__file__).parent)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that holds what pip would install."""
    pytest.importorskip("setuptools")
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    for top in ("moecompile", "passes", "kernels"):  # a copy: setuptools leaves build/ in the tree it builds
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp / "site")
    return tmp / "site"


def run(site: pathlib.Path, *arguments: str) -> str:
    """Python outside the repository, with the wheel's content first on its path."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=site, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file(site: pathlib.Path) -> None:
    for top, folder in (("moecompile", "moecompile"), ("passes", "moecompile/passes"), ("kernels", "moecompile/kernels")):
        files = [p.relative_to(ROOT / top) for p in (ROOT / top).rglob("*") if p.suffix in SHIPPED]
        missing = [str(f) for f in files if not (site / folder / f).exists()]
        assert not missing, f"not in the wheel, under {folder}: {missing}"


def test_the_backend_is_found_without_an_import(site: pathlib.Path) -> None:
    package, passes = run(site, "-c", USER).split()
    assert pathlib.Path(package) == site / "moecompile"
    assert pathlib.Path(passes) == site / "moecompile" / "passes"


@pytest.mark.parametrize("script", ["moe-opt", "moecompile"])
def test_scripts_start(script: str, site: pathlib.Path) -> None:
    (info,) = site.glob("*.dist-info")
    line = next(x for x in (info / "entry_points.txt").read_text().splitlines() if x.startswith(f"{script} ="))
    module, function = line.split("=")[1].strip().split(":")
    assert "usage" in run(
        site, "-c", f"import sys; sys.argv = ['{script}', '--help']; from {module} import {function}; {function}()"
    )
