"""Pipelines as values: stock ones by name, edits by instance id, and what edits refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from backends import backend_names, find_backend
from qeff_ir.errors import PipelineError
from qeff_ir.passing.base import PHASES
from qeff_ir.passing.pipeline import Pipeline

TWICE = "canonicalize,unflatten,canonicalize#2,legalize{opset=17}"


@pytest.mark.parametrize("name", backend_names())
def test_a_stock_pipeline_is_expanded_by_printing(name: str) -> None:
    stock = Pipeline.parse(find_backend(name).pipeline)
    assert Pipeline.parse(f"@{name}") == stock
    assert str(Pipeline.parse(f"unflatten, @{name} ,legalize")) == f"unflatten,{stock},legalize"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda p: p.insert_after("canonicalize", "fuse-norms"), "canonicalize,fuse-norms,unflatten,canonicalize"),
        (lambda p: p.insert_after("canonicalize#2", "fuse-norms"), "canonicalize,unflatten,canonicalize,fuse-norms"),
        (lambda p: p.insert_before("canonicalize#2", p.passes[1]), "canonicalize,unflatten,unflatten,canonicalize"),
        (lambda p: p.insert_before("unflatten", Pipeline()), "canonicalize,unflatten,canonicalize"),
        (lambda p: p.add("fuse-norms,fuse-rotary"), "canonicalize,unflatten,canonicalize,fuse-norms,fuse-rotary"),
        (lambda p: p.add("token-embedding"), "canonicalize,unflatten,canonicalize,token-embedding"),
        (lambda p: p.without("canonicalize"), "unflatten,canonicalize"),
        (lambda p: p.without("canonicalize#2"), "canonicalize,unflatten"),
    ],
)
def test_edits(edit: Callable[[Pipeline], Pipeline], expected: str) -> None:
    pipeline = Pipeline.parse(TWICE)
    assert str(edit(pipeline)) == f"{expected},legalize{{opset=17}}"
    assert pipeline == Pipeline.parse(TWICE)


def test_what_changes_the_returns_stays_last() -> None:
    assert str(Pipeline.parse(TWICE).add("sampling").add("dtype")).endswith("legalize{opset=17},dtype,sampling")


def test_options_are_changed_one_by_one() -> None:
    pipeline = Pipeline.parse("kv-retention{layout=tensor-scatter},kv-retention#2")
    changed = pipeline.with_options("kv-retention", ring="off").with_options("kv-retention#2", layout="scatter")
    assert str(changed) == "kv-retention{layout=tensor-scatter ring=off},kv-retention"


@pytest.mark.parametrize("name", backend_names())
def test_a_stock_pipeline_has_its_phases_in_order(name: str) -> None:
    """So that `add` puts a pass behind all of its phase: what adapts a model sees it fused, and not yet lowered."""
    stock = Pipeline.parse(f"@{name}")
    phases = [PHASES.index(item.phase) for item in stock.passes]
    assert phases == sorted(phases) and set(phases) == {0, 1, 2}
    names = [id for id, _ in stock.add("lora,fuse-norms").add(stock.passes[-1])]
    assert names.index("fuse-norms#2") == phases.index(1) and names.index("lora") == phases.index(2) + 1
    assert names[-1] == f"{stock.passes[-1].name}#2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+lora", "canonicalize,last-logits,lora,kv-retention,canonicalize"),
        ("+lora<last-logits", "canonicalize,lora,last-logits,kv-retention,canonicalize"),
        ("+fuse-norms", "canonicalize,fuse-norms,last-logits,kv-retention,canonicalize"),
        ('+attention{impl="standard"}>canonicalize#2', "canonicalize,last-logits,kv-retention,canonicalize,attention"),
        ("-canonicalize#2, -last-logits ,legalize", "canonicalize,kv-retention,legalize"),
        ("canonicalize,+lora,-canonicalize", "lora"),
        ("-canonicalize#1,+legalize", "last-logits,kv-retention,canonicalize,legalize"),
        ("+canonicalize#3", "canonicalize,canonicalize,last-logits,kv-retention,canonicalize"),
    ],
)
def test_edits_as_text(text: str, expected: str) -> None:
    """Behind a pipeline they edit that, alone the one that is meant; printing shows what they make."""
    own = "canonicalize,last-logits,kv-retention,canonicalize"
    made = Pipeline.parse(text, Pipeline.parse(own))
    assert str(made).replace("{impl=standard}", "") == expected and Pipeline.parse(str(made)) == made
    if text[0] in "+-":
        assert Pipeline.parse(f"{own},{text}") == made
        assert str(Pipeline.parse("", Pipeline.parse(own))) == ""


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p.without("unflaten"), "there is no 'unflaten' in the pipeline; did you mean 'unflatten'?"),
        (
            lambda p: p.without("legalize#2"),
            "there is no 'legalize#2' in the pipeline; did you mean 'legalize'?",
        ),
        (lambda p: p.with_options("legalize", opsets=1), "legalize has no option 'opsets'; did you mean 'opset'?"),
        (lambda p: p.with_options("legalize", opset="17"), "'17' is no value for 'opset', which takes int"),
        (lambda p: p.with_options("legalize", opset=True), "True is no value for 'opset', which takes int"),
    ],
)
def test_what_edits_refuse(edit: Callable[[Pipeline], Pipeline], message: str) -> None:
    with pytest.raises(PipelineError) as error:
        edit(Pipeline.parse(TWICE))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canonicalize#2", "'canonicalize#2' is use 1 of canonicalize: write 'canonicalize'\n  canonicalize#2\n  ^"),
        (
            "canonicalize,canonicalize#3",
            "'canonicalize#3' is use 2 of canonicalize: write 'canonicalize#2'\n"
            "  canonicalize,canonicalize#3\n               ^",
        ),
        ("canonicalize#", "expected the number of a use\n  canonicalize#\n               ^"),
        ("@ai10", "there is no stock pipeline '@ai10'; did you mean 'ai100'?\n  @ai10\n  ^"),
        ("-unflatten", "there is no 'unflatten' in the pipeline; there are none\n  -unflatten\n   ^"),
        (
            "canonicalize,+unflatten<canonical",
            "there is no 'canonical' in the pipeline; did you mean 'canonicalize'?\n"
            "  canonicalize,+unflatten<canonical\n                          ^",
        ),
        ("+", "expected the name of a pass\n  +\n   ^"),
        ("canonicalize,-", "expected the name of a pass\n  canonicalize,-\n                ^"),
        ("@", "expected the name of a stock pipeline\n  @\n   ^"),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as error:
        Pipeline.parse(text)
    assert str(error.value) == message


def test_uses_of_a_stock_pipeline_count() -> None:
    assert [id for id, _ in Pipeline.parse("@ai100,canonicalize#2")][-1] == "canonicalize#2"
