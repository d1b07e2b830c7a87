"""What the store and packs hold: four kinds of JSON entries, and the strict reading of them.

    Measurement    one configuration was timed here, or refused
    Choice         the configuration to run, timed against the default at the end of a tuning
    Proposal       a choice from elsewhere (a pack): tried first when tuning, never run unmeasured
    Compiled       in packs alone: a configuration chosen by compiling, of which no time is known

Text is parsed field by field: each integer in its allowed set, each string in a list or of a narrow form, no field missing and
none extra, but for the younger axes of a configuration, which are written where they are not at their default.  Nothing of it
reaches generated source but integers that family.AXES lists.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from moecompile.analysis.machine import MACHINES
from moecompile.autotune import bucket, family
from moecompile.autotune.key import DTYPES, TIMERS, Environment, Key, Problem, digest
from moecompile.kernels.gpu.config import YOUNGER, Config

SCHEMA = 1
REFUSED = ("", "compile", "launch", "memory", "resources", "wrong")  # why a configuration has no time; "" where it has one

_ARCH = re.compile(r"cpu|sm_\d{2,3}|gfx[0-9a-f]{3,5}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")
_LONGEST = 3600.0  # seconds
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Measurement:
    """`seconds` of one configuration; 0 where it was `refused`."""

    key: Key
    config: Config
    seconds: float
    refused: str


@dataclass(frozen=True)
class Choice:
    """The better of the best measured configuration and the default, timed turn by turn; both in seconds."""

    key: Key
    config: Config
    seconds: float
    default_seconds: float


@dataclass(frozen=True)
class Proposal:
    """A choice made elsewhere: `key` says where."""

    key: Key
    config: Config


@dataclass(frozen=True)
class Compiled:
    """The best configuration by the floor model, with `device`'s ceilings, of those that the compiler made for `arch` without
    spills and within its shared memory: `registers` a thread, `shared` bytes a block.  Nothing was run and no time is claimed."""

    problem: Problem
    arch: str
    device: str
    triton: str
    config: Config
    registers: int
    shared: int


Entry = Measurement | Choice | Proposal
InPacks = Choice | Compiled
KINDS: dict[str, type[Measurement] | type[Choice] | type[Proposal] | type[Compiled]] = {
    "measured": Measurement,
    "choice": Choice,
    "proposed": Proposal,
    "compiled": Compiled,
}


def file_name(entry: Entry) -> str:
    """The name that an entry goes by. Proposals go by what they are for, wherever they come from."""
    if isinstance(entry, Measurement):
        return measured_prefix(entry.key) + digest(entry.config) + ".json"
    return choice_name(entry.key) if isinstance(entry, Choice) else proposal_name(entry.key.problem)


def measured_prefix(key: Key) -> str:
    return f"measured-{digest(key)}-"


def choice_name(key: Key) -> str:
    return f"choice-{digest(key)}.json"


def proposal_name(problem: Problem) -> str:
    return f"proposed-{digest(problem)}.json"


def to_plain(entry: Entry | Compiled) -> dict[str, Any]:
    kind = next(k for k, t in KINDS.items() if isinstance(entry, t))
    return {"schema": SCHEMA, "kind": kind, **dataclasses.asdict(entry), "config": entry.config.plain()}


def to_text(entry: Entry) -> str:
    return json.dumps(to_plain(entry), indent=1, sort_keys=True) + "\n"


def from_text(text: str | bytes) -> Entry:
    """The inverse of to_text(). ValueError that names the field, on anything else."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: of json, and of undecodable bytes
        raise ValueError(f"is not JSON: {error}") from None
    found = from_plain(plain)
    if isinstance(found, Compiled):
        raise ValueError("was not measured: it belongs in a pack")
    return found


