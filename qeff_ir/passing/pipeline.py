"""Pipelines are text and values: ``"fuse-norms,attention{impl=grouped},kv-retention{layout=scatter ring=off}"``.

Grammar::

    pipeline = [ item { "," item } ]
    item     = pass | "@" target | edit
    edit     = "+" pass [ ( "<" | ">" ) id ] | "-" id
    id       = name [ "#" use ]
    pass     = name [ "#" use ] [ "{" [ option { " " option } ] "}" ]
    option   = key "=" value          value = word | JSON string

``@ai100`` stands for that target's own pipeline. Edits change the passes that stand before them: ``+scale-fold`` puts a
pass at the end of its phase (`qeff_ir.passing.base.Phase`), ``+scale-fold<attention`` before a pass, with ``>`` behind
it, and ``-fuse-rotary`` takes one out. ``kv-retention#2`` is the second use of a pass; the number may be left
out. Option keys are the fields of the pass, with dashes or underscores. Printing expands targets, writes only what
differs from the defaults, and no edits: ``Pipeline.parse(str(pipeline)) == pipeline``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qeff_ir.errors import PipelineError
from qeff_ir.passing.base import Pass
from qeff_ir.passing.options import Option, as_text, nearest, options
from qeff_ir.passing.parser import Parser
from qeff_ir.passing.places import end_of_phase, ids, place

__all__ = ["Option", "Pipeline", "nearest", "options"]


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes with their options; a value that can be compared, printed and edited.

    Edits return another pipeline, and name a pass by its instance id: ``kv-retention``, ``kv-retention#2``.

    Attributes:
        passes: The passes in order.
    """

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str, own: Pipeline | None = None) -> Pipeline:
        """Read a pipeline.

        Args:
            text: The pipeline.
            own: The pipeline that is meant where the text begins with an edit.

        Raises:
            PipelineError: A pass, option or value is unknown or malformed; the message points at the place in the text
                and gives the nearest name or the allowed values.
        """
        start = own if own is not None and text.lstrip()[:1] in ("+", "-") else cls()
        return cls(tuple(Parser(text).passes(start.passes)))

    def __str__(self) -> str:
        return ",".join(_print_pass(p) for p in self.passes)

    def __iter__(self) -> Iterator[tuple[str, Pass]]:
        """Each pass with its instance id: the name, and ``#n`` from the second use on."""
        yield from zip(ids(self.passes), self.passes, strict=True)

    def add(self, more: Pipeline | Pass | str) -> Pipeline:
        """The pipeline with each pass of `more` at the end of its phase, whatever passes there are.

        Raises:
            PipelineError: `more` is a text that cannot be read.
        """
        made = self
        for item in _as_passes(more):
            made = made._spliced(end_of_phase(made.passes, item), 0, item)
        return made

    def insert_before(self, id: str, more: Pipeline | Pass | str) -> Pipeline:
        """The pipeline with `more` before a pass.

        Raises:
            PipelineError: There is no such pass, or `more` is a text that cannot be read.
        """
        return self._spliced(place(self.passes, id), 0, more)

    def insert_after(self, id: str, more: Pipeline | Pass | str) -> Pipeline:
        """The pipeline with `more` after a pass; raises as `insert_before` does."""
        return self._spliced(place(self.passes, id) + 1, 0, more)

    def without(self, id: str) -> Pipeline:
        """The pipeline without a pass.

        Raises:
            PipelineError: There is no such pass.
        """
        return self._spliced(place(self.passes, id), 1, Pipeline())

    def with_options(self, id: str, **changed: Any) -> Pipeline:
        """The pipeline with other options of a pass; those not named stay.

        Raises:
            PipelineError: There is no such pass, it has no such option, or the option takes other values.
        """
        index = place(self.passes, id)
        item = self.passes[index]
        declared = options(type(item))
        for name, value in changed.items():
            if name not in declared:
                raise PipelineError(f"{item.name} has no option '{name}'; {nearest(name, declared)}")
            if not declared[name].takes(value):
                raise PipelineError(f"{value!r} is no value for '{name}', which takes {declared[name].values}")
        return self._spliced(index, 1, dataclasses.replace(item, **changed))  # pyright: ignore[reportArgumentType, reportUnknownArgumentType, reportCallIssue]

    def told(self, asked: Mapping[str, Any]) -> Pipeline:
        """The pipeline whose passes know what is compiled for: options of theirs that `compile` has too (`Option.told`)
        take its values, unless the pipeline gives others."""
        made = self
        for id, item in self:
            for option in options(type(item)).values():
                value = asked.get(option.told or "")
                if value is not None and getattr(item, option.field) == option.default:
                    made = made.with_options(id, **{option.field: value})
        return made

    def _spliced(self, at: int, gone: int, more: Pipeline | Pass | str) -> Pipeline:
        return Pipeline((*self.passes[:at], *_as_passes(more), *self.passes[at + gone :]))


def _as_passes(more: Pipeline | Pass | str) -> tuple[Pass, ...]:
    if isinstance(more, str):
        more = Pipeline.parse(more)
    return more.passes if isinstance(more, Pipeline) else (more,)


def _print_pass(item: Pass) -> str:
    given = [
        f"{o.name}={as_text(value)}"
        for o in options(type(item)).values()
        if (value := getattr(item, o.field)) != o.default or type(value) is not type(o.default)
    ]
    return item.name + (f"{{{' '.join(given)}}}" if given else "")
