"""From a model to a package: lower, run the target's pipeline, check, emit, compile, seal; cached by all it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from backends import find_backend, preferred
from backends.base import Backend
from backends.options import DECODER, CompileOptions
from qeff_ir import quantized, widening
from qeff_ir.cache_key import input_digests, package_key, refuse_changes
from qeff_ir.errors import CompileError, PackageError
from qeff_ir.frontend.source import Source
from qeff_ir.home import cache_root
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.ports import EMBEDDINGS
from qeff_ir.package import (
    MAIN,
    SIDE_FOLDER,
    Manifest,
    ProgramRecord,
    TableRecord,
    building,
    is_package,
    open_package,
    program_folder,
    read_manifest,
    seal,
)
from qeff_ir.passing.manager import PassRun, Report, run_pipeline
from qeff_ir.passing.pipeline import Pipeline, nearest
from qeff_ir.ranges import numbers_digest
from qeff_ir.reading import plain_name
from qeff_ir.replacement import disk_errors, put_right
from qeff_ir.requested_passes import with_requested
from qeff_ir.sharing import together
from qeff_ir.specialize import keep_phases, specialize
from qeff_ir.target_options import as_given, read_options

Pipelines = Pipeline | str | Mapping[str, Pipeline | str] | None
"""What a caller may give as a pipeline, see `compile_model`."""

Watch = Callable[[str, PassRun | None], None]
"""Called with the name of each step before it starts, and again with the result when it was a pass."""

TokenEmbedding = Literal["graph", "host"]
"""Who looks up the vectors of the tokens."""


@dataclass(frozen=True)
class Compiled:
    """The result of `compile_model`.

    Attributes:
        folder: The package.
        manifest: What the package says of itself.
        cached: Whether the package was there already.
    """

    folder: Path
    manifest: Manifest
    cached: bool


def choose_target(target: str) -> tuple[str, str]:
    """Resolve ``auto``: the target with the highest priority that nothing is missing for.

    Returns:
        The target's name, and a sentence that says why.
    """
    if target != "auto":
        return target, f"target {target}, as asked"
    reasons: list[str] = []
    for name in preferred():
        missing = find_backend(name).missing()
        if missing is None:
            return name, f"target {name}: {'; '.join(reasons) or 'its compiler is installed'}"
        reasons.append(missing)
    raise CompileError(f"there is no target that can compile here: {'; '.join(reasons)}")


def chosen(given: Pipeline | str | None, own: Pipeline) -> Pipeline:
    """The pipeline that a caller asks for: another one, or the text of edits, instead of the `own` one.

    Raises:
        PipelineError: The text cannot be read.
    """
    return given if isinstance(given, Pipeline) else Pipeline.parse(given, own) if given else own


def compile_model(
    source: Source,
    options: CompileOptions | Mapping[str, Any],
    *,
    target: str = "auto",
    out: Path | None = None,
    pipeline: Pipelines = None,
    edits: str = "",
    token_embedding: TokenEmbedding = "graph",
    emit_only: bool = False,
    watch: Watch | None = None,
) -> Compiled:
    """Compile a model into a package: each of its programs (`Source.programs`) is lowered, run through the target's
    pipeline, checked, emitted and compiled.

    Args:
        source: The model.
        options: Shapes, and what the target takes beside them, also by name (`qeff_ir.target_options.read_options`).
        target: ``auto``, or the name of a backend.
        out: Folder of the package; one in the cache (`cache_root`) when not given. An equal package that is there
            already is used as it is.
        pipeline: Another pipeline than the target's own, as a value or a text; a text may be edits of the own one. A
            mapping has one for each program that is to have another.
        edits: Edits of the main program's pipeline, whichever it is.
        token_embedding: ``host``: the pass ``token-embedding`` is added to the main program, whose graph takes vectors,
            and their table stays in the checkpoint.
        emit_only: Stop before the target's compiler, which then need not be installed.
        watch: Told of every step.

    Raises:
        CompileError: The target cannot take the options or the model, is missing, or its compiler failed.
        ModelLoadError, UnsupportedModelError, PipelineError, PassError, PackageError: See there.
    """
    target, _ = choose_target(target)
    backend = find_backend(target)
    options = _read(backend, source, options)
    backend.check_options(options)
    missing = None if emit_only else backend.missing(options)
    if missing is not None:
        raise CompileError(f"{target} cannot compile here: {missing}; pass emit_only=True (--emit-only) to go without")
    tell = watch or (lambda _step, _run: None)
    tell("weights", None)
    programs = _checked(backend.programs(source.programs()))
    steps = pipelines(pipeline, Pipeline.parse(backend.pipeline), list(programs))
    if source.task.retains and not source.task.encodes:
        steps[MAIN] = with_requested(Pipeline.parse(edits, steps[MAIN]) if edits else steps[MAIN], options, backend)
    if token_embedding == "host":
        steps[MAIN] = steps[MAIN].add("token-embedding")
    steps = {name: given.told(asdict(options)) for name, given in steps.items()}
    if options.dtype != "float32":
        steps = {name: given.add(f"dtype{{type={options.dtype}}}") for name, given in steps.items()}
    steps = {name: backend.asked(given, options) for name, given in steps.items()}
    lowered = {} if source.identity() is not None else {name: lower() for name, lower in programs.items()}
    folder = out or cache_root() / _architecture(source)
    with disk_errors(folder):  # the disk of the model, and the one of temporary files
        before = input_digests(source)
        key = package_key(source, lowered, backend, options, steps, emit_only, before)
        folder = out or folder / f"{_architecture(source)}-{key[:16]}"
        found = _cached(folder, key)
        if found is not None:
            return Compiled(folder, found, cached=True)
        with building(folder) as partial:
            found = _cached(folder, key)  # another process may have built it while we waited
            cached = found is not None
            if found is None:
                found = Manifest(backend.name, key, not emit_only, asdict(options), {})
                placed: dict[Path, Path] = {}
                for name, lower in programs.items():
                    if name not in lowered:
                        tell("lower", None)
                    module = lowered.pop(name) if name in lowered else lower()
                    specialize(module, options, source.task.graph_name)
                    report = _build(module, backend, options, steps[name], emit_only, partial, name, placed, tell)
                    found.programs[name] = ProgramRecord(module.name, report)
                    found.tables |= _tables(module, source)
                _save_side_files(source, partial)
                seal(partial, found)
                refuse_changes(before, input_digests(source))
    return Compiled(folder, found, cached=cached)


def _checked(programs: Mapping[str, Callable[[], Module]]) -> dict[str, Callable[[], Module]]:
    """The programs of a source, the main one first.

    Raises:
        PackageError: There is no main one, or a name is not that of a folder of its own.
    """
    if MAIN not in programs:
        raise PackageError(f"the model has the programs {', '.join(programs)}: one of them must be called '{MAIN}'")
    for name in programs:
        program_folder(Path(), name)
    return dict(sorted(programs.items(), key=lambda item: item[0] != MAIN))


def pipelines(given: Pipelines, own: Pipeline, programs: Collection[str]) -> dict[str, Pipeline]:
    """The pipeline of each program, see `chosen`; one alone is for all.

    Raises:
        CompileError: There is one for a program that the model does not have.
        PipelineError: See `chosen`.
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(programs, chosen(given, own))
    unknown = [name for name in given if name not in programs]
    if unknown:
        raise CompileError(f"there is a pipeline for the program '{unknown[0]}'; {nearest(unknown[0], programs)}")
    return {name: chosen(given.get(name), own) for name in programs}


