"""Which layers a selection names, by PEFT's own rule, and the shortest text that names given ones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qeff_ir.errors import AdapterError

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
"""PEFT's shorthand for every linear layer but the one that makes the logits."""

_NAMES = re.compile(r"[\w.]+(,[\w.]+)*")


def select(config: LoraConfig, paths: Iterable[str], linear: Iterable[str]) -> list[str]:
    """The paths that a PEFT configuration adapts.

    Args:
        config: The configuration.
        paths: All layers that can be adapted.
        linear: Those that ``all-linear`` means.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        config = selection(",".join(linear), exclude=config.exclude_modules)
    return [path for path in paths if check_target_module_exists(config, path)]


def selection(
    targets: str,
    *,
    exclude: Iterable[str] | str | None = None,
    layers: Iterable[int] | None = None,
    pattern: str | None = None,
) -> LoraConfig:
    """A PEFT configuration that selects layers.

    Args:
        targets: ``all-linear``; names or endings of names, separated by commas; or a regular expression of whole names.
        exclude: What to leave out: names, or a text as `targets`.
        layers: Indices of decoder layers, where `targets` are endings (PEFT's ``layers_to_transform``).
        pattern: Name of the list of layers (PEFT's ``layers_pattern``).

    Raises:
        AdapterError: The text is no regular expression.
    """
    from peft import LoraConfig

    excluded = _spelled(exclude) if isinstance(exclude, str) else list(exclude or ())
    return LoraConfig(
        target_modules=targets if targets == ALL_LINEAR else _spelled(targets),
        exclude_modules=excluded or None,
        layers_to_transform=list(layers) if layers is not None else None,
        layers_pattern=pattern or None,
    )


def regex(paths: Iterable[str]) -> str:
    """A regular expression that names just these paths: one alternative for all that differ in numbers only."""
    groups: dict[str, dict[tuple[str, ...], None]] = {}
    for path in paths:
        numbers = tuple(re.findall(r"(?<=\.)\d+(?=\.|$)", path))
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path), {})[numbers] = None
    return "|".join(_alternative(shape, tuple(sorted(found))) for shape, found in groups.items())


def _alternative(shape: str, found: tuple[tuple[str, ...], ...]) -> str:
    """One expression for paths of one shape, exact: by its only varying number, or written out."""
    fixed = re.escape(shape).replace(re.escape("#"), "#")
    if len(found[0]) == 1:
        numbers = [n for (n,) in found]
        return fixed.replace("#", numbers[0] if len(numbers) == 1 else f"({'|'.join(sorted(numbers, key=int))})")
    return "|".join(_filled(fixed, numbers) for numbers in found)


def _filled(fixed: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        fixed = fixed.replace("#", number, 1)
    return fixed


def _spelled(text: str) -> str | list[str]:
    if _NAMES.fullmatch(text):
        return text.split(",")
    try:
        re.compile(text)
    except re.error as error:
        raise AdapterError(f"'{text}' is neither a list of names nor a regular expression ({error})") from error
    return text
