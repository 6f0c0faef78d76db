"""What a graph that draws tokens is given at a run, and keeps between runs (AI 100 contract §1.3)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir

from qeff_ir.ir import ports
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import Role, name_of
from qeff_ir.ir.residents import DimValue, Resident

BATCH = "batch_size"
"""Rows of a run."""


@dataclass(frozen=True)
class DrawInputs:
    """Inputs of a draw, in the order that the contract has them.

    Attributes:
        accepted: Tokens that are new to the tables, int64 ``[batch, seq]``.
        seen: Table of the tokens in prompts and answers, bool ``[rows, vocab]``.
        repetition: Penalty of those, float32 ``[batch, 1]``, as are those below.
        answered: Table of the tokens in answers, bool ``[rows, vocab]``.
        presence: Penalty of those.
        temperature: What scores are divided by.
        top_k: Tokens to draw from, int32 ``[batch, 1]``.
        top_p: Sum of probabilities to draw from.
        min_p: Least share of the best probability.
        numbers: Uniform random numbers, float32 ``[batch, top]`` or ``[batch, tokens, top]``.
        allowed: Tokens that may be drawn, bool ``[batch, vocab]``; `None` where all may.
    """

    accepted: ir.Value
    seen: ir.Value
    repetition: ir.Value
    answered: ir.Value
    presence: ir.Value
    temperature: ir.Value
    top_k: ir.Value
    top_p: ir.Value
    min_p: ir.Value
    numbers: ir.Value
    allowed: ir.Value | None

    @property
    def width(self) -> int:
        """Tokens to draw from at most, the best ones."""
        size = None if self.numbers.shape is None else self.numbers.shape[-1]
        assert isinstance(size, int)
        return size


def add_inputs(module: Module, logits: ir.Value, top: int, *, guided: bool) -> DrawInputs:
    """Give a module the inputs of a draw from its logits, behind those that its runs have.

    Args:
        module: The module; the tables become residents of it.
        logits: ``[batch, tokens, vocab]``.
        top: Tokens to draw from at most.
        guided: Whether a mask of tokens is given.
    """
    assert logits.shape is not None
    tokens, vocabulary = (d if isinstance(d, int) else str(d.value) for d in logits.shape.dims[1:])
    assert isinstance(vocabulary, int)
    rows = next(state.shape[0] for state in module.states if not state.shared)

    def port(role: Role, dtype: ir.DataType, *sizes: DimValue) -> ir.Value:
        value = ir.val(name_of(role), shape=ir.Shape([BATCH, *sizes]), dtype=dtype)
        return module.declare(value, role)

    def table(kind: str) -> ir.Value:
        state = Resident(0, kind, (rows, vocabulary), ir.DataType.BOOL)
        module.residents = sorted([*module.residents, state], key=lambda resident: resident.order)
        return ir.val(state.input, shape=ir.Shape(state.shape), dtype=state.dtype)

    number = ir.DataType.FLOAT
    made = DrawInputs(
        accepted=port(ports.ACCEPTED, ir.DataType.INT64, "seq_len"),
        seen=table("repetition-buffer"),
        repetition=port(ports.REPETITION, number, 1),
        answered=table("presence-buffer"),
        presence=port(ports.PRESENCE, number, 1),
        temperature=port(ports.TEMPERATURE, number, 1),
        top_k=port(ports.TOP_K, ir.DataType.INT32, 1),
        top_p=port(ports.TOP_P, number, 1),
        min_p=port(ports.MIN_P, number, 1),
        numbers=port(ports.NUMBERS, number, *([] if tokens == 1 else [tokens]), min(top, vocabulary)),
        allowed=port(ports.ALLOWED, ir.DataType.BOOL, vocabulary) if guided else None,
    )
    module.add_input(made.accepted, ports.ACCEPTED)
    first = module.graph.inputs.index(made.accepted)
    values = [getattr(made, field.name) for field in dataclasses.fields(made)]
    for at, value in enumerate(values[1:], first + 1):
        if value is not None:
            module.graph.inputs.insert(at, value)
    return made
