"""From compile options to the compiler's flags (contract §4.1)."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from backends.ai100.options import Ai100Options
from backends.ai100.sdk import FlagType, Sdk
from qeff_ir.errors import CompileError

_INSTEAD = {
    "aic-num-cores": "num_cores",
    "mxfp6-matmul": "mxfp6_matmul",
    "m": None,
    "aic-hw": None,
    "aic-binary-dir": None,
    "convert-to-fp16": None,
    "retained-state": None,
    "network-specialization-config": None,
    "custom-IO-list-file": None,
}
"""Flags that follow from the model or from an option of their own, and that option."""

_OBSOLETE = frozenset({"compile-only"})
"""Flags that old scripts give; the description of an SDK that wants them has them among its standing arguments."""

_EXPECTED: dict[FlagType, str] = {
    "flag": "True or False",
    "int": "a whole number",
    "string": "a text",
    "input": "the path of an existing file",
    "output": "a relative path inside the package",
}


@dataclass(frozen=True)
class Flags:
    """What the user's flags come to.

    Attributes:
        hardware: Hardware to compile for, if the user named it.
        arguments: Arguments in the order of the user's flags.
        partition: Name in the package of the user's own partition config.
        sub_functions: Whether layers stay functions.
        files: Files that the arguments name, by their name in the package.
    """

    hardware: str | None = None
    arguments: tuple[str, ...] = ()
    partition: str | None = None
    sub_functions: bool = False
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])


def format_flag(key: str, value: Any) -> str | None:
    """One flag: the key with dashes, bare for `True`, `None` for `False`, else ``flag=value``."""
    if value is False:
        return None
    flag = "-" + key.replace("_", "-")
    return flag if value is True else f"{flag}={value}"


def resolve(options: Ai100Options, sdk: Sdk) -> Flags:
    """Check and translate the flags of `Ai100Options.flags`.

    Raises:
        CompileError: A flag is unknown (unless `Ai100Options.force_flags`), follows from something else, or has a
            value of the wrong type.
    """
    hardware: str | None = None
    partition: str | None = None
    sub_functions = False
    arguments: list[str] = []
    files: dict[str, Path] = {}
    for key, value in options.flags.items():
        name = key.replace("_", "-")
        known = {n.lower(): n for n in sdk.flags}.get(name.lower())
        if name in _OBSOLETE:
            warnings.warn(f"the flag {key} is obsolete and ignored: drop it", stacklevel=2)
            continue
        if known in _INSTEAD:
            raise CompileError(_managed(key, _INSTEAD[known]))
        if known is None:
            if not options.force_flags:
                raise CompileError(_unknown(key, name, sdk))
            argument = format_flag(key, value)
        else:
            _check_type(key, value, sdk.flags[known])
            if sdk.flags[known] == "input":
                value = _adopt(key, Path(value), files)
            if known == "aic-hw-version":
                hardware = _hardware(value, sdk)
                continue
            if known == "mdp-load-partition-config":
                partition = value
                continue
            if known == "sub-functions":
                sub_functions = value is True
                continue
            argument = format_flag(known, value)
        if argument is not None:
            arguments.append(argument)
    return Flags(hardware, tuple(arguments), partition, sub_functions, files)


def _managed(key: str, option: str | None) -> str:
    if option is None:
        return f"the flag {key} follows from the model and the other options: leave it out"
    return f"the flag {key} has an option of its own: say {option}=... instead"


def _unknown(key: str, name: str, sdk: Sdk) -> str:
    offered = [n for n in sdk.flags if n not in _INSTEAD and n not in _OBSOLETE]
    near = difflib.get_close_matches(name, offered, n=1)
    hint = f"the nearest is {near[0].replace('-', '_')}" if near else "leave it out"
    unknown = f"the {sdk.compiler} of SDK {sdk.version} has no flag {key}"
    return f"{unknown}: {hint}; force_flags=True hands it over all the same"


def _check_type(key: str, value: Any, kind: FlagType) -> None:
    fits = {
        "flag": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "string": isinstance(value, str) and value != "",
        "input": isinstance(value, str | Path) and Path(value).is_file(),
        "output": isinstance(value, str) and _is_inside(value),
    }
    if not fits[kind]:
        raise CompileError(f"the flag {key} takes {_EXPECTED[kind]}, not {value!r}")


def _is_inside(text: str) -> bool:
    path = PurePosixPath(text)
    return text not in ("", ".") and not path.is_absolute() and ".." not in path.parts


def _adopt(key: str, path: Path, files: dict[str, Path]) -> str:
    """Give a file of the user's a name in the package, so that the command holds wherever the package goes."""
    name = f"{key.replace('-', '_')}{path.suffix}"
    files[name] = path
    return name


def _hardware(value: str, sdk: Sdk) -> str:
    if value not in sdk.hardware:
        raise CompileError(
            f"SDK {sdk.version} compiles for {' or '.join(sorted(sdk.hardware))}, not for aic_hw_version={value!r}"
        )
    return value
