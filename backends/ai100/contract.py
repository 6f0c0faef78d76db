"""Check an emitted folder against the AI 100 contract, offline and without the IR.

The folder is read as the compiler will read it: the ONNX file through onnx and onnx-graphsurgeon, the rest as text. So
what is wrong in the writing, and not only in the IR, is found too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from backends.ai100 import specializations, weight_free
from backends.ai100.artifact import model_file
from backends.ai100.contract_adapters import adapters
from backends.ai100.contract_encoders import (
    CROSSED,
    FEATURES,
    SEEN,
    SUFFIX,
    encoder_interface,
    runs_of_encoder,
    written_once,
)
from backends.ai100.contract_nbits import NATIVE, nbits
from backends.ai100.contract_pictures import (
    BESIDE,
    NEXT,
    PIXELS,
    ROWS,
    language_interface,
    runs_of_pixels,
    vision_interface,
)
from backends.ai100.contract_rows import rows_of_caches
from backends.ai100.contract_runs import RUN_INPUTS, one_prefix, run_interface, sizes_of_runs
from backends.ai100.contract_sampling import DRAWS, TABLES, draw_interface, drawn
from backends.ai100.contract_weights import bound_weights, weight_files
from backends.ai100.emit import COMMAND, CUSTOM_IO
from backends.ai100.qnn.contract import violations as qnn_violations
from backends.ai100.sdk import Sdk, description
from backends.ai100.violation import Violation, refuse_first
from qeff_ir.errors import PackageError
from qeff_ir.reading import read_bytes, read_json

_EMBEDS = "inputs_embeds"
# Written out again: this module checks what the others make, and shares no names with them.
_WHOLE = ("conv_state", "recurrent_state")
_STEMS = ("past_key", "past_value", "past_indexer", *CROSSED, *_WHOLE)
"""Names of retained states, before the number of the layer, in the order of a layer (contract §1.1 and §1.6)."""
_STATE = re.compile(rf"({'|'.join(_STEMS)})\.(0|[1-9]\d*)(?:\.([1-9]\d*))?(?:_([A-Za-z0-9]+))?")
_EMBEDDED = "embedding_output"
"""What stands in the place of the logits of an embedding model (§1.9)."""
_ADAPTER = re.compile(r"\.lora_(A|B|a|b|bias|embedding)")
_ENTRY = re.compile(r" - IOName: (\S+)\n   Precision: (\S+)\n\n")
_PRECISIONS = frozenset({"float16", "bfloat16", "mxint8"})


def check(folder: Path) -> None:
    """Refuse a folder that breaks the contract.

    Raises:
        CompileError: With the code and the sentence of the first violation.
    """
    refuse_first(violations(folder))


def violations(folder: Path) -> Iterator[Violation]:
    """Everything in an emitted folder that breaks the contract of the SDK that it was made for."""
    missing = [n for n in (COMMAND, specializations.FILE) if not (folder / n).is_file()]
    for name in missing:
        yield Violation("file", f"{folder} has no {name}: emit the package again")
    try:
        model = model_file(folder)
    except PackageError as error:
        yield Violation("file", str(error))
        return
    if missing:
        return
    command, recorded = _json(folder / COMMAND), _json(folder / specializations.FILE)
    if not _is_command(command):
        yield Violation("command", f"{COMMAND} has no sdk and no command: emit the package again")
        return
    sdk = description(command["sdk"])
    if not model.is_file():
        yield Violation("file", f"{model.name} is not a regular file: emit the package again")
        return
    if model.stat().st_size > sdk.limits.protobuf_bytes:
        yield Violation("protobuf-size", f"{model.name} exceeds 2 GB: keep weights in files of their own")
        return
    try:
        proto = onnx.load(str(model), load_external_data=False)
        with G_LOGGER.suppress(G_LOGGER.ERROR):  # it says that NumPy has no bfloat16
            graph = gs.import_onnx(proto)
    except Exception as error:  # protobuf and onnx-graphsurgeon raise types of their own
        yield Violation("onnx", f"{model.name} cannot be read ({type(error).__name__}): emit the package again")
        return
    bound: set[str] = set()
    try:
        spec = weight_free.specification(proto)
        if spec is not None:
            bound = {item["name"] for item in spec["inputs"]}
            yield from bound_weights(proto, spec, folder)
    except PackageError as error:
        yield Violation("weight-free", str(error))
    graph.inputs = [tensor for name, tensor in _by_name(graph.inputs).items() if name not in bound]
    yield from _opsets(proto, sdk)
    yield from _ops(graph, sdk)
    yield from _interface(graph)
    yield from written_once(graph)
    yield from adapters(proto, _by_name(graph.inputs), bound, folder)
    yield from _specializations(graph, recorded, sdk)
    retains = _retains(graph)
    listed = retains or ROWS[0] in _by_name(graph.outputs)
    if "commands" in command:
        form = specializations.form_of(recorded)
        sizes = [s.symbols for s in specializations.load(folder / specializations.FILE)] if form is not None else []
        inputs, outputs = _by_name(graph.inputs), _by_name(graph.outputs)
        yield from qnn_violations(command["commands"], model.name, inputs, outputs, sizes, folder)
        yield from weight_files(proto, folder)
        return
    if listed and not (folder / CUSTOM_IO).is_file():
        yield Violation("file", f"{folder} has no {CUSTOM_IO}: emit the package again")
        return
    if listed:
        yield from _custom_io(graph, _text(folder / CUSTOM_IO))
    yield from weight_files(proto, folder)
    as_it_is = _computes_in_bfloat16(proto, bound)
    passed = listed and not (as_it_is and "mxint8" not in _text(folder / CUSTOM_IO))
    yield from _command(
        command["argv"], model.name, folder, sdk, retains=retains, passed=passed, converted=not as_it_is
    )


def _computes_in_bfloat16(proto: onnx.ModelProto, weights: AbstractSet[str]) -> bool:
    """Whether a graph has states in bfloat16 or rounds to it; one that only has its weights so makes them float32.

    `weights`: the inputs that are bound to files of weights.
    """
    inputs = [value for value in proto.graph.input if value.name not in weights]
    nodes = itertools.chain(proto.graph.node, *(function.node for function in proto.functions))
    rounds = (a.i == onnx.TensorProto.BFLOAT16 for n in nodes if n.op_type == "Cast" for a in n.attribute)
    return any(v.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for v in inputs) or any(rounds)


def _is_command(data: Any) -> bool:
    if not isinstance(data, dict):
        return False
    fields = cast("dict[str, Any]", data)
    argv: Any = fields.get("argv", [] if "commands" in fields else None)
    words = isinstance(argv, list) and all(isinstance(word, str) for word in cast("list[object]", argv))
    return words and isinstance(fields.get("sdk"), str)


def _text(path: Path) -> str:
    """A text file; other bytes are shown as what they are not."""
    return read_bytes(path, error=PackageError).decode(errors="replace")


def _json(path: Path) -> Any:
    try:
        return read_json(path, error=PackageError)
    except PackageError:
        return None


def _opsets(proto: onnx.ModelProto, sdk: Sdk) -> Iterator[Violation]:
    versions = {o.domain: o.version for o in proto.opset_import}
    if versions.get("") != sdk.opset:
        yield Violation("opset", f"the graph is in opset {versions.get('')}, SDK {sdk.version} takes {sdk.opset}")
    for domain in sorted({f.domain for f in proto.functions}):
        if domain not in versions:
            yield Violation("opset", f"the model has functions of {domain}, and no opset import of it")


def _ops(graph: gs.Graph, sdk: Sdk) -> Iterator[Violation]:
    known = {(domain, name) for domain, names in sdk.ops.items() for name in names}
    bodies = {(f.domain, f.name): f for f in graph.functions}
    for domain, name in sorted({(n.domain or "", n.op) for n in _nodes(graph)} & known):
        if domain not in ("", NATIVE) and (domain, name) not in bodies:
            yield Violation("function", f"{domain}::{name} has no body: attach the device ops")
    inside = [n for key, body in bodies.items() if key not in known for n in _nodes(body)]
    for node in [*_nodes(graph), *inside]:
        yield from nbits(node)
    for domain, name in sorted({(n.domain or "", n.op) for n in [*_nodes(graph), *inside]} - known - set(bodies)):
        yield Violation("op", f"{domain + '::' if domain else ''}{name} is not an operator of SDK {sdk.version}")


def _nodes(graph: Any) -> Iterator[gs.Node]:
    for node in graph.nodes:
        yield node
        for subgraph in node.subgraphs():
            yield from _nodes(subgraph)


def _by_name(tensors: Sequence[Any]) -> dict[str, Any]:
    """Graph inputs or outputs, in order."""
    return {tensor.name: tensor for tensor in tensors}


def _interface(graph: gs.Graph) -> Iterator[Violation]:
    """Names, order, types and shapes (contract §1.1 and §1.2)."""
    inputs, outputs = _by_name(graph.inputs), _by_name(graph.outputs)
    if _retains(graph):
        yield from _decoder_interface(inputs, outputs)
    else:
        yield from _forward_interface(inputs, outputs)


def _retains(graph: gs.Graph) -> bool:
    """Whether a graph has retained states."""
    names: list[str] = [*_by_name(graph.inputs), *_by_name(graph.outputs)]
    return any(name.endswith(SUFFIX) or _STATE.fullmatch(name) for name in names)


def _forward_interface(inputs: dict[str, Any], outputs: dict[str, Any]) -> Iterator[Violation]:
    """A forward pass: its batch comes first, token ids before their mask, both int64 (§1.10)."""
    if ROWS[0] in outputs:
        yield from vision_interface(inputs, outputs)
        return
    for name, tensor in inputs.items():
        shape = list(tensor.shape or [])
        if not shape or shape[0] != "batch_size":
            yield Violation("dtype-shape", f"{name} is {shape}, not [batch_size, ...]")
        if name in ("input_ids", "attention_mask") and (tensor.dtype != np.int64 or shape != ["batch_size", "seq_len"]):
            yield Violation("dtype-shape", f"{name} is {tensor.dtype} {shape}, not int64 [batch_size, seq_len]")
    names = list(inputs)
    if "input_ids" in names and names[:2] != ["input_ids", "attention_mask"][: len(names)]:
        yield Violation("inputs", "the inputs must start with input_ids, attention_mask")
    if not outputs:
        yield Violation("outputs", "there is no output")


def _decoder_interface(inputs: dict[str, Any], outputs: dict[str, Any]) -> Iterator[Violation]:
    for name in sorted(n for n in outputs if n.endswith(SUFFIX) and n.removesuffix(SUFFIX) not in inputs):
        yield Violation("state-pair", f"output {name} has no input {name.removesuffix(SUFFIX)}")
    features = [n for n in FEATURES if n in inputs]
    given = (_EMBEDS, "input_ids", "position_ids", *RUN_INPUTS, *BESIDE, *features, SEEN, *DRAWS)
    retained = [n for n in inputs if n not in given or n in TABLES]
    adapters = [n for n in retained if _ADAPTER.search(n)]
    rows = [n for n in (*ROWS, PIXELS) if n in retained]
    states = [n for n in retained if n not in (*adapters, *rows, *TABLES)]
    yield from language_interface(inputs, outputs)
    yield from draw_interface(inputs, outputs)
    for name in retained:
        if name + SUFFIX not in outputs:
            yield Violation("state-pair", f"input {name} has no output {name}{SUFFIX}")
    for name in states:
        if _STATE.fullmatch(name) is None:
            yield Violation("inputs", f"input {name} is no retained state: name it {_STEMS[0]}.<layer>, say")
    expected = sorted((n for n in states if _STATE.fullmatch(n) is not None), key=_order)
    pairs = {n for n in expected if n.startswith(("past_key", "past_value"))}
    for name in sorted(pairs, key=_order):
        other = name.replace("past_key", "past_value") if "key" in name else name.replace("past_value", "past_key")
        if other not in pairs:
            yield Violation("inputs", f"input {name} has no {other} beside it")
    expected += [n for n in (*RUN_INPUTS, *DRAWS) if n in inputs] + adapters
    tokens = [n for n in (_EMBEDS, "input_ids") if n in inputs] or ["input_ids"]
    beside = [n for n in (*BESIDE, SEEN) if n in inputs]
    yield from encoder_interface(inputs, {n: found[1] for n in states if (found := _STATE.fullmatch(n))})
    if list(inputs) != [*features, *tokens, *rows, "position_ids", *beside, *expected]:
        first = ", ".join(tokens)
        yield Violation("inputs", f"the inputs must be {first}, position_ids, past_key.0, past_value.0, ... in order")
    embeds = inputs.get(_EMBEDS)
    if embeds is not None:
        shape = list(embeds.shape or [])
        if embeds.dtype != np.float32 or shape[:2] != ["batch_size", "seq_len"] or len(shape) != 3:
            found = f"{embeds.dtype} {shape}"
            yield Violation("dtype-shape", f"{_EMBEDS} is {found}, not float32 [batch_size, seq_len, hidden]")
    returned = [n.removesuffix(SUFFIX) for n in outputs if n.endswith(SUFFIX)]
    handed = [*(n + SUFFIX for n in rows if n in returned), *([NEXT] if NEXT in outputs else [])]
    returned = [
        *sorted((n for n in returned if _STATE.fullmatch(n) is not None), key=_order),
        *(n for n in TABLES if n in returned),
        *(n for n in adapters if n in returned),
    ]
    first = _EMBEDDED if _EMBEDDED in outputs else "logits"
    if list(outputs) != [*(drawn(outputs) or [first]), *handed, *(name + SUFFIX for name in returned)]:
        yield Violation("outputs", "the outputs must be logits, past_key.0_RetainedState, ... in order")
    for name in ("input_ids", "position_ids", BESIDE[1]):
        tensor = inputs.get(name)
        shapes: list[list[str | int]] = [["batch_size", "seq_len"]]
        if rows and name == "position_ids":
            shapes.append([4, "batch_size", "seq_len"])  # places on further axes (§1.1)
        if tensor is not None and (tensor.dtype != np.int64 or list(tensor.shape) not in shapes):
            yield Violation("dtype-shape", f"{name} is {tensor.dtype} {tensor.shape}, not int64 [batch_size, seq_len]")
    for name, tensor in ((BESIDE[0], inputs.get(BESIDE[0])), (NEXT, outputs.get(NEXT))):
        if tensor is not None and (tensor.dtype != np.int64 or list(tensor.shape) != ["batch_size", 1]):
            yield Violation("dtype-shape", f"{name} is {tensor.dtype} {tensor.shape}, not int64 [batch_size, 1]")
    logits = outputs.get(first)
    if logits is not None:
        shape = list(logits.shape or [])
        kept = RUN_INPUTS["num_logits_to_keep"][0] if "num_logits_to_keep" in inputs else 1
        if logits.dtype != np.float32 or shape[:2] != ["batch_size", kept] or len(shape) != 3:
            yield Violation(
                "dtype-shape", f"{first} is {logits.dtype} {shape}, not float32 [batch_size, {kept}, width]"
            )
    yield from run_interface(inputs)
    yield from one_prefix({n: found[4] for n in states if (found := _STATE.fullmatch(n))})
    batch = "full_batch_size" if "batch_index" in inputs else "batch_size"
    for name in retained:
        before, after = inputs[name], outputs.get(name + SUFFIX)
        shape = list(before.shape or [])
        if name in adapters:
            if not all(isinstance(size, int) for size in shape):
                yield Violation("dtype-shape", f"the adapter {name} is {shape}, not of a fixed size")
        elif name in (*rows, *TABLES):
            pass  # seen to above
        elif name.startswith(_WHOLE):
            if shape[:1] != [batch] or any(isinstance(d, str) for d in shape[1:]):
                yield Violation("dtype-shape", f"{name} is {shape}: only the first axis may vary, and is {batch}")
        elif len(shape) != 4 or shape[0] != batch:
            yield Violation("dtype-shape", f"{name} is {shape}, not [{batch}, heads, slots, width]")
        if after is not None and (before.dtype != after.dtype or shape != list(after.shape or [])):
            yield Violation("state-pair", f"{name} is {before.dtype} {shape}, its output {after.dtype} {after.shape}")


def _order(name: str) -> tuple[int, int, int]:
    """Layer, role and index of a state's name."""
    found = _STATE.fullmatch(name)
    assert found is not None
    return int(found[2]), _STEMS.index(found[1]), int(found[3] or 0)


