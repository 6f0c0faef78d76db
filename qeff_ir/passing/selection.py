"""Logits of some tokens only: their hidden states are selected before the LM head."""

from __future__ import annotations

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import LOGITS
from qeff_ir.passing.matching import depends_on
from qeff_ir.passing.rewriter import Rewriter

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Tanh", "Where", "Cast", "Identity"})


def head_of(module: Module) -> list[ir.Node]:
    """Nodes from the logits up to the LM head, which is the last of them; all treat each token by itself.

    Their other operands are the same for every token: they depend on none of the graph's inputs.

    Raises:
        PassError: The logits do not come from a matrix product over the tokens.
    """
    tail, inputs = list[ir.Node](), set(module.graph.inputs)
    value = module.port(LOGITS)
    while (node := value.producer()) is not None:
        if node.op_type == "MatMul":
            weight = node.inputs[1]
            if weight is None or depends_on(weight, inputs):
                break
            return [*tail, node]
        data = [v for v in node.inputs if v is not None and depends_on(v, inputs)]
        if node.op_type not in _ELEMENTWISE or len(data) != 1:
            break
        tail.append(node)
        value = data[0]
    raise PassError(
        "the logits are not a matrix product of one hidden state per token, so one token cannot be selected "
        "before the LM head"
    )


def keep_columns(head: list[ir.Node], columns: ir.Value, count: int | str, rewriter: Rewriter) -> None:
    """Let the LM head see some columns only.

    Args:
        head: See `head_of`.
        columns: Which, int64 ``[batch, count]``.
        count: How many: a size, or a symbol.
        rewriter: The pass's.
    """
    product = head[-1]
    hidden = product.inputs[0]
    assert hidden is not None and hidden.shape is not None
    b = rewriter.at(product)
    index, shape = b("Unsqueeze", columns, b.const([2])), ir.Shape([hidden.shape[0], count, hidden.shape[2]])
    kept = b("GatherND", hidden, index, batch_dims=1, shape=shape, dtype=hidden.dtype)
    product.replace_input_with(0, kept)
    for node in head:
        out = node.outputs[0]
        if out.shape is not None:
            out.shape = ir.Shape([out.shape[0], count, *out.shape.dims[2:]])
