"""lit's settings: every file here with a RUN line is a test."""
# ruff: noqa: F821 (lit defines config)

import os
import pathlib
import sys

import lit.formats

config.name = "moecompile"
config.test_format = lit.formats.ShTest(execute_external=False)
config.suffixes = [".py", ".test"]
config.excludes = ["lit.cfg.py"]
config.test_source_root = str(pathlib.Path(__file__).parent)
config.test_exec_root = os.environ.get("LIT_EXEC_ROOT", str(pathlib.Path(__file__).parents[2] / "out" / "lit"))
config.environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[2])
config.environment["OMP_NUM_THREADS"] = "1"
config.environment["HOME"] = os.environ.get("HOME", "/")
scripts = pathlib.Path(sys.executable).parent
config.substitutions += [
    ("moe-opt", f"{sys.executable} -m moecompile.tools.opt"),
    ("FileCheck", f"{scripts / 'filecheck'}"),
]
