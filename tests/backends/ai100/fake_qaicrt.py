"""A `qaicrt` and a `QAicApi_pb2` in pure Python that follow contract §5.1 and fail when it is not followed.

The "device" answers with logits that say what it was given: entry 0 is the sum of the ids, entry 1 the last position,
entry 2 the number of runs since activation, entry 3 the sum over the adapters that it keeps, of the row's slot.
"""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

VOCAB = 5
NAMES = (
    "input_ids",
    "position_ids",
    "past_key.0",
    "past_value.0",
    "logits",
    "past_key.0_RetainedState",
    "past_value.0_RetainedState",
)
TYPES = {"FLOAT_TYPE": 32, "FLOAT_16_TYPE": 1, "INT64_I_TYPE": 64, "BFLOAT16_TYPE": 16, "NEW_TYPE": 99}
"""Types of bindings by name; the last one is of another SDK."""
FORWARD = ("input_ids", "attention_mask", "output")
"""Of a program that retains nothing."""


class Binding(SimpleNamespace):
    """One of ``iodesc.selected_set.bindings``."""


def descriptor(shapes: list[tuple[int, int]], prefix: str = "", *, logits: str = "FLOAT_TYPE") -> bytes:
    """A serialized `IoDesc` for input shapes ``[batch, seq]``; one shape is described by the bindings alone.

    The type of the logits may be another one of `TYPES`, as a program may give them.
    """
    rows = [
        [[b, s], [b, s], [b, 2, 16, 4], [b, 2, 16, 4], [b, 1, VOCAB], [b, 2, 16, 4], [b, 2, 16, 4]] for b, s in shapes
    ]
    return json.dumps({"rows": rows, "prefix": prefix, "names": NAMES, "logits": logits}).encode()


def written_descriptor(
    shapes: list[tuple[int, int]],
    states: dict[str, list[int]],
    written: dict[str, list[int]],
    row: str = "lora_ids",
    returned: tuple[str, ...] = (),
) -> bytes:
    """That of a decoder with adapters in slots, or rows of pictures: states and these by name, with their shapes."""
    kept = {**states, **written}
    names = [
        "input_ids",
        "position_ids",
        *states,
        row,
        *written,
        "logits",
        *returned,
        *(n + "_RetainedState" for n in kept),
    ]
    ends = [*kept.values()]
    rows = [
        [[b, s], [b, s], *states.values(), [b, 1], *written.values(), [b, 1, VOCAB], *([[b, 1]] * len(returned)), *ends]
        for b, s in shapes
    ]
    return json.dumps({"rows": rows, "prefix": "", "names": names}).encode()


def forward_descriptor(shapes: list[tuple[int, int]], *, of_tokens: bool = False) -> bytes:
    """That of a program that retains nothing; its output has a row for each text, or for each token of it."""
    rows = [[[b, s], [b, s], [b, s, VOCAB] if of_tokens else [b, VOCAB]] for b, s in shapes]
    return json.dumps({"rows": rows, "prefix": "", "names": FORWARD}).encode()