def _specializations(graph: gs.Graph, recorded: Any, sdk: Sdk) -> Iterator[Violation]:
    form = specializations.form_of(recorded)
    if form != sdk.specializations:
        yield Violation("specializations-form", f"SDK {sdk.version} reads {sdk.specializations} specializations")
        return
    entries: list[dict[str, str]] = [e["symbols"] if form == "named" else e for e in recorded["specializations"]]
    names = [e["name"] for e in recorded["specializations"]] if form == "named" else []
    if len(set(names)) < len(names) or any(e in entries[:i] for i, e in enumerate(entries)):
        yield Violation(
            "duplicate-specialization", "two specializations have the same name or the same sizes: drop one"
        )
    yield from runs_of_encoder(entries)
    yield from runs_of_pixels(graph, entries)
    yield from sizes_of_runs(entries)
    yield from rows_of_caches(graph, entries)
    symbols = {d for t in [*graph.inputs, *graph.outputs] for d in t.shape or [] if d and not isinstance(d, int)}
    for symbol in sorted(symbols, key=str):
        for index, entry in enumerate(entries):
            if symbol not in entry:
                yield Violation("symbol", f"the dimension '{symbol}' has no size in specialization {index}")


def _custom_io(graph: gs.Graph, text: str) -> Iterator[Violation]:
    """Each state is listed as input and as output, in one precision, and nothing else is (§4.3); tables are of bits.

    Of a vision program, everything is listed, in half precision (§1.9).
    """
    entries = dict(_ENTRY.findall(text))
    if _ENTRY.sub("", text) != "" or len(entries) != len(_ENTRY.findall(text)):
        yield Violation("custom-io", f"{CUSTOM_IO} is not a list of one IOName and Precision for each tensor")
    names = {name for name in _by_name(graph.outputs) if name.endswith(SUFFIX)} - {name + SUFFIX for name in TABLES}
    names |= {name.removesuffix(SUFFIX) for name in names}
    heard = {n for n in FEATURES[:2] if names and n in _by_name(graph.inputs)}
    names |= heard
    if not names:
        names = {*_by_name(graph.inputs), *_by_name(graph.outputs)}
    for name in sorted(names ^ set(entries)):
        what = "lacks" if name in names else "has the unknown tensor"
        yield Violation("custom-io", f"{CUSTOM_IO} {what} {name}: it lists every state twice, and nothing else")
    halves = heard & set(entries) | {
        name for name in entries if _ADAPTER.search(name) or name.removesuffix(SUFFIX) in (*ROWS, PIXELS)
    }
    halves |= heard & set(entries)
    if any(entries[name] != "float16" for name in halves):
        yield Violation("custom-io", f"{CUSTOM_IO} has adapters or rows of another precision than float16")
    precisions = {precision for name, precision in entries.items() if name not in halves}
    if len(precisions) > 1 or not precisions <= _PRECISIONS:
        found = ", ".join(sorted(precisions))
        yield Violation("custom-io", f"{CUSTOM_IO} has the precisions {found}: use float16 or mxint8 for all states")


