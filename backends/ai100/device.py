"""A session on the device through `qaicrt` (contract §5.1)."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.ai100 import runtime_path, specializations
from backends.ai100.artifact import model_file, read_module
from backends.ai100.emit import BINARY_FOLDER, COMMAND
from backends.ai100.qnn.files import AIC_SETTINGS
from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, QeffError, RuntimeInputError
from qeff_ir.ir.module import Specialization
from qeff_ir.ir.residents import Resident
from qeff_ir.runtime.interface import interface_of, sized
from qeff_ir.storage import load_proto

_DTYPES: dict[str, type[np.generic]] = {
    "FLOAT_TYPE": np.float32,
    "FLOAT_16_TYPE": np.float16,
    "BFLOAT16_TYPE": np.float16,
    "INT8_Q_TYPE": np.int8,
    "INT8_TYPE": np.int8,
    "UINT8_Q_TYPE": np.uint8,
    "INT16_Q_TYPE": np.int16,
    "INT32_Q_TYPE": np.int32,
    "INT32_I_TYPE": np.int32,
    "INT64_I_TYPE": np.int64,
}
"""Host type of a binding by the name of its type in ``aicapi``; bfloat16 travels as two bytes."""


class DeviceError(QeffError):
    """The AI 100 runtime refused or failed."""


@dataclass(frozen=True, slots=True)
class _Binding:
    """One buffer of the program: its place, host type and shape in each specialization."""

    index: int
    dtype: np.dtype[Any]
    shapes: tuple[tuple[int, ...], ...]


class DeviceSession:
    """Runs a compiled package.

    The states never leave the device: their buffers are passed as empty, which makes it keep its own. The shapes of
    inputs and logits select the specialization.

    Args:
        folder: The package, with ``qpc/programqpc.bin``.
        devices: Device ids; as many as the package was compiled for, from 0, by default.
        timeout_ms: How long one run may take.

    Raises:
        PackageError: The program lacks an input or output of the package, or was made for other shapes.
        DeviceError: The runtime cannot load or activate it.
    """

    free = False

    def __init__(self, folder: Path, *, devices: Sequence[int] | None = None, timeout_ms: int = 60_000) -> None:
        runtime_path.extend()
        self._rt: Any = importlib.import_module("qaicrt")
        api: Any = importlib.import_module("QAicApi_pb2")
        model = model_file(folder)
        module = read_module(load_proto(model), model)
        self.interface = interface_of(module, model)
        self._specializations = specializations.load(folder / specializations.FILE, module.specializations)
        self._inputs = self.interface.inputs
        self._outputs = [port.name for port in self.interface.outputs]
        written = [r.input for r in self.interface.residents if r.update == "host"]
        ids = list(devices) if devices is not None else list(range(_device_count(folder)))

        context = self._rt.Context(self._rt.QIDList(ids))
        self._queue = self._rt.Queue(context, ids[0])
        qpc = self._rt.Qpc(str(folder / BINARY_FOLDER))
        status, described = qpc.getIoDescriptor()
        self._expect(status, "read the program's description")
        descriptor = api.IoDesc()
        descriptor.ParseFromString(bytes(described))
        names = [*(port.name for port in self._inputs), *written, *self._outputs]
        self._bindings = _bindings(descriptor, api, names)
        for name in names:
            if name not in self._bindings:
                raise PackageError(f"the program in {folder} has no buffer {name}: compile the package again")
        self._choices = self._match(folder)

        properties = self._rt.QAicProgramProperties()
        properties.dataPathTimeoutMs = timeout_ms
        if len(ids) > 1:
            properties.devMapping = ":".join(map(str, ids))
        self._program = self._rt.Program(context, ids[0] if len(ids) == 1 else None, qpc, properties)
        self._expect(self._program.load(), "load the program")
        self._expect(self._program.activate(), "activate the program")
        self._execution = self._rt.ExecObj(context, self._program)
        self._lock = threading.Lock()
        # Every buffer starts out empty, those of the states for good; what the host writes is passed after.
        self._buffers: list[Any] = [self._rt.QBuffer(b"") for _ in self._bindings]
        self._contents = {n: np.zeros((b := self._bindings[n]).shapes[0], b.dtype) for n in written}
        self._changed = set(written)
        sizes = [(b.dtype.itemsize, [0]) for b in sorted(self._bindings.values(), key=lambda b: b.index)]
        self._dims: Any = self._rt.BufferDimensionsVecRef(sizes)

    @property
    def specializations(self) -> Sequence[Specialization]:
        """The static shapes that `run` takes."""
        return self._specializations

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `qeff_ir.runtime.session.Session.run`.

        Raises:
            RuntimeInputError: The inputs are of no compiled shape.
            DeviceError: The run failed or took too long.
        """
        with self._lock:  # the buffers are those of one run
            return self._run(inputs)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = [t.name for t in self._inputs]
        if set(inputs) != set(names):
            raise RuntimeInputError(f"the inputs are {' and '.join(names)}, not {', '.join(sorted(inputs))}")
        shapes = tuple(inputs[name].shape for name in names)
        given = " and ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
        choice = self._choices.get(shapes)
        if choice is None:
            allowed = " or ".join(str(list(first)) for first, *_ in self._choices)
            raise RuntimeInputError(f"{given} are not of a compiled shape: {allowed}")
        for name in names:
            self._set(name, inputs[name])
        for name in self._changed:
            self._set(name, self._contents[name])
        for name in self._outputs:
            binding = self._bindings[name]
            self._set(name, np.zeros(binding.shapes[choice], dtype=binding.dtype))

        self._expect(self._execution.setData(self._buffers, self._dims), "take the buffers")
        self._expect(self._queue.enqueue(self._execution), "enqueue the run")
        self._expect(self._execution.waitForCompletion(), f"complete the run of {given}")
        status, results = self._execution.getData()
        self._expect(status, "return the results")
        for name in self._changed:  # the device keeps them from now on
            binding = self._bindings[name]
            self._buffers[binding.index] = self._rt.QBuffer(b"")
            self._dims[binding.index] = (binding.dtype.itemsize, [0])
        self._changed = set()
        return {name: self._read(name, results, choice) for name in self._outputs}

    def _read(self, name: str, results: Any, choice: int) -> Array:
        binding = self._bindings[name]
        data = np.frombuffer(bytes(results[binding.index]), dtype=binding.dtype).reshape(binding.shapes[choice])
        return data.astype(np.float32) if np.issubdtype(binding.dtype, np.floating) else data

    def write(self, name: str, data: Array, slot: int | None = None) -> None:
        """See `qeff_ir.runtime.session.Session.write`; the next run takes it to the device (contract §5.3)."""
        self._contents[name][... if slot is None else slot] = data
        self._changed.add(name)

    def reset(self) -> None:
        """Start a new request.

        Nothing has to be cleared: the program reads only slots that a token of the request has been written to.
        """

    def close(self) -> None:
        """Free the device; the session cannot run any more."""
        del self._execution
        self._expect(self._program.deactivate(), "deactivate the program")

    def _set(self, name: str, array: Array) -> None:
        binding = self._bindings[name]
        data = np.ascontiguousarray(array, dtype=binding.dtype)
        self._buffers[binding.index] = self._rt.QBuffer(data.tobytes())
        self._dims[binding.index] = (binding.dtype.itemsize, list(data.shape))

    def _match(self, folder: Path) -> dict[tuple[tuple[int, ...], ...], int]:
        """Index of the program's own specialization by the shapes of the inputs."""
        per_input = [self._bindings[t.name].shapes for t in self._inputs]
        compiled = {shapes: index for index, shapes in enumerate(zip(*per_input, strict=True))}
        wanted = [tuple(sized(t, s.symbols) for t in self._inputs) for s in self._specializations]
        absent = [shapes for shapes in wanted if shapes not in compiled]
        if absent:
            raise PackageError(
                f"the program in {folder} does not take {self._inputs[0].name} {list(absent[0][0])}, which "
                f"{specializations.FILE} lists: compile the package again"
            )
        return {shapes: compiled[shapes] for shapes in wanted}

    def _expect(self, status: Any, what: str) -> None:
        if status != self._rt.QStatus.QS_SUCCESS:
            raise DeviceError(f"the AI 100 runtime could not {what} ({status}): see the driver's log")


