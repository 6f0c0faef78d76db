"""A session on ONNX Runtime: one model for all specializations, states updated in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.module import DimValue, Specialization
from qeff_ir.runtime.session import Array
from qeff_ir.snapshot import load_module


class OrtSession:
    """Runs a package's ``model.onnx``.

    Every state is one buffer that is bound as input and as output: the cache writes change it in place, and nothing is
    copied from step to step. Inputs and logits have buffers of their own for each specialization.

    Args:
        model: The ONNX file.
        threads: Threads of the runtime; its own choice by default.
    """

    def __init__(self, model: Path, *, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        module = load_module(model)
        self._specializations = module.specializations
        fixed = dict(self._specializations[0].symbols)
        del fixed["seq_len"]  # the only symbol that differs between the specializations
        for symbol, size in fixed.items():
            options.add_free_dimension_override_by_name(symbol, size)
        try:
            self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises several private types
            raise PackageError(f"ONNX Runtime cannot load {model}: {str(error).splitlines()[0]}") from error
        self._states = {
            s.output: (s.input, ort.OrtValue.ortvalue_from_numpy(_zeros(s.shape, fixed))) for s in module.states
        }
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
        if set(inputs) != {"input_ids", "position_ids"}:
            raise RuntimeInputError(f"the inputs are input_ids and position_ids, not {', '.join(sorted(inputs))}")
        binding = self._bindings.get(inputs["input_ids"].shape)
        if binding is None or inputs["position_ids"].shape != inputs["input_ids"].shape:
            allowed = " or ".join(str(list(shape)) for shape in self._bindings)
            raise RuntimeInputError(
                f"input_ids {list(inputs['input_ids'].shape)} and position_ids {list(inputs['position_ids'].shape)} "
                f"are not of a compiled shape: {allowed}"
            )
        binding.values["input_ids"].update_inplace(inputs["input_ids"])
        binding.values["position_ids"].update_inplace(inputs["position_ids"])
        self._session.run_with_iobinding(binding.io)
        return {"logits": binding.values["logits"].numpy().copy()}

    def reset(self) -> None:
        """Set all states to zero."""
        for _, value in self._states.values():
            value.update_inplace(np.zeros(value.shape(), dtype=np.float32))

    def _bind(self, shape: list[int], vocab: int) -> _Binding:
        io = self._session.io_binding()
        values = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.int64)),
            "position_ids": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.int64)),
            "logits": ort.OrtValue.ortvalue_from_numpy(np.zeros((shape[0], 1, vocab), dtype=np.float32)),
        }
        io.bind_ortvalue_input("input_ids", values["input_ids"])
        io.bind_ortvalue_input("position_ids", values["position_ids"])
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


def _zeros(shape: Sequence[DimValue], symbols: Mapping[str, int]) -> Array:
    return np.zeros([symbols[d] if isinstance(d, str) else d for d in shape], dtype=np.float32)
