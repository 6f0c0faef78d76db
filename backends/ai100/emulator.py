"""A session without the device: the emitted artifact itself on ONNX Runtime, under the device's rules.

What is checked is what is shipped: the ONNX file of the package with its weights, the shapes of its
``specializations.json``, and states that stay where they are between runs. Only the bodies of the device's operators
are exchanged for its rules (`qeff_ir.ir.operators`), which give NaN for what they do not read, so that nothing can
depend on it. The arithmetic is that of the ONNX file: float32, or what was asked for by ``dtype`` (`arithmetic`).
Caches that the device keeps as MXINT8 are rounded after each run (`mxint8`). What else a compiler makes of a model,
``-convert-to-fp16`` say, is not emulated.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort

from backends.ai100 import arithmetic, mxint8, specializations, sub_functions, weight_free
from backends.ai100.artifact import read_module
from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir import dialect, operators
from qeff_ir.ir.module import Specialization
from qeff_ir.ir.residents import Resident
from qeff_ir.passing.base import registered_passes
from qeff_ir.runtime.interface import interface_of
from qeff_ir.storage import load_proto
from qeff_ir.widening import HALVES

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bool)": np.dtype(np.bool_),
}
"""Types of inputs by ONNX Runtime's names."""


class EmulatedSession:
    """Runs an AI 100 package on the CPU.

    There is one ONNX Runtime session for each specialization, with static shapes as on the device. Every state has two
    buffers that change places after each run.

    Args:
        model: The ONNX file, beside its ``specializations.json``.
        threads: Threads of the runtime; its own choice by default.

    Attributes:
        computes: What results are rounded to: float32, or the type that the package was compiled for.

    Raises:
        PackageError: The artifact cannot be loaded.
    """

    free = False

    def __init__(self, model: Path, *, threads: int | None = None) -> None:
        proto = load_proto(model)
        self.computes = arithmetic.declared_type(proto)
        module = read_module(proto, model)
        self.interface = interface_of(module, model)
        self._specializations = specializations.load(model.parent / specializations.FILE, module.specializations)
        weight_free.bind(proto, model.parent)
        if self.computes in HALVES:
            proto = arithmetic.spell_out(proto)
        _give_rules(proto, model)
        content = proto.SerializeToString()
        self._programs = [_Program(content, model, s, threads) for s in self._specializations]
        shapes = self._programs[0].states
        if any(p.states != shapes for p in self._programs):
            raise PackageError(f"the states of {model} differ in size between its specializations: compile again")
        self._written = {resident.input for resident in self.interface.residents if resident.written_by_host}
        self._states = {name: _zeros(*kept) for name, kept in shapes.items()}
        self._spare = {name: _zeros(*kept) for name, kept in shapes.items()}
        listed = mxint8.compressed(model.parent)
        self._rounded = [name for name in shapes if name in listed and name not in self._written]
        self._lock = threading.Lock()

    @property
    def specializations(self) -> Sequence[Specialization]:
        """The static shapes that `run` takes."""
        return self._specializations

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `qeff_ir.runtime.session.Session.run`."""
        expected = self._programs[0].inputs
        if set(inputs) != set(expected):
            raise RuntimeInputError(f"the inputs are {' and '.join(expected)}, not {', '.join(sorted(inputs))}")
        for name, array in inputs.items():
            if array.dtype != self._programs[0].types[name]:
                raise RuntimeInputError(f"{name} is {array.dtype}: give {self._programs[0].types[name]}")
        shapes = {name: array.shape for name, array in inputs.items()}
        program = next((p for p in self._programs if p.inputs == shapes), None)
        if program is None:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            allowed = " or ".join(str([list(s) for s in p.inputs.values()]) for p in self._programs)
            raise RuntimeInputError(f"{given} are not of a compiled shape: {allowed}")
        with self._lock:
            outputs = program.run(inputs, self._states, self._spare)
            self._states, self._spare = self._spare, self._states
            for name in self._rounded:
                self._states[name].update_inplace(mxint8.rounded(self._states[name].numpy()))
        return outputs

    def write(self, name: str, data: Array, slot: int | None = None) -> None:
        """See `qeff_ir.runtime.session.Session.write`."""
        contents = np.array(data, dtype=np.float32)
        if slot is not None:
            entry, contents = contents, self._states[name].numpy().copy()
            contents[slot] = entry
        self._states[name].update_inplace(np.ascontiguousarray(contents))

    def state(self, name: str) -> Array:
        """See `qeff_ir.runtime.session.HostStates.state`."""
        return self._states[name].numpy()

    def reset(self) -> None:
        """Set all states to zero that runs write."""
        for name, value in self._states.items():
            if name not in self._written:
                value.update_inplace(np.zeros_like(value.numpy()))


_COMPILED = (dialect.DOMAIN, sub_functions.DOMAIN)
"""Domains of functions that the compiler reads; any other is of operators of the device."""


def _give_rules(proto: onnx.ModelProto, model: Path) -> None:
    """Let the device's operators do what the device does; a read of nothing gives NaN, which shows in the logits.

    Raises:
        PackageError: There is no rule for one.
    """
    native = [(f.domain, f.name) for f in proto.functions if f.domain not in _COMPILED]
    if any(key not in operators.known() for key in native):
        registered_passes()  # imports plug-ins, which takes its time
    for key in native:
        if key not in operators.known() or operators.known()[key].rule is None:
            raise PackageError(
                f"{model} calls {key[0]}::{key[1]}, and nothing says how the device runs it: install the plug-in that "
                "defines the operator with a rule (qeff_ir.ir.operators.define)"
            )
    operators.give_rules(proto, unread=math.nan)


_FUSE_BIASES = ["MatMulAddFusion", "SkipLayerNormFusion"]
"""What the runtime must leave: a bias stays a sum of its own, so that a branch between product and bias leaves all
other numbers as they are without it."""


class _Program:
    """One specialization.

    Attributes:
        inputs: Shapes of the inputs that are given at every run.
        types: Their types.
        states: Shapes and types of the retained inputs.
    """

    def __init__(self, content: bytes, model: Path, item: Specialization, threads: int | None) -> None:
        options, self._model = ort.SessionOptions(), model
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        for symbol, size in item.symbols.items():
            options.add_free_dimension_override_by_name(symbol, size)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(model.parent.resolve())
        )
        try:
            self._session = ort.InferenceSession(
                content, options, providers=["CPUExecutionProvider"], disabled_optimizers=_FUSE_BIASES
            )
        except Exception as error:  # ONNX Runtime raises several private types
            reason = str(error).splitlines()[0]
            raise PackageError(f"ONNX Runtime cannot load {model} as {item.name}: {reason}") from error
        outputs = [o.name for o in self._session.get_outputs()]
        self._results = [name for name in outputs if not name.endswith(Resident.SUFFIX)]
        retained = {name.removesuffix(Resident.SUFFIX) for name in outputs if name.endswith(Resident.SUFFIX)}
        shapes = {i.name: _static(model, item, i.name, i.shape) for i in self._session.get_inputs()}
        types = {i.name: _DTYPES[i.type] for i in self._session.get_inputs()}
        self.types = {name: dtype for name, dtype in types.items() if name not in retained}
        self.inputs = {name: shape for name, shape in shapes.items() if name not in retained}
        self.states = {name: (shape, types[name]) for name, shape in shapes.items() if name in retained}

    def run(
        self, inputs: Mapping[str, Array], states: Mapping[str, ort.OrtValue], spare: Mapping[str, ort.OrtValue]
    ) -> dict[str, Array]:
        """Run once: states are read from `states` and written to `spare`."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._results:  # bound first, so that they come first in `get_outputs`
            binding.bind_output(name)
        for name in self.states:
            binding.bind_ortvalue_input(name, states[name])
            binding.bind_ortvalue_output(name + Resident.SUFFIX, spare[name])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises several private types
            reason = str(error).splitlines()[0]
            raise PackageError(
                f"ONNX Runtime fails to run {self._model} ({reason}): compile the model again"
            ) from error
        values = binding.get_outputs()[: len(self._results)]
        return {name: cast("Array", value.numpy()) for name, value in zip(self._results, values, strict=True)}


def _static(model: Path, item: Specialization, name: str, shape: Sequence[int | str | None]) -> tuple[int, ...]:
    """The shape, all of whose symbols the specialization must have fixed."""
    free = [d for d in shape if not isinstance(d, int)]
    if free:
        raise PackageError(f"{name} of {model} has the dimension '{free[0]}', which {item.name} does not fix")
    return tuple(d for d in shape if isinstance(d, int))


def _zeros(shape: Sequence[int], dtype: np.dtype[Any]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=dtype))
