"""Let the host look up the token embeddings: the graph takes vectors, and the table stays out of the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir.module import CHANGED_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.ports import EMBEDDINGS, POSITIONS, TOKENS, name_of
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AtLeast, Expect

_RESHAPING = frozenset({"Reshape", "Identity", "Cast"})


@register
@dataclass(frozen=True, slots=True)
class TokenEmbedding(Pass):
    """Replace the look-up of the tokens by an input ``inputs_embeds``, float ``[batch_size, seq_len, hidden]``.

    ``input_ids`` stays, behind the other, only where something else reads the tokens. The table leaves the graph unless
    something else reads it, as a tied LM head does, which then has it alone. The new input carries the name of the
    parameter (`qeff_ir.ir.module.WEIGHT_KEY`), by which the runtime finds the rows in the checkpoint. Whatever follows
    the look-up (a scale, a norm) stays in the graph. ``side=graph`` leaves everything as it is.
    """

    name: ClassVar[str] = "token-embedding"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_interface: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True
    expect: ClassVar[Expect] = AtLeast(0)

    side: Literal["host", "graph"] = field(default="host", metadata={"help": "who looks up the rows"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Put the input in place of the look-up.

        Raises:
            PassError: The tokens are not looked up in just one table, or an earlier pass has changed it.
        """
        if self.side == "graph":
            return
        ids = module.port(TOKENS)
        found = [node for node in module.graph if _is_lookup(node, ids)]
        tables = {node.inputs[0] for node in found}
        if len(tables) != 1:
            raise PassError(
                f"the tokens are looked up in {len(tables)} tables, not in one, so the host cannot do it: "
                "leave token-embedding out, or use side=graph"
            )
        (table,) = tables
        assert table is not None
        if CHANGED_KEY in table.metadata_props:
            raise PassError(
                f"an earlier pass has changed the table {table.name}, and the host looks up the checkpoint's: "
                "leave token-embedding out, or use side=graph"
            )
        if not rewriter.rewrite("look-up"):
            return
        like = found[0].outputs[0]
        embeds = ir.val(name_of(EMBEDDINGS), shape=like.shape, dtype=ir.DataType.FLOAT)
        module.declare(embeds, EMBEDDINGS)
        embeds.metadata_props[WEIGHT_KEY] = table.metadata_props[WEIGHT_KEY]
        inputs = module.graph.inputs
        inputs.insert(inputs.index(ids), embeds)
        for node in found:
            rewriter.substitute(node, embeds)
        for node in [n for n in ids.consumers() if n.op_type == "Shape"]:
            node.replace_input_with(0, module.port(POSITIONS))  # of the same shape
        rewriter.sweep()
        if not ids.consumers():
            inputs.remove(ids)


def _is_lookup(node: ir.Node, ids: ir.Value) -> bool:
    """Whether a node looks up each token of `ids`, ``[batch, seq]``, in a weight."""
    table, index = (*node.inputs, None, None)[:2]
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0 or table is None or index is None:
        return False
    if WEIGHT_KEY not in table.metadata_props or not table.is_initializer() or table.dtype != ir.DataType.FLOAT:
        return False
    while index is not ids:
        maker = index.producer()
        if maker is None or maker.op_type not in _RESHAPING or maker.inputs[0] is None:
            return False
        index = maker.inputs[0]
    found, own = node.outputs[0].shape, ids.shape
    return found is not None and own is not None and len(found) == 3 and found.dims[:2] == own.dims
