"""Pipelines as text: what is printed reads back equal, and every misspelling is an error that points and suggests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import backend_names, find_backend
from qeff_ir.errors import PipelineError
from qeff_ir.ir.module import Module
from qeff_ir.passing import base
from qeff_ir.passing.base import Pass, Rewriter, registered_passes
from qeff_ir.passing.pipeline import Option, Pipeline, options


@dataclass(frozen=True, slots=True)
class Options(Pass):
    """Has an option of every kind."""

    name: ClassVar[str] = "test-options"

    flag: bool = False
    count: int = 3
    limit: float = 0.5
    text: str = ""
    maybe_text: str | None = "x"
    maybe_count: int | None = None
    number_or_text: int | str = 0
    choice: Literal["one", "two words", "none", 3] = "one"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Nothing."""


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    registered_passes()
    base.register(Options)
    yield
    del base._REGISTRY[Options.name]


def values(option: Option) -> st.SearchStrategy[Any]:
    kinds = {
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False),
        str: st.one_of(st.text(max_size=6), st.sampled_from(["none", "true", "5", "1e3", "inf", "a b", 'q"', "\\"])),
    }
    return st.one_of([kinds[k] if isinstance(k, type) else st.just(k) for k in option.kinds])


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    classes = [*registered_passes().values(), Options, Options]
    items = []
    for cls in draw(st.lists(st.sampled_from(classes), max_size=4)):
        given_options = {o.field: draw(values(o)) for o in options(cls).values() if draw(st.booleans())}
        items.append(cls(**given_options))
    return Pipeline(tuple(items))


def same(one: Pipeline, other: Pipeline) -> bool:
    """Equal, types of the options included (``1 == True`` is not enough)."""
    return one == other and repr(one) == repr(other)


@given(pipelines())
def test_printing_and_parsing_is_the_identity(pipeline: Pipeline) -> None:
    assert same(Pipeline.parse(str(pipeline)), pipeline)


@given(pipelines(), st.data())
def test_spaces_do_not_matter(pipeline: Pipeline, data: st.DataObject) -> None:
    gap = data.draw(st.sampled_from([" ", "\n  ", "\t"]))
    text = gap + f"{gap},{gap}".join(str(Pipeline((p,))) for p in pipeline.passes) + gap
    assert same(Pipeline.parse(text), pipeline)


@pytest.mark.parametrize("name", backend_names())
def test_every_stock_pipeline_is_in_its_shortest_form(name: str) -> None:
    text = find_backend(name).pipeline
    assert Pipeline.parse(str(Pipeline.parse(text))) == Pipeline.parse(text)


LETTERS = st.sampled_from("abcdefghijklmnopqrstuvwxyz")


@st.composite
def misspelled(draw: st.DrawFn, word: str) -> str:
    """One slip of the finger, not at the first letter."""
    at = draw(st.integers(1, len(word) - 1))
    kind = draw(st.sampled_from(["drop", "double", "replace", "swap"]))
    if kind == "drop":
        return word[:at] + word[at + 1 :]
    if kind == "double":
        return word[:at] + word[at] + word[at:]
    if kind == "replace":
        return word[:at] + draw(LETTERS) + word[at + 1 :]
    return word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]


def caret(error: PipelineError) -> tuple[str, int]:
    """The text as printed in an error, and the place that its caret points at."""
    _, text, pointer = str(error).split("\n")
    assert set(pointer) <= {" ", "^"}
    return text[2:], pointer.index("^") - 2


@given(st.data())
def test_a_misspelled_pass_is_pointed_at_and_corrected(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(registered_passes())))
    wrong = data.draw(misspelled(name).filter(lambda w: w not in registered_passes() and w[0].isalpha()))
    before = data.draw(st.sampled_from(["", "canonicalize,", "legalize{opset=17}, "]))
    with pytest.raises(PipelineError, match="did you mean '") as error:
        Pipeline.parse(f"{before}{wrong},canonicalize")
    text, place = caret(error.value)
    assert place == len(before)
    assert text[place:].startswith(wrong)


