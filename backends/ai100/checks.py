"""What the AI 100 compiler refuses, found on the IR, where the Hugging Face module is still known (contract §13)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir

from backends.ai100.options import Ai100Options
from backends.ai100.sdk import Sdk
from backends.ai100.violation import Violation
from qeff_ir.ir import dialect, operators
from qeff_ir.ir.module import WEIGHT_KEY, Module, all_values
from qeff_ir.ir.ports import (
    ACCEPTED,
    ADAPTER_ROW,
    CACHE_ROW,
    DRAW,
    EMBEDDED,
    EMBEDDINGS,
    FEATURES,
    FEATURES_MASK,
    FIRST_ROW,
    KEPT_LOGITS,
    LOGITS,
    NEXT_ROW,
    NEXT_TOKENS,
    POSITIONS,
    PROBABILITIES,
    READ_LENGTH,
    ROWS_OUTPUT,
    TOKEN_KINDS,
    TOKENS,
    name_of,
)
from qeff_ir.ir.sources import source_text

_FP16_MAX = 65504.0
_LOWERED = {"states-lowered": "kv-retention", "attention-lowered": "attention", "legal": "legalize"}
"""Properties that a module needs, and the passes that establish them."""

_CONSTANT_IN_FUNCTIONS = {
    "Range": ((1, "limit"),),
    "ReduceSum": ((1, "axes"),),
    "ConstantOfShape": ((0, "shape"),),
    "Slice": ((1, "start"), (2, "end"), (3, "axes")),
}
"""Inputs that must be constants inside functions, because the compiler compiles a function by itself."""


_BESIDE_POSITIONS = (FIRST_ROW, *TOKEN_KINDS, FEATURES_MASK)
"""Roles of what is given beside the positions, for pictures (contract §1.8) and for what an encoder sees."""


def violations(module: Module, options: Ai100Options, sdk: Sdk) -> Iterator[Violation]:
    """Everything in a lowered module and its options that the compiler would refuse, options first."""
    yield from option_violations(options, sdk)
    for name, by in _LOWERED.items():
        if name not in module.properties:
            yield Violation("lowered", f"the module is not {name}: put {by} into the pipeline")
    yield from _specializations(module)
    yield from _states(module)
    opset = module.model.opset_imports.get("")
    if opset != sdk.opset:
        yield Violation(
            "opset", f"the graph is in opset {opset}, SDK {sdk.version} takes {sdk.opset}: set it in legalize"
        )
    known = {(domain, name) for domain, names in sdk.ops.items() for name in names}
    own = [f for f in module.model.functions.values() if (f.domain, f.name) not in known]
    calls = known | {(f.domain, f.name) for f in own}
    for node in ir.traversal.RecursiveGraphIterator(module.graph):
        yield from _node(node, calls, sdk)
    for function in own:
        operator = operators.known().get((function.domain, function.name))
        if operator is not None and operator.rule is None and function.domain != dialect.DOMAIN:
            yield Violation(
                "op-rule",
                f"nothing says how the device runs {function.domain}::{function.name}: define it with a rule, its body "
                "if that is all",
            )
    for function in own:  # the compiler does not look into the bodies of the ops that it knows
        for node in ir.traversal.RecursiveGraphIterator(function.graph):
            yield from _node(node, calls, sdk, inside=function.name)
    yield from _types(module, {*sdk.types, *(["BFLOAT16"] if options.dtype == "bfloat16" else [])})
    yield from _constants(module)
    yield from _size(module, sdk)
    encoder = any(module.role_of(value) is ROWS_OUTPUT for value in module.graph.outputs)
    if options.mxint8_kv_cache and not module.states and not encoder:  # the cache is its language model's
        yield Violation("kv-cache", f"{module.name} has no KV cache to compress: leave out mxint8_kv_cache")


def option_violations(options: Ai100Options, sdk: Sdk) -> Iterator[Violation]:
    """What is wrong with the options alone, flags apart."""
    if not 1 <= options.num_cores <= sdk.limits.cores:
        yield Violation("cores", f"num_cores is {options.num_cores}: a device has 1 to {sdk.limits.cores}")
    if not 1 <= options.num_devices <= sdk.limits.devices:
        yield Violation("devices", f"num_devices is {options.num_devices}: give 1 to {sdk.limits.devices}")
    if options.prefill_seq_len > options.ctx_len:
        yield Violation(
            "context",
            f"prefill_seq_len is {options.prefill_seq_len}, more than the {options.ctx_len} slots of the cache: "
            "lower it, or raise ctx_len",
        )


def dtype_violations(options: Ai100Options, hardware: str) -> Iterator[Violation]:
    """What the hardware cannot compute in (contract §0: the AI 100 has no bfloat16)."""
    if options.dtype == "bfloat16" and hardware != "ai200":
        yield Violation(
            "dtype",
            f"dtype is bfloat16, which {hardware} does not compute in: give dtype='float16', or aic_hw_version='ai200' "
            "for a card that does",
        )


def _specializations(module: Module) -> Iterator[Violation]:
    if not module.specializations:
        yield Violation("specializations", "there is no specialization: set the module's specializations")
    seen: dict[tuple[tuple[str, int], ...], str] = {}
    for item in module.specializations:
        key = tuple(sorted(item.symbols.items()))
        if key in seen:
            yield Violation("duplicate-specialization", f"{item.name} has the same sizes as {seen[key]}: drop one")
        seen[key] = item.name
    for value in module.graph.inputs:
        for dim in value.shape.dims if value.shape is not None else ():
            if isinstance(dim, int):
                continue
            for item in module.specializations:
                if dim.value not in item.symbols:
                    yield Violation(
                        "symbol", f"input {value.name} has the dimension '{dim}', which {item.name} gives no size"
                    )


def _states(module: Module) -> Iterator[Violation]:
    inputs = {v.name for v in module.graph.inputs}
    outputs = {v.name for v in module.graph.outputs}
    for state in module.states:
        for name, names, kind in ((state.input, inputs, "input"), (state.output, outputs, "output")):
            if name not in names:
                yield Violation("state-pair", f"layer {state.layer} has no {kind} named {name}: keep both of a state")
    if not module.states:  # a forward pass: its inputs and outputs are the model's own
        return
    roles = [module.role_of(v) for v in module.graph.inputs]
    tokens = [name_of(role) for role in (EMBEDDINGS, TOKENS) if role in roles] or [name_of(TOKENS)]
    rows = [name_of(role) for role in (READ_LENGTH, CACHE_ROW, KEPT_LOGITS) if role in roles]
    rows += [name_of(ADAPTER_ROW)] if ADAPTER_ROW in roles else []
    shared = [r for r in module.residents if r.shared and not r.last]
    own = [r for r in module.residents if not r.shared or r.last]
    beside = [str(v.name) for v, role in zip(module.graph.inputs, roles, strict=True) if role in _BESIDE_POSITIONS]
    features = [str(v.name) for v, role in zip(module.graph.inputs, roles, strict=True) if role is FEATURES]
    expected = [*features, *tokens, *(s.input for s in shared), name_of(POSITIONS), *beside]
    expected += [r.input for r in own if r.part is None and not r.last]
    expected += [*rows, *_draws(module), *(r.input for r in own if r.part is not None)]
    if not all(r.retained for r in module.residents):
        yield Violation("state-pair", "adapters must be retained: put lora{retained=true} into the pipeline")
    elif [v.name for v in module.graph.inputs] != expected:
        yield Violation("inputs", f"the inputs must be {', '.join(expected[:4])}, ... in this order")
    given_back = [str(v.name) for v in module.graph.outputs if module.role_of(v) is NEXT_ROW]
    embeds = EMBEDDED in [v.name for v in module.graph.outputs]
    answers = [name_of(role) for role in (PROBABILITIES, NEXT_TOKENS) if module.find(role) is not None]
    answers = answers or [EMBEDDED if embeds else name_of(LOGITS)]
    expected = [*answers, *(s.output for s in shared), *given_back]
    expected += [r.output for r in own]
    if [v.name for v in module.graph.outputs] != expected:
        yield Violation("outputs", f"the outputs must be {', '.join(expected[:3])}, ... in this order")


def _draws(module: Module) -> list[str]:
    """What a draw is given, in order (contract §1.3)."""
    if module.find(NEXT_TOKENS) is None:
        return []
    tables = [r.input for r in module.residents if r.last]
    names = [name_of(role) for role in DRAW if module.find(role) is not None]
    return [name_of(ACCEPTED), *tables[:1], *names[:1], *tables[1:], *names[1:]]


def _node(node: ir.Node, calls: set[tuple[str, str]], sdk: Sdk, inside: str | None = None) -> Iterator[Violation]:
    where = _where(node)
    if (node.domain, node.op_type) not in calls:
        if "Sequence" in node.op_type:
            yield Violation("sequence-op", f"{node.op_type} in {where} makes a sequence: compute on one tensor instead")
        else:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            yield Violation("op", f"{name} in {where} is not an operator of SDK {sdk.version}: lower it by a pass")
    if node.op_type == "Trilu" and len(node.inputs) > 1 and not _is_constant(node.inputs[1]):
        yield Violation("trilu-diagonal", f"Trilu in {where} computes its diagonal: build the mask from position_ids")
    for index, name in _CONSTANT_IN_FUNCTIONS.get(node.op_type, ()) if inside is not None else ():
        if index < len(node.inputs) and not _is_constant(node.inputs[index]):
            yield Violation(
                "function-constant",
                f"{node.op_type} in {where} computes its {name} inside the function {inside}: "
                "keep it in the main graph",
            )


def _types(module: Module, known: Collection[str]) -> Iterator[Violation]:
    for value in all_values(module.graph):
        if value.dtype is not None and value.dtype.name not in known:
            maker = value.producer()
            where = _where(maker) if maker is not None else f"'{value.name}'"
            yield Violation("type", f"{where} has a tensor of type {value.dtype.name}, which the device does not have")


def _constants(module: Module) -> Iterator[Violation]:
    for value in module.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or WEIGHT_KEY in value.metadata_props or not tensor.dtype.is_floating_point():
            continue
        if tensor.dtype == ir.DataType.BFLOAT16:  # not converted
            continue
        numbers = tensor.numpy()
        if bool(np.any((numbers > _FP16_MAX) | ((numbers < -_FP16_MAX) & ~np.isneginf(numbers)))):
            users = value.consumers()
            where = _where(users[0]) if users else f"'{value.name}'"
            yield Violation(
                "fp16-range", f"a constant of {where} exceeds half precision: put fp16-clip into the pipeline"
            )


def _size(module: Module, sdk: Sdk) -> Iterator[Violation]:
    """The ONNX file holds what nodes carry as attributes; initializers of any size go to files of their own."""
    held = sum(
        attribute.as_tensor().nbytes
        for node in ir.traversal.RecursiveGraphIterator(module.graph)
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()
    )
    if held > sdk.limits.protobuf_bytes:
        yield Violation("protobuf-size", f"the constants inside nodes take {held} bytes: make them initializers")


def _where(node: ir.Node) -> str:
    return source_text(node) or "the model itself"


def _is_constant(value: ir.Value | None) -> bool:
    if value is None or value.const_value is not None:
        return True
    maker = value.producer()
    return maker is not None and maker.op_type == "Constant"
