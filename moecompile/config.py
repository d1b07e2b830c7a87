"""Every option and environment variable, in one table.

A value is looked for in the call, then in the environment, then in the table:

    torch.compile(model, backend="moe", options={"fallback": "error"})      or "moe.fallback"; "-" may stand for "_"
    MOECOMPILE_FALLBACK=error                                               an empty variable counts as unset

Options that are not ours are Inductor's ("max_autotune", "cpp.threads"), and are checked against its own configuration.
Whatever is not known is a ValueError that names the nearest valid spelling: torch validates nothing for a custom backend.
"""

from __future__ import annotations

import difflib
import os
import pathlib
import sys
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One row of the table. `allowed` is empty where any value of the type will do; `process` marks what only the environment
    sets, because it holds for the whole process and not for one compiled model."""

    name: str
    default: str | int | bool
    help: str
    allowed: tuple[str, ...] = ()
    process: bool = False

    @property
    def variable(self) -> str:
        return "MOECOMPILE_" + self.name.upper()

    @property
    def values(self) -> str:
        """What may be written, for people."""
        if self.allowed:
            return " or ".join(self.allowed)
        return {bool: "true or false", int: "a whole number, 0 or more", str: "a path"}[type(self.default)]

    def check(self, value: object, source: str) -> str | int | bool:
        """The value, or a ValueError that says what `source` should have held."""
        if type(value) is not type(self.default):
            raise ValueError(f"{source}: {value!r} is a {type(value).__name__}, needs {self.values}")
        if self.allowed and value not in self.allowed:
            raise ValueError(f"{source}: {value!r} is not allowed, needs {self.values}{_nearest(str(value), self.allowed)}")
        if isinstance(value, int) and value < 0:
            raise ValueError(f"{source}: {value} is negative, needs {self.values}")
        assert isinstance(value, (str, int, bool))
        return value

    def parse(self, text: str) -> str | int | bool:
        """The value of an environment variable."""
        if isinstance(self.default, bool):
            if text.lower() in _BOOLEANS:
                return _BOOLEANS[text.lower()]
            raise ValueError(f"{self.variable}: {text!r} is not one of {', '.join(_BOOLEANS)}")
        if isinstance(self.default, int):
            if not text.isdecimal():
                raise ValueError(f"{self.variable}: {text!r} is not {self.values}")
            return int(text)
        return self.check(text, self.variable)


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

TABLE = (
    Option("fallback", "warn", "what happens when a layer or a graph cannot be improved", ("warn", "error", "silent")),
    Option("verify", 0, "the original layer runs beside the new one for this many calls, and the numbers are compared"),
    Option("strict", False, "an internal failure raises; otherwise the original graph is compiled, with a warning"),
    Option("inner", "inductor", "what compiles the rest of the graph", ("inductor", "aot_eager", "eager")),
    Option("router", True, "routers are fused too; otherwise only the experts"),
    Option("kernels", "auto", "kernels made for the device, or the plain PyTorch reference", ("auto", "reference")),
    Option("mode", "default", "Inductor's presets, as in torch.compile(mode=...), which torch refuses beside options"),
    Option("cache_dir", "", "where built kernels and measurements are kept; empty: the user's cache folder", process=True),
)
BY_NAME = {option.name: option for option in TABLE}


@dataclass(frozen=True)
class Settings:
    """The outcome: our options by name, and `inductor`, the configuration patches for compile_fx."""

    fallback: str
    verify: int
    strict: bool
    inner: str
    router: bool
    kernels: str
    mode: str
    inductor: dict[str, Any]


def resolve(mode: str | None = None, options: Mapping[str, Any] | None = None) -> Settings:
    """Check and merge what torch.compile() was given with the environment and the defaults; ValueError if anything is off."""
    ours, inductor = _sort(options or {})
    if mode is not None:
        if "mode" in ours:
            raise ValueError("mode is given twice: as torch.compile(mode=...) and as an option")
        ours["mode"] = mode
    _warn_of_unknown_variables()
    values = {option.name: _look_up(option, ours)[0] for option in TABLE}
    patches = {**_mode_patches(str(values["mode"])), **inductor}
    return Settings(**{k: v for k, v in values.items() if not BY_NAME[k].process}, inductor=patches)  # type: ignore[arg-type]


def describe(mode: str | None = None, options: Mapping[str, Any] | None = None) -> str:
    """The table as text: each option's value, where it comes from, what it may be and what it does."""
    settings = resolve(mode, options)
    ours, _ = _sort(options or {})
    if mode is not None:
        ours["mode"] = mode
    rows = []
    for option in TABLE:
        value, origin = _look_up(option, ours)
        shown = str(cache_dir()) if option.name == "cache_dir" else _plain(value)
        rows.append([option.name, shown, origin, option.variable, f"{option.help} ({_values(option)})"])
    rows += [[name, str(value), "Inductor's", "", ""] for name, value in sorted(settings.inductor.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows)


def markdown() -> str:
    """The table as it stands in README.md."""
    rows = ["| option | default | values | variable | meaning |", "|---|---|---|---|---|"]
    for option in TABLE:
        name = f"`{option.name}`" if not option.process else "(variable only)"
        default = f"`{_plain(option.default)}`" if option.default != "" else ""
        rows.append(f"| {name} | {default} | {_values(option)} | `{option.variable}` | {option.help} |")
    return "\n".join(rows)


def cache_dir() -> pathlib.Path:
    """The folder for built kernels and measurements: MOECOMPILE_CACHE_DIR, else the user's cache folder, never the temporary
    one, where another user could have made it first.  It is not created here."""
    given = os.environ.get(BY_NAME["cache_dir"].variable, "")
    if given:
        return pathlib.Path(given).expanduser().resolve()
    home = pathlib.Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "moecompile"
    if sys.platform == "win32":
        return pathlib.Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "moecompile" / "Cache"
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "moecompile"


def _sort(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours, checked, and Inductor's, checked."""
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for written, value in options.items():
        if not isinstance(written, str):
            raise ValueError(f"option {written!r} is a {type(written).__name__}, needs to be a name")
        key = written.replace("-", "_")
        name = key.removeprefix("moe.")
        if name in BY_NAME:
            option = BY_NAME[name]
            if option.process:
                raise ValueError(f"option {written!r} holds for the whole process: set the variable {option.variable} instead")
            if name in ours:
                raise ValueError(f"option {name!r} is given twice, with and without the prefix 'moe.'")
            ours[name] = option.check(value, f"option {written!r}")
        elif key.startswith("moe."):
            raise _unknown_option(written, [f"moe.{known}" for known in BY_NAME])
        else:
            inductor[key] = _check_inductor(written, key, value)
    return ours, inductor


def _look_up(option: Option, ours: Mapping[str, Any]) -> tuple[str | int | bool, str]:
    """The value that is in force, and "call", "environment" or "default"."""
    if option.name in ours:
        return ours[option.name], "call"
    text = os.environ.get(option.variable, "")
    if text:
        return option.parse(text), "environment"
    return option.default, "default"


def _mode_patches(mode: str) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ValueError(f"unknown mode {mode!r}{_nearest(mode, known)}; modes: {', '.join(known)}")
    return dict(known[mode])


def _check_inductor(written: str, key: str, value: object) -> object:
    from torch._inductor import config as inductor

    known = inductor.get_config_copy()
    if key not in known:
        raise _unknown_option(written, [*(name for name, o in BY_NAME.items() if not o.process), *known])
    needed = inductor.get_type(key)  # type: ignore[attr-defined]
    if needed is float and type(value) is int:
        value = float(value)
    if typing.get_origin(needed) is None and isinstance(needed, type) and not isinstance(value, needed):
        raise ValueError(f"option {written!r} of Inductor: {value!r} is a {type(value).__name__}, needs a {needed.__name__}")
    return value


def _unknown_option(written: str, known: Iterable[str]) -> ValueError:
    ours = ", ".join(o.name for o in TABLE if not o.process)
    return ValueError(f"unknown option {written!r}{_nearest(written, known)}; options of moe: {ours}, and all of Inductor's")


def _warn_of_unknown_variables() -> None:
    known = [option.variable for option in TABLE]
    for name in os.environ:
        if name.startswith("MOECOMPILE_") and name not in known:
            warnings.warn(f"unknown environment variable {name}{_nearest(name, known)}", stacklevel=3)


def _nearest(written: str, known: Iterable[str]) -> str:
    """The words " (did you mean ..?)", whichever of "-" and "_" was written."""
    spelled = {k.replace("-", "_"): k for k in known}
    found = difflib.get_close_matches(written.replace("-", "_"), spelled, 1, 0.0)
    return f" (did you mean {spelled[found[0]]!r}?)" if found else ""


def _values(option: Option) -> str:
    if option.name == "mode":
        return "default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs"
    return option.values


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
