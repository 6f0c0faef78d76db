"""``specializations.json``, in the two forms that SDKs read (contract §4.2)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from qeff_ir.errors import PackageError
from qeff_ir.ir.module import Specialization
from qeff_ir.reading import read_json

FILE = "specializations.json"

_SIZE = re.compile("[1-9][0-9]{0,8}")

Form = Literal["named", "flat"]


def dumps(specializations: Sequence[Specialization], form: Form) -> str:
    """The file's text: every value a string, keys sorted, four spaces of indentation."""
    entries: list[dict[str, Any]] = []
    for item in specializations:
        symbols = {name: str(size) for name, size in item.symbols.items()}
        entries.append({"name": item.name, "symbols": symbols} if form == "named" else dict(symbols))
    return json.dumps({"specializations": entries}, indent=4, sort_keys=True) + "\n"


def load(path: Path) -> list[Specialization]:
    """Read either form; flat entries are named by what they are for, ``Decode`` with one token and else ``Prefill``.

    Raises:
        PackageError: The file is missing or of neither form.
    """
    data = read_json(path, error=PackageError)
    form = form_of(data)
    if form is None:
        raise PackageError(f"{path} is not a specializations file (not a list of sizes): compile again")
    return _named([_entry(item) for item in cast("dict[str, Any]", data)["specializations"]])


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


def _entry(item: Mapping[str, Any]) -> Specialization:
    symbols = item.get("symbols", item)
    sizes = {name: int(size) for name, size in symbols.items()}
    return Specialization(item["name"] if "symbols" in item else _name(sizes), sizes)


def _name(sizes: Mapping[str, int]) -> str:
    return "Decode" if sizes.get("seq_len") == 1 else "Prefill"


def _named(entries: list[Specialization]) -> list[Specialization]:
    """Make names unique: those that occur more than once are numbered."""
    counts = Counter(e.name for e in entries)
    seen: Counter[str] = Counter()
    result: list[Specialization] = []
    for entry in entries:
        name = entry.name if counts[entry.name] == 1 else f"{entry.name}_{seen[entry.name]}"
        seen[entry.name] += 1
        result.append(Specialization(name, entry.symbols))
    return result
