"""Whether an adapter fits a compiled model, and what each input of the model then gets."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qeff_ir.adapters.folder import Adapter, Factors
from qeff_ir.arrays import Array
from qeff_ir.errors import AdapterError
from qeff_ir.ir.module import LAYER_KEY, WEIGHT_KEY
from qeff_ir.ir.residents import Resident
from qeff_ir.ir.sources import sources_of
from qeff_ir.ranges import FileRange
from qeff_ir.storage import load_model

Base = Callable[[str], Array | None]
"""A parameter of the base model by name, float32; `None` when there is none of that name."""


def fit(name: str, adapter: Adapter, inputs: Sequence[Resident], base: Base) -> dict[str, Array]:
    """What each input gets for an adapter, float32; an input that is not named gets zeros.

    Args:
        name: Of the adapter, for messages.
        adapter: The adapter.
        inputs: Those of the compiled model.
        base: The base model's parameters, asked only for adapters with biases or with copies of base weights.

    Raises:
        AdapterError: The compiled model has no branch for a layer, the rank or a shape does not fit, or the adapter
            was made for other weights; the message names the layer.
    """
    found = {(item.path, item.part): item for item in inputs}
    tensors: dict[str, Array] = {}
    biases: dict[str, Array] = {}
    for path, factors in adapter.layers.items():
        a, b = found.get((path, "a")), found.get((path, "b"))
        if a is None or b is None:
            raise AdapterError(
                f"adapter '{name}' changes {path}, for which the compiled model has no branch{_near(path, inputs)}: "
                "if the base model has such a layer, compile with the adapter loaded, or with lora_targets that name it"
            )
        tensors |= {a.input: _factor_a(name, path, factors, a), b.input: _factor_b(name, path, factors, b)}
        if factors.b_bias is not None:
            biases[path] = numbers(factors.b_bias) * np.float32(factors.scaling)
    for path, entry in adapter.biases.items():
        own = _base_value(base, name, f"{path}.bias", entry)
        new = numbers(entry)
        if not np.array_equal(own, new):
            biases[path] = biases.get(path, np.float32(0)) + (new - own)
    for path, values in biases.items():
        item = found.get((path, "bias"))
        if item is None or item.shape[-1:] != values.shape:
            raise AdapterError(
                f"adapter '{name}' changes the bias of {path}, for which the compiled model has no branch: compile "
                "with the adapter loaded, or with lora_bias='all'"
            )
        tensors[item.input] = values
    for parameter, entry in adapter.copies.items():
        if not np.array_equal(_base_value(base, name, parameter, entry), numbers(entry)):
            raise AdapterError(
                f"adapter '{name}' brings a {parameter} of its own, other than the base model's: only low-rank "
                "changes are supported"
            )
    return tensors


def _near(path: str, inputs: Sequence[Resident]) -> str:
    """A clause that names the branch whose path is most like another, if one ends alike."""
    leaf = path.rpartition(".")[2]
    ending = [other for item in inputs if (other := str(item.path)).endswith(f".{leaf}")]
    alike = difflib.get_close_matches(path, dict.fromkeys(ending), n=1)
    return f" (it has one for {alike[0]})" if alike else ""


def _base_value(base: Base, name: str, parameter: str, entry: FileRange) -> Array:
    value = base(parameter)
    if value is None or value.shape != entry.shape:
        raise AdapterError(
            f"adapter '{name}' has a {parameter} of {list(entry.shape)}, which the base model does not have: it is of "
            "another model"
        )
    return value


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
                sources = {source for node in value.consumers() for source in sources_of(node)}
                known |= {f"{source}.weight": value.const_value for source in sources}
        return known

    def read(name: str) -> Array | None:
        found = tensors().get(name)
        return None if found is None else found.numpy().astype(np.float32)

    return read


def numbers(entry: FileRange) -> Array:
    """A tensor of an adapter, read now, float32.

    Raises:
        AdapterError: A number is not finite.
    """
    values = entry.tensor("").numpy().astype(np.float32)
    if not np.isfinite(values).all():
        raise AdapterError(f"{entry.file} holds numbers that are not finite: train or save the adapter again")
    return values


def _factor_a(name: str, path: str, factors: Factors, item: Resident) -> Array:
    """``A`` padded to the input's rank: ``[rank, in]``, with slots ``[in, rank]``."""
    shape = item.sizes[::-1] if item.slots else item.sizes
    _check(name, path, factors, shape[0], factors.a.shape[1], shape[1])
    padded = np.zeros(shape, dtype=np.float32)
    padded[: factors.rank] = numbers(factors.a)
    return padded.T if item.slots else padded


def _factor_b(name: str, path: str, factors: Factors, item: Resident) -> Array:
    """``B``, scaled, padded to the input's rank: ``[out, rank]``, with slots ``[rank, out]``."""
    shape = item.sizes[::-1] if item.slots else item.sizes
    _check(name, path, factors, shape[1], factors.b.shape[0], shape[0])
    padded = np.zeros(shape, dtype=np.float32)
    padded[:, : factors.rank] = numbers(factors.b) * np.float32(factors.scaling)
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
