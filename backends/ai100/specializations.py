"""``specializations.json``, in the two forms that SDKs read (contract §4.2)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from qeff_ir.errors import PackageError
from qeff_ir.ir.module import RunPhase, Specialization
from qeff_ir.ir.ports import FEATURE_LENGTH
from qeff_ir.reading import read_json

FILE = "specializations.json"

_SIZE = re.compile("[1-9][0-9]{0,8}")

Form = Literal["named", "flat"]

_NAMES: dict[RunPhase, str] = {"prefill": "Prefill", "decode": "Decode"}
"""What the named form calls a run of a phase; one of a model without a cache has a name of its own, and so has one with
features, which is an ``Encoder``."""


def dumps(specializations: Sequence[Specialization], form: Form) -> str:
    """The file's text: every value a string, keys sorted, four spaces of indentation."""
    entries: list[dict[str, Any]] = []
    names = _numbered([_name(item) for item in specializations])
    for name, item in zip(names, specializations, strict=True):
        symbols = {symbol: str(size) for symbol, size in item.symbols.items()}
        entries.append({"name": name, "symbols": symbols} if form == "named" else dict(symbols))
    return json.dumps({"specializations": entries}, indent=4, sort_keys=True) + "\n"


def _name(item: Specialization) -> str:
    return "Encoder" if item.symbols.get(FEATURE_LENGTH, 1) > 1 else _NAMES.get(item.phase, item.name)


def load(path: Path, known: Sequence[Specialization] = ()) -> list[Specialization]:
    """Read either form.

    Args:
        path: The file.
        known: Specializations of the module, by whose sizes an entry is told. Of one that has other sizes than these,
            the phase is not known: ``forward``. Without a name, it is a ``Graph_0``.

    Raises:
        PackageError: The file is missing or of neither form.
    """
    data = read_json(path, error=PackageError)
    form = form_of(data)
    if form is None:
        raise PackageError(f"{path} is not a specializations file (not a list of sizes): compile again")
    entries = cast("dict[str, list[dict[str, Any]]]", data)["specializations"]
    return [_entry(item, known, index) for index, item in enumerate(entries)]


def form_of(data: Any) -> Form | None:
    """The form of parsed JSON; `None` when it is neither, or both are mixed."""
    entries = cast("dict[str, Any]", data).get("specializations") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        return None
    forms: set[Form | None] = {_form_of_entry(e) for e in cast("list[Any]", entries)}
    return forms.pop() if len(forms) == 1 else None


def _form_of_entry(entry: Any) -> Form | None:
    if not isinstance(entry, dict):
        return None
    fields = cast("dict[str, Any]", entry)
    if set(fields) == {"name", "symbols"} and isinstance(fields["name"], str):
        symbols = fields["symbols"]
        return "named" if isinstance(symbols, dict) and _sizes(cast("dict[str, Any]", symbols)) else None
    return "flat" if _sizes(fields) else None


def _sizes(symbols: Mapping[str, Any]) -> bool:
    """Whether all values are sizes written as strings."""
    return bool(symbols) and all(isinstance(v, str) and _SIZE.fullmatch(v) is not None for v in symbols.values())


def _entry(item: Mapping[str, Any], known: Sequence[Specialization], index: int) -> Specialization:
    named = "symbols" in item
    sizes = {name: int(size) for name, size in (item["symbols"] if named else item).items()}
    found = next((k for k in known if k.symbols == sizes), Specialization(f"Graph_{index}", "forward", sizes))
    return dataclasses.replace(found, name=item["name"]) if named else found


def _numbered(names: Sequence[str]) -> list[str]:
    """Names that occur more than once, numbered."""
    counts, seen = Counter(names), Counter[str]()
    unique: list[str] = []
    for name in names:
        if counts[name] > 1:
            while f"{name}_{seen[name]}" in counts:  # another has that name of its own
                seen[name] += 1
            unique.append(f"{name}_{seen[name]}")
            seen[name] += 1
        else:
            unique.append(name)
    return unique
