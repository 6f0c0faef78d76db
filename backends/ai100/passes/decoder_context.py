"""Call the contexts of a decoder with an encoder as the contract does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import ENCODER_CONTEXT, FEATURES
from qeff_ir.numerics import Exact, Numeric
from qeff_ir.passing.base import Pass, Phase, Rewriter, register


@register
@dataclass(frozen=True, slots=True)
class DecoderContext(Pass):
    """Call the slots of states ``decoder_ctx_len`` and ``encoder_ctx_len`` in a graph with an encoder (contract §1.7).

    All passes that ask for ``ctx_len``, and for sizes that the encoder has, come before. Any other model stays as it
    is.
    """

    name: ClassVar[str] = "decoder-context"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered"})
    changes_interface: ClassVar[bool] = True
    numeric: ClassVar[Numeric] = Exact()

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Name the sizes."""
        if not module.states or module.find(FEATURES) is None or not rewriter.rewrite("contexts"):
            return
        module.rename_dim("ctx_len", "decoder_ctx_len")
        for index, state in enumerate(module.residents):
            if state.update == "once":
                shape = tuple(ENCODER_CONTEXT if axis == 2 else size for axis, size in enumerate(state.shape))
                module.residents[index] = dataclasses.replace(state, shape=shape)
                for value in (module.input(state.input), module.output(state.output)):
                    value.shape = ir.Shape(shape)