def from_plain(plain: object) -> Entry | Compiled:
    """An entry from what JSON gives."""
    if not isinstance(plain, dict):
        raise ValueError(f"is a {type(plain).__name__}, needs an object")
    if plain.get("schema") != SCHEMA or type(plain["schema"]) is not int:
        raise ValueError(f"schema is {plain.get('schema')!r}, needs {SCHEMA}")
    kind = plain.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, needs one of {', '.join(KINDS)}")
    fields = _fields(KINDS[kind], {k: v for k, v in plain.items() if k not in ("schema", "kind")}, "entry")
    if kind == "compiled":
        return _compiled(fields)
    key = _fields(Key, fields["key"], "key")
    problem, environment = _problem(key["problem"]), _environment(key["environment"])
    config = _config(problem.kernel, fields["config"])
    found = Key(problem, environment)
    if kind == "proposed":
        return Proposal(found, config)
    if kind == "choice":
        return Choice(found, config, _seconds(fields, "seconds"), _seconds(fields, "default_seconds"))
    refused = _one_of(fields, "refused", REFUSED)
    if refused and fields["seconds"] != 0:
        raise ValueError("seconds is not 0 though the configuration was refused")
    return Measurement(found, config, 0.0 if refused else _seconds(fields, "seconds"), refused)


def _compiled(fields: dict[str, Any]) -> Compiled:
    problem, arch = _problem(fields["problem"]), _matching(fields, "arch", _ARCH)
    return Compiled(
        problem,
        arch,
        _one_of(fields, "device", tuple(m.name for m in MACHINES.values() if m.arch == arch)),
        _matching(fields, "triton", _VERSION),
        _config(problem.kernel, fields["config"]),
        _int(fields, "registers"),
        _int(fields, "shared", 0),
    )


def _fields(cls: type, plain: object, where: str) -> dict[str, Any]:
    """The object, if it has the fields of the class and no other."""
    if not isinstance(plain, dict):
        raise ValueError(f"{where} is a {type(plain).__name__}, needs an object")
    needed = {f.name for f in dataclasses.fields(cls)}
    for name in needed - set(plain):
        raise ValueError(f"{where}: field {name!r} is missing")
    for name in set(plain) - needed:
        raise ValueError(f"{where}: field {str(name)[:40]!r} is unknown")
    return plain


def _int(fields: dict[str, Any], name: str, least: int = 1, most: int = _LARGEST) -> int:
    value = fields[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]!r}, needs a whole number of {least}..{most}")
    return value


def _one_of(fields: dict[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    value = fields[name]
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {str(value)[:40]!r}, needs one of {', '.join(map(repr, allowed))}")
    return value


def _matching(fields: dict[str, Any], name: str, form: re.Pattern[str]) -> str:
    value = fields[name]
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(f"{name} is {str(value)[:40]!r}, needs the form {form.pattern}")
    return value


def _seconds(fields: dict[str, Any], name: str) -> float:
    value = fields[name]
    if type(value) not in (int, float) or not 0 < value <= _LONGEST:
        raise ValueError(f"{name} is {str(value)[:40]!r}, needs seconds above 0 and up to {_LONGEST:g}")
    return float(value)


def _problem(plain: object) -> Problem:
    fields = _fields(Problem, plain, "problem")
    sizes = {f: _int(fields, f) for f in ("hidden", "intermediate", "num_experts", "top_k", "out_features", "projections")}
    if sizes["top_k"] > sizes["num_experts"]:
        raise ValueError(f"top_k is {sizes['top_k']}, needs at most num_experts = {sizes['num_experts']}")
    return Problem(
        kernel=_one_of(fields, "kernel", tuple(family.AXES)),
        dtype=_one_of(fields, "dtype", tuple(DTYPES)),
        bucket=_int(fields, "bucket", 0, len(bucket.BUCKETS) - 1),
        **sizes,
    )


def _environment(plain: object) -> Environment:
    fields = _fields(Environment, plain, "environment")
    return Environment(
        arch=_matching(fields, "arch", _ARCH),
        sms=_int(fields, "sms"),
        timer=_one_of(fields, "timer", TIMERS),
        **{name: _matching(fields, name, _VERSION) for name in ("torch", "triton", "moecompile")},
    )


def _config(kernel: str, plain: object) -> Config:
    younger = {f.name: f.default for f in dataclasses.fields(Config) if f.name in YOUNGER}
    fields = _fields(Config, {**younger, **plain} if isinstance(plain, dict) else plain, "config")
    wrong = family.check(kernel, fields)
    if wrong is not None:
        raise ValueError(wrong)
    return Config(**fields)
