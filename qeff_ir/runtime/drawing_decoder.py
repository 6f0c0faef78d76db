"""A decoder whose graph draws the next tokens: it is told how, and returns tokens in place of logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.draw import Draw
from qeff_ir.ir.ports import ALLOWED, NEXT_TOKENS, NUMBERS, PROBABILITIES, Run
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.session import Session
from qeff_ir.runtime.token_table import TokenTable


class DrawingDecoder(Decoder):
    """Drives a session that draws, see `passes.sampling.Sampling`; see `Decoder` for the rest.

    `prefill` and `decode` return the next token of each row, int64 ``[batch]``.

    Attributes:
        draw: How the tokens of the next runs are drawn.
        random: Where random numbers come from that a draw does not bring.
        top: Tokens that are drawn from at most, the best ones.
        vocabulary: Tokens in all.
        guided: Whether it takes a mask of the tokens that are allowed.
        probabilities: Of the last draw, float32 ``[batch, vocab]``; `None` for a package that does not return them.
    """

    returns = NEXT_TOKENS

    def __init__(self, session: Session, table: TokenTable | None = None) -> None:
        super().__init__(session, table)
        numbers, shares = session.interface.input(NUMBERS), session.interface.output(PROBABILITIES)
        tables = [resident for resident in session.interface.residents if resident.last]
        if numbers is None or not tables:
            raise PackageError("the package draws tokens without random numbers or penalties: compile it again")
        self._numbers, self.top = numbers, int(numbers.shape[-1] or 1)
        self.vocabulary = int(tables[0].shape[-1])
        self.guided = session.interface.input(ALLOWED) is not None
        self.draw = Draw()
        self.random = np.random.default_rng()
        self.probabilities: Array | None = None
        self._shares = None if shares is None else shares.name
        self._last_shares = np.empty(0, dtype=np.float32)

    def check_scores(self) -> None:
        """Refuse to read logits, which stay in the graph.

        Raises:
            RuntimeInputError: Always.
        """
        raise RuntimeInputError(
            "the package returns tokens that it draws, and no logits: compile without sampling to read them"
        )

    def prefill(self, rows: Sequence[Sequence[int]], lora_ids: Array | None = None) -> Array:
        """See `Decoder.prefill`; the next token of each row, int64 ``[batch]``."""
        return super().prefill(rows, lora_ids)[:, 0]

    def decode(self, tokens: Sequence[int] | Array, lora_ids: Array | None = None) -> Array:
        """See `Decoder.decode`; the next token of each row, int64 ``[batch]``."""
        return super().decode(tokens, lora_ids)[:, 0]

    def _told(self, run: Run) -> Run:
        draw = self.draw
        if draw.allowed is not None and not self.guided:
            raise RuntimeInputError("the package takes no mask of tokens: compile with sampling{guided=true}")
        if draw.presence is not None and draw.presence.any() and self.prefill_len == 1:
            raise RuntimeInputError(
                "a presence penalty is for tokens of the answer, and a package that reads prompts one by one does not "
                "know them: compile with prefill_seq_len=2 or more"
            )
        if draw.numbers is None and draw.temperature is not None and draw.temperature.any():
            numbers = self.random.random((self.batch_size, *self._kept(run), self.top), dtype=np.float32)
            draw = dataclasses.replace(draw, numbers=numbers)
        given = {field.name: getattr(draw, field.name) for field in dataclasses.fields(draw)}
        of_run = {name: None if array is None else array[run.cache_rows] for name, array in given.items()}
        return dataclasses.replace(super()._told(run), draw=Draw(**of_run))

    def _kept(self, run: Run) -> list[int]:
        """Tokens of a row that have random numbers of their own, where there are several."""
        return [run.sizes[str(size)] for size in self._numbers.shape[1:-1]]

    def _heard(self, outputs: Mapping[str, Array]) -> None:
        super()._heard(outputs)
        if self._shares is not None:
            self._last_shares = outputs[self._shares][:, 0]

    def _run(self, ids: Array, positions: Array, lora_ids: Array | None, rows: Array | None = None) -> Array:
        tokens = super()._run(ids, positions, lora_ids, rows)
        if self._shares is not None:
            if self.probabilities is None:
                self.probabilities = np.zeros((self.batch_size, self.vocabulary), dtype=np.float32)
            self.probabilities[slice(None) if rows is None else rows] = self._last_shares
        return tokens
