"""Facts in a model's metadata come from anywhere: exact on the way back, and refused in one sentence when damaged."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from qeff_ir.errors import QeffError, VerificationError
from qeff_ir.ir.module import Dim, Facts, OutputSizes, Padding, Specialization, read_facts
from qeff_ir.ir.residents import Resident
from tests import support

VALUES: list[Any] = [
    None, True, 0, 1, -1, 3, 2**31, 2**70, 1.5, float("nan"), float("inf"), "", "x", "key", "FLOAT", "STRING",
    "../../x", "a\nb", "\x00", "\ud800", "x" * 5000, [], {}, [[]], [{}], {"": 1}, [None], ["batch_size", 1], {"x": {}},
]  # fmt: skip


def complete() -> dict[str, Any]:
    """Facts with an item in every list."""
    module = support.canonical("gemma2")
    module.specializations = [Specialization("Prefill", "prefill", {"batch_size": 2, "seq_len": 8, "ctx_len": 32})]
    module.residents.append(Resident(0, "lora-a", (5, 16, 4), ir.DataType.FLOAT, path="model.layers.0.q"))
    module.properties = {"canonical"}
    module.padding = Padding(7, (OutputSizes("logits", ("batch_size", "seq_len//2", 8)),), True)
    return json.loads(json.dumps(module.facts()))


def test_every_field_comes_back() -> None:
    data = complete()
    found = read_facts(json.dumps(data))
    assert {f.name for f in dataclasses.fields(Facts)} == data.keys()
    assert all(getattr(found, name) for name in data)
    assert isinstance(found.padding, Padding) and found.padding.sizes("logits") == ("batch_size", "seq_len//2", 8)
    for kind, part in ((Resident, "residents"), (Dim, "dims")):
        assert all(type(item) is kind for item in getattr(found, part))
        assert {f.name for f in dataclasses.fields(kind)} == data[part][0].keys()


def spoiled(change: Callable[[dict[str, Any]], Any]) -> str:
    data = complete()
    change(data)
    return json.dumps(data)


SPOILED: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "cannot be read as JSON"),
    "deep": ("[" * 100_000, "cannot be read as JSON"),
    "deep, within Python's limit": ('{"a":' * 500 + "1" + "}" * 500, "nested more than 100 deep"),
    "a list": ("[]", "the module is a list, not an object"),
    "no version": (spoiled(lambda d: d.pop("version")), "the module has no version"),
    "version of another type": (spoiled(lambda d: d.update(version="2")), "the version of the module is '2'"),
    "no residents": (spoiled(lambda d: d.pop("residents")), "the module has no residents"),
    "unknown field": (spoiled(lambda d: d.update(extra=1)), "the module has the unknown field 'extra'"),
    "unknown field of a resident": (
        spoiled(lambda d: d["residents"][1].update(extra=1)),
        "number 1 of the residents of the module has the unknown field 'extra'",
    ),
    "name": (spoiled(lambda d: d.update(name="../../x")), "which is not a plain name"),
    "name of an option": (spoiled(lambda d: d.update(name="-rf")), "which is not a plain name"),
    "name of another type": (spoiled(lambda d: d.update(name=5)), "the name of the module is 5"),
    "token below 0": (spoiled(lambda d: d["padding"].update(fill=-1)), "the fill of padding of the module is -1"),
    "size of an output": (spoiled(lambda d: d["padding"]["outputs"][0].update(sizes=[0])), "number 0 of the sizes of"),
    "layer below 0": (
        spoiled(lambda d: d["residents"][0].update(layer=-1)),
        "the layer of number 0 of the resid",
    ),
    "layer as truth": (spoiled(lambda d: d["residents"][0].update(layer=True)), "the layer of number 0"),
    "kind": (spoiled(lambda d: d["residents"][0].update(kind="keys")), "there is no kind of resident 'keys'"),
    "kind as a list": (spoiled(lambda d: d["residents"][0].update(kind=["key"])), "the kind of number 0"),
    "size 0": (spoiled(lambda d: d["residents"][0].update(shape=["b", 0, 1, 1])), "number 1 of the shape of number 0"),
    "size too large": (spoiled(lambda d: d["residents"][0].update(shape=["b", 2**32, 1, 1])), "is 4294967296"),
    "few axes": (spoiled(lambda d: d["residents"][0].update(shape=["b", 1])), "past_key.0 has the shape ['b', 1]"),
    "shape as text": (spoiled(lambda d: d["residents"][0].update(shape="batch")), "the shape of number 0"),
    "element type": (spoiled(lambda d: d["residents"][0].update(dtype="STRING")), "the dtype of number 0"),
    "window": (spoiled(lambda d: d["residents"][0].update(window=0)), "the window of number 0"),
    "maximum": (spoiled(lambda d: d["dims"][0].update(maximum="x")), "the maximum of number 0 of the dims"),
    "two dims": (spoiled(lambda d: d["dims"].append(d["dims"][0])), "two dims have one name"),
    "symbols": (spoiled(lambda d: d["specializations"][0].update(symbols=[])), "the symbols of number 0"),
    "phase": (spoiled(lambda d: d["specializations"][0].update(phase="run")), "the phase of number 0 of the specializ"),
    "no phase": (
        spoiled(lambda d: d["specializations"][0].pop("phase")),
        "number 0 of the specializations of the modul",
    ),
    "size of a symbol": (spoiled(lambda d: d["specializations"][0]["symbols"].update(seq_len="8")), "the seq_len of"),
    "property": (spoiled(lambda d: d.update(properties=[5])), "number 0 of the properties of the module is 5"),
    "two residents": (spoiled(lambda d: d["residents"].append(d["residents"][0])), "two residents have one name"),
    "retained": (spoiled(lambda d: d["residents"][-1].update(retained=1)), "the retained of number 4 of the residents"),
    "state without an output": (
        spoiled(lambda d: d["residents"][0].update(retained=False)),
        "past_key.0 is of the kind 'key'",
    ),
    "path of a state": (spoiled(lambda d: d["residents"][0].update(path="q")), "past_key.0 is of the kind 'key'"),
    "adapter without a path": (spoiled(lambda d: d["residents"][-1].update(path=None)), "is of the kind 'lora-a'"),
    "size of an adapter": (
        spoiled(lambda d: d["residents"][-1].update(shape=["b", 1, 1])),
        "lora_a_weights has the shape ['b'",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_damaged_facts_are_told_by_their_place(case: str) -> None:
    text, reason = SPOILED[case]
    with pytest.raises(VerificationError) as error:
        read_facts(text)
    assert error.value.code == "facts"
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_ten_thousand_mutations_are_read_or_refused() -> None:
    good, draw, refused = complete(), random.Random(0), 0
    for _ in range(10_000):
        data = json.loads(json.dumps(good))
        for _ in range(draw.choice((1, 1, 2))):
            mutate(data, draw)
        text = json.dumps(data)
        if draw.random() < 0.1:
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(('"', "[", "}", "\\", "9", "")) + text[at + 1 :]
        try:
            found = read_facts(text)
        except QeffError:
            refused += 1
        else:
            _ = [s.order for s in found.residents], [s.input for s in found.residents]
            assert all(s.ctx_dim for s in found.residents if s.has_slots)
    assert 5_000 < refused < 10_000


def mutate(data: Any, draw: random.Random) -> None:
    """Replace, drop or add something, anywhere."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(data[key], dict | list) and draw.random() < 0.8:
            data = data[key]
            continue
        match draw.randrange(4):
            case 0:
                del data[key]
            case 1 if isinstance(data, dict):
                data[str(draw.choice(VALUES))[:9]] = copy.deepcopy(draw.choice(VALUES))
            case 2 if isinstance(data, list):
                data.append(copy.deepcopy(draw.choice([*VALUES, *data])))
            case _:
                data[key] = copy.deepcopy(draw.choice(VALUES))
        return
