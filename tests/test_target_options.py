"""Options by name: taken by the target, read as another's, or refused; nothing is ignored in silence."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from backends import find_backend, option_types
from backends.ai100.options import Ai100Options
from backends.options import CompileOptions
from qeff_ir.errors import CompileError
from qeff_ir.target_options import as_given, read_options
from tests import support
from tests.examples.reference_target import ReferenceBackend

AI100, ORT = find_backend("ai100"), find_backend("onnxruntime")


def test_fields_are_taken_and_the_rest_are_flags() -> None:
    given = {"ctx_len": 64, "num_cores": 4, "mxfp6_matmul": True, "mos": 1, "mos_file": Path("/x/y.yaml")}
    flags = {"mos": 1, "mos_file": "/x/y.yaml"}
    read = read_options(AI100, given)
    assert read == Ai100Options(ctx_len=64, num_cores=4, mxfp6_matmul=True, flags=flags)
    assert read_options(AI100, as_given(read)) == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_cores": True}, "num_cores must be a whole number of at least 1, not True"),
        ({"num_devices": 0}, "num_devices must be a whole number of at least 1, not 0"),
        ({"weight_free": None}, "weight_free must be True or False, not None"),
        ({"qnn_config": 3}, "qnn_config must be a text or None, not 3"),
        ({"seq_len": (8, True)}, "seq_len must be whole numbers of at least 1, not True"),
        ({"mos": {1}}, "the flag mos is {1}: give a text, a number, or a list of them"),
    ],
)
def test_values_of_another_type_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        read_options(AI100, given)


def test_options_of_another_target_are_named() -> None:
    with pytest.warns(UserWarning, match="^onnxruntime has no option mxfp6_matmul, mos: of ai100, it does nothing"):
        assert read_options(ORT, {"ctx_len": 64, "num_cores": 16, "mxfp6_matmul": True, "mos": 1}).ctx_len == 64


def test_what_another_target_does_anyway_is_not_worth_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_options(ORT, {"num_cores": 16, "mxfp6_matmul": False}) == CompileOptions()


def test_what_no_target_takes_is_refused() -> None:
    with pytest.raises(CompileError, match="has no flag enable_qn"):
        read_options(ORT, {"enable_qn": True})
    with pytest.raises(CompileError, match=r"\[cores\] num_cores is 99"):
        read_options(ORT, {"num_cores": 99})


def test_a_target_from_outside_has_options_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Slices(CompileOptions):
        slices: int = field(default=2, metadata={"help": "Slices."})

    class Sliced(ReferenceBackend):
        Options: ClassVar[type[CompileOptions]] = Slices

    assert read_options(Sliced(), {"slices": 3}) == Slices(slices=3)
    monkeypatch.setattr("qeff_ir.target_options.preferred", list)
    with pytest.raises(CompileError, match=r"^reference has no option slice: it takes prefill_seq_len, .*, slices$"):
        read_options(Sliced(), {"slice": 3})


def test_the_command_line_has_the_options_of_the_targets_here() -> None:
    assert option_types() == [Ai100Options]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 8}, "has no option seq_len: its shapes are prefill_seq_len, ctx_len, batch_size"),
        ({"graph_name": "x"}, "has no option graph_name"),
    ],
)
def test_shapes_of_another_task_are_refused(options: dict[str, Any], message: str) -> None:
    from qeff_ir import QEFFAutoModelForCausalLM

    model = QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))
    with pytest.raises(CompileError, match=message):
        model.compile(target="onnxruntime", **options)