def _command(
    argv: list[str], model: str, folder: Path, sdk: Sdk, *, retains: bool, passed: bool, converted: bool
) -> Iterator[Violation]:
    """The command starts as the SDK wants, names files of the folder only, and asks for retained states where there are
    some (§4.1 and §4.6); bfloat16 is not converted to float16."""
    given: dict[str, str] = {}
    for argument in argv[1:]:
        flag, _, value = argument.removeprefix("-").partition("=")
        given[flag] = value
    head = [sdk.compiler, *sdk.standing_arguments]
    if argv[: len(head)] != head:
        yield Violation("command", f"the command does not start with {' '.join(head)}")
    required = {"m": model, "network-specialization-config": specializations.FILE, "aic-binary-dir": "qpc"}
    if retains:
        required |= {"retained-state": ""}
    if passed:
        required |= {"custom-IO-list-file": CUSTOM_IO}
    if converted != ("convert-to-fp16" in given):
        yield Violation("command", f"the command {'has not' if converted else 'has'} -convert-to-fp16")
    for flag, value in required.items():
        if given.get(flag) != value:
            yield Violation("command", f"the command has not -{flag}{'=' + value if value else ''}")
    if given.get("aic-hw-version") not in sdk.hardware.values():
        yield Violation("command", f"-aic-hw-version is not {' or '.join(sorted(sdk.hardware.values()))}")
    for flag, value in given.items():
        if sdk.flags.get(flag) == "input" and not (folder / value).is_file():
            yield Violation("command", f"-{flag} names {value}, which is not in the folder")
        if sdk.flags.get(flag) in ("input", "output") and PurePosixPath(value).is_absolute():
            yield Violation("command", f"-{flag} names the absolute path {value}: use one inside the folder")
