from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from backends.ai100 import operators, specializations
from backends.ai100.backend import BACKEND
from backends.ai100.emulator import EmulatedSession
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.module import RunPhase, Specialization
from qeff_ir.numerics import bound, depth
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.session import Session
from qeff_ir.testing.trace import Trace, compare, reference_trace, session_trace
from tests import support

from .conftest import Tiny

STEPS = 20


@pytest.fixture(scope="module")
def session(tiny: Tiny) -> Session:
    opened = BACKEND.open(tiny.folder, threads=1)
    assert isinstance(opened, EmulatedSession)
    return opened


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    numbers = np.random.default_rng(3)
    return [numbers.integers(4, 97, size).tolist() for size in (19, 5)]


@pytest.fixture(scope="module")
def reference(tiny: Tiny, prompts: list[list[int]]) -> Trace:
    return reference_trace(tiny.model, prompts, STEPS)


def test_it_answers_as_transformers_does(
    tiny: Tiny, session: Session, prompts: list[list[int]], reference: Trace
) -> None:
    """Prompts of several chunks and of less than one; rings that wrap more than once; idle rows."""
    found = compare(session_trace(Decoder(session), prompts, reference.tokens), reference)
    assert found.agreement == STEPS
    assert found.error <= bound(depth(tiny.module))


def test_reset_forgets(session: Session, prompts: list[list[int]]) -> None:
    decoder = Decoder(session)
    first = decoder.prefill(prompts)
    decoder.decode([5, 6])
    np.testing.assert_array_equal(decoder.prefill(prompts), first)
    other = decoder.prefill([prompts[1], prompts[0]])
    assert np.abs(other - first).max() > 1e-3


def test_a_reset_sets_states_to_zero(tmp_path: Path) -> None:
    """Shown by a graph that counts its runs in a state; models do not look at what they have not written."""
    ids, positions = (
        helper.make_tensor_value_info(n, TensorProto.INT64, [1, 1]) for n in ("input_ids", "position_ids")
    )
    names = ("past_key.0", "past_key.0_RetainedState", "logits")
    past, retained, logits = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 1]) for n in names)
    one = numpy_helper.from_array(np.ones((1, 1, 1), np.float32), "one")
    nodes = [helper.make_node("Add", ["past_key.0", "one"], [name]) for name in names[1:]]
    graph = helper.make_graph(nodes, "g", [ids, positions, past], [logits, retained], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    sizes = Specialization("Decode", "decode", {"batch_size": 1, "seq_len": 1})
    (tmp_path / "specializations.json").write_text(specializations.dumps([sizes], "named"))
    session = EmulatedSession(tmp_path / "m.onnx", threads=1)
    feeds: dict[str, Any] = dict.fromkeys(("input_ids", "position_ids"), np.zeros((1, 1), np.int64))
    counted = []
    for runs in (3, 2, 1):
        session.reset()
        counted += [float(session.run(feeds)["logits"].item()) for _ in range(runs)]
    assert counted == [1, 2, 3, 1, 2, 1]


@pytest.mark.parametrize("name", ["gpt-oss", "falcon-h1", "qwen3-next"])
def test_nothing_that_an_earlier_request_has_left_is_read(name: str, prompts: list[list[int]]) -> None:
    """A device clears no state between requests: NaN in all of them changes no number."""
    decoder = support.plain_decoder(name, "ai100", batch_size=2, prefill_seq_len=8, ctx_len=40)
    session = decoder.session
    assert isinstance(session, EmulatedSession)

    def answer(fill: float) -> list[np.ndarray]:
        def leave() -> None:
            for value in (*session._states.values(), *session._spare.values()):
                value.update_inplace(np.full(value.shape(), fill, np.float32))

        session.reset = leave
        return [decoder.prefill(prompts), *(decoder.decode([5 + step, 9]) for step in range(6))]

    clean, left = answer(0.0), answer(np.nan)
    assert np.abs(clean[0][0] - clean[0][1]).max() > 1e-3
    np.testing.assert_array_equal(left, clean)


def test_padding_changes_nothing(session: Session) -> None:
    ids = np.full((2, 8), 7)
    positions = np.tile([0, 1, 2, -1, -1, -1, -1, -1], (2, 1))
    results = []
    for junk in (0, 96):
        session.reset()
        ids[:, 3:] = junk
        session.run({"input_ids": ids, "position_ids": positions})
        step = {"input_ids": np.array([[9], [9]]), "position_ids": np.array([[3], [3]])}
        results.append(session.run(step)["logits"])
    np.testing.assert_array_equal(*results)


def test_an_artifact_without_our_facts_is_driven_too(folder: Path, prompts: list[list[int]], session: Session) -> None:
    """One that another compiler's front end wrote: names tell tokens, positions, logits and states."""
    expected = Decoder(session).prefill(prompts)
    file = next(folder.glob("*.onnx"))
    model = onnx.load(str(file), load_external_data=False)
    del model.metadata_props[:]
    file.write_bytes(model.SerializeToString())
    bare = EmulatedSession(file, threads=1)
    assert [port.name for port in bare.interface.inputs] == ["input_ids", "position_ids"]
    np.testing.assert_array_equal(Decoder(bare).prefill(prompts), expected)


def test_it_reads_flat_specializations(folder: Path, prompts: list[list[int]], session: Session) -> None:
    path = folder / "specializations.json"
    entries = json.loads(path.read_text())["specializations"]
    path.write_text(json.dumps({"specializations": [e["symbols"] for e in entries]}))
    flat = EmulatedSession(next(folder.glob("*.onnx")), threads=1)
    assert flat.specializations == session.specializations
    np.testing.assert_array_equal(Decoder(flat).prefill(prompts), Decoder(session).prefill(prompts))
    entries[1]["symbols"]["ctx_len"] = "41"
    path.write_text(json.dumps({"specializations": [e["symbols"] for e in entries]}))
    assert [(s.name, s.phase) for s in specializations.load(path, session.specializations)] == [
        ("Prefill", "prefill"),
        ("Graph_1", "forward"),
    ]


def test_phases_are_those_of_the_module_and_names_those_of_the_contract(tmp_path: Path) -> None:
    """A prefill of one token is none of decode, and a name tells nothing."""
    runs: dict[str, tuple[RunPhase, int]] = {
        "a": ("prefill", 1), "b": ("decode", 4), "c": ("prefill", 8), "Decode": ("forward", 3)
    }  # fmt: skip
    module = [Specialization(n, phase, {"seq_len": size}) for n, (phase, size) in runs.items()]
    path = tmp_path / specializations.FILE
    path.write_text(specializations.dumps(module[:3], "named"))
    found = specializations.load(path, module)
    assert [s.name for s in found] == ["Prefill_0", "Decode", "Prefill_1"]
    same = [Specialization(name, "forward", {"seq_len": n}) for n, name in enumerate(("A", "A", "A_0"), 1)]
    path.write_text(specializations.dumps(same, "named"))
    assert [s.name for s in specializations.load(path)] == ["A_1", "A_2", "A_0"]
    assert [s.phase for s in found] == ["prefill", "decode", "prefill"]
    assert {s.phase for s in specializations.load(path)} == {"forward"}
    path.write_text(specializations.dumps(module, "flat"))
    assert specializations.load(path, module) == module


def test_only_compiled_shapes_run(session: Session) -> None:
    def feed(*shape: int) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros(shape, np.int64), "position_ids": np.zeros(shape, np.int64)}

    assert session.run(feed(2, 8))["logits"].shape == (2, 1, 97)
    for shape in ((2, 4), (1, 8), (1, 1), (2, 8, 1)):
        with pytest.raises(RuntimeInputError, match="not of a compiled shape"):
            session.run(feed(*shape))
    with pytest.raises(RuntimeInputError, match="not of a compiled shape"):
        session.run({**feed(2, 8), "position_ids": np.zeros((2, 1), np.int64)})
    with pytest.raises(RuntimeInputError, match="give int64"):
        session.run({**feed(2, 8), "input_ids": np.zeros((2, 8), np.int32)})
    with pytest.raises(RuntimeInputError, match=r"the inputs are input_ids and position_ids, not input_ids$"):
        session.run({"input_ids": np.zeros((2, 8), np.int64)})


