"""A session on ONNX Runtime: one model for all specializations, states updated in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from backends.onnxruntime.cache_rows import Span, span_of
from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.module import Module, Specialization
from qeff_ir.ir.ports import CACHE_ROW, CACHE_ROWS
from qeff_ir.ir.residents import Resident
from qeff_ir.runtime.interface import BATCH, LENGTH, interface_of, sized

_FUSE_BIASES = ["SkipLayerNormFusion"]
"""What the runtime must leave: it adds a layer's bias to the residual, in another order than where an adapter's branch
stands between product and bias, and the base model's slot would not answer as the base model alone."""


FOLDED = ("session.disable_quant_qdq", "1")
"""A weight that is still a `DequantizeLinear` is computed once, when the model is loaded, and not in every run. The
runtime would also fuse some products with it, and round their activations."""


_MOST_SPANS = 1024
"""Bindings that are kept; each is a few pointers."""


class OrtSession:
    """Runs a package's ``model.onnx``.

    Every resident is one buffer that is bound as input and as output: the cache writes change it in place, and nothing
    is copied from step to step. Inputs and logits have buffers of their own for each specialization. Where a run names
    the rows of the caches that it continues, it is bound to a span of the same buffers (`cache_rows`).

    Args:
        model: The ONNX file.
        content: Its bytes.
        module: What they say.
        threads: Threads of the runtime; its own choice by default.

    Raises:
        PackageError: ONNX Runtime cannot load the file, or an output has no size before it is computed.
    """

    free = False

    def __init__(self, model: Path, content: bytes, module: Module, *, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._model, self._specializations = model, module.specializations
        self.interface = interface_of(module, model)
        all_sizes = [s.symbols for s in self._specializations]
        fixed = {n: size for n, size in all_sizes[0].items() if all(s.get(n) == size for s in all_sizes)}
        fixed.pop(LENGTH, None)  # that of a single specialization too
        self._index = self.interface.input(CACHE_ROW)
        if any(s.shape[0] != BATCH for s in module.states):
            self._index = None  # the graph itself selects the rows
        if self._index is not None:
            fixed.pop(BATCH, None)
        for symbol, size in fixed.items():
            options.add_free_dimension_override_by_name(symbol, size)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(model.parent.resolve())
        )
        options.add_session_config_entry(*FOLDED)
        try:
            self._session = ort.InferenceSession(
                content, options, providers=["CPUExecutionProvider"], disabled_optimizers=_FUSE_BIASES
            )
        except Exception as error:  # ONNX Runtime raises several private types
            raise PackageError(f"ONNX Runtime cannot load {model}: {str(error).splitlines()[0]}") from error
        kept = fixed if self._index is None else {**fixed, BATCH: fixed[CACHE_ROWS]}
        self._residents = {r.input: ort.OrtValue.ortvalue_from_numpy(_zeros(r, kept)) for r in module.residents}
        self._bindings = {
            tuple(sized(port, s.symbols) for port in self.interface.inputs): self._bind(s.symbols)
            for s in self._specializations
        }
        self._spans: dict[tuple[int, int, int], _Binding] = {}

    @property
    def specializations(self) -> Sequence[Specialization]:
        """The static shapes that `run` takes."""
        return self._specializations

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `qeff_ir.runtime.session.Session.run`."""
        ports = self.interface.inputs
        names = [port.name for port in ports]
        if set(inputs) != set(names):
            raise RuntimeInputError(f"the inputs are {' and '.join(names)}, not {', '.join(sorted(inputs))}")
        binding = self._bindings.get(tuple(inputs[name].shape for name in names))
        if binding is None:
            given = " and ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            allowed = " or ".join(str(list(first)) for first, *_ in self._bindings)
            raise RuntimeInputError(f"{given} are not of a compiled shape: {allowed}")
        for port in ports:
            if inputs[port.name].dtype != port.dtype:  # ONNX Runtime would take the bytes for numbers of the other type
                raise RuntimeInputError(f"{port.name} is {inputs[port.name].dtype}: give {port.dtype}")
        if self._index is None:
            return self._run(binding, inputs)
        span = span_of(inputs[self._index.name], binding.symbols[CACHE_ROWS])
        found = self._run(self._bound(binding, span), span.given(inputs, ports))
        return {name: span.returned(array) for name, array in found.items()}

    def _run(self, binding: _Binding, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name, array in inputs.items():
            binding.values[name].update_inplace(array)
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:  # ONNX Runtime raises several private types
            reason = str(error).splitlines()[0]
            raise PackageError(
                f"ONNX Runtime fails to run {self._model} ({reason}): compile the model again"
            ) from error
        return {port.name: binding.values[port.name].numpy().copy() for port in self.interface.outputs}

    def write(self, name: str, data: Array, slot: int | None = None) -> None:
        """See `qeff_ir.runtime.session.Session.write`."""
        self._residents[name].numpy()[... if slot is None else slot] = data

    def state(self, name: str) -> Array:
        """See `qeff_ir.runtime.session.HostStates.state`."""
        return self._residents[name].numpy()

    def reset(self) -> None:
        """Set all states to zero that runs write."""
        for resident in self.interface.residents:
            if not resident.written_by_host:  # the buffer itself: a cache of zeros to copy from would cost as much
                self._residents[resident.input].numpy().fill(0)

    def _bind(self, symbols: Mapping[str, int]) -> _Binding:
        values = {
            port.name: ort.OrtValue.ortvalue_from_numpy(np.zeros(sized(port, symbols), dtype=port.dtype))
            for port in (*self.interface.inputs, *self.interface.outputs)
        }
        return self._binding(symbols, values, self._residents)

    def _bound(self, whole: _Binding, span: Span) -> _Binding:
        """The buffers of a specialization for a span of the caches: the first rows of its own, and the span's."""
        key = (id(whole), span.first, span.count)
        if key not in self._spans:
            if len(self._spans) == _MOST_SPANS:
                self._spans.clear()
            symbols = {**whole.symbols, BATCH: span.count}
            ports = (*self.interface.inputs, *self.interface.outputs)
            values = {port.name: _part(whole.values[port.name], sized(port, symbols)) for port in ports}
            rows = slice(span.first, span.first + span.count)
            states = {r.input for r in self.interface.residents if BATCH in r.shape}
            residents = {
                name: ort.OrtValue.ortvalue_from_numpy(value.numpy()[rows]) if name in states else value
                for name, value in self._residents.items()
            }
            self._spans[key] = self._binding(symbols, values, residents)
        return self._spans[key]

    def _binding(
        self, symbols: Mapping[str, int], values: dict[str, ort.OrtValue], residents: Mapping[str, ort.OrtValue]
    ) -> _Binding:
        io = self._session.io_binding()
        for port in self.interface.inputs:
            io.bind_ortvalue_input(port.name, values[port.name])
        for port in self.interface.outputs:
            io.bind_ortvalue_output(port.name, values[port.name])
        for resident in self.interface.residents:
            value = residents[resident.input]
            io.bind_ortvalue_input(resident.input, value)
            if resident.retained:
                io.bind_ortvalue_output(resident.output, value)
        return _Binding(io, symbols, values)


class _Binding:
    """The buffers of one specialization."""

    def __init__(self, io: ort.IOBinding, symbols: Mapping[str, int], values: dict[str, ort.OrtValue]) -> None:
        self.io = io
        self.symbols = symbols
        self.values = values


def _part(whole: ort.OrtValue, shape: Sequence[int]) -> ort.OrtValue:
    """A smaller tensor in the memory of a larger one, from its beginning on; or a larger one, in memory of its own."""
    memory, size = whole.numpy().reshape(-1), math.prod(shape)
    memory = memory[:size] if size <= len(memory) else np.zeros(size, dtype=memory.dtype)
    return ort.OrtValue.ortvalue_from_numpy(memory.reshape(shape))


def _zeros(resident: Resident, sizes: Mapping[str, int]) -> Array:
    return np.zeros([sizes[d] if isinstance(d, str) else d for d in resident.shape], dtype=resident.dtype.numpy())
