"""A pass written with onnx-graphsurgeon: the graph as its tensors and nodes, the rest kept safe around it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from qeff_ir.ir.module import PASS_KEY, SOURCE_KEY, Module
from qeff_ir.passing.base import Pass, Rewriter

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_EDIT = "edit"


class SurgeonPass(Pass):
    """A pass whose `edit` changes an `onnx_graphsurgeon.Graph`.

    The weights show as graph inputs, so that they can be wired and not read. Nodes that the edit leaves alone keep
    their source and their pass; one that it changes or adds is stamped. States, dims and weights stay as they are.
    """

    __slots__ = ()

    @abstractmethod
    def edit(self, graph: gs.Graph) -> Iterator[str] | None:
        """Change the graph in place.

        An edit that makes many rewrites is a generator: it yields the name of each rewrite just before making it, which
        counts it, and lets bisection stop there. Any other edit counts as one.
        """

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Convert, edit, and convert back."""
        import onnx_graphsurgeon as gs

        with rewriter.hidden_weights():
            shown = ir.Model(module.graph, ir_version=module.model.ir_version)
            graph = gs.import_onnx(ir.to_proto(shown))
            if not list(_admitted(self.edit(graph), rewriter)):
                return
            after = ir.from_proto(gs.export_onnx(graph, do_type_check=False)).graph
        after.sort()
        _restore(module, after, rewriter)
        rewriter.sweep()


def _admitted(edit: Iterator[str] | None, rewriter: Rewriter) -> Iterator[str]:
    """The rewrites of an edit that the budget admits."""
    if edit is None:
        if rewriter.rewrite(_EDIT):
            yield _EDIT
        return
    for name in edit:
        if not rewriter.rewrite(name):
            return
        yield name


def _restore(module: Module, after: ir.Graph, rewriter: Rewriter) -> None:
    """Put the edited graph into the module, with what graphsurgeon does not carry taken from the old one."""
    before = module.graph
    makers = {out.name: node for node in before for out in node.outputs}
    for node in after:
        old = next((makers[o.name] for o in node.outputs if o.name in makers), None)
        if old is not None and _same(node, old):
            node.metadata_props.update(old.metadata_props)
            rewriter.know(node)
        else:
            node.metadata_props[PASS_KEY] = rewriter.pass_id
            if old is not None:
                node.metadata_props[SOURCE_KEY] = old.metadata_props.get(SOURCE_KEY, "")
    for name, value in before.initializers.items():
        new = next((v for v in after.inputs if v.name == name), None) or after.initializers.get(name)
        if new is None:
            continue
        if new in after.inputs and value not in before.inputs:  # weights and large constants are hidden as inputs
            after.inputs.remove(new)
        new.const_value, new.type, new.shape = value.const_value, value.type, value.shape
        new.metadata_props.update(value.metadata_props)
        if name not in after.initializers:
            after.register_initializer(new)
    after.opset_imports.update(before.opset_imports)
    after.name = before.name
    module.model.graph = after


def _same(one: ir.Node, other: ir.Node) -> bool:
    return (
        one.op_identifier() == other.op_identifier()
        and [v and v.name for v in one.inputs] == [v and v.name for v in other.inputs]
        and [v.name for v in one.outputs] == [v.name for v in other.outputs]
        and _attributes(one) == _attributes(other)
    )


def _attributes(node: ir.Node) -> dict[str, bytes]:
    """Attributes as saved: in memory, a float may have digits that saving drops."""
    return {
        a.name: ir.to_proto(a).SerializeToString() for a in node.attributes.values() if a.type != ir.AttributeType.GRAPH
    }
