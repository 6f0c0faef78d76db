"""The way from a transformers model to a decoder that runs: the one place that knows how this is done."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from backends.onnxruntime.backend import BACKEND
from backends.options import CompileOptions
from qeff_ir.frontend.checkpoint.weights import Weights
from qeff_ir.frontend.export.lower import lower
from qeff_ir.ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.specialize import specialize


def lowered(model: PreTrainedModel, weights: Weights) -> Module:
    """The module of a model as the frontend makes it."""
    return lower(model, weights)


def emit(module: Module, options: CompileOptions, folder: Path, *, edits: str = "") -> None:
    """Compile a lowered module for ONNX Runtime into `folder`, in place.

    Args:
        module: The module.
        options: Its sizes.
        folder: Gets the package.
        edits: Of the backend's own pipeline, as ``qeff compile --pipeline`` takes them.
    """
    own = Pipeline.parse(BACKEND.pipeline)
    specialize(module, options)
    run_pipeline(module, Pipeline.parse(edits, own) if edits else own)
    BACKEND.emit(module, folder, options)


def opened(folder: Path, threads: int) -> Decoder:
    """A decoder on an emitted package."""
    return Decoder(BACKEND.open(folder, threads=threads))
