"""Write what the AI 100 compiler reads (contract §4)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from backends.ai100 import flags, specializations, sub_functions, weight_free
from backends.ai100.options import Ai100Options
from backends.ai100.qnn import files
from backends.ai100.qnn.request import requested
from backends.ai100.sdk import Sdk
from qeff_ir.ir.baked import save_names
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import FEATURES, MASK, POSITIONS, ROWS_OUTPUT
from qeff_ir.ir.residents import Resident
from qeff_ir.storage import save_model

CUSTOM_IO = "custom_io.yaml"
COMMAND = "compile_command.json"
BINARY_FOLDER = "qpc"
BINARY = f"{BINARY_FOLDER}/programqpc.bin"
"""What the compiler makes, and all that is ever asked of its folder."""


def emit(module: Module, folder: Path, options: Ai100Options, sdk: Sdk, hardware: str) -> None:
    """Write the ONNX file and everything beside it; no file names an absolute path.

    Args:
        module: A checked module.
        folder: Where to write.
        options: What the user asked for.
        sdk: Whose compiler will read it.
        hardware: ``ai100`` or ``ai200``, unless the user's flags say otherwise.

    Raises:
        CompileError: A flag is wrong (see `flags.resolve`).
    """
    asked = requested(options)
    user = flags.resolve(options, sdk) if asked is None else flags.Flags()
    folder.mkdir(parents=True, exist_ok=True)
    model = f"{module.name}.onnx"
    network = module.model
    if user.sub_functions:
        network = network.clone()
        of_all_layers = (POSITIONS, MASK)
        shared = [str(v.name) for v in module.graph.inputs if module.role_of(v) in of_all_layers]
        sub_functions.outline(network, shared)
    if options.weight_free:
        weight_free.save(network, folder, model, module.name)
    else:
        save_model(network, folder, model)
    save_names(module, folder)
    for name, source in user.files.items():
        shutil.copyfile(source, folder / name)
    (folder / specializations.FILE).write_text(specializations.dumps(module.specializations, sdk.specializations))
    if asked is not None:
        commands = files.emit(module, model, folder, options, asked)
        _write_json(folder / COMMAND, {"sdk": sdk.version, "commands": commands})
        return
    listed = custom_io(module.residents, "mxint8" if options.mxint8_kv_cache else None)
    heard = [v for v in module.graph.inputs if module.role_of(v) is FEATURES and v.dtype == ir.DataType.FLOAT]
    if module.states:
        listed += halves(str(value.name) for value in heard)
    if any(module.role_of(v) is ROWS_OUTPUT for v in module.graph.outputs):
        listed = halves(str(v.name) for v in (*module.graph.inputs, *module.graph.outputs))
    if listed:
        (folder / CUSTOM_IO).write_text(listed)
    partition = user.partition
    if partition is None and options.num_devices > 1:
        partition = f"mdp_ts_{options.num_devices}.json"
        _write_json(folder / partition, tensor_slicing(options.num_devices, options.num_cores))
    argv = command(model, options, sdk, user, hardware, partition, retains=bool(module.states), custom_io=bool(listed))
    _write_json(folder / COMMAND, {"sdk": sdk.version, "argv": argv})


def command(
    model: str,
    options: Ai100Options,
    sdk: Sdk,
    user: flags.Flags,
    hardware: str,
    partition: str | None,
    *,
    retains: bool = True,
    custom_io: bool = True,
) -> list[str]:
    """The compiler's command line, to be run inside the package's folder; without states it is shorter (§4.6).

    A bfloat16 graph is not converted, and its states are stored as they are (§4.1).
    """
    as_it_is = options.dtype == "bfloat16"
    custom_io = custom_io and (options.mxint8_kv_cache or not as_it_is)
    own = {
        "retained_state": retains,
        "convert_to_fp16": not as_it_is,
        "aic_num_cores": options.num_cores,
        "mxfp6_matmul": options.mxfp6_matmul,
    }
    arguments = [flags.format_flag(key, value) for key, value in own.items()]
    return [
        sdk.compiler,
        *sdk.standing_arguments,
        f"-aic-hw-version={sdk.hardware.get(user.hardware or hardware, hardware)}",
        f"-m={model}",
        *([f"-mdp-load-partition-config={partition}"] if partition is not None else []),
        *(a for a in arguments if a is not None),
        *user.arguments,
        *(["-sub-functions"] if user.sub_functions else []),
        f"-network-specialization-config={specializations.FILE}",
        *([f"-custom-IO-list-file={CUSTOM_IO}"] if custom_io else []),
        f"-aic-binary-dir={BINARY_FOLDER}",
    ]


def custom_io(residents: Sequence[Resident], precision: str | None) -> str:
    """``custom_io.yaml``: each resident as input and as output, in `precision` or its own half-sized one (§4.3).

    What the host writes is always float16: rows of an encoder, and adapters. Tables of bits are not listed.
    """
    entries: list[str] = []
    for resident in (r for r in residents if r.dtype != ir.DataType.BOOL):
        stored = precision or ("bfloat16" if resident.dtype == ir.DataType.BFLOAT16 else "float16")
        stored = "float16" if resident.update == "host" else stored
        entries += [f" - IOName: {name}\n   Precision: {stored}\n\n" for name in resident.names]
    return "".join(entries)


def halves(names: Iterable[str]) -> str:
    """Entries of ``custom_io.yaml`` for tensors in half precision."""
    return "".join(f" - IOName: {name}\n   Precision: float16\n\n" for name in names)


def tensor_slicing(num_devices: int, num_cores: int) -> dict[str, Any]:
    """The partition config that lets every device compute a slice of every tensor (§4.4)."""
    devices = list(range(num_devices))
    return {
        "connections": [{"devices": devices, "type": "p2p"}],
        "partitions": [
            {"name": "Partition0", "devices": [{"deviceId": d, "numCores": num_cores} for d in devices]},
        ],
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=4) + "\n")
