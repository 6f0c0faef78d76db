"""What the manager checks after a pass, by level: structure and promises; then types, properties, truthfulness."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from qeff_ir.errors import PassError, VerificationError
from qeff_ir.module import WEIGHT_KEY, Module
from qeff_ir.passing import properties
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.hiding import LARGE, hidden_weights
from qeff_ir.passing.report import Missed, site_name
from qeff_ir.printer import structure, to_text
from qeff_ir.storage import file_range
from qeff_ir.verifier import verify

if TYPE_CHECKING:
    from onnx_ir import TensorProtocol


@dataclasses.dataclass(frozen=True)
class Transition:
    """One run of a pass: what the checks look at.

    Attributes:
        item: The pass.
        before: A clone of the module, made before it ran.
        after: The module.
        rewriter: What the pass reported.
        sites: Sites that the pass's finder found before it ran.
    """

    item: Pass
    before: Module
    after: Module
    rewriter: Rewriter
    sites: list[ir.Node]


def check(transition: Transition, level: int) -> None:
    """Check a pass that has just run.

    Args:
        transition: The run.
        level: 0 nothing; 1 the rules of the IR, the interface contract and the expectation; 2 also types and shapes,
            properties, reported rewrites and idempotence; 3 also that the text form survives saving.

    Raises:
        VerificationError, PassError: The first check that does not hold.
    """
    if level >= 1:
        verify(transition.after)
        _check_interface(transition)
        _check_weights(transition)
        _check_expectation(transition)
    if level >= 2:
        _check_types(transition.after)
        _check_properties(transition)
        _check_reported(transition)
        _check_idempotence(transition)
    if level >= 3:
        _check_text(transition.after)


def _check_interface(run: Transition) -> None:
    before, after = _interface(run.before), _interface(run.after)
    if not run.item.changes_interface and before != after:
        changed = sorted(map(str, set(before) ^ set(after)))
        raise VerificationError(
            "contract", f"the interface changed although the pass does not declare it: {', '.join(changed[:4])}"
        )


def _interface(module: Module) -> list[tuple[str, ...]]:
    values = [("input", v) for v in module.graph.inputs] + [("output", v) for v in module.graph.outputs]
    return [
        *((kind, v.name or "", str(v.dtype), str(v.shape)) for kind, v in values),
        *(("state", str(s)) for s in module.states),
    ]


def _check_weights(run: Transition) -> None:
    """Weights stay the very tensors that they were: none copied, altered, untied, or lost."""
    if run.item.changes_weights:
        return
    before, after = _stored(run.before), _stored(run.after)
    for name, (storage, size) in after.items():
        if storage not in {s for s, _ in before.values()}:
            what = "is no longer the tensor that it was" if name in before else f"is new, with {size} bytes"
            raise VerificationError("contract", f"'{name}' {what}, although the pass does not declare changes_weights")
    lost = sorted({s for s, _ in before.values()} - {s for s, _ in after.values()}, key=str)
    if lost:
        name = next(n for n, (s, _) in before.items() if s == lost[0])
        raise VerificationError("contract", f"'{name}' is gone, although the pass does not declare changes_weights")


def _stored(module: Module) -> dict[str, tuple[object, int]]:
    """Storage and bytes of every initializer that is a weight, or as large as one."""
    return {
        name: (_storage(tensor), tensor.nbytes)
        for name, value in module.graph.initializers.items()
        if (tensor := value.const_value) is not None and (WEIGHT_KEY in value.metadata_props or tensor.nbytes > LARGE)
    }


def _storage(tensor: TensorProtocol) -> object:
    return file_range(tensor) or id(tensor)


def _check_expectation(run: Transition) -> None:
    if run.rewriter.refused:
        return  # only a part of the rewrites was asked for
    left = missed_sites(run)
    done = len(run.sites) - len(left) if finds_sites(run.item) else run.rewriter.count
    missed = _reasons(run, left)
    problem = run.item.expect.problem(run.before, max(done, 0), len(missed))
    if problem is not None:
        raise PassError("\n  ".join([problem + (":" if missed else ""), *map(str, missed)]))
    known = {m.node for m in run.rewriter.stats.missed}
    run.rewriter.stats.missed += [m for m in missed if m.node not in known]


def finds_sites(item: Pass) -> bool:
    """Whether a pass has a site finder of its own."""
    return type(item).sites is not Pass.sites


def missed_sites(run: Transition) -> list[ir.Node]:
    """Sites that the pass's finder still finds after it ran."""
    return run.item.sites(run.after)


def _reasons(run: Transition, left: list[ir.Node]) -> list[Missed]:
    """Why each site is left: what the pass said, or what its pattern says now."""
    said = {m.node: m for m in run.rewriter.stats.missed}
    found = [said.pop(site_name(n), None) or run.item.explain(run.after, n) for n in left]
    return found if finds_sites(run.item) else [*found, *said.values()]


def _check_types(module: Module) -> None:
    """Types and sizes that the operators imply agree with those that values declare."""
    declared = {v.name: v for node in module.graph for v in node.outputs}
    proto = _proto(module)
    del proto.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        said = " ".join(str(error).split())
        raise VerificationError("types", f"shape inference refuses the graph: {said}") from error
    for info in inferred.graph.value_info:
        value, kind = declared.get(info.name), info.type.tensor_type
        if value is None:
            continue
        if value.dtype is not None and kind.elem_type and value.dtype != kind.elem_type:
            name = ir.DataType(kind.elem_type).name
            raise VerificationError("types", f"'{info.name}' is declared {value.dtype.name} but is {name}")
        if value.shape is None or not kind.HasField("shape"):
            continue
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        stated = [d if isinstance(d, int) else None for d in value.shape]
        if len(sizes) != len(stated) or any(
            a is not None and b is not None and a != b for a, b in zip(sizes, stated, strict=True)
        ):
            raise VerificationError("types", f"'{info.name}' is declared {value.shape} but has the sizes {sizes}")


def _check_properties(run: Transition) -> None:
    if run.rewriter.refused:
        return
    for name in sorted(run.after.properties):
        problem = properties.problem(name, run.after)
        if problem is None:
            continue
        if name in run.item.establishes:
            raise PassError(f"it declares that it establishes '{name}', but {problem}")
        if properties.problem(name, run.before) is None:
            raise PassError(f"it destroys '{name}' without declaring that it invalidates it: {problem}")


def _check_reported(run: Transition) -> None:
    if run.rewriter.count == 0 and structure(run.before) != structure(run.after):
        raise PassError("it changed the graph without reporting a rewrite, so it cannot be bisected")


def _check_idempotence(run: Transition) -> None:
    if not run.item.idempotent or run.rewriter.refused:
        return
    again = run.after.clone()
    run.item.run(again, Rewriter(again, run.rewriter.pass_id))
    if structure(again) != structure(run.after):
        raise PassError("it is declared idempotent, but a second run changes the graph again")


def _check_text(module: Module) -> None:
    """Everything that the text form shows survives saving, weights aside, which are only named."""
    clone = module.clone()
    with hidden_weights(clone.graph):
        before = to_text(clone).splitlines()
    saved = dataclasses.replace(module, model=ir.from_proto(_proto(module)))
    for one, other in zip(before, to_text(saved).splitlines(), strict=False):
        if one != other:
            raise VerificationError("text", f"saving changes the line '{one}' to '{other}'")


def _proto(module: Module) -> onnx.ModelProto:
    """The model as saved, with the weights as inputs, so that no weight is read."""
    clone = module.clone()
    with hidden_weights(clone.graph):
        return ir.to_proto(clone.model)
