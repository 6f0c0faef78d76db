"""What the manager checks after a pass, by level: structure and promises; then types, properties, truthfulness."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

import qeff_ir.passing.properties as properties
from qeff_ir.errors import PassError, VerificationError
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.printer import bodies, interface, output_line, structure, to_text
from qeff_ir.ir.verifier import broken, verify
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.hiding import LARGE, hidden_weights
from qeff_ir.passing.report import Missed, site_name
from qeff_ir.ranges import stored_in

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
        level: 0 nothing; 1 the rules of the IR, the contract (interface, weights, bodies of ops) and the expectation;
            2 also types and shapes, properties, reported rewrites and idempotence (and the manager sees passes that
            undo each other); 3 also that the text form survives saving.

    Raises:
        VerificationError, PassError: The first check that does not hold.
    """
    if level >= 1:
        verify(transition.after)
        _check_interface(transition)
        _check_bodies(transition)
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
    before, after = interface(run.before), interface(run.after)
    if run.item.changes_interface or before == after:
        return
    before = _as_found(before, run)
    if before == after:
        return
    gone, new = [x for x in before if x not in after], [x for x in after if x not in before]
    parts = [f"'{found[0]}' {what}" for found, what in ((gone, "is gone"), (new, "is new")) if found]
    changed = "; ".join(parts) or "its order is another"
    hint = "set changes_interface = True on the pass if it is meant to"
    raise VerificationError("contract", f"the pass changed the interface: {changed}", hint=hint)


def _as_found(before: list[str], run: Transition) -> list[str]:
    """The interface with the sizes of outputs that the pass found, where they were open: no other interface.

    Open is a shape or a size that is not given, and one whose name belongs to outputs alone.
    """
    old, new = run.before.graph, run.after.graph
    if len(old.outputs) != len(new.outputs):
        return before
    named = {name for v in old.inputs for d in v.shape or () if isinstance(name := _size(d), str)}
    pairs = zip(old.outputs, new.outputs, strict=True)
    kept = before[: len(before) - len(old.outputs)]
    return kept + [output_line(now if _refines(now, was, named) else was) for was, now in pairs]


def _refines(now: ir.Value, was: ir.Value, named: Collection[str]) -> bool:
    """Whether an output is of the type that it was, in all that this type did not leave open."""
    if (now.name, now.dtype) != (was.name, was.dtype) or now.shape is None:
        return False
    if was.shape is None:
        return True
    sizes = [(_size(new), _size(old)) for new, old in zip(now.shape, was.shape, strict=False)]
    kept = all(new == old or (new is not None and not isinstance(old, int) and old not in named) for new, old in sizes)
    return kept and len(now.shape) == len(was.shape)


def _size(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _check_bodies(run: Transition) -> None:
    """What an op means does not depend on the pass that looks at it."""
    before, after = bodies(run.before), bodies(run.after)
    changed = next((name for name, body in before.items() if after.get(name, body) != body), None)
    if changed is not None:
        hint = "rewrite nodes of the main graph, and write another op where another meaning is wanted"
        raise VerificationError("contract", f"the pass changed the body of the op {changed}", hint=hint)


def _check_weights(run: Transition) -> None:
    """Weights stay the very tensors that they were: none copied, altered, untied, swapped, or lost."""
    if run.item.changes_weights:
        return
    folds = run.item.folds_constants
    before, after = _stored(run.before, weights_only=folds), _stored(run.after, weights_only=folds)
    known = {storage for storage, _ in before.values()}
    for name, (storage, size) in after.items():
        if storage not in known or (name in before and storage != before[name][0]):
            what = "is no longer the tensor that it was" if name in before else f"is new, with {size} bytes"
            raise VerificationError("contract", f"'{name}' {what}, although the pass does not declare changes_weights")
    kept = {storage for storage, _ in after.values()}
    lost = {name for name, (storage, _) in before.items() if storage not in kept}
    if lost:
        swept = run.before.clone()
        common.RemoveUnusedNodesPass()(swept.model)  # what reaches no output may go
        lost &= swept.graph.initializers.keys()
        for name in before:
            if name in lost:
                raise VerificationError(
                    "contract", f"'{name}' is gone, although the pass does not declare changes_weights"
                )


def same_weights(before: Module, after: Module) -> bool:
    """Whether all weights are the tensors that they were; the text form only names them."""
    return _stored(before, weights_only=False) == _stored(after, weights_only=False)


def _stored(module: Module, *, weights_only: bool) -> dict[str, tuple[object, int]]:
    """Storage and bytes of every initializer that is a weight, or as large as one unless `weights_only`."""
    return {
        name: (_storage(tensor), tensor.nbytes)
        for name, value in module.graph.initializers.items()
        if (tensor := value.const_value) is not None
        and (WEIGHT_KEY in value.metadata_props or (tensor.nbytes > LARGE and not weights_only))
    }


def _storage(tensor: TensorProtocol) -> object:
    return stored_in(tensor) or id(tensor)


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
    """Sites that the pass's finder still finds after it ran, and that it did not change in place.

    Raises:
        PassError: It says of a node that it changed it in place which is none of the sites that it found before.
    """
    strange = sorted(site_name(node) for node in run.rewriter.done.difference(run.sites))
    if strange:
        raise PassError(f"it says that it has changed {strange[0]} in place, which its 'sites' did not find before")
    return [node for node in run.item.sites(run.after) if node not in run.rewriter.done]


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
            message = f"'{info.name}' is declared {value.dtype.name} but is {name}"
            raise _misdeclared(module, message, value)
        if value.shape is None or not kind.HasField("shape"):
            continue
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        stated = [d if isinstance(d, int) else None for d in value.shape]
        if len(sizes) != len(stated) or any(
            a is not None and b is not None and a != b for a, b in zip(sizes, stated, strict=True)
        ):
            message = f"'{info.name}' is declared {value.shape} but has the sizes {sizes}"
            raise _misdeclared(module, message, value)


def _misdeclared(module: Module, message: str, value: ir.Value) -> VerificationError:
    hint = "give a new node the shape and dtype of what it makes, or none: rewriter.replace then takes the old value's"
    return broken(module, "types", message, value.producer() or "", f"%{value.name}", hint=hint)


def _check_properties(run: Transition) -> None:
    if run.rewriter.refused:
        return
    for name in sorted(run.after.properties):
        problem = properties.problem(name, run.after)
        if problem is None:
            continue
        if name in run.item.established():
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
    for one, other in itertools.zip_longest(before, to_text(saved).splitlines(), fillvalue=""):
        if one != other:
            raise VerificationError("text", f"saving changes the line '{one}' to '{other}'")


def _proto(module: Module) -> onnx.ModelProto:
    """The model as saved, with the weights as inputs, so that no weight is read."""
    clone = module.clone()
    with hidden_weights(clone.graph):
        return ir.to_proto(clone.model)
