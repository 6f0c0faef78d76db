"""Return the hidden state of each row's last token in place of its logits: a decoder as an embedding model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from passes.embedding import unit
from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import EMBEDDED, LOGITS
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import Exactly, Expect
from qeff_ir.passing.selection import head_of


@register
@dataclass(frozen=True, slots=True)
class EmbeddingOutput(Pass):
    """Leave out the LM head: ``embedding_output``, float ``[batch, 1, features]``, takes the place of ``logits``.

    It is what the LM head reads of the last real token (AI 100 contract §1.9). ``dim`` keeps the first features
    (Matryoshka embeddings), then ``normalize`` scales to unit length. The weight of the head is dropped, unless the
    embedding of the tokens shares it. A model without a cache returns what it returns.
    """

    name: ClassVar[str] = "embedding-output"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"last-logits"})
    changes_interface: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True
    expect: ClassVar[Expect] = Exactly("num_decoders")

    normalize: bool = field(default=False, metadata={"help": "scale to unit length"})
    dim: int | None = field(default=None, metadata={"help": "features to keep"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Put the embedding in place of the logits.

        Raises:
            PassError: ``logits`` do not come from a matrix product over the tokens, or there are fewer features than
                `dim`.
        """
        if not module.states:
            return
        head, logits = head_of(module), module.port(LOGITS)
        hidden = head[-1].inputs[0]
        assert hidden is not None and hidden.shape is not None
        features = hidden.shape[-1]
        if self.dim is not None and (not isinstance(features, int) or not 1 <= self.dim <= features):
            raise PassError(f"dim is {self.dim}, but an embedding has {features} features: give 1 to {features}")
        if not rewriter.rewrite("head"):
            return
        b = rewriter.at(head[-1])
        value = hidden if self.dim is None else b("Slice", hidden, b.const([0]), b.const([self.dim]), b.const([-1]))
        value = unit(value, b) if self.normalize else b("Identity", value) if value is hidden else value
        value.name, value.dtype = EMBEDDED, ir.DataType.FLOAT
        value.shape = ir.Shape([*hidden.shape.dims[:-1], features if self.dim is None else self.dim])
        outputs = module.graph.outputs
        outputs[outputs.index(logits)] = value
        module.declare(value, LOGITS)
        rewriter.sweep()
