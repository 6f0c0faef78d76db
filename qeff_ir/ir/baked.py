"""Adapters that are weights of a package: their names and numbers, for whoever fills ``lora_ids``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from qeff_ir.errors import PackageError
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import ADAPTER_ROW
from qeff_ir.reading import parse_json, read_json

FILE = "adaptername_to_id.json"
"""Beside a package: the number of each adapter by name, from 1 in order (AI 100 contract §14.1)."""

ADAPTERS_KEY = "qeff.adapters"
"""In the metadata of the input that selects adapters: a JSON list of the names of those that are baked."""


def names_of(value: ir.Value) -> tuple[str, ...]:
    """The adapters that an input selects from, number 1 first; none where they are inputs.

    Raises:
        PackageError: The metadata are damaged.
    """
    text = value.metadata_props.get(ADAPTERS_KEY)
    if text is None:
        return ()
    found: Any = parse_json(text, f"the metadata of {value.name}", PackageError)
    names = [name for name in cast("list[object]", found) if isinstance(name, str)] if isinstance(found, list) else []
    if names != found or len(set(names)) < len(names):
        raise PackageError(f"the metadata of {value.name} are no list of adapters: compile again")
    return tuple(names)


def name_adapters(value: ir.Value, names: Sequence[str]) -> None:
    """Write down which adapters an input selects from."""
    value.metadata_props[ADAPTERS_KEY] = json.dumps(list(names))


def save_names(module: Module, folder: Path) -> None:
    """Write `FILE` beside a package whose adapters are baked; nothing for any other."""
    ids = module.find(ADAPTER_ROW)
    names = () if ids is None else names_of(ids)
    if names:
        numbers = {name: number for number, name in enumerate(names, start=1)}
        (folder / FILE).write_text(json.dumps(numbers, indent=4) + "\n")


def read_names(folder: Path) -> dict[str, int]:
    """The number of each baked adapter of a package, by name; none where adapters are inputs.

    Raises:
        PackageError: The file does not number them from 1, in order.
    """
    if not (folder / FILE).exists():
        return {}
    found: Any = read_json(folder / FILE, error=PackageError)
    numbers = list(cast("dict[str, Any]", found).values()) if isinstance(found, dict) else []
    if not numbers or numbers != list(range(1, len(numbers) + 1)) or any(type(number) is not int for number in numbers):
        raise PackageError(f"{folder / FILE} does not number adapters from 1 in order: compile again")
    return cast("dict[str, int]", found)
