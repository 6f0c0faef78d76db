"""A session on ONNX Runtime for a model that retains nothing: one model for inputs of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime as ort

from backends.onnxruntime.session import FOLDED
from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.module import Module, Specialization
from qeff_ir.runtime.interface import interface_of


class OrtForwardSession:
    """Runs a package's ``model.onnx`` once for each call.

    Args:
        model: The ONNX file.
        content: Its bytes.
        module: What they say.
        threads: Threads of the runtime; its own choice by default.
    """

    free = True

    def __init__(self, model: Path, content: bytes, module: Module, *, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(model.parent.resolve())
        )
        options.add_session_config_entry(*FOLDED)
        try:
            self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises several private types
            raise PackageError(f"ONNX Runtime cannot load {model}: {str(error).splitlines()[0]}") from error
        self.interface = interface_of(module, model)
        self._specializations = module.specializations
        self._outputs = [port.name for port in self.interface.outputs]

    @property
    def specializations(self) -> Sequence[Specialization]:
        """See `qeff_ir.runtime.session.Session`."""
        return self._specializations

    def write(self, name: str, data: Array, slot: int | None = None) -> None:
        """Nothing is kept that could be written.

        Raises:
            RuntimeInputError: Always.
        """
        raise RuntimeInputError(f"the session keeps no {name}: the model was compiled without adapters")

    def reset(self) -> None:
        """Nothing is kept."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `qeff_ir.runtime.session.Session.run`."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))  # pyright: ignore[reportReturnType]