def modules(serialized: bytes, *, fail: str = "") -> tuple[ModuleType, ModuleType, list[str]]:
    """The two modules over a program of that description, and a log of the calls; `fail` names a call to fail."""
    log: list[str] = []
    ok, bad = "QS_SUCCESS", "QS_ERROR"
    names: list[str] = json.loads(serialized)["names"]
    states = [i for i, name in enumerate(names) if "past_" in name or name.endswith("_RetainedState")]
    written = [i for i, name in enumerate(names) if f"{name}_RetainedState" in names and i not in states]
    out = next(i for i, name in enumerate(names) if name in ("logits", "output"))
    kind: str = json.loads(serialized).get("logits", "FLOAT_TYPE")
    given = np.dtype(np.float32 if kind == "FLOAT_TYPE" else np.float16)

    def status(call: str) -> str:
        log.append(call)
        return bad if call == fail else ok

    class Dims(list[Any]):
        """`BufferDimensionsVecRef`."""

    class QBuffer:
        def __init__(self, data: bytes) -> None:
            assert isinstance(data, bytes)
            self.data = data

        def __bytes__(self) -> bytes:
            return self.data

    class Qpc:
        def __init__(self, path: str) -> None:
            assert isinstance(path, str)

        def getIoDescriptor(self) -> tuple[str, bytes]:  # noqa: N802
            return status("getIoDescriptor"), serialized

    class Program:
        def __init__(self, context: Any, device: int | None, qpc: Qpc, properties: Any) -> None:
            self.state = "new"
            mapped = getattr(properties, "devMapping", "")
            assert (device is None) == (":" in mapped), "several devices are named by devMapping only"
            log.append(f"device={device} mapping={mapped} timeout={properties.dataPathTimeoutMs}")

        def load(self) -> str:
            assert self.state == "new"
            self.state = "loaded"
            return status("load")

        def activate(self) -> str:
            assert self.state == "loaded"
            self.state = "active"
            return status("activate")

        def deactivate(self) -> str:
            assert self.state == "active"
            self.state = "loaded"
            return status("deactivate")

    class ExecObj:
        kept: dict[int, Any]

        def __init__(self, context: Any, program: Program) -> None:
            assert program.state == "active", "an ExecObj needs an active program"
            self.state, self.runs, self.kept = "idle", 0, dict.fromkeys(written, np.zeros(0))

        def setData(self, buffers: list[QBuffer], dims: Dims) -> str:  # noqa: N802
            assert isinstance(dims, Dims) and len(buffers) == len(dims) == len(names)
            for index in states:
                assert bytes(buffers[index]) == b"" and dims[index][1] == [0], "states stay on the device"
            assert dims[0][0] == 8 and dims[out][0] == given.itemsize
            for index in written:
                if dims[index][1] != [0]:
                    assert dims[index] == (2, json.loads(serialized)["rows"][0][index]), "all that is written, in fp16"
                    self.kept[index] = np.frombuffer(bytes(buffers[index]), np.float16).reshape(dims[index][1])
            log.extend(f"takes {names[i]}" for i in written if dims[i][1] != [0])
            for buffer, (size, shape) in zip(buffers, dims, strict=True):
                assert len(bytes(buffer)) == size * int(np.prod(shape))
            rows = json.loads(serialized)["rows"]
            chosen = [r for r in rows if r[0] == dims[0][1] and r[1] == dims[1][1] and r[out] == dims[out][1]]
            assert len(chosen) == 1, "the shapes select one specialization"
            self.buffers, self.shape, self.state = buffers, dims[out][1], "set"
            return status("setData")

        def waitForCompletion(self) -> str:  # noqa: N802
            assert self.state == "enqueued"
            self.state, self.runs = "done", self.runs + 1
            return status("waitForCompletion")

        def getData(self) -> tuple[str, list[QBuffer]]:  # noqa: N802
            assert self.state == "done"
            ids, positions = (np.frombuffer(bytes(b), np.int64).reshape(self.shape[0], -1) for b in self.buffers[:2])
            answer = np.zeros((self.shape[0], VOCAB), np.float32)
            answer[:, 0], answer[:, 1], answer[:, 2] = ids.sum(1), positions.max(1), self.runs
            if "image_idx" in names:
                answer[:, 3] = sum(kept.sum() for kept in self.kept.values())
            if "lora_ids" in names:
                slots = np.frombuffer(bytes(self.buffers[names.index("lora_ids")]), np.int64)
                answer[:, 3] = sum(kept[slots].reshape(len(slots), -1).sum(1) for kept in self.kept.values())
            if len(self.shape) == 3 and self.shape[1] > 1:
                answer = np.repeat(answer[:, None], self.shape[1], axis=1)
            self.state = "idle"
            result = QBuffer(answer.astype(given).tobytes())
            return status("getData"), [*self.buffers[:out], result, *self.buffers[out + 1 :]]

    class Queue:
        def __init__(self, context: Any, device: int) -> None:
            assert isinstance(device, int)
            log.append(f"context={':'.join(map(str, context[1]))} queue={device}")

        def enqueue(self, execution: ExecObj) -> str:
            assert execution.state == "set", "setData comes before enqueue"
            execution.state = "enqueued"
            return status("enqueue")

    class IoDesc:
        def ParseFromString(self, data: bytes) -> None:  # noqa: N802
            read = json.loads(data)
            number = TYPES[kind]
            types = [1 if i in (*states, *written) else number if i == out else 64 for i in range(len(names))]
            self.selected_set = SimpleNamespace(
                bindings=[
                    Binding(name=read["prefix"] + n, index=i, dir=int(i >= out), type=types[i], dims=read["rows"][0][i])
                    for i, n in enumerate(names)
                ]
            )
            rows = read["rows"] if len(read["rows"]) > 1 else []
            self.allowed_shapes = [SimpleNamespace(shapes=[SimpleNamespace(dims=d) for d in r]) for r in rows]

    rt, api = ModuleType("qaicrt"), ModuleType("QAicApi_pb2")
    rt.__dict__.update(
        Context=lambda ids: ("context", ids),
        QIDList=list,
        Queue=Queue,
        Qpc=Qpc,
        Program=Program,
        ExecObj=ExecObj,
        QBuffer=QBuffer,
        BufferDimensionsVecRef=Dims,
        QAicProgramProperties=SimpleNamespace,
        QStatus=SimpleNamespace(QS_SUCCESS=ok),
    )
    api.__dict__.update(IoDesc=IoDesc, **{name: number for name, number in TYPES.items() if name != "NEW_TYPE"})
    return rt, api, log
