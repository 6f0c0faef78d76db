"""The adapters that a running session holds: written into slots and taken out again, nothing else is touched."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qeff_ir.adapters.fit import Base, fit
from qeff_ir.adapters.folder import Adapter
from qeff_ir.arrays import Array
from qeff_ir.errors import AdapterError
from qeff_ir.ir.residents import Resident
from qeff_ir.runtime.session import Session


class AdapterSlots:
    """Slots of one session, by adapter name.

    With ``lora{mode=single}`` there is one slot, number 0, which holds the adapter of all rows, or the base model.

    Args:
        session: The session, whose slots are all zero.
        base: The base model's parameters, asked only for adapters with biases or with copies of base weights.
    """

    def __init__(self, session: Session, base: Base) -> None:
        self.session = session
        self.inputs = [resident for resident in session.interface.residents if resident.part is not None]
        self.base = base
        slots = max((item.slots for item in self.inputs), default=0)
        self.single = not slots
        self._names: list[str | None] = [None] * (slots or 1)

    @property
    def slots(self) -> int:
        """Slots beside the base model's."""
        return len(self._names)

    def slot(self, name: str) -> int:
        """Number of an adapter's slot, for ``lora_ids``.

        Raises:
            AdapterError: There is no such adapter.
        """
        if name not in self._names:
            raise AdapterError(f"there is no adapter '{name}' in the session: load it first")
        return 0 if self.single else self._names.index(name) + 1

    def holds(self, name: str) -> bool:
        """Whether an adapter of that name is in a slot."""
        return name in self._names

    def put(self, name: str | None, adapter: Adapter | None) -> None:
        """Make an adapter, or the base model, that of all rows; for a model with one adapter at a time.

        Raises:
            AdapterError: It does not fit; the one before stays.
        """
        if adapter is None:
            for held in [held for held in self._names if held is not None]:
                self.remove(held)
        elif name != self._names[0]:
            tensors = fit(str(name), adapter, self.inputs, self.base)
            self._names[0] = None  # until all of it is there
            for item in self.inputs:
                self._write(item, 0, tensors.get(item.input))
            self._names[0] = name

    def add(self, name: str, adapter: Adapter) -> int:
        """Write an adapter into a free slot, or over the one of its name.

        With one adapter at a time, one that is not that of all rows is only checked; `put` writes it.

        Returns:
            The slot.

        Raises:
            AdapterError: It does not fit, or no slot is free; nothing was written.
        """
        tensors = fit(name, adapter, self.inputs, self.base)
        if self.single and name not in self._names:
            return 0
        if name not in self._names and None not in self._names:
            raise AdapterError(
                f"no slot is free for the adapter '{name}': delete one of {', '.join(map(str, self._names))}, or "
                f"compile with adapter_slots={self.slots + 1} or more"
            )
        index = self._names.index(name if name in self._names else None)
        self._names[index] = None  # until all of it is there
        for item in self.inputs:
            self._write(item, index, tensors.get(item.input))
        self._names[index] = name
        return self.slot(name)

    def remove(self, name: str) -> None:
        """Make an adapter's slot the base model's again, and free.

        Raises:
            AdapterError: There is no such adapter.
        """
        if name not in self._names:
            raise AdapterError(f"there is no adapter '{name}' in the session: load it first")
        index = self._names.index(name)
        self._names[index] = None
        for item in self.inputs:
            self._write(item, index, None)

    def _write(self, item: Resident, index: int, data: Array | None) -> None:
        values = np.zeros(item.sizes, dtype=np.float32) if data is None else data
        self.session.write(item.input, values, index + 1 if item.slots else None)


class BakedSlots(AdapterSlots):
    """The adapters of a package whose weights they are: none comes, and none goes.

    Args:
        session: The session.
        numbers: The slot of each adapter, by name.
    """

    def __init__(self, session: Session, numbers: Mapping[str, int]) -> None:
        super().__init__(session, lambda _: None)
        self.single = False
        self._names = list(numbers)

    def add(self, name: str, adapter: Adapter) -> int:
        """Refuse.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(baked_already(name))

    def remove(self, name: str) -> None:
        """Refuse.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(baked_already(name))


def baked_already(name: str) -> str:
    """Why an adapter cannot be loaded into, or deleted from, a package."""
    return (
        f"the adapters of the package are its weights (bake_adapters): '{name}' can neither be loaded nor deleted; "
        "compile without bake_adapters to swap adapters"
    )