def _build(
    module: Module,
    backend: Backend,
    options: CompileOptions,
    steps: Pipeline,
    emit_only: bool,
    package: Path,
    program: str,
    placed: dict[Path, Path],
    tell: Watch,
) -> dict[str, Any]:
    """Make the files of one program; returns what the passes did."""
    report: Report = run_pipeline(module, steps, tell)
    keep_phases(module, options)
    backend.check(module, options)
    tell("emit", None)
    folder = program_folder(package, program)
    if program != MAIN:
        if os.path.lexists(folder):
            raise PackageError(
                f"a program cannot be called '{program}', as what {backend.name} writes is: choose another name"
            )
        folder.mkdir()
    if options.materialize:
        widening.forget(module.model)
        quantized.forget(module.model)
    with together(placed):  # this alone: who watches may save files elsewhere
        backend.emit(module, folder, options)
    if not emit_only:
        tell("compile", None)
        backend.compile(folder, options)
    return report.to_json()


def _save_side_files(source: Source, package: Path) -> None:
    side = package / SIDE_FOLDER
    side.mkdir()
    source.save_side_files(side)


def _tables(module: Module, source: Source) -> dict[str, TableRecord]:
    """What is known of the table that the graph leaves in the checkpoint, where an input stands for its rows."""
    found: dict[str, TableRecord] = {}
    for value in module.graph.inputs:
        if module.role_of(value) is EMBEDDINGS and (name := value.metadata_props.get(WEIGHT_KEY)) is not None:
            table = source.weights().get(name)
            if table is not None:
                found[name] = table_record(table)
    return found


