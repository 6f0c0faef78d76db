"""A small picture on a terminal: two pixels a character, or a letter for each two where there is no color."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from qeff_ir.arrays import Array

_UPPER_HALF = "▀"
_DARK = 100
"""Below this, of 255, the strongest of red, green and blue is background."""


class Blocks:
    """A picture, as many characters wide as it has pixels, and half as many lines high.

    Args:
        pixels: uint8 ``[height, width, 3]``.
        letters: Colors that are expected, by the letter that stands for each where the terminal has no color.
    """

    def __init__(self, pixels: Array, letters: Mapping[str, tuple[int, int, int]]) -> None:
        self._pixels, self._letters = pixels, letters

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = self._pixels.shape[1]
        return Measurement(width, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colored = console.color_system is not None and not console.no_color and not options.ascii_only
        for upper, lower in zip(self._pixels[::2].tolist(), self._pixels[1::2].tolist(), strict=True):
            line = Text(no_wrap=True, end="\n")
            for above, below in zip(upper, lower, strict=True):
                if colored:
                    line.append(_UPPER_HALF, Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
                else:
                    line.append(self._letter([(a + b) / 2 for a, b in zip(above, below, strict=True)]))
            yield line

    def _letter(self, color: list[float]) -> str:
        """The character of the nearest expected color, whatever its brightness; a dot where it is dark."""
        if max(color) < _DARK:
            return "."
        far = {name: _distance(_brightest(rgb), _brightest(color)) for name, rgb in self._letters.items()}
        return min(far, key=far.__getitem__)


def _brightest(color: Sequence[float]) -> list[float]:
    return [value / max(*color, 1) for value in color]


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
