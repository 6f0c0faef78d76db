"""Drawn pictures and questions about them, whose answers follow from what was drawn.

A picture has one to four shapes, or one digit. It is drawn first which, then where, how large, how slanted, in which
tone and with which noise; so a tenth of the sets of shapes can be kept from training, whatever the pictures look like.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from qeff_ir.arrays import Array

PICTURE_MODEL_FOLDER: Path = Path(__file__).parent / "picture_model"
"""The model, a checkpoint as any other, with its processor. `qeff_ir.demo.train_pictures` made it."""

SIZE = 32
"""Height and width of a picture, in pixels."""

COLORS = {"red": (225, 60, 50), "green": (60, 180, 75), "blue": (70, 110, 235), "yellow": (240, 210, 50)}
SHAPES = ("circle", "square", "triangle")

COUNTS = (0, 0, 1, 2, 3, 4)
"""Shapes of a picture, each number as often as it stands here; 0 is a digit."""

DEMO_SEED = 2026
"""Of the pictures that ``qeff demo --vision`` shows; written down before the model was trained."""


@dataclass(frozen=True)
class Mark:
    """Something on a picture.

    Attributes:
        kind: A shape, or a digit.
        color: Its color.
        x: Center, in pixels from the left.
        y: Center, in pixels from the top.
        radius: Of the circle around it, in pixels.
    """

    kind: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        kind: Which of the kinds it is, for reports.
        text: The question.
        answer: The only right answer.
    """

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Drawn:
    """A picture and what is on it.

    Attributes:
        marks: What is on it, from left to right.
        pixels: uint8 ``[height, width, 3]``.
    """

    marks: tuple[Mark, ...]
    pixels: Array

    def questions(self) -> list[Question]:
        """Every question that has one answer."""
        first = self.marks[0]
        if first.kind.isdigit():
            return [
                Question("which digit", "Which digit is this?", first.kind),
                Question("color of the digit", "What color is the digit?", first.color),
            ]
        kinds, colors = [mark.kind for mark in self.marks], [mark.color for mark in self.marks]
        listed = ", ".join(f"{mark.color} {mark.kind}" for mark in self.marks)
        found = [
            Question("from left to right", "What is there from left to right?", listed),
            Question("how many", "How many shapes are there?", str(len(self.marks))),
        ]
        found += [Question("how many of a color", f"How many are {c}?", str(colors.count(c))) for c in COLORS]
        found += [Question("how many of a shape", f"How many {k}s are there?", str(kinds.count(k))) for k in SHAPES]
        for mark in self.marks:
            if kinds.count(mark.kind) == 1:
                found.append(Question("which color", f"What color is the {mark.kind}?", mark.color))
            if colors.count(mark.color) == 1:
                found.append(Question("which shape", f"What shape is {mark.color}?", mark.kind))
        return found


def held_out(shapes: tuple[tuple[str, str], ...]) -> bool:
    """Whether pictures with a set of shapes (kinds and colors, sorted) are kept from training; one in ten is."""
    return zlib.crc32(repr(shapes).encode()) % 10 == 0


def draw(rng: random.Random, *, kept: bool, count: int | None = None) -> Drawn:
    """A picture.

    Args:
        rng: Where everything random comes from.
        kept: Whether its shapes are a set that is kept from training, or one of the others. Of digits, with their few
            contents, only the drawing is new.
        count: How many shapes, one of `COUNTS`; by default, any.
    """
    while True:
        wanted = count if count is not None else rng.choice(COUNTS)
        kinds = [rng.choice(SHAPES) for _ in range(wanted)] or [str(rng.randrange(10))]
        content = [(kind, rng.choice(list(COLORS))) for kind in kinds]
        if not wanted or held_out(tuple(sorted(content))) == kept:
            break
    marks: list[Mark] = []
    while len(marks) < len(content):
        kind, color = content[len(marks)]
        radius = rng.uniform(10, 14) if kind.isdigit() else rng.uniform(4.4, 5.6)
        mark = Mark(kind, color, rng.uniform(radius, SIZE - radius), rng.uniform(radius, SIZE - radius), radius)
        if all(_apart(mark, other) for other in marks):
            marks.append(mark)
        elif rng.random() < 0.02:  # there may be no place left
            marks.clear()
    marks.sort(key=lambda mark: mark.x)
    return Drawn(tuple(marks), _pixels(marks, rng))


def demo_pictures() -> list[Drawn]:
    """The pictures of the demo, in the order in which they are shown: shapes and digits.

    They are the first that `DEMO_SEED` gives, with sets of shapes that the model was not trained on; none was replaced.
    """
    rng = random.Random(DEMO_SEED)
    return [draw(rng, kept=True, count=count) for count in (2, 0, 4, 0)]


