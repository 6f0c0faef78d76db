"""From the words of a user to a model or a package, with a live line while it takes time."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from qeff_ir.cli.request import Request
from qeff_ir.cli.terminal import quiet_transformers, show, working
from qeff_ir.errors import ModelLoadError, PackageError, RuntimeInputError
from qeff_ir.reading import path_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qeff_ir.compiler import Compiled
    from qeff_ir.frontend.source import Source
    from qeff_ir.ir.module import Module
    from qeff_ir.package import Manifest
    from qeff_ir.passing.manager import PassRun

STEPS = {
    "weights": "Reading the weight files",
    "lower": "Lowering the model to ONNX",
    "emit": "Writing the package",
    "compile": "Running the target's compiler",
}
"""What is shown while a step runs."""


def open_model(name: str, request: Request) -> Source:
    """Open a model folder, a hub id or a GGUF file.

    Raises:
        ModelLoadError: There is no such model, or it cannot be read.
    """
    from qeff_ir.package import is_package

    folder = path_of(name, "the model")
    if is_package(folder):
        raise ModelLoadError(f"{name} is a compiled package: give the model that it was made from")
    with working(f"Opening {name}"):
        from qeff_ir.frontend.source import open_source

        source = open_source(folder if folder.is_dir() else name, trust_remote_code=request.trust_remote_code)
        quiet_transformers()
    return source


def refuse_options(name: str | Path, given: Collection[str]) -> None:
    """Refuse options of compiling beside a package.

    Args:
        name: The package.
        given: The options that the user gave, by Python names.

    Raises:
        PackageError: There are some.
    """
    if given:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in given)
        raise PackageError(f"{name} is compiled already: leave out {options}, or give the model instead of the package")


def compile_source(source: Source, request: Request, out: Path | None = None, *, announce: bool = True) -> Compiled:
    """Compile a model; first say for which target and why, if that is to be announced.

    Raises:
        QeffError: See `qeff_ir.compiler.compile_model`.
    """
    from qeff_ir.compiler import compile_model

    with compiling(request, announce=announce) as rest:
        return compile_model(source, request.options(), out=out, token_embedding=request.token_embedding, **rest)


@contextlib.contextmanager
def compiling(request: Request, *, announce: bool = True) -> Generator[dict[str, Any]]:
    """A block that compiles: say for which target and why, and show each step while it runs.

    Yields:
        The arguments ``target``, ``pipeline``, ``emit_only`` and ``watch`` of whatever compiles.

    Raises:
        CompileError: No target can compile here.
    """
    from qeff_ir.compiler import choose_target

    target, why = choose_target(request.target)
    if announce:
        show(Text(why, style="dim"))
    with working(STEPS["weights"]) as say:

        def watch(step: str, run: PassRun | None) -> None:
            if run is None:
                say(STEPS.get(step, f"Running the pass {step}"))

        yield {"target": target, "pipeline": request.pipeline, "emit_only": request.emit_only, "watch": watch}


def program_module(package: Path, manifest: Manifest, program: str) -> Module:
    """The graph of a program of a package, without functions.

    Raises:
        PackageError: There is no such program.
    """
    from onnx_ir.passes.common import InlinePass

    from backends import find_backend, load_passes
    from qeff_ir.ir import operators
    from qeff_ir.ir.snapshot import load_module
    from qeff_ir.package import program_folder

    if program not in manifest.programs:
        raise PackageError(f"{package} has no program '{program}': it has {', '.join(manifest.programs)}")
    module = load_module(find_backend(manifest.target).model_file(program_folder(package, program)))
    load_passes()  # and the targets' operators with them
    for key in [key for key in module.model.functions if key[:2] in operators.known()]:
        del module.model.functions[key]
    InlinePass()(module.model)  # layers that are functions
    return module


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or of a package's.

    Raises:
        RuntimeInputError: There is none, or it cannot be read.
    """
    from qeff_ir.side_files import read_tokenizer

    quiet_transformers()
    return read_tokenizer(folder, RuntimeInputError)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        RuntimeInputError: A prompt is not Unicode, or has no token.
    """
    from qeff_ir.runtime import texts

    return [texts.encode(tokenizer, text) for text in texts.as_texts(prompts)]
