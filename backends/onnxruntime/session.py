"""A session on ONNX Runtime: one model for all specializations, states updated in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.module import AdapterInput, DimValue, Specialization
from qeff_ir.ir.snapshot import load_module

_TYPES: dict[str, type[np.generic]] = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
"""Types of the inputs of a run, by ONNX Runtime's names."""
_FUSE_BIASES = ["SkipLayerNormFusion"]
"""What the runtime must leave: it adds a layer's bias to the residual, in another order than where an adapter's branch
stands between product and bias, and the base model's slot would not answer as the base model alone."""


class OrtSession:
    """Runs a package's ``model.onnx``.

    Every state is one buffer that is bound as input and as output: the cache writes change it in place, and nothing is
    copied from step to step. Inputs and logits have buffers of their own for each specialization; adapters have one
    that all share, and that is written in place.

    Args:
        model: The ONNX file.
        threads: Threads of the runtime; its own choice by default.
    """

    def __init__(self, model: Path, *, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        module, self._model = load_module(model), model
        self._specializations = module.specializations
        fixed = dict(self._specializations[0].symbols)
        del fixed["seq_len"]  # the only symbol that differs between the specializations
        for symbol, size in fixed.items():
            options.add_free_dimension_override_by_name(symbol, size)
        try:
            self._session = ort.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=_FUSE_BIASES
            )
        except Exception as error:  # ONNX Runtime raises several private types
            raise PackageError(f"ONNX Runtime cannot load {model}: {str(error).splitlines()[0]}") from error
        self._states = {
            s.output: (s.input, ort.OrtValue.ortvalue_from_numpy(_zeros(s.shape, fixed))) for s in module.states
        }
        self._adapters = {a.name: _Adapter(a) for a in module.adapters}
        kept = {s.input for s in module.states} | set(self._adapters)
        given = [v for v in self._session.get_inputs() if v.name not in kept]
        self._shapes = {v.name: list(v.shape) for v in given}
        self._types = {v.name: _TYPES[v.type] for v in given}
        vocab = next(o.shape[-1] for o in self._session.get_outputs() if o.name == "logits")
        self._bindings = {
            tuple(shape): self._bind(shape, vocab)
            for shape in ([s.symbols["batch_size"], s.symbols["seq_len"]] for s in self._specializations)
        }

    @property
    def specializations(self) -> Sequence[Specialization]:
        """The static shapes that `run` takes."""
        return self._specializations

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `qeff_ir.runtime.session.Session.run`."""
        if set(inputs) != set(self._shapes):
            raise RuntimeInputError(f"the inputs are {' and '.join(self._shapes)}, not {', '.join(sorted(inputs))}")
        binding = self._bindings.get(inputs["position_ids"].shape)
        if binding is None or any(inputs[n].shape != tuple(binding.values[n].shape()) for n in self._shapes):
            given = " and ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            allowed = " or ".join(str(list(shape)) for shape in self._bindings)
            raise RuntimeInputError(f"{given} are not of a compiled shape: {allowed}")
        for name, array in inputs.items():
            if array.dtype != self._types[name]:  # ONNX Runtime would take the bytes for numbers of the other type
                raise RuntimeInputError(f"{name} is {array.dtype}: give {np.dtype(self._types[name])}")
            binding.values[name].update_inplace(array)
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:  # ONNX Runtime raises several private types
            reason = str(error).splitlines()[0]
            raise PackageError(
                f"ONNX Runtime fails to run {self._model} ({reason}): compile the model again"
            ) from error
        return {"logits": binding.values["logits"].numpy().copy()}

    @property
    def adapters(self) -> Sequence[AdapterInput]:
        """The inputs that hold adapters."""
        return [a.item for a in self._adapters.values()]

    def write(self, name: str, data: Array, slot: int | None = None) -> None:
        """See `qeff_ir.runtime.session.Session.write`."""
        self._adapters[name].data[... if slot is None else slot] = data

    def reset(self) -> None:
        """Set all states to zero."""
        for _, value in self._states.values():
            value.numpy().fill(0)  # the buffer itself: a cache of zeros to copy from would cost as much again

    def _bind(self, shape: list[int], vocab: int) -> _Binding:
        io = self._session.io_binding()
        sizes: dict[str, int] = {"batch_size": shape[0], "seq_len": shape[1]}
        values = {
            **{
                name: ort.OrtValue.ortvalue_from_numpy(_zeros(dims, sizes, self._types[name]))
                for name, dims in self._shapes.items()
            },
            "logits": ort.OrtValue.ortvalue_from_numpy(np.zeros((shape[0], 1, vocab), dtype=np.float32)),
        }
        for name in self._shapes:
            io.bind_ortvalue_input(name, values[name])
        for name, adapter in self._adapters.items():
            io.bind_ortvalue_input(name, adapter.value)
        io.bind_ortvalue_output("logits", values["logits"])
        for output, (name, value) in self._states.items():
            io.bind_ortvalue_input(name, value)
            io.bind_ortvalue_output(output, value)
        return _Binding(io, values)


class _Binding:
    """The buffers of one specialization."""

    def __init__(self, io: ort.IOBinding, values: dict[str, ort.OrtValue]) -> None:
        self.io = io
        self.values = values


class _Adapter:
    """The buffer of an adapter input: ONNX Runtime reads the very memory of `data`."""

    def __init__(self, item: AdapterInput) -> None:
        self.item = item
        self.data: Array = np.zeros(item.shape, dtype=np.float32)
        self.value = ort.OrtValue.ortvalue_from_numpy(self.data)


def _zeros(dims: Sequence[DimValue], sizes: Mapping[str, int], dtype: type[np.generic] = np.float32) -> Array:
    return np.zeros([sizes[d] if isinstance(d, str) else d for d in dims], dtype=dtype)
