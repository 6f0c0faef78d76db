"""Run any module on one trace: chunked prefill of unequal prompts, then decode steps and a draft, states carried over.

A module is driven by what it says of itself: its states are fed back, its dims take the sizes of its specializations or
small ones, whatever a pass did to the shape of a cache or to the logits. A graph that is not a decoder (a plain ONNX
file) is run once on random inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.ir import operators
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.ports import EMBEDDINGS, LOGITS, NEXT_TOKENS, POSITIONS, TOKENS, Port, Run
from qeff_ir.ir.snapshot import save_module
from qeff_ir.passing.base import registered_passes
from qeff_ir.runtime.interface import BATCH
from qeff_ir.runtime.runs import fitted, last
from qeff_ir.runtime.token_table import TokenTable

SMALL = {"batch_size": 2, "seq_len": 4, "ctx_len": 24}
"""Sizes of the dims of a module without specializations."""
_OTHER = 3
_FORMULA = re.compile(r"[A-Za-z_]\w{0,60}(?: ?[-+*] ?(?:[A-Za-z_]\w{0,60}|\d{1,6})){1,8}")
"""A dim that is computed of others, as exporters write them: ``past_sequence_length + sequence_length``."""
_DECODE_STEPS = 3
_DRAFT = 2
"""Tokens of the last run, of which all logits are asked for: a graph may verify drafts."""
_MOST_CHUNKS = 64
"""Chunks of a prefill that fills the context; a longer context is not filled, as each pass is driven."""
_SHOWN = 8
_MAX_ELEMENTS = 1 << 31


@dataclass(frozen=True)
class Plan:
    """What is fed, the same for every module that is compared.

    Attributes:
        sizes: A size for each symbol that was known when the plan was made.
        runs: The runs of a decoder, in order; none for another graph.
        inputs: The inputs of another graph, by name, for its one run.
        tables: Weights of the module that the plan was made for, by parameter: a pass may leave the look-up of the
            tokens to the host.
        vectors: The vector of each token, ``[vocab, hidden]``, for a module that took vectors when the plan was made.
    """

    sizes: Mapping[str, int]
    runs: Sequence[Run] = ()
    inputs: Mapping[str, Array] = field(default_factory=dict[str, Array])
    tables: Mapping[str, ir.TensorProtocol] = field(default_factory=dict[str, ir.TensorProtocol])
    vectors: Array | None = None


@dataclass(frozen=True)
class Answers:
    """What a module answered.

    Attributes:
        outputs: Outputs of each run by name; of a decoder, ``logits`` of each row's last real token.
        drafts: Of each run of a decoder, the logits of the tokens before the last of each of these rows that it asks
            for, ``[rows, keep - 1, vocab]``; `None` where the graph does not return them.
        first_feeds: All inputs of the first run.
        first_outputs: All outputs of the first run, as the graph gives them.
    """

    outputs: list[dict[str, Array]]
    drafts: list[Array | None]
    first_feeds: dict[str, Array]
    first_outputs: dict[str, Array]


def sizes_of(module: Module) -> dict[str, int]:
    """A size for each dim: that of the longest specialization, else a small one."""
    found = {name: SMALL.get(name, _OTHER) for name in module.dims if not _FORMULA.fullmatch(name)}
    found = {n: size if (top := module.dims[n].maximum) is None else min(size, top) for n, size in found.items()}
    longest = max(module.specializations, key=lambda s: s.symbols.get("seq_len", 0), default=None)
    return found | (dict(longest.symbols) if longest is not None else {})


def make_plan(module: Module, seed: int = 0) -> Plan:
    """The trace for a module and all that passes make of it.

    The first row fills the caches to the last slot, past a turn of every ring that is shorter, unless the context is
    longer than `_MOST_CHUNKS` chunks.
    """
    sizes, random = sizes_of(module), np.random.default_rng(seed)
    if not is_decoder(module):
        feeds = {v.name or "": _random(v, sizes, random) for v in module.graph.inputs}
        return Plan(sizes, inputs=feeds)
    vocabulary = module.port(LOGITS).shape
    last = vocabulary[-1] if vocabulary is not None else None
    if not isinstance(last, int):
        raise RuntimeInputError(f"the logits of {module.name} have no fixed width: no token can be drawn")
    (batch, chunk), room = _dims(module.port(POSITIONS), sizes), _room(module, sizes)
    rows = max((s.symbols.get(BATCH, batch) for s in module.specializations), default=batch)
    alone = batch < rows  # a prefill run is of one request, a decode run of all
    draft = _DRAFT if not alone and chunk >= _DRAFT and room > _DRAFT + _DECODE_STEPS else 0
    steps = min(_DECODE_STEPS, room - draft - 1)
    fills = -(-room // chunk) <= _MOST_CHUNKS
    longest = room if fills else chunk + chunk // 2 + 1
    wanted = itertools.cycle((longest, max(1, chunk // 3), 2 * chunk))
    prompts = [random.integers(0, last, min(n, room - draft - steps)) for n in itertools.islice(wanted, rows)]
    groups = [[row] for row in range(rows)] if alone else [list(range(rows))]
    runs = [run for group in groups for run in _prefill([prompts[row] for row in group], chunk, group)]
    for step in range(steps):
        positions = np.array([[len(p) + step] for p in prompts], dtype=np.int64)
        runs.append(Run(random.integers(0, last, (rows, 1)), positions))
    if draft:
        positions = np.array([[len(p) + steps + i for i in range(draft)] for p in prompts], dtype=np.int64)
        runs.append(Run(random.integers(0, last, (rows, draft)), positions, keep=draft))
    embeds, vectors = module.find(EMBEDDINGS), None
    if embeds is not None:
        vectors = random.standard_normal((last, _dims(embeds, sizes)[-1])).astype(np.float32)
    return Plan(sizes, runs, tables=tables_of(module), vectors=vectors)


def tables_of(module: Module) -> dict[str, ir.TensorProtocol]:
    """The weights of a module, by parameter: what a host has that looks up the tokens itself."""
    return {
        v.metadata_props[WEIGHT_KEY]: v.const_value
        for v in module.graph.initializers.values()
        if WEIGHT_KEY in v.metadata_props and v.const_value is not None
    }


def is_decoder(module: Module) -> bool:
    """Whether a module is a decoder with its inputs and its output: ports without states are not enough."""
    roles = [module.role_of(v) for v in module.graph.inputs]
    positions = module.find(POSITIONS)
    takes_tokens = (
        positions is not None and len(positions.shape or ()) == 2 and (TOKENS in roles or EMBEDDINGS in roles)
    )
    return bool(module.states) and takes_tokens and module.find(LOGITS) is not None


def _room(module: Module, sizes: Mapping[str, int]) -> int:
    """Tokens that fit the caches."""
    slots = [_size(s.ctx_dim, sizes) for s in module.states if s.has_slots and not s.ring]
    return sizes.get("ctx_len") or min(slots, default=SMALL["ctx_len"])


class Step(NamedTuple):
    """One run of a module.

    Attributes:
        run: Of a decoder, in the shapes of a specialization; `None` for another graph.
        feeds: All inputs.
        result: All outputs, as the graph gives them.
    """

    run: Run | None
    feeds: dict[str, Array]
    result: dict[str, Array]


def drive(module: Module, plan: Plan) -> Answers:
    """Run a module on a trace, ONNX Runtime's own rewriting off, so that only the passes are judged.

    Raises:
        RuntimeInputError: ONNX Runtime cannot load or run the graph, or no specialization takes a run.
    """
    outputs: list[dict[str, Array]] = []
    drafts: list[Array | None] = []
    first: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
    for number, (run, feeds, result) in enumerate(driven(module, plan)):
        first = first if number else (feeds, result)
        logits, draft = (result, None) if run is None else _answers(module, result, run)
        outputs.append(logits)
        drafts.append(draft)
    return Answers(outputs, drafts, *first)


def driven(module: Module, plan: Plan) -> Iterator[Step]:
    """The runs of `drive`, one by one.

    Raises:
        RuntimeInputError: ONNX Runtime cannot load or run the graph.
    """
    sizes = {**plan.sizes, **sizes_of(module)} if plan.runs else plan.sizes
    kept = {**sizes, BATCH: max(len(run.tokens) for run in plan.runs)} if plan.runs else sizes
    with tempfile.TemporaryDirectory(prefix="qeff-drive-") as folder:
        session = _open(module, Path(folder))
        states = {s.input: _zeros(s.shape, kept, s.dtype) for s in module.states}
        of_run = {s.input for s in module.states if plan.runs and s.shape[0] == BATCH}
        others = {v.name or "": v for v in module.graph.inputs if v.name not in states}
        names = [v.name or "" for v in module.graph.outputs]
        lost = next((s.output for s in module.states if s.output not in names), None)
        if lost is not None:
            raise RuntimeInputError(f"{module.name} has a state without its output '{lost}': it cannot be run")
        embed = _embed(module, plan) if plan.runs else None
        for asked in plan.runs or [None]:
            run = None if asked is None else _fitted(module, dataclasses.replace(asked, embed=embed))
            feeds = plan.inputs if run is None else {p.name: p.feed(run) for p in _ports(module) if p.is_fed}
            own = {name: feeds[name] if name in feeds else _zeros_of(v, sizes) for name, v in others.items()}
            rows = slice(None) if run is None else run.cache_rows
            all_feeds = {**own, **{name: state[rows] if name in of_run else state for name, state in states.items()}}
            try:
                values = session.run(names, all_feeds)
            except Exception as error:  # ONNX Runtime raises several private types
                raise RuntimeInputError(
                    f"ONNX Runtime cannot run {module.name}: {_first_line(error)}{_chosen(module, sizes)}"
                ) from error
            result: dict[str, Any] = dict(zip(names, values, strict=True))
            strange = next((name for name, value in result.items() if not _is_numbers(value)), None)
            if strange is not None:
                raise RuntimeInputError(
                    f"the output '{strange}' of {module.name} is not a tensor of numbers, so that it cannot be "
                    "compared: check on a lower level"
                )
            for state in module.states:
                if state.input in of_run:
                    states[state.input][rows] = result[state.output]
                else:
                    states[state.input] = result[state.output]
            yield Step(run, all_feeds, result)


def _ports(module: Module) -> list[Port]:
    """The inputs with roles, by which they are given what they take."""
    given = [(v, role) for v in module.graph.inputs if (role := module.role_of(v)) is not None]
    dims = [[d if isinstance(d, int) else d.value for d in v.shape or ()] for v, _ in given]
    return [Port(str(v.name), r, _dtype(v).numpy(), tuple(s)) for (v, r), s in zip(given, dims, strict=True)]


def _fitted(module: Module, run: Run) -> Run:
    """The run in the shapes of a specialization, or as it is before there are any.

    A specialization that returns fewer logits than the run asks for is given it for the last ones.

    Raises:
        RuntimeInputError: No specialization takes it.
    """
    if not module.specializations:
        return run
    ports = _ports(module)
    try:
        return fitted(run, ports, module.specializations)
    except RuntimeInputError:
        if run.keep == 1:
            raise
        return fitted(dataclasses.replace(run, keep=1), ports, module.specializations)


def _embed(module: Module, plan: Plan) -> Callable[[Array], Array] | None:
    """Where to look up the vectors of tokens, for a graph that takes them."""
    vectors, embeds = plan.vectors, module.find(EMBEDDINGS)
    if vectors is not None:
        return lambda ids: vectors[ids]
    if embeds is None or WEIGHT_KEY not in embeds.metadata_props:
        return None
    name = embeds.metadata_props[WEIGHT_KEY]
    if name not in plan.tables:
        raise RuntimeInputError(f"{module.name} takes vectors of the table '{name}', which the trace does not have")
    return TokenTable(plan.tables[name]).vectors


def _answers(module: Module, result: Mapping[str, Array], run: Run) -> tuple[dict[str, Array], Array | None]:
    """The logits of the last real token of each row that has one, and those of the tokens before it.

    Raises:
        RuntimeInputError: The graph draws tokens, and returns none.
    """
    if module.find(NEXT_TOKENS) is not None:
        raise RuntimeInputError(
            f"{module.name} returns tokens that it draws, and no logits to compare: check on a lower level"
        )
    name = str(module.port(LOGITS).name)
    logits = last(result[name], run)[(run.positions >= 0).any(axis=1)]
    return {name: logits[:, -1]}, logits[:, :-1] if 1 < run.keep <= result[name].shape[1] else None


def _prefill(prompts: Sequence[Array], chunk: int, rows: Sequence[int]) -> list[Run]:
    """Runs of one chunk each, which continue these rows of the caches.

    All rows end in the last run, shorter ones are padding before (position -1).
    """
    chunks = -(-max(map(len, prompts)) // chunk)
    ids = np.zeros((len(prompts), chunks * chunk), dtype=np.int64)
    positions = np.full_like(ids, -1)
    for row, tokens in enumerate(prompts):
        start = (chunks - -(-len(tokens) // chunk)) * chunk
        ids[row, start : start + len(tokens)] = tokens
        positions[row, start : start + len(tokens)] = np.arange(len(tokens))
    starts = range(0, chunks * chunk, chunk)
    at = np.array(rows, dtype=np.int64)
    return [Run(ids[:, start : start + chunk], positions[:, start : start + chunk], cache_rows=at) for start in starts]


def _open(module: Module, folder: Path) -> ort.InferenceSession:
    """A session on a snapshot, operators of devices as the devices run them."""
    path = save_module(module, folder, prefer_links=True)
    proto = onnx.load(str(path), load_external_data=False)
    registered_passes()  # imports the operators of targets and plug-ins
    operators.give_rules(proto)
    del proto.graph.value_info[
        :
    ]  # a pass may leave the shape of an inner value behind the times; the runtime infers it
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1  # sums in the same order every time
    options.log_severity_level = 4  # what cannot be run is raised, and told once
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises several private types
        raise RuntimeInputError(f"ONNX Runtime cannot load {module.name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _chosen(module: Module, sizes: Mapping[str, int]) -> str:
    """The sizes that were chosen for dims that the module leaves open, as a clause."""
    chosen = [] if module.states else [f"{name}={_size(name, sizes)}" for name in [*module.dims][:_SHOWN]]
    return f" (on random inputs of {', '.join(chosen)})" if chosen else ""


def _is_numbers(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind not in "OSU"  # pyright: ignore[reportUnknownMemberType]


def _dims(value: ir.Value, sizes: Mapping[str, int]) -> list[int]:
    return [_size(d if isinstance(d, int) else d.value or "", sizes) for d in value.shape or ()]


def _size(dim: str | int, sizes: Mapping[str, int]) -> int:
    """The size of a dim; a sum or a product of others is computed."""
    if isinstance(dim, int):
        return dim if dim >= 0 else _OTHER
    if dim in sizes:
        return sizes[dim]
    if not _FORMULA.fullmatch(dim):
        return _OTHER
    symbol = ir.SymbolicDim(dim)
    found = symbol.evaluate({name: sizes.get(name, _OTHER) for name in symbol.free_symbols()})
    return max(found, 1) if isinstance(found, int) else _OTHER


def _dtype(value: ir.Value) -> ir.DataType:
    return value.dtype or ir.DataType.FLOAT


def _zeros(shape: Sequence[str | int], sizes: Mapping[str, int], dtype: ir.DataType) -> Array:
    return np.zeros(_possible([_size(d, sizes) for d in shape]), dtype=dtype.numpy())


def _zeros_of(value: ir.Value, sizes: Mapping[str, int]) -> Array:
    return np.zeros(_possible(_dims(value, sizes)), dtype=_dtype(value).numpy())


def _possible(shape: list[int]) -> list[int]:
    """The shape of a tensor that memory may hold."""
    if math.prod(shape) > _MAX_ELEMENTS:
        raise RuntimeInputError(f"an input of the shape {shape} is too large to be made up: give smaller sizes")
    return shape


def _random(value: ir.Value, sizes: Mapping[str, int], random: np.random.Generator) -> Array:
    """Numbers for an input of unknown meaning: normal ones, or small integers that any table can be indexed by."""
    dtype, shape = _dtype(value), _dims(value, sizes)
    if not isinstance(value.type, ir.TensorType) or dtype == ir.DataType.STRING:
        raise RuntimeInputError(f"the input '{value.name}' is not a tensor of numbers: no example can be drawn for it")
    numbers = random.standard_normal(_possible(shape)) if dtype.is_floating_point() else random.integers(0, 2, shape)
    return np.asarray(numbers).astype(dtype.numpy())
