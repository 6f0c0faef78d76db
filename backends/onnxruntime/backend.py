"""The `onnxruntime` backend: standard ops, caches in place, any CPU."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from backends.base import Backend
from backends.onnxruntime.options import OnnxRuntimeOptions
from backends.options import CompileOptions
from qeff_ir.errors import CompileError
from qeff_ir.ir.baked import save_names
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import CROSSING, ROWS_OUTPUT
from qeff_ir.ir.snapshot import MODEL_FILE, load_both, save_module
from qeff_ir.passing.pipeline import Pipeline
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
        "fuse-products,ort-packed-attention,ort-matmul-nbits,ort-kernels"
    )
    rounds_caches: ClassVar[bool] = True
    Options: ClassVar[type[CompileOptions]] = OnnxRuntimeOptions

    def missing(self, options: CompileOptions | None = None) -> str | None:
        """Nothing: ONNX Runtime is a dependency."""
        return None

    def check_options(self, options: CompileOptions) -> None:
        """Refuse levels that the products do not have.

        Raises:
            CompileError: ``matmul_level`` is another number than 0 and 4.
        """
        level = _level(options)
        if level not in (0, 4):
            raise CompileError(f"matmul_level={level} is no level of the products: give 0 (exact) or 4 (fast)")

    def asked(self, pipeline: Pipeline, options: CompileOptions) -> Pipeline:
        """See `Backend.asked`: the level of products, and the pass that keeps caches in 8 bits."""
        level = _level(options)
        if level:
            pipeline = pipeline.with_options("ort-matmul-nbits", level=level)
        return pipeline.insert_after("kv-retention", "kv-cache") if options.mxint8_kv_cache else pipeline

    def check(self, module: Module, options: CompileOptions) -> None:
        """Refuse what the passes did not lower, and options that do nothing for a decoder.

        Raises:
            CompileError: A state has no physical layout; or there are no weights of few bits to multiply with, or no
                caches to round.
        """
        rounded = any(state.dtype == ir.DataType.INT8 for state in module.states)
        if options.mxint8_kv_cache and module.states and not rounded:
            raise CompileError(
                f"mxint8_kv_cache is for caches of keys and values, of which {module.name} has none that can be "
                "rounded: leave it out"
            )
        encodes = any(module.role_of(value) in (ROWS_OUTPUT, CROSSING) for value in module.graph.outputs)
        multiplies = any(node.op_type == "MatMulNBits" for node in module.graph)
        if _level(options) and not multiplies and not encodes:  # an encoder is beside a decoder, which is looked at
            raise CompileError(
                f"matmul_level={_level(options)} is for products with weights of few bits, of which {module.name} has "
                'none: leave it out, or round the weights (pipeline="+quantize-weights{bits=4}")'
            )
        if "states-lowered" not in module.properties:
            raise CompileError("the caches have no physical layout: put kv-retention into the pipeline")

    def emit(self, module: Module, folder: Path, options: CompileOptions) -> None:
        """Write ``model.onnx``, weights by reference, and the numbers of adapters that are weights."""
        save_module(module, folder)
        save_names(module, folder)

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


def _level(options: CompileOptions) -> int:
    """``matmul_level``, which options of every target do not have."""
    return options.matmul_level if isinstance(options, OnnxRuntimeOptions) else 0


BACKEND = OnnxRuntimeBackend()
