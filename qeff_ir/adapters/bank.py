"""The adapters that a running session holds: written into slots and taken out again, nothing else is touched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qeff_ir.adapters.folder import Adapter, Factors
from qeff_ir.errors import AdapterError
from qeff_ir.module import LAYER_KEY, SOURCE_KEY, WEIGHT_KEY, AdapterInput
from qeff_ir.runtime.session import Array, Session
from qeff_ir.storage import FileRange, load_model

Base = Callable[[str], Array | None]
"""A parameter of the base model by name; `None` when there is none of that name."""


class AdapterBank:
    """Slots of one session, by adapter name.

    With ``lora{mode=single}`` there is one slot, number 0, which holds the adapter of all rows, or the base model.

    Args:
        session: The session, whose slots are all zero.
        base: The base model's parameters, asked only for adapters with biases or with copies of base weights.
    """

    def __init__(self, session: Session, base: Base) -> None:
        self.session = session
        self.inputs = list(session.adapters)
        self.base = base
        self.single = not any(item.slots for item in self.inputs)
        sizes = [item.shape[0] - 1 for item in self.inputs if item.slots]
        self._names: list[str | None] = [None] * (1 if self.single else sizes[0])

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

    def add(self, name: str, adapter: Adapter) -> int:
        """Write an adapter into a free slot, or over the one of its name.

        Returns:
            The slot.

        Raises:
            AdapterError: It does not fit, or no slot is free; nothing was written.
        """
        tensors = self.fit(name, adapter)
        if name not in self._names and None not in self._names:
            raise AdapterError(
                f"no slot is free for the adapter '{name}': delete one of {', '.join(map(str, self._names))}, or compile "
                f"with adapter_slots={self.slots + 1} or more"
            )
        index = self._names.index(name if name in self._names else None)
        for item in self.inputs:
            self._write(item, index, tensors.get(item.name))
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
        for item in self.inputs:
            self._write(item, index, None)
        self._names[index] = None

    def fit(self, name: str, adapter: Adapter) -> dict[str, Array]:
        """What each input gets for an adapter, float32; an input that is not named gets zeros.

        Raises:
            AdapterError: The compiled model has no branch for a layer, the rank or a shape does not fit, or the adapter
                was made for other weights; the message names the layer.
        """
        found: dict[tuple[str, str], AdapterInput] = {(item.layer, item.part): item for item in self.inputs}
        tensors: dict[str, Array] = {}
        biases: dict[str, Array] = {}
        for path, factors in adapter.layers.items():
            a, b = found.get((path, "a")), found.get((path, "b"))
            if a is None or b is None:
                raise AdapterError(
                    f"adapter '{name}' changes {path}, for which the compiled model has no branch: compile with the adapter "
                    "loaded, or with lora_targets that name this layer"
                )
            tensors |= {a.name: _factor_a(name, path, factors, a), b.name: _factor_b(name, path, factors, b)}
            if factors.b_bias is not None:
                biases[path] = _numbers(factors.b_bias) * np.float32(factors.scaling)
        for path, entry in adapter.biases.items():
            own = self._base_value(name, f"{path}.bias", entry)
            new = _numbers(entry)
            if not np.array_equal(own, new):
                biases[path] = biases.get(path, np.float32(0)) + (new - own)
        for path, values in biases.items():
            item = found.get((path, "bias"))
            if item is None or item.shape[-1:] != values.shape:
                raise AdapterError(
                    f"adapter '{name}' changes the bias of {path}, for which the compiled model has no branch: compile "
                    "with the adapter loaded, or with lora_bias='all'"
                )
            tensors[item.name] = values
        for parameter, entry in adapter.copies.items():
            if not np.array_equal(self._base_value(name, parameter, entry), _numbers(entry)):
                raise AdapterError(
                    f"adapter '{name}' brings a {parameter} of its own, other than the base model's: only low-rank "
                    "changes are supported"
                )
        return tensors

    def _base_value(self, name: str, parameter: str, entry: FileRange) -> Array:
        value = self.base(parameter)
        if value is None or value.shape != entry.shape:
            raise AdapterError(
                f"adapter '{name}' has a {parameter} of {list(entry.shape)}, which the base model does not have: it is of "
                "another model"
            )
        return value

    def _write(self, item: AdapterInput, index: int, data: Array | None) -> None:
        shape = item.shape[1:] if item.slots else item.shape
        values = np.zeros(shape, dtype=np.float32) if data is None else data
        self.session.write(item.name, values, index + 1 if item.slots else None)


def package_weights(model: Path) -> Base:
    """The parameters of a package's ONNX file by name, read one at a time and only when asked for."""

    @functools.cache
    def tensors() -> dict[str, ir.TensorProtocol]:
        graph, known = load_model(model).graph, dict[str, ir.TensorProtocol]()
        for value in graph.initializers.values():
            if value.const_value is None or WEIGHT_KEY not in value.metadata_props:
                continue
            known[value.metadata_props[WEIGHT_KEY]] = value.const_value
            if LAYER_KEY in value.metadata_props:  # a tied weight has the names of all its users
                sources = {node.metadata_props.get(SOURCE_KEY) for node in value.consumers()}
                known |= {f"{source}.weight": value.const_value for source in sources if source}
        return known

    def read(name: str) -> Array | None:
        found = tensors().get(name)
        return None if found is None else found.numpy().astype(np.float32)

    return read


def _numbers(entry: FileRange) -> Array:
    return entry.tensor("").numpy().astype(np.float32)


def _factor_a(name: str, path: str, factors: Factors, item: AdapterInput) -> Array:
    """``A`` padded to the input's rank: ``[rank, in]``, with slots ``[in, rank]``."""
    shape = item.shape[1:][::-1] if item.slots else item.shape
    _check(name, path, factors, shape[0], factors.a.shape[1], shape[1])
    padded = np.zeros(shape, dtype=np.float32)
    padded[: factors.rank] = _numbers(factors.a)
    return padded.T if item.slots else padded


def _factor_b(name: str, path: str, factors: Factors, item: AdapterInput) -> Array:
    """``B``, scaled, padded to the input's rank: ``[out, rank]``, with slots ``[rank, out]``."""
    shape = item.shape[1:][::-1] if item.slots else item.shape
    _check(name, path, factors, shape[1], factors.b.shape[0], shape[0])
    padded = np.zeros(shape, dtype=np.float32)
    padded[:, : factors.rank] = _numbers(factors.b) * np.float32(factors.scaling)
    return padded.T if item.slots else padded


def _check(name: str, path: str, factors: Factors, rank: int, size: int, expected: int) -> None:
    if factors.rank > rank:
        raise AdapterError(
            f"adapter '{name}' has rank {factors.rank} in {path}, the model is compiled for rank {rank}: compile with "
            f"max_lora_rank={factors.rank} or more"
        )
    if size != expected:
        raise AdapterError(
            f"adapter '{name}' has {size} features for {path}, which has {expected}: it is of another base model"
        )
