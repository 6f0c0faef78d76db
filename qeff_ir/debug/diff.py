"""The semantic diff between two modules: what nodes, interface, states and weights became, not which lines moved.

A node is the same node on both sides when it makes the value of the same name with the same operator, or, where a pass
renamed values, when operator, attributes and (renamed) inputs agree. The same node with other inputs or attributes is
*re-wired*.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnx_ir as ir

from qeff_ir.ir.module import PASS_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.printer import attribute_text, to_text, type_text
from qeff_ir.ir.sources import source_text, sources_of

Kind = Literal["added", "removed", "rewired"]
MARKS: dict[Kind, str] = {"added": "+", "removed": "-", "rewired": "~"}
"""How each kind of change is marked in text."""


@dataclass(frozen=True, slots=True)
class NodeChange:
    """One node that differs.

    Attributes:
        kind: What became of it.
        op: Operator, with its domain unless standard.
        name: Name of its first result.
        source: Hugging Face module that it stands for, several as one text; empty when unknown.
        made_by: Pass that made it; empty for the frontend's nodes.
        detail: For a re-wired node, what changed.
        sources: Each Hugging Face module by itself.
    """

    kind: Kind
    op: str
    name: str
    source: str
    made_by: str
    detail: str = ""
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModuleDiff:
    """All that differs between two modules.

    Attributes:
        nodes: Changed nodes: removed ones, then added and re-wired ones in graph order.
        interface: Graph inputs and outputs that differ, one line each.
        facts: Residents, dims, specializations, ports (with their roles) and properties that differ, one line each.
        weights_added: Bytes of each new weight or constant, by name.
        weights_removed: Bytes of each one that is gone.
        node_count: Nodes of the main graph before and after.
        weight_bytes: Bytes of all initializers before and after.
    """

    nodes: tuple[NodeChange, ...]
    interface: tuple[str, ...]
    facts: tuple[str, ...]
    weights_added: dict[str, int]
    weights_removed: dict[str, int]
    node_count: tuple[int, int]
    weight_bytes: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.nodes or self.interface or self.facts or self.weights_added or self.weights_removed)

    def count(self, kind: Kind) -> int:
        """Number of node changes of one kind."""
        return sum(n.kind == kind for n in self.nodes)

    def groups(self) -> dict[tuple[str, str], list[NodeChange]]:
        """Node changes by pass and Hugging Face module, in order of appearance."""
        found: dict[tuple[str, str], list[NodeChange]] = {}
        for change in self.nodes:
            found.setdefault((change.made_by, change.source), []).append(change)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data, for tools."""
        return asdict(self)


def diff(before: Module, after: Module) -> ModuleDiff:
    """Compare two modules, of one pipeline or of two."""
    old, new = _weights(before), _weights(after)
    return ModuleDiff(
        tuple(_node_changes(before.graph, after.graph)),
        tuple(_line_changes(_interface(before), _interface(after))),
        tuple(_line_changes(_facts(before), _facts(after))),
        {n: size for n, size in new.items() if n not in old},
        {n: size for n, size in old.items() if n not in new},
        (len(before.graph), len(after.graph)),
        (sum(old.values()), sum(new.values())),
    )


def render(found: ModuleDiff, *, limit: int = 8) -> list[str]:
    """The diff as lines of text; those of changes begin with ``+``, ``-`` or ``~``.

    Args:
        found: What to show.
        limit: Nodes listed for each pass and Hugging Face module; the rest is counted.
    """
    if not found:
        return ["no difference"]
    (nodes, now), (size, size_now) = found.node_count, found.weight_bytes
    lines = [
        f"nodes {nodes} → {now}: {found.count('added')} added, {found.count('removed')} removed, "
        f"{found.count('rewired')} re-wired",
        f"weights and constants {size:,} → {size_now:,} bytes",
    ]
    lines += [*found.interface, *found.facts]
    lines += [f"+ {n} ({size:,} bytes)" for n, size in found.weights_added.items()]
    lines += [f"- {n} ({size:,} bytes)" for n, size in found.weights_removed.items()]
    for (made_by, source), changes in found.groups().items():
        lines.append(f"{source or 'no module'}, made by {made_by or 'the frontend'}: {summary(changes)}")
        lines += [
            f"  {MARKS[c.kind]} {c.op} %{c.name}" + (f": {c.detail}" if c.detail else "") for c in changes[:limit]
        ]
        if len(changes) > limit:
            lines.append(f"    and {len(changes) - limit} more")
    return lines


def text_diff(before: Module, after: Module) -> list[str]:
    """What the text form (`qeff_ir.ir.printer`) shows of the change: the lines of a unified diff, without its head."""
    old, new = (to_text(module).splitlines() for module in (before, after))
    return list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]


def summary(changes: Iterable[NodeChange]) -> str:
    """Operators of some changes, counted: ``-MatMul ×2, +FusedMatMul``."""
    counted = Counter(f"{MARKS[c.kind]}{c.op}" for c in changes)
    return ", ".join(f"{op} ×{n}" if n > 1 else op for op, n in counted.items())


