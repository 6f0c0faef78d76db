"""From a lowered program of a model to a session, as the compiler does it, without a package."""

from __future__ import annotations

from pathlib import Path

from backends import find_backend
from backends.options import CompileOptions
from qeff_ir.ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.session import Session
from qeff_ir.specialize import specialize


def compiled(
    module: Module, target: str, folder: Path, options: CompileOptions, graph_name: str = "Embedding"
) -> Session:
    """A session over one program.

    Args:
        module: It stays unchanged.
        target: The backend's name.
        folder: Where its files go; it need not exist.
        options: Its shapes.
        graph_name: As `qeff_ir.frontend.tasks.Task.graph_name`, of a program without states.
    """
    backend, lowered = find_backend(target), module.clone()
    specialize(lowered, options, graph_name)
    run_pipeline(lowered, Pipeline.parse(backend.pipeline))
    backend.check(lowered, options)
    backend.emit(lowered, folder, options)
    return backend.open(folder, threads=1)