def table_record(table: ir.TensorProtocol) -> TableRecord:
    """What the manifest says of a table."""
    return TableRecord(tuple(int(d) for d in table.shape.numpy()), numbers_digest(table))


def _read(backend: Backend, source: Source, asked: CompileOptions | Mapping[str, Any]) -> CompileOptions:
    """The options of the target, with the shapes of the source's task."""
    task, given = source.task, as_given(asked) if isinstance(asked, CompileOptions) else asked
    for field in fields(CompileOptions):
        named = field.name in given and (given is asked or given[field.name] != field.default)
        if named and "help" not in field.metadata and field.name not in task.shapes:  # with help, it is no shape
            raise CompileError(
                f"{_architecture(source)} has no option {field.name}: its shapes are {', '.join(task.shapes)}"
            )
    options = read_options(backend, given)
    asks = [f.name for f in fields(CompileOptions) if DECODER in f.metadata and getattr(options, f.name) != f.default]
    if asks and (task.encodes or not task.retains):
        raise CompileError(f"{_architecture(source)} has no option {asks[0]}: it is for models that only decode")
    if options.dtype == "auto":
        options = replace(options, dtype=_own_dtype(source))
    if options.dtype not in backend.dtypes:
        raise CompileError(
            f"{backend.name} computes in {' or '.join(sorted(backend.dtypes))}, not in {options.dtype}: leave dtype "
            "out; weights of 16 bits stay as they are stored all the same"
        )
    if options.materialize and options.dtype != "float32":
        raise CompileError(f"materialize writes float32 weights, and dtype asks for {options.dtype}: leave one out")
    if options.mxint8_kv_cache and not (task.retains and backend.rounds_caches):
        who = backend.name if task.retains else _architecture(source)
        what = "keeps caches as they are" if task.retains else "has no KV cache to compress"
        raise CompileError(f"{who} {what}: leave out mxint8_kv_cache")
    _check_rows(options)
    if not task.retains:
        return options
    if options.ctx_len < options.prefill_seq_len:
        raise CompileError(
            f"ctx_len={options.ctx_len} is less than prefill_seq_len={options.prefill_seq_len}: the context must "
            "hold at least one prefill chunk"
        )
    if getattr(source.config, "is_encoder_decoder", False) and not task.encodes:
        raise CompileError(
            f"{_architecture(source)} is an encoder-decoder model, not a causal LM: open it with "
            "QEFFAutoModelForSeq2SeqLM, or with QEFFAutoModelForSpeechSeq2Seq if it takes recordings"
        )
    return options


def _check_rows(options: CompileOptions) -> None:
    """Refuse numbers of rows that do not fit one another.

    Raises:
        CompileError: They do not.
    """
    requests, rows = options.full_batch_size, options.kv_cache_batch_size
    if requests and options.batch_size != 1:
        raise CompileError(
            f"batch_size={options.batch_size} stands beside full_batch_size={requests}, with which a prefill run is of "
            "one request, and a decode run of all: leave batch_size out"
        )
    if rows and not requests:
        raise CompileError(f"kv_cache_batch_size={rows} is for continuous batching: give full_batch_size too")
    if rows and rows < requests:
        raise CompileError(
            f"kv_cache_batch_size={rows} is less than full_batch_size={requests}, and each request takes a row of the "
            "caches: raise it, or leave it out"
        )


def _own_dtype(source: Source) -> Literal["float32", "float16", "bfloat16"]:
    """The type that a model's configuration names."""
    named = str(getattr(source.config, "dtype", None)).removeprefix("torch.")
    if named == "float16" or named == "bfloat16":
        return named
    if named in ("float32", "None"):
        return "float32"
    raise CompileError(f"config.json says dtype={named}, which no target computes in: give dtype='float16', say")


def _architecture(source: Source) -> str:
    names = source.config.architectures
    return (
        plain_name(names[0], "the model's architecture")
        if names
        else type(source.config).__name__.removesuffix("Config")
    )


def _cached(folder: Path, key: str) -> Manifest | None:
    """The package in `folder`, if it is whole and was made from just this."""
    put_right(folder)
    try:
        return open_package(folder) if is_package(folder) and read_manifest(folder).key == key else None
    except PackageError:
        return None  # damaged or of another version: it is built anew
