"""The `onnxruntime` backend: standard ops, caches in place, any CPU."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from backends.base import Backend
from backends.options import CompileOptions
from qeff_ir.errors import CompileError
from qeff_ir.ir.module import Module
from qeff_ir.ir.snapshot import MODEL_FILE, load_both, save_module
from qeff_ir.runtime.session import Session


class OnnxRuntimeBackend(Backend):
    """Emits one ONNX file that takes every specialization; there is nothing to compile ahead of time."""

    name: ClassVar[str] = "onnxruntime"
    title: ClassVar[str] = "this CPU"
    runner: ClassVar[str] = "ONNX Runtime"
    lengths_behind: ClassVar[str] = "ort-attention"
    pipeline: ClassVar[str] = (
        "canonicalize,unflatten,fuse-norms,fuse-rotary,fuse-activations,last-logits,image-merge,"
        "kv-retention{layout=tensor-scatter},attention{impl=standard},ort-attention,ort-rotary,"
        "ort-matmul-nbits,ort-kernels"
    )

    def missing(self, options: CompileOptions | None = None) -> str | None:
        """Nothing: ONNX Runtime is a dependency."""
        return None

    def check(self, module: Module, options: CompileOptions) -> None:
        """Refuse what the passes did not lower.

        Raises:
            CompileError: A state has no physical layout.
        """
        if "states-lowered" not in module.properties:
            raise CompileError("the caches have no physical layout: put kv-retention into the pipeline")

    def emit(self, module: Module, folder: Path, options: CompileOptions) -> None:
        """Write ``model.onnx``, weights by reference."""
        save_module(module, folder)

    def compile(self, folder: Path, options: CompileOptions) -> None:
        """Nothing: the runtime compiles when a session opens."""

    def open(self, folder: Path, *, threads: int | None = None) -> Session:
        """Open a session on a package.

        Raises:
            PackageError: ONNX Runtime cannot load the model.
        """
        from backends.onnxruntime.forward_session import OrtForwardSession
        from backends.onnxruntime.session import OrtSession

        model = self.model_file(folder)
        module, content = load_both(model)
        return (OrtSession if module.states else OrtForwardSession)(model, content, module, threads=threads)

    def model_file(self, folder: Path) -> Path:
        """``model.onnx``; what is wrong with it, opening says."""
        return folder / MODEL_FILE


BACKEND = OnnxRuntimeBackend()
