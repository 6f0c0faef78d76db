"""What the runtime asks of a compiled model, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from qeff_ir.arrays import Array
from qeff_ir.ir.module import Specialization
from qeff_ir.runtime.interface import Interface


class Session(Protocol):
    """A compiled model with what it retains.

    One thread at a time drives a model that retains states, see `qeff_ir.runtime.decoder.Decoder`: what a run leaves in
    them is the next run's. Of a model without states, any number of threads may call `run` at a time.

    A token whose position is -1 is padding: nothing of it is stored, and nothing may depend on it. In one run the real
    tokens of a row come first and their positions are consecutive.
    """

    @property
    def free(self) -> bool:
        """Whether inputs of any batch, and of any length up to the largest, run as they are.

        Otherwise only those of the specializations do.
        """
        ...

    @property
    def interface(self) -> Interface:
        """What `run` takes and returns, and what the session keeps."""
        ...

    @property
    def specializations(self) -> Sequence[Specialization]:
        """The static shapes that `run` takes."""
        ...

    def write(self, name: str, data: Array, slot: int | None = None) -> None:
        """Replace what a resident that the host writes holds, from the next run on.

        Adapters are zero, which is the base model, until they are written; so are rows.

        Args:
            name: The input.
            data: Its new contents, float32, of the input's shape; with `slot`, of the shape behind the first axis.
            slot: The entry of the first axis to replace; all of the input by default.
        """
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the specialization that the input shapes select; states are kept for the next run.

        Args:
            inputs: All inputs of the interface by name, in their types. A decoder's ports tell them from a
                `qeff_ir.ir.ports.Run`.

        Returns:
            All outputs of the interface by name, floats as float32. Of a decoder: ``logits`` ``[batch, 1, vocab]``,
            those of each row's last real token.

        Raises:
            RuntimeInputError: No specialization has these shapes, or an input is missing, unknown or of another type.
        """
        ...

    def reset(self) -> None:
        """Forget all states that runs write (set them to zero); adapters and rows stay."""
        ...


@runtime_checkable
class HostStates(Protocol):
    """A session whose states the host may read and change between two runs; one on a device has them there."""

    def state(self, name: str) -> Array:
        """What a state holds, float32 ``[rows, ...]``: the memory itself, until the next run.

        Args:
            name: The input.
        """
        ...
