"""Which base model an adapter says that it is of."""

from __future__ import annotations

from pathlib import Path

from qeff_ir.adapters.folder import CONFIG_FILE, Adapter
from qeff_ir.errors import AdapterError
from qeff_ir.frontend.providers.stored import Stored
from qeff_ir.frontend.source import Source


def base_of(adapter: Adapter) -> str:
    """Name of the base model; a path that starts with a dot is one from the adapter's folder.

    Raises:
        AdapterError: The adapter does not say.
    """
    if not adapter.base:
        raise AdapterError(f"{adapter.folder / CONFIG_FILE} does not name its base model: pass base_model=")
    return _relative(adapter) or adapter.base


def check_base(name: str, adapter: Adapter, source: Source) -> None:
    """Compare what an adapter says of its base model with what the base model says of itself, where both do.

    Args:
        name: Of the adapter, for the message.
        adapter: The adapter.
        source: The base model.

    Raises:
        AdapterError: It is of another one.
    """
    said = adapter.base.rstrip("/")
    own = {str(getattr(source.config, "_name_or_path", "") or "").rstrip("/")}
    if isinstance(source.provider, Stored):
        own |= {str(source.provider.folder), str(source.provider.folder.resolve())}
    own.discard("")
    if not said or not own:
        return
    last = {Path(known).name for known in own}
    if said not in own and Path(said).name not in last and _relative(adapter) not in own:
        raise AdapterError(
            f"adapter '{name}' is of the base model {said}, this one is {' or '.join(sorted(own))}: pass "
            "check_base_model=False if they are the same"
        )


def _relative(adapter: Adapter) -> str | None:
    return str((adapter.folder / adapter.base).resolve()) if adapter.base.startswith(".") else None
