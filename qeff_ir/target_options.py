"""What a user asks of `compile`, read into the options of the target: every name is taken, refused, or warned of."""

from __future__ import annotations

import dataclasses
import json
import typing
import warnings
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, cast

from backends import find_backend, preferred
from backends.base import Backend
from backends.options import CompileOptions, completed
from qeff_ir.errors import CompileError
from qeff_ir.passing.options import Option, options

FLAGS = "flags"
"""The field of a target's options that takes names of no field."""


def as_given(asked: CompileOptions) -> dict[str, Any]:
    """Options by name, flags among them: what `read_options` reads.

    Raises:
        CompileError: A flag has the name of an option.
    """
    given = {field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)}
    flags: Mapping[str, Any] = given.pop(FLAGS, {})
    twice = next((name for name in flags if name in given), None)
    if twice is not None:
        raise CompileError(f"{twice} is an option of its own: give it as that, not as a flag")
    return {**given, **flags}


def read_options(backend: Backend, given: Mapping[str, Any]) -> CompileOptions:
    """The options of a target.

    Args:
        backend: The target.
        given: Values by name, which `backends.options.completed` completes: of its fields, of flags where it takes
            them; where it takes none, of another target's options, which do nothing here: a warning names those that
            differ from what that target does anyway.

    Raises:
        CompileError: A value is of the wrong type, or no target takes a name.
    """
    declared = options(backend.Options)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in completed(given).items()}
    own = {name: value for name, value in plain.items() if name in declared and name != FLAGS}
    rest = {name: value for name, value in plain.items() if name not in own}
    if FLAGS not in declared:
        _tell_elsewhere(backend, rest)
        rest = {}
    for name, value in own.items():
        own[name] = _checked(declared[name], value)
    for name, value in rest.items():
        _check_flag(name, value)
    values: dict[str, Any] = own if FLAGS not in declared else {**own, FLAGS: rest}
    return backend.Options(**values)


def _checked(option: Option, value: Any) -> Any:
    """The value of an option.

    Raises:
        CompileError: It is of another type, or less than the least that is taken.
    """
    name, (first, *_) = option.field, option.kinds
    if typing.get_origin(first) is tuple:
        numbers = cast("list[Any]", list(value)) if isinstance(value, list | tuple) else []
        wrong = [n for n in numbers if type(n) is not int or n < option.least]
        if wrong or not isinstance(value, list | tuple):
            said = wrong[0] if wrong else value
            raise CompileError(f"{name} must be whole numbers of at least {option.least}, not {said!r}")
        return tuple(numbers)
    if option.takes(value) and not (type(value) is int and value < option.least):
        return value
    known = {int: f"a whole number of at least {option.least}", bool: "True or False", str: "a text", float: "a number"}
    kinds = " or ".join(known.get(kind, repr(kind)) for kind in option.kinds)
    raise CompileError(f"{name} must be {kinds}, not {value!r}")


def _check_flag(name: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:  # the package keeps it
        raise CompileError(f"the flag {name} is {value!r}: give a text, a number, or a list of them") from error


def _tell_elsewhere(backend: Backend, given: Mapping[str, Any]) -> None:
    """Read what is given as another target's options, and say that they do nothing here.

    Raises:
        CompileError: Every target refuses them.
    """
    refused: list[CompileError] = []
    for other in map(find_backend, preferred()):
        declared = options(other.Options)
        asked = {n: v for n, v in given.items() if n not in declared or not _is_default(declared[n], v)}
        if not asked:
            return
        if not (FLAGS in declared or all(name in declared for name in asked)):
            continue
        try:
            other.check_options(read_options(other, given))
        except CompileError as error:
            refused.append(error)
            continue
        names = ", ".join(asked)
        warnings.warn(f"{backend.name} has no option {names}: of {other.name}, it does nothing here", stacklevel=4)
        return
    if refused:
        raise refused[0]
    if given:
        known = ", ".join(options(backend.Options))
        raise CompileError(f"{backend.name} has no option {next(iter(given))}: it takes {known}")


def _is_default(option: Option, value: Any) -> bool:
    return option.default is not MISSING and type(value) is type(option.default) and value == option.default
