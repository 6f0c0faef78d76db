"""A session on ONNX Runtime for a model that retains nothing: one model for inputs of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime as ort

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError
from qeff_ir.ir.module import Module, Specialization


class OrtForwardSession:
    """Runs a package's ``model.onnx`` once for each call.

    Args:
        model: The ONNX file.
        module: What it holds.
        threads: Threads of the runtime; its own choice by default.
    """

    free = True

    def __init__(self, model: Path, module: Module, *, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises several private types
            raise PackageError(f"ONNX Runtime cannot load {model}: {str(error).splitlines()[0]}") from error
        self._specializations = module.specializations
        self._outputs = [o.name for o in self._session.get_outputs()]

    @property
    def specializations(self) -> Sequence[Specialization]:
        """See `qeff_ir.runtime.session.ForwardSession`."""
        return self._specializations

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `qeff_ir.runtime.session.ForwardSession.run`."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))  # pyright: ignore[reportReturnType]
