"""What the runtime asks of a compiled model, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from qeff_ir.arrays import Array
from qeff_ir.ir.module import AdapterInput, Specialization


class Session(Protocol):
    """A compiled decoder with its retained states.

    One thread at a time drives it, see `qeff_ir.runtime.decoder.Decoder`: what a run leaves in the states is the next
    run's.

    A token whose position is -1 is padding: nothing of it is stored, and nothing may depend on it. In one run the real
    tokens of a row come first and their positions are consecutive.
    """

    @property
    def specializations(self) -> Sequence[Specialization]:
        """The static shapes that `run` takes."""
        ...

    @property
    def adapters(self) -> Sequence[AdapterInput]:
        """The inputs that hold adapters; zero, which is the base model, until they are written."""
        ...

    def write(self, name: str, data: Array, slot: int | None = None) -> None:
        """Replace what an adapter input holds, from the next run on; nothing else changes.

        Args:
            name: The input.
            data: Its new contents, float32, of the input's shape; with `slot`, of the shape behind the first axis.
            slot: The entry of the first axis to replace; all of the input by default.
        """
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the specialization that the input shapes select; states are kept for the next run.

        Args:
            inputs: ``input_ids`` and ``position_ids``, int64 ``[batch, seq]``; of a model with adapter slots also
                ``lora_ids``, int64 ``[batch, 1]``. Of a model whose tokens the host looks up, ``inputs_embeds``,
                float32 ``[batch, seq, hidden]``, in place of ``input_ids``.

        Returns:
            ``logits``, float32 ``[batch, 1, vocab]``: those of each row's last real token.

        Raises:
            RuntimeInputError: No specialization has these shapes, or an input is missing, unknown or of another type.
        """
        ...

    def reset(self) -> None:
        """Forget all states (set them to zero); adapters stay."""
        ...


class ForwardSession(Protocol):
    """A compiled forward pass that retains nothing; any number of threads may call `run` at a time.

    Attributes:
        free: Whether inputs of any batch, and of any length up to the largest, run as they are; otherwise only those of
            the specializations do.
    """

    free: bool

    @property
    def specializations(self) -> Sequence[Specialization]:
        """The static shapes, by symbol."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Args:
            inputs: All inputs by name, in their types, of one specialization's shapes (see `free`).

        Returns:
            All outputs by name, float32.

        Raises:
            RuntimeInputError: The inputs are of no compiled shape.
        """
        ...
