"""What ``qeff verify`` has asked of a compiled model and of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qeff_ir.errors import RuntimeInputError

if TYPE_CHECKING:
    from qeff_ir.cli.yardstick import Yardstick
    from qeff_ir.testing.trace import Trace


@dataclass(frozen=True)
class Asked:
    """What a compiled model and transformers have answered.

    Attributes:
        target: The target.
        lengths: Tokens of each prompt.
        trace: What the compiled model answers.
        reference: What transformers answers.
        measure: Tells how far they may lie apart.
        decoded_here: Whether transformers was given numbers that it does not load itself (`Source.decoded_here`).
        drift: Of types of 16 bits, how far both are from float32, as sentences.
    """

    target: str
    lengths: list[int]
    trace: Trace
    reference: Trace
    measure: Callable[[], Yardstick]
    decoded_here: bool
    drift: str = ""


def check_room(longest: int, steps: int, ctx_len: int) -> None:
    """Refuse a prompt of so many tokens whose answer of so many steps does not fit.

    Raises:
        RuntimeInputError: It does not.
    """
    needed = longest + steps - 1  # the last token is compared, never fed
    if needed > ctx_len:
        raise RuntimeInputError(
            f"a prompt of {counted(longest, 'token')} and {counted(steps, 'step')} do not fit "
            f"ctx_len={ctx_len}: pass --ctx-len {needed} or more, or fewer --steps"
        )


def counted(count: int, what: str) -> str:
    """A number of things in words."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
