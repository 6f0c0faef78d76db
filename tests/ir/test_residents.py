"""Kinds of retained states: a row says all that names, order, facts and axes need."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qeff_ir.errors import PipelineError, VerificationError
from qeff_ir.ir import residents
from qeff_ir.ir.module import Module
from qeff_ir.ir.residents import KINDS, Kind, Resident
from tests import support

FLOAT = ir.DataType.FLOAT


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> Kind:
    """A kind of another distribution, whose context axis is the first."""
    kind = Kind("features", "vision_features.{layer}", "replace", context_axis=1)
    monkeypatch.setitem(KINDS, kind.name, kind)
    return kind


def test_a_row_is_enough_for_a_kind(features: Kind) -> None:
    state = Resident(3, features.name, ("batch_size", "images", 8), FLOAT, index=1)
    assert (state.input, state.output) == ("vision_features.3.1", "vision_features.3.1_RetainedState")
    assert state.has_slots and state.ctx_dim == "images"
    value = Resident(3, "value", ("batch_size", 1, "ctx_len", 4), FLOAT)
    assert value.order < state.order and value.ctx_dim == "ctx_len"


def test_a_kind_of_another_distribution_is_in_the_facts(features: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    module = support.lowered("llama")
    module.residents = [Resident(0, features.name, ("batch_size", "images"), FLOAT)]
    module.write_facts()
    assert Module.with_facts(module.model).residents == module.residents
    module.residents = [Resident(0, features.name, ("batch_size",), FLOAT)]  # without its context axis
    module.write_facts()
    with pytest.raises(VerificationError, match=r"the resident vision_features.0 has the shape \['batch_size'\]"):
        Module.with_facts(module.model)
    monkeypatch.delitem(KINDS, features.name)
    with pytest.raises(VerificationError, match="there is no kind of resident 'features': there are key, value"):
        Module.with_facts(module.model)


@pytest.mark.parametrize(("name", "taken"), [("key", "other"), ("other", "past_key.{layer}")])
def test_names_of_kinds_are_their_own(name: str, taken: str) -> None:
    with pytest.raises(PipelineError, match=f"two kinds of resident are named '{name}' or '{taken}'; rename one"):
        residents.define(Kind(name, taken, "append"))


def test_only_states_that_keep_every_slot_can_be_rewound() -> None:
    shape = ("batch_size", 1, "ctx_len", 4)
    assert Resident(0, "key", shape, FLOAT).rewindable
    assert not Resident(0, "key", shape, FLOAT, window=3, ring=True).rewindable
    assert not any(Resident(0, kind, shape, FLOAT).rewindable for kind in ("conv", "recurrent"))
