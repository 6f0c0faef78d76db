"""A target: packages that run in ONNX's own reference evaluator, operator by operator in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import InlinePass

from backends.base import Backend
from backends.options import CompileOptions
from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.ir.module import Module, Specialization
from qeff_ir.ir.residents import DimValue
from qeff_ir.ir.snapshot import MODEL_FILE, load_module, save_module
from qeff_ir.runtime.interface import interface_of, sized


class ReferenceSession:
    """Runs a package's ``model.onnx``; states are arrays that go round.

    Args:
        model: The ONNX file.
    """

    def __init__(self, model: Path) -> None:
        module = load_module(model)
        self.interface, self._specializations = interface_of(module, model), module.specializations
        self.free = not module.states
        # Inlined: the evaluator loses an attribute that a function hands to a branch of an If.
        whole = ir.from_proto(onnx.load(str(model)))
        InlinePass()(whole)
        self._evaluator: Any = ReferenceEvaluator(ir.to_proto(whole))
        self._states = [r for r in module.residents if not r.written_by_host]
        self._names = [*(p.name for p in self.interface.outputs), *(s.output for s in self._states)]
        self._kept = {r.input: self._zeros(r.shape) for r in module.residents}

    @property
    def specializations(self) -> Sequence[Specialization]:
        """The static shapes that `run` takes."""
        return self._specializations

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `qeff_ir.runtime.session.Session.run`."""
        names = [port.name for port in self.interface.inputs]
        if set(inputs) != set(names):
            raise RuntimeInputError(f"the inputs are {' and '.join(names)}, not {', '.join(sorted(inputs))}")
        shapes = [inputs[name].shape for name in names]
        known = [[sized(port, s.symbols) for port in self.interface.inputs] for s in self._specializations]
        if not self.free and shapes not in known:
            raise RuntimeInputError(f"{shapes} are not of a compiled shape: {known}")
        found = dict(zip(self._names, self._evaluator.run(self._names, {**inputs, **self._kept}), strict=True))
        self._kept |= {state.input: found.pop(state.output) for state in self._states}
        return found

    def write(self, name: str, data: Array, slot: int | None = None) -> None:
        """See `qeff_ir.runtime.session.Session.write`."""
        self._kept[name][... if slot is None else slot] = data

    def reset(self) -> None:
        """Set all states to zero."""
        self._kept |= {state.input: self._zeros(state.shape) for state in self._states}

    def _zeros(self, shape: Sequence[DimValue]) -> Array:
        symbols = self._specializations[0].symbols
        return np.zeros([symbols[d] if isinstance(d, str) else d for d in shape], np.float32)


class ReferenceBackend(Backend):
    """Emits one ONNX file; the operators of our dialect bring their bodies along."""

    name: ClassVar[str] = "reference"
    title: ClassVar[str] = "ONNX's reference evaluator"
    runner: ClassVar[str] = "the reference evaluator"
    priority: ClassVar[int] = -1
    pipeline: ClassVar[str] = "canonicalize,unflatten,fuse-norms,fuse-activations,last-logits,attention{impl=standard}"

    def missing(self, options: CompileOptions | None = None) -> str | None:
        """Nothing: it comes with ONNX."""
        return None

    def check(self, module: Module, options: CompileOptions) -> None:
        """Nothing: it runs any module."""

    def emit(self, module: Module, folder: Path, options: CompileOptions) -> None:
        """Write ``model.onnx``."""
        save_module(module, folder)

    def compile(self, folder: Path, options: CompileOptions) -> None:
        """Nothing to compile."""

    def model_file(self, folder: Path) -> Path:
        """``model.onnx``."""
        return folder / MODEL_FILE

    def open(self, folder: Path, *, threads: int | None = None) -> ReferenceSession:
        """Open a session on a package."""
        return ReferenceSession(self.model_file(folder))


BACKEND = ReferenceBackend()
