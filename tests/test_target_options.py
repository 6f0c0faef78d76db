"""Options by name: taken by the target, read as another's, or refused; nothing is ignored in silence."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from backends import find_backend, option_types
from backends.ai100.options import Ai100Options, own
from backends.onnxruntime.options import OnnxRuntimeOptions
from backends.options import CompileOptions
from qeff_ir.compiler import _read
from qeff_ir.errors import CompileError, PipelineError
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
        ({"seq_len": 8}, "seq_len must be whole numbers of at least 1, not 8"),
        ({"seq_len": [8, 0]}, "seq_len must be whole numbers of at least 1, not 0"),
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
        assert read_options(ORT, {"num_cores": 16, "mxfp6_matmul": False}) == OnnxRuntimeOptions()


def test_what_no_target_takes_is_refused() -> None:
    with pytest.raises(CompileError, match="has no flag enable_qn"):
        read_options(ORT, {"enable_qn": True})
    with pytest.raises(CompileError, match=r"\[cores\] num_cores is 99"):
        read_options(ORT, {"num_cores": 99})


def test_paths_are_texts_and_lists_are_tuples() -> None:
    read = read_options(AI100, {"qnn_config": Path("/x/y.json"), "seq_len": [8, 16]})
    assert read == Ai100Options(qnn_config="/x/y.json", seq_len=(8, 16))


def test_an_option_is_not_given_as_a_flag_too() -> None:
    with pytest.raises(CompileError, match=r"^ctx_len is an option of its own: give it as that, not as a flag$"):
        as_given(Ai100Options(ctx_len=256, flags={"ctx_len": 64}))


def test_what_is_read_can_be_read_again() -> None:
    given = {"ctx_len": 64, "prefill_seq_len": 8, "mos": 1}
    source, read = support.Lowered("llama"), read_options(AI100, given)
    assert _read(AI100, source, read) == _read(AI100, source, given) == read


def test_a_target_from_outside_has_options_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Slices(CompileOptions):
        slices: int = field(default=2, metadata={"help": "Slices."})
        level: int = field(default=0, metadata={"help": "Level.", "least": 0})
        num_cores: int = field(default=4, metadata={"help": "Cores."})

    class Sliced(ReferenceBackend):
        Options: ClassVar[type[CompileOptions]] = Slices

    assert read_options(Sliced(), {"slices": 3}) == Slices(slices=3)
    assert read_options(Sliced(), as_given(Slices())) == Slices()
    with pytest.raises(CompileError, match=r"^level must be a whole number of at least 0, not -1$"):
        read_options(Sliced(), {"level": -1})
    assert own(Slices(ctx_len=64, num_cores=2)) == Ai100Options(ctx_len=64)
    monkeypatch.setattr("qeff_ir.target_options.preferred", list)
    with pytest.raises(CompileError, match=r"^reference has no option slice: it takes prefill_seq_len, .*, num_cores$"):
        read_options(Sliced(), {"slice": 3})


def test_the_command_line_has_the_options_of_the_targets_here() -> None:
    assert option_types() == [Ai100Options, OnnxRuntimeOptions]


def test_two_targets_with_one_option_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from qeff_ir.cli import request

    monkeypatch.setattr(request, "option_types", lambda: [Ai100Options, Ai100Options])
    with pytest.raises(PipelineError, match="two options of the command line are named 'num_cores'"):
        request._of_targets()


@pytest.mark.parametrize(
    ("given", "chunk"),
    [({}, 32), ({"ctx_len": 16}, 16), ({"ctx_len": 16, "prefill_seq_len": None}, 16), ({"prefill_seq_len": 4}, 4)],
)
def test_a_prefill_run_is_no_longer_than_the_context(given: dict[str, Any], chunk: int) -> None:
    assert read_options(ORT, given).prefill_seq_len == chunk


def test_only_what_is_given_reaches_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default of one target is not a wish for another."""
    from qeff_ir import QEFFAutoModelForCausalLM

    seen: list[dict[str, Any]] = []
    model = QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))
    monkeypatch.setattr(model, "_compile", lambda given, *_, **__: seen.append(given))
    model.compile(ctx_len=64)
    assert seen == [{"prefill_seq_len": None, "ctx_len": 64, "batch_size": 1}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 8}, "has no option seq_len: its shapes are prefill_seq_len, ctx_len, batch_size"),
        ({"graph_name": "x"}, "has no flag graph_name"),
        ({"seq_len": ()}, "has no option seq_len"),
    ],
)
def test_shapes_of_another_task_are_refused(options: dict[str, Any], message: str) -> None:
    from qeff_ir import QEFFAutoModelForCausalLM

    model = QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))
    with pytest.raises(CompileError, match=message):
        model.compile(target="onnxruntime", **options)
