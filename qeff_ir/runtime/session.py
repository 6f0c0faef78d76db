"""What the runtime asks of a compiled model, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from qeff_ir.module import Specialization

Array = NDArray[Any]


class Session(Protocol):
    """A compiled decoder with its retained states.

    A token whose position is -1 is padding: nothing of it is stored, and nothing may depend on it. In one run the real
    tokens of a row come first and their positions are consecutive.
    """

    @property
    def specializations(self) -> Sequence[Specialization]:
        """The static shapes that `run` takes."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the specialization that the input shapes select; states are kept for the next run.

        Args:
            inputs: ``input_ids`` and ``position_ids``, int64 ``[batch, seq]``.

        Returns:
            ``logits``, float32 ``[batch, 1, vocab]``: those of each row's last real token.

        Raises:
            RuntimeInputError: No specialization has these shapes, or an input is missing or unknown.
        """
        ...

    def reset(self) -> None:
        """Forget all states (set them to zero)."""
        ...


class ForwardSession(Protocol):
    """A compiled forward pass that retains nothing.

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
