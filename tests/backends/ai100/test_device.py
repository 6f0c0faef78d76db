from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from backends.ai100 import emit
from backends.ai100.backend import BACKEND
from backends.ai100.device import DeviceError, DeviceSession
from backends.ai100.emulator import EmulatedSession
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.snapshot import load_module
from qeff_ir.runtime.decoder import Decoder

from . import fake_qaicrt

SHAPES = [(2, 8), (2, 1)]


def install(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, int]], prefix: str = "", fail: str = ""
) -> list[str]:
    return put(monkeypatch, fake_qaicrt.descriptor(shapes, prefix), fail)


def put(monkeypatch: pytest.MonkeyPatch, descriptor: bytes, fail: str = "") -> list[str]:
    rt, api, log = fake_qaicrt.modules(descriptor, fail=fail)
    rt.__spec__ = sys.__spec__  # makes `find_spec` find it
    monkeypatch.setitem(sys.modules, "qaicrt", rt)
    monkeypatch.setitem(sys.modules, "QAicApi_pb2", api)
    return log


@pytest.fixture
def compiled(folder: Path) -> Path:
    (folder / "qpc").mkdir()
    (folder / "qpc" / "programqpc.bin").touch()
    return folder


def test_a_request_follows_the_protocol(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch, SHAPES)
    session = BACKEND.open(compiled)
    assert isinstance(session, DeviceSession)
    decoder = Decoder(session)
    first = decoder.prefill([[3, 4, 5], list(range(10))])
    # Row 0 idles in the first of two chunks; sums of ids, last positions, runs.
    np.testing.assert_array_equal(first[:, :3], [[12, 2, 2], [17, 9, 2]])
    np.testing.assert_array_equal(decoder.decode([7, 8])[:, :3], [[7, 3, 3], [8, 10, 3]])
    opened = ["context=0 queue=0", "getIoDescriptor", "device=0 mapping= timeout=60000", "load", "activate"]
    assert log[:9] == [*opened, "setData", "enqueue", "waitForCompletion", "getData"]
    session.close()
    assert log[-1] == "deactivate"


def test_a_program_of_one_specialization_has_no_allowed_shapes(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [(2, 1)])
    path = compiled / "specializations.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({"specializations": data["specializations"][1:]}))
    session = DeviceSession(compiled)
    one = np.array([[5], [6]])
    assert session.run({"input_ids": one, "position_ids": one})["logits"][:, 0, 0].tolist() == [5, 6]


def test_names_lose_the_graphs_prefix(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, SHAPES, prefix="graph/")
    assert Decoder(DeviceSession(compiled)).prefill([[1], [2]]).shape == (2, fake_qaicrt.VOCAB)