def counterparts(before: ir.Graph, after: ir.Graph) -> dict[str, str]:
    """The old value that a new one stands for, by name, where nodes tell.

    Both are results of the same node, or outputs of one name; or the same node, otherwise unchanged, takes the new one
    where it took the old one.
    """
    same = _twins(before, after)
    renamed = _renamed(same)
    found = {str(v.name): str(v.name) for v in after.outputs if v.name in {o.name for o in before.outputs}}
    found |= {str(b): str(a) for b, a in renamed.items()}
    for new, old in same.items():
        was, now = _inputs(old, {}), _inputs(new, renamed)
        changed = [(a, b) for a, b in zip(was, now, strict=False) if a != b]
        if len(changed) == 1 and len(was) == len(now) and _attributes(old) == _attributes(new):
            ((a, b),) = changed
            found.setdefault(b, a)
    return found


def _node_changes(before: ir.Graph, after: ir.Graph) -> Iterable[NodeChange]:
    same = _twins(before, after)
    kept, renamed = set(same.values()), _renamed(same)
    yield from (_change("removed", n) for n in before if n not in kept)
    for node in after:
        if node not in same:
            yield _change("added", node)
        elif detail := _rewiring(same[node], node, renamed):
            yield _change("rewired", node, detail)


def _twins(before: ir.Graph, after: ir.Graph) -> dict[ir.Node, ir.Node]:
    """The old node of each new one that is the same, in the order of the graph."""
    by_name = {n.outputs[0].name: n for n in before if n.outputs}
    by_form: dict[tuple[Any, ...], list[ir.Node]] = {}
    names = {n.outputs[0].name for n in after if n.outputs}
    for node in before:
        if node.outputs[0].name not in names:
            by_form.setdefault(_form(node, {}), []).append(node)
    found, renamed = dict[ir.Node, ir.Node](), dict[str | None, str | None]()
    for node in after:
        twin = by_name.get(node.outputs[0].name)
        if twin is None or twin.op_identifier() != node.op_identifier():
            same = by_form.get(_form(node, renamed), [])
            twin = same.pop(0) if same else None
        if twin is not None:
            found[node] = twin
            renamed |= _renamed({node: twin})
    return found


def _renamed(same: Mapping[ir.Node, ir.Node]) -> dict[str | None, str | None]:
    """Old names of the results of nodes that are the same."""
    pairs = (zip(new.outputs, old.outputs, strict=False) for new, old in same.items())
    return {new.name: old.name for pair in pairs for new, old in pair}


def _form(node: ir.Node, renamed: dict[str | None, str | None]) -> tuple[Any, ...]:
    return node.op_identifier(), tuple(_attributes(node).items()), tuple(_inputs(node, renamed))


def _inputs(node: ir.Node, renamed: dict[str | None, str | None]) -> list[str]:
    names = (v.name if v is not None else "_" for v in node.inputs)
    return [renamed.get(n, n) or "" for n in names]


def _attributes(node: ir.Node) -> dict[str, str]:
    return {a.name: attribute_text(a) for a in sorted(node.attributes.values(), key=lambda a: a.name)}


def _rewiring(old: ir.Node, new: ir.Node, renamed: dict[str | None, str | None]) -> str:
    """What changed between two forms of one node, as a clause; empty when nothing did."""
    was, now = _inputs(old, {}), _inputs(new, renamed)
    parts = [
        f"input {i} %{was[i] if i < len(was) else '_'} → %{now[i] if i < len(now) else '_'}"
        for i in range(max(len(was), len(now)))
        if was[i : i + 1] != now[i : i + 1]
    ]
    a, b = _attributes(old), _attributes(new)
    parts += [f"{key} {a.get(key, 'unset')} → {b.get(key, 'unset')}" for key in a | b if a.get(key) != b.get(key)]
    return ", ".join(parts)


def _change(kind: Kind, node: ir.Node, detail: str = "") -> NodeChange:
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    name = node.outputs[0].name if node.outputs else node.name
    made_by = node.metadata_props.get(PASS_KEY, "")
    return NodeChange(kind, op, name or "", source_text(node), made_by, detail, sources_of(node))


def _weights(module: Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, value in module.graph.initializers.items():
        kind = "weight" if WEIGHT_KEY in value.metadata_props else "constant"
        found[f"{kind} {name}"] = value.const_value.nbytes if value.const_value is not None else 0
    return found


def _interface(module: Module) -> dict[str, str]:
    inputs = {f"input {v.name}": type_text(v) for v in module.graph.inputs}
    return inputs | {f"output {v.name}": type_text(v) for v in module.graph.outputs}


def _facts(module: Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for state in module.residents:
        window = f", window {state.window}" if state.window is not None else ""
        shape = ", ".join(map(str, state.shape))
        ring = ", ring" if state.ring else ""
        found[f"state {state.input}"] = f"{state.dtype.name.lower()}[{shape}]{window}{ring}"
    for dim in module.dims.values():
        found[f"dim {dim.name}"] = "any size" if dim.maximum is None else f"at most {dim.maximum}"
    for item in module.specializations:
        symbols = " ".join(f"{k}={v}" for k, v in sorted(item.symbols.items()))
        found[f"specialization {item.name}"] = f"{item.phase} {symbols}"
    ends = {v.name for v in (*module.graph.inputs, *module.graph.outputs)}
    found |= {f"port {name}": role for name, role in sorted(module.ports.items()) if name in ends}
    return found | {f"property {name}": "holds" for name in sorted(module.properties)}


def _line_changes(old: dict[str, str], new: dict[str, str]) -> Iterable[str]:
    yield from (f"- {key}: {value}" for key, value in old.items() if key not in new)
    yield from (f"+ {key}: {value}" for key, value in new.items() if key not in old)
    yield from (f"~ {key}: {old[key]} → {value}" for key, value in new.items() if old.get(key, value) != value)