@given(st.data())
def test_a_misspelled_option_is_pointed_at_and_corrected(data: st.DataObject) -> None:
    every = [(name, o.name) for name, cls in registered_passes().items() for o in options(cls).values()]
    known = [(name, option) for name, option in every if len(option) > 1]  # one letter has none but the first
    name, option = data.draw(st.sampled_from(known))
    fields = set(options(registered_passes()[name]))
    wrong = data.draw(misspelled(option).filter(lambda w: w.replace("-", "_") not in fields))
    with pytest.raises(PipelineError, match=f"{name} has no option '{wrong}'; (did you mean|there are) ") as error:
        Pipeline.parse(f"canonicalize,{name}{{{wrong}=1}}")
    assert caret(error.value)[1] == len(f"canonicalize,{name}{{")


@given(st.data())
def test_a_value_of_another_kind_is_refused_with_what_is_taken(data: st.DataObject) -> None:
    option, wrong = data.draw(
        st.sampled_from([("flag", "yes"), ("count", "1.5"), ("limit", "big"), ("maybe-count", "x"), ("choice", "4")])
    )
    text = f"test-options{{{option}={wrong}}}"
    with pytest.raises(PipelineError, match=f"'{wrong}' is no value for '{option}', which takes ") as error:
        Pipeline.parse(text)
    assert caret(error.value) == (text, len(f"test-options{{{option}="))


@given(pipelines().filter(lambda p: "{" in str(p)), st.data())
def test_a_text_that_breaks_off_inside_the_options_is_refused(pipeline: Pipeline, data: st.DataObject) -> None:
    text = str(Pipeline(tuple(p for p in pipeline.passes if "{" in str(Pipeline((p,))))[:1]))
    cut = data.draw(st.integers(text.index("{") + 1, len(text) - 1))
    with pytest.raises(PipelineError):
        Pipeline.parse(text[:cut])


@given(st.text(alphabet='ac{}=, \n"\\1-', max_size=12))
def test_no_text_ends_in_another_error(text: str) -> None:
    problem = None
    try:
        Pipeline.parse(text)
    except PipelineError as error:
        problem = error
    if problem is not None:
        assert 0 <= caret(problem)[1] <= len(text)  # the caret points into the text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canonicalize,", "a pass is missing after the ','"),
        ("canonicalize,,unflatten", "expected the name of a pass"),
        ("canonicalize unflatten", "a ',' is missing between two passes"),
        ("legalize{opset}", "'=' and a value are missing after 'opset'"),
        ("legalize{opset=17 opset=18}", "the option 'opset' is given twice"),
        ("attention{impl=grupped}", "'grupped' is no value for 'impl', which takes grouped|standard"),
        ("canonicalize{x=1}", "canonicalize has no option 'x'; there are none"),
        ("zzz", "there is no pass 'zzz'; there are "),
        ('test-options{text="\\q"}', "is not a JSON string"),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as error:
        Pipeline.parse(text)
    assert message in str(error.value)
    assert caret(error.value)[0] == text


def test_a_text_of_several_lines_is_pointed_at_in_one() -> None:
    with pytest.raises(PipelineError) as error:
        Pipeline.parse("canonicalize,\nunflaten")
    assert caret(error.value) == ("canonicalize, unflaten", len("canonicalize,\n"))


def test_instance_ids_count_repeated_passes() -> None:
    assert [name for name, _ in Pipeline.parse("canonicalize,unflatten,canonicalize")] == [
        "canonicalize",
        "unflatten",
        "canonicalize#2",
    ]


@pytest.mark.parametrize(
    "item",
    [
        Options(number_or_text="5"), Options(number_or_text="1e3"), Options(number_or_text=5), Options(maybe_text=None),
        Options(maybe_text="none"), Options(maybe_count=0), Options(choice="none"), Options(choice=3),
        Options(text="3"), Options(text="nan"), Options(text='a "b" \\'),
    ],
)  # fmt: skip
def test_texts_are_not_taken_for_numbers_nor_nothing_for_a_text(item: Options) -> None:
    assert same(Pipeline.parse(str(Pipeline((item,)))), Pipeline((item,)))


def test_infinity_is_a_float() -> None:
    (item,) = Pipeline.parse("test-options{limit=inf}").passes
    assert isinstance(item, Options) and math.isinf(item.limit)