def _bindings(descriptor: Any, api: Any, names: Sequence[str]) -> dict[str, _Binding]:
    """The bindings by public name: without a graph prefix, and without the mark of a function's state."""
    types = {getattr(api, name): dtype for name, dtype in _DTYPES.items() if hasattr(api, name)}
    # NumPy has no such numbers: only states, which nobody reads, may be some.
    wide = getattr(api, "BFLOAT16_TYPE", None)
    found: dict[str, _Binding] = {}
    for binding in descriptor.selected_set.bindings:
        name = binding.name.rpartition("/")[2].replace("_InternalRetainedState", Resident.SUFFIX)
        if name in names and (binding.type not in types or binding.type == wide):
            raise PackageError(f"buffer {name} of the program has a type that qeff-ir does not know ({binding.type})")
        # States stay on the device, in whatever type it keeps them.
        dtype = np.dtype(types.get(binding.type, np.uint8))
        # A program of a single specialization lists no shapes but those of the bindings.
        shapes = [tuple(shapes.shapes[binding.index].dims) for shapes in descriptor.allowed_shapes]
        found[name] = _Binding(binding.index, dtype, tuple(shapes or [tuple(binding.dims)]))
    return found


def _device_count(folder: Path) -> int:
    """Devices that the package was compiled for, from its partition config."""
    data: dict[str, Any] = json.loads((folder / COMMAND).read_text())
    if "commands" in data:
        settings: dict[str, Any] = json.loads((folder / AIC_SETTINGS).read_text())
        name = settings.get("compiler_mdp_load_partition_config")
    else:
        given = (argument.partition("=") for argument in data["argv"])
        name = next((value for flag, _, value in given if flag == "-mdp-load-partition-config"), None)
    if name is None:
        return 1
    partitions = json.loads((folder / name).read_text())["partitions"]
    return len({d["deviceId"] for p in partitions for d in p["devices"]})