def test_logits_are_float32_whatever_the_program_gives(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for kind in ("FLOAT_TYPE", "FLOAT_16_TYPE"):
        put(monkeypatch, fake_qaicrt.descriptor(SHAPES, logits=kind))
        decoder = Decoder(DeviceSession(compiled))
        answers.append((decoder.prefill([[3, 4, 5], list(range(10))]), decoder.decode([7, 8])))
    for one, two in zip(*answers, strict=True):
        assert one.dtype == two.dtype == np.float32 and two.flags.writeable and one.any()
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("kind", ["BFLOAT16_TYPE", "NEW_TYPE"])
def test_logits_of_a_type_that_would_be_misread_are_refused(
    kind: str, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, fake_qaicrt.descriptor(SHAPES, logits=kind))
    with pytest.raises(PackageError, match=f"buffer logits .* does not know .{fake_qaicrt.TYPES[kind]}.$"):
        DeviceSession(compiled)


@pytest.mark.parametrize("name", ["position_ids", "logits"])
def test_a_program_without_a_buffer_of_the_package_is_refused(
    name: str, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fake_qaicrt.descriptor(SHAPES).replace(f'"{name}"'.encode(), b'"output"')
    put(monkeypatch, other)
    with pytest.raises(PackageError, match=f"has no buffer {name}: compile the package again"):
        DeviceSession(compiled)


def test_devices_come_from_the_partition(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch, SHAPES)
    (compiled / "mdp_ts_4.json").write_text(json.dumps(emit.tensor_slicing(4, 16)))
    command = json.loads((compiled / "compile_command.json").read_text())
    command["argv"].append("-mdp-load-partition-config=mdp_ts_4.json")
    (compiled / "compile_command.json").write_text(json.dumps(command))
    DeviceSession(compiled, timeout_ms=5)
    assert "context=0:1:2:3 queue=0" in log and "device=None mapping=0:1:2:3 timeout=5" in log


def test_a_device_of_several_partitions_counts_once(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(monkeypatch, SHAPES)
    partition = emit.tensor_slicing(2, 16)
    first = partition["partitions"][0]
    partition["partitions"] = [first, {**first, "name": "Partition1"}]
    (compiled / "two.json").write_text(json.dumps(partition))
    command = json.loads((compiled / "compile_command.json").read_text())
    command["argv"].append("-mdp-load-partition-config=two.json")
    (compiled / "compile_command.json").write_text(json.dumps(command))
    DeviceSession(compiled)
    assert "context=0:1 queue=0" in log and "device=None mapping=0:1 timeout=60000" in log


@pytest.mark.parametrize(
    ("devices", "context", "program"),
    [([3], "context=3 queue=3", "device=3 mapping= "), ([5, 7], "context=5:7 queue=5", "device=None mapping=5:7 ")],
)
def test_the_devices_that_are_asked_for_are_taken(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, devices: list[int], context: str, program: str
) -> None:
    log = install(monkeypatch, SHAPES)
    DeviceSession(compiled, devices=devices)
    assert context in log
    assert [line for line in log if line.startswith(program)] == [f"{program}timeout=60000"]


def test_only_compiled_shapes_run(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, SHAPES)
    session = DeviceSession(compiled)
    wrong = np.zeros((2, 4), np.int64)
    with pytest.raises(RuntimeInputError, match=r"not of a compiled shape: \[2, 8\] or \[2, 1\]"):
        session.run({"input_ids": wrong, "position_ids": wrong})
    with pytest.raises(RuntimeInputError, match="the inputs are input_ids and position_ids"):
        session.run({"input_ids": wrong})


def test_a_program_of_other_shapes_is_refused(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [(2, 16), (2, 1)])
    with pytest.raises(PackageError, match=r"does not take input_ids \[2, 8\]"):
        DeviceSession(compiled)


@pytest.mark.parametrize(
    "call", ["getIoDescriptor", "load", "activate", "setData", "enqueue", "waitForCompletion", "getData"]
)
def test_every_failure_is_reported(compiled: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    install(monkeypatch, SHAPES, fail=call)
    one = np.zeros((2, 1), np.int64)
    with pytest.raises(DeviceError, match=r"the AI 100 runtime could not .* \(QS_ERROR\): see the driver's log"):
        DeviceSession(compiled).run({"input_ids": one, "position_ids": one})


def test_without_a_binary_or_a_runtime_the_emulator_opens(
    folder: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(BACKEND.open(compiled, threads=1), EmulatedSession)
    install(monkeypatch, SHAPES)
    (compiled / "qpc" / "programqpc.bin").unlink()
    assert isinstance(BACKEND.open(compiled, threads=1), EmulatedSession)


def test_adapters_travel_once_and_stay(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, sizes = load_module(BACKEND.model_file(adapted)), {"batch_size": 2, "ctx_len": 40}
    adapters = {a.input: [a.slots + 1, *a.sizes] for a in module.adapters}
    states = {s.input: [sizes[d] if isinstance(d, str) else d for d in s.shape] for s in module.states}
    log = put(monkeypatch, fake_qaicrt.written_descriptor(SHAPES, states, adapters))
    session = BACKEND.open(adapted)
    assert isinstance(session, DeviceSession)
    decoder = Decoder(session)
    name, *others = [r.input for r in session.interface.residents if r.part is not None]
    assert {name, *others} == set(adapters) and len(others) == 7  # A and B of two layers' two projections

    def sums(rows: list[int]) -> list[float]:
        log.clear()
        decoder.lora_ids[:] = rows
        return decoder.decode([1, 1])[:, 3].tolist()

    decoder.prefill([[1], [2]])
    shape = adapters[name][1:]
    session.write(name, np.full(shape, 0.5, np.float32), slot=1)
    assert sums([0, 1]) == [0.0, 0.5 * np.prod(shape)]
    assert [line for line in log if line.startswith("takes")] == [f"takes {name}"]
    assert sums([1, 0]) == [0.5 * np.prod(shape), 0.0]  # kept by the device
    assert not any(line.startswith("takes") for line in log)
    session.write(name, np.ones(shape, np.float32), slot=2)
    assert sums([1, 2]) == [0.5 * np.prod(shape), np.prod(shape)]


def test_a_forward_pass_follows_the_protocol(forward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (forward / "qpc").mkdir()
    (forward / "qpc" / "programqpc.bin").touch()
    # The program lists its shapes in another order than the package.
    log = put(monkeypatch, fake_qaicrt.forward_descriptor([(2, 16), (2, 8)]))
    session = BACKEND.open(forward)
    assert isinstance(session, DeviceSession) and not session.free
    assert [s.symbols["seq_len"] for s in session.specializations] == [8, 16]
    for run, length in enumerate((16, 8, 16), 1):
        ids = np.arange(2 * length).reshape(2, length)
        mask = np.array([[1] * length, [0] * length])
        outputs = session.run({"input_ids": ids, "attention_mask": mask})
        assert list(outputs) == ["output"] and outputs["output"].dtype == np.float32
        # Sums of ids, the greatest of the mask, runs.
        np.testing.assert_array_equal(outputs["output"][:, :3], np.stack([ids.sum(1), [1, 0], [run, run]], 1))
    assert log.count("enqueue") == 3
    wrong = np.zeros((2, 12), np.int64)
    with pytest.raises(RuntimeInputError, match=r"not of a compiled shape: \[2, 8\] or \[2, 16\]"):
        session.run({"input_ids": wrong, "attention_mask": wrong})
    with pytest.raises(RuntimeInputError, match=r"the inputs are input_ids and attention_mask, not input_ids$"):
        session.run({"input_ids": wrong})


def test_an_output_has_the_length_of_its_own_specialization(forward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (forward / "qpc").mkdir()
    (forward / "qpc" / "programqpc.bin").touch()
    put(monkeypatch, fake_qaicrt.forward_descriptor([(2, 16), (2, 8)], of_tokens=True))
    session = BACKEND.open(forward)
    for length in (8, 16, 8):
        ids = np.arange(2 * length).reshape(2, length)
        output = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["output"]
        assert output.shape == (2, length, fake_qaicrt.VOCAB)
        np.testing.assert_array_equal(output[:, -1, 0], ids.sum(1))


def test_a_forward_program_of_other_shapes_is_refused(forward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (forward / "qpc").mkdir()
    (forward / "qpc" / "programqpc.bin").touch()
    put(monkeypatch, fake_qaicrt.forward_descriptor([(2, 16), (2, 4)]))
    with pytest.raises(PackageError, match=r"does not take input_ids \[2, 8\]"):
        BACKEND.open(forward)
