"""The `lora` pass that some adapters and the user's wishes ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from qeff_ir.adapters.folder import Adapter
from qeff_ir.adapters.targets import ALL_LINEAR, regex
from qeff_ir.errors import AdapterError

if TYPE_CHECKING:
    from passes.lora import Lora
    from qeff_ir.passing.base import Pass

Mode = Literal["slots", "single"]
Bias = Literal["none", "targets", "all"]

_DEFAULT_SLOTS = 4
_DEFAULT_RANK = 16


def lora_step(
    loaded: Sequence[Adapter],
    *,
    slots: int | None,
    rank: int | None,
    targets: str | None,
    bias: Bias | None,
    mode: Mode,
    retained: bool,
) -> Lora:
    """The pass with which all loaded adapters fit; what the user leaves open (`None`) is chosen by them.

    Args:
        loaded: The adapters.
        slots: Adapters that fit at a time.
        rank: Largest rank.
        targets: Layers that get a branch.
        bias: Biases that get a branch.
        mode: One adapter for each row, or one for all.
        retained: Whether the target keeps the factors of a single adapter as retained state.

    Raises:
        AdapterError: A number is none, or below 1.
    """
    from passes.lora import Lora

    for name, value in (("adapter_slots", slots), ("max_lora_rank", rank)):
        if value is not None and (type(value) is not int or value < 1):
            raise AdapterError(f"{name} is {value!r}: give a whole number of at least 1")
    paths = dict.fromkeys(path for adapter in loaded for path in adapter.layers)
    return Lora(
        mode=mode,
        n=slots or max(_DEFAULT_SLOTS, len(loaded)),
        rank=rank or max((adapter.rank for adapter in loaded), default=_DEFAULT_RANK),
        targets=targets or regex(paths) or ALL_LINEAR,
        bias=bias or _bias_of(loaded),
        retained=retained,
    )


def baked(
    loaded: Mapping[str, Adapter],
    *,
    slots: int | None = None,
    rank: int | None = None,
    targets: str | None = None,
    bias: Bias | None = None,
    mode: Mode = "slots",
) -> list[Pass]:
    """The passes that make adapters weights of a package: branches with a slot for each, and each in its slot.

    Args:
        loaded: The adapters by name, number 1 first.
        slots: See `lora_step`, as for all others.
        rank: See there.
        targets: See there.
        bias: See there.
        mode: See there.

    Raises:
        AdapterError: There is no adapter, or what is asked for leaves room for others.
    """
    from passes.bake_lora import BakeLora
    from passes.merge_lora import adapter_digest

    if not loaded:
        raise AdapterError("no adapter is loaded that could be baked: load them first, or leave bake_adapters out")
    if mode != "slots" or slots not in (None, len(loaded)):
        asked = f"adapter_slots={slots}" if mode == "slots" else f"lora_mode='{mode}'"
        raise AdapterError(
            f"{asked} asks for adapters that are swapped later, and bake_adapters=True makes the {len(loaded)} loaded "
            "ones weights for good: leave one out"
        )
    found = list(loaded.values())
    step = lora_step(found, slots=len(loaded), rank=rank, targets=targets, bias=bias, mode=mode, retained=False)
    made: list[Pass] = [step]
    for name, adapter in loaded.items():
        folder = adapter.folder.resolve()
        made.append(BakeLora(adapter=str(folder), called=name, digest=adapter_digest(folder)[:16]))
    return made


def _bias_of(loaded: Sequence[Adapter]) -> Bias:
    """The biases that the adapters change: none, those of layers with factors, or others too."""
    layers = {path for adapter in loaded for path in adapter.layers}
    if any(adapter.biases.keys() - layers for adapter in loaded):
        return "all"
    some = any(adapter.biases or any(f.b_bias for f in adapter.layers.values()) for adapter in loaded)
    return "targets" if some else "none"