def demo_questions(picture: Drawn) -> list[Question]:
    """The first question of each kind about a picture."""
    return list({question.kind: question for question in reversed(picture.questions())}.values())[::-1]


def _apart(one: Mark, other: Mark) -> bool:
    """Whether two shapes have room between them, and one is visibly left of the other."""
    far = (one.x - other.x) ** 2 + (one.y - other.y) ** 2 >= (one.radius + other.radius + 1.5) ** 2
    return far and abs(one.x - other.x) >= 2


def _pixels(marks: list[Mark], rng: random.Random) -> Array:
    noise = np.random.default_rng(rng.randrange(2**32))
    picture = np.full((SIZE, SIZE, 3), rng.uniform(10, 50))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    for mark in marks:
        color = np.array(COLORS[mark.color]) + noise.uniform(-20, 20, 3)
        place = x - mark.x, y - mark.y
        far = _from_strokes(mark, *place, rng) if mark.kind.isdigit() else _FROM_EDGE[mark.kind](*place, mark.radius)
        cover = np.clip(0.5 - far, 0, 1)[..., None]  # of each pixel, whose center lies `far` outside
        picture = picture * (1 - cover) + color * cover
    return np.clip(picture + noise.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


def _from_circle(x: Array, y: Array, radius: float) -> Array:
    return np.hypot(x, y) - radius


def _from_square(x: Array, y: Array, radius: float) -> Array:
    return np.maximum(abs(x), abs(y)) - 0.8 * radius


def _from_triangle(x: Array, y: Array, radius: float) -> Array:
    sides = [x * np.cos(a) + y * np.sin(a) for a in np.radians((90, 210, 330))]
    return np.max(sides, axis=0) - 0.5 * radius


_FROM_EDGE = {"circle": _from_circle, "square": _from_square, "triangle": _from_triangle}
"""Distance of points from the edge of each shape, negative inside; `radius` is that of the circle around it."""


def _arc(x: float, y: float, width: float, height: float, begin: float, end: float) -> list[tuple[float, float]]:
    """Points of an arc, clockwise from `begin` to `end` degrees; 0 is on the right."""
    angles = np.radians(np.linspace(begin, end, 13))
    return list(zip(x + width * np.cos(angles), y + height * np.sin(angles), strict=True))


_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "0": [_arc(0.5, 0.5, 0.3, 0.45, 0, 360)],
    "1": [[(0.3, 0.25), (0.55, 0.05), (0.55, 0.95)]],
    "2": [[*_arc(0.5, 0.3, 0.28, 0.25, 190, 395), (0.2, 0.95), (0.8, 0.95)]],
    "3": [[*_arc(0.47, 0.28, 0.28, 0.23, 200, 450), *_arc(0.47, 0.73, 0.31, 0.22, 270, 520)]],
    "4": [[(0.62, 0.95), (0.62, 0.05), (0.18, 0.68), (0.85, 0.68)]],
    "5": [[(0.75, 0.05), (0.28, 0.05), (0.25, 0.45), *_arc(0.47, 0.66, 0.3, 0.28, 225, 510)]],
    "6": [[(0.66, 0.06), (0.4, 0.28), (0.24, 0.65)], _arc(0.5, 0.7, 0.26, 0.25, 0, 360)],
    "7": [[(0.2, 0.05), (0.8, 0.05), (0.42, 0.95)]],
    "8": [_arc(0.5, 0.27, 0.22, 0.22, 0, 360), _arc(0.5, 0.72, 0.28, 0.23, 0, 360)],
    "9": [_arc(0.5, 0.3, 0.26, 0.25, 0, 360), [(0.76, 0.3), (0.7, 0.65), (0.45, 0.95)]],
}
"""Lines of each digit, in a square of side 1; y grows downward."""


def _from_strokes(mark: Mark, x: Array, y: Array, rng: random.Random) -> Array:
    """Distance of points from the strokes of a digit, a little slanted and of some width."""
    slant, half = rng.uniform(-0.25, 0.25), rng.uniform(0.9, 1.7)
    near = np.full(x.shape, np.inf)
    for (ax, ay), (bx, by) in _segments(mark.kind):
        a = np.array((ax - 0.5 - slant * (ay - 0.5), ay - 0.5)) * 1.6 * mark.radius
        b = np.array((bx - 0.5 - slant * (by - 0.5), by - 0.5)) * 1.6 * mark.radius
        along = np.clip(((x - a[0]) * (b - a)[0] + (y - a[1]) * (b - a)[1]) / max(float((b - a) @ (b - a)), 1e-9), 0, 1)
        near = np.minimum(near, np.hypot(x - a[0] - along * (b - a)[0], y - a[1] - along * (b - a)[1]))
    return near - half


def _segments(digit: str) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    for points in _STROKES[digit]:
        yield from pairwise(points)