def test_states_have_one_size_in_all_specializations(folder: Path) -> None:
    path = folder / "specializations.json"
    sizes = json.loads(path.read_text())
    sizes["specializations"][1]["symbols"]["sliding_window"] = "12"
    path.write_text(json.dumps(sizes))
    with pytest.raises(PackageError, match=r"the states of .* differ in size between its specializations"):
        BACKEND.open(folder)


def test_it_runs_the_artifact(folder: Path) -> None:
    """A symbol without a size, and weights that are gone, are noticed."""
    path = folder / "specializations.json"
    text = path.read_text()
    path.write_text(text.replace('"sliding_window"', '"other"'))
    with pytest.raises(PackageError, match="'sliding_window', which Prefill does not fix"):
        BACKEND.open(folder)
    path.write_text(text)
    for file in (folder / "weights").iterdir():
        file.unlink()
    with pytest.raises(PackageError, match="ONNX Runtime cannot load"):
        BACKEND.open(folder)


@pytest.mark.parametrize(("slot", "expected"), [(1, 0.0), (4, np.nan), (-1, np.nan)])
def test_a_graph_that_looks_at_a_slot_that_is_not_read_shows_it(tmp_path: Path, slot: int, expected: float) -> None:
    gather = operators.CtxGather.to_function_proto()
    constants = {"slots": np.array([[[slot]]]), "count": np.array(1)}
    ids, positions = (
        helper.make_tensor_value_info(n, TensorProto.INT64, [1, 1]) for n in ("input_ids", "position_ids")
    )
    past = helper.make_tensor_value_info("past_key.0", TensorProto.FLOAT, [1, 1, 4, 1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, 1, 1])
    retained = helper.make_tensor_value_info("past_key.0_RetainedState", TensorProto.FLOAT, [1, 1, 4, 1])
    nodes = [
        helper.make_node("Identity", ["past_key.0"], ["past_key.0_RetainedState"]),
        helper.make_node("CtxGather", ["past_key.0", "slots", "count"], ["logits"], domain=gather.domain),
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [ids, positions, past], [logits, retained], weights)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(gather.domain, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, functions=[gather], ir_version=8), tmp_path / "m.onnx")
    sizes = Specialization("Decode", "decode", {"batch_size": 1, "seq_len": 1, "ctx_len": 4})
    (tmp_path / "specializations.json").write_text(specializations.dumps([sizes], "named"))
    one = np.zeros((1, 1), np.int64)
    answer = EmulatedSession(tmp_path / "m.onnx", threads=1).run({"input_ids": one, "position_ids": one})["logits"]
    np.testing.assert_array_equal(answer, np.full((1, 1, 1, 1), expected, np.float32))
