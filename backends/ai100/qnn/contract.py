"""Check what a folder says to QNN's tools against the contract (§4.7), offline and without the IR.

The folder is read as the tools will read it. Names are written out again: nothing is shared with `files`, which makes
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from backends.ai100.violation import Violation
from qeff_ir.errors import PackageError
from qeff_ir.reading import read_bytes, read_json

_SUFFIX = "_RetainedState"
_BIN = "$QNN_SDK_ROOT/bin/x86_64-linux-clang/"
_LIB = "$QNN_SDK_ROOT/lib/x86_64-linux-clang/"
_CONVERT = {
    "--output_path": "model.dlc", "--config": "custom_io_config.yaml", "--float_bias_bitwidth": "32",
    "--float_bitwidth": "16", "--target_backend": "AIC",
}  # fmt: skip
_GENERATE = {
    "--binary_file": "qnngraph.serialized", "--backend_binary": "programqpc.bin", "--output_dir": "qpc",
    "--backend": f"{_LIB}libQnnAic.so", "--dlc_path": "model.dlc", "--config_file": "qnn_compiler_config.json",
}  # fmt: skip
_SETTINGS = (
    "compiler_compilation_target", "compiler_hardware_version", "compiler_convert_to_FP16", "compiler_retained_state",
    "graph_names", "compiler_enable_depth_first", "compiler_mxfp6_matmul_weights", "compiler_num_of_cores",
    "compiler_do_DDR_to_multicast", "compiler_perfWarnings", "compiler_printDDRStats", "compiler_printPerfMetrics",
    "compiler_stat_level", "compiler_stats_batch_size", "compiler_time_passes", "compiler_mxint8_mdp_io",
)  # fmt: skip
_STATE_TYPES = ("float16", "uint8")


def violations(
    commands: object,
    model: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    sizes: Sequence[Mapping[str, int]],
    folder: Path,
) -> Iterator[Violation]:
    """Everything that breaks the contract.

    Args:
        commands: What the folder says is to be run.
        model: File name of the ONNX file.
        inputs: Inputs of the graph by name (onnx-graphsurgeon's variables).
        outputs: Its outputs.
        sizes: The symbols of each specialization.
        folder: The folder.
    """
    if not _are_commands(commands):
        yield Violation("qnn-command", "there are not two commands, of the converter and of the generator")
        return
    convert, generate = cast("list[list[str]]", commands)
    yield from _command(convert, "qairt-converter", {"--input_network": model, **_CONVERT})
    for flag in ("--preserve_io_datatype", "--onnx_skip_simplification"):
        if flag not in convert:
            yield Violation("qnn-command", f"the command of qairt-converter has not {flag}")
    formats = {"--data_format_config": "qnn_data_format_config.json"} if "--data_format_config" in generate else {}
    yield from _command(generate, "qnn-context-binary-generator", {**_GENERATE, **formats})
    if not 1 <= len(sizes) <= 2:
        yield Violation("qnn-specializations", f"there are {len(sizes)} specializations: QNN takes one or two")
    names = ["model"] if len(sizes) == 1 else [f"model_configuration_{i + 1}" for i in range(len(sizes))]
    yield from _settings(_json(folder / "qnn_compile_backend.json"), names, outputs, folder)
    extensions = {
        "config_file_path": "qnn_compile_backend.json",
        "shared_library_path": f"{_LIB}libQnnAicNetRunExtensions.so",
    }
    if _json(folder / "qnn_compiler_config.json") != {"backend_extensions": extensions}:
        yield Violation("qnn-extensions", "qnn_compiler_config.json does not name the settings and the SDK's library")
    types = dict.fromkeys((*inputs, *outputs))
    try:
        described: Any = yaml.safe_load(read_bytes(folder / "custom_io_config.yaml", error=PackageError))
        types = yield from _io(described, inputs, outputs, sizes)
    except (PackageError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        yield Violation("qnn-io", f"custom_io_config.yaml does not describe tensors ({type(error).__name__})")
    compressed = {name for name, found in types.items() if found == "uint8"}
    for name in sorted(n for n in compressed if not n.startswith(("past_key.", "past_value."))):
        yield Violation("qnn-io", f"{name} is uint8, which only keys and values may be")
    yield from _formats(_json(folder / "qnn_data_format_config.json"), bool(formats), compressed, names)


def _are_commands(data: object) -> bool:
    if not isinstance(data, list) or len(cast("list[object]", data)) != 2:
        return False
    return all(
        isinstance(one, list) and one and all(isinstance(word, str) for word in cast("list[object]", one))
        for one in cast("list[object]", data)
    )


def _command(argv: Sequence[str], tool: str, required: Mapping[str, str]) -> Iterator[Violation]:
    if argv[0] != _BIN + tool:
        yield Violation("qnn-command", f"the command does not start with {_BIN}{tool}")
    for flag, value in required.items():
        given = [b for a, b in itertools.pairwise(argv) if a == flag]
        if given != [value]:
            yield Violation("qnn-command", f"the command of {tool} has not {flag} {value}, once")


def _settings(data: Any, names: list[str], outputs: Mapping[str, Any], folder: Path) -> Iterator[Violation]:
    found = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    absent = [name for name in _SETTINGS if name not in found]
    if absent:
        yield Violation("qnn-settings", f"qnn_compile_backend.json has no {absent[0]}")
        return
    if found["graph_names"] != names:
        yield Violation("qnn-settings", f"graph_names is {found['graph_names']}, not {names}")
    retains = any(name.endswith(_SUFFIX) for name in outputs)
    if found["compiler_retained_state"] is not retains:
        yield Violation("qnn-settings", f"compiler_retained_state is not {str(retains).lower()}")
    partition = found.get("compiler_mdp_load_partition_config")
    if partition is not None and not (folder / str(partition)).is_file():
        yield Violation("qnn-settings", f"the partition config {partition} is not in the folder")


def _io(
    data: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any], sizes: Sequence[Mapping[str, int]]
) -> Iterator[Violation]:
    """Each tensor once, with its type, and the inputs with their sizes; returns the types."""
    types: dict[str, str] = {}
    for key, tensors in (("Input Tensor Configuration", inputs), ("Output Tensor Configuration", outputs)):
        entries: list[dict[str, Any]] = data[key]
        if [entry["Name"] for entry in entries] != list(tensors):
            yield Violation("qnn-io", f"{key} does not list the graph's tensors in their order")
            return types
        for entry in entries:
            name, wanted = entry["Name"], entry["Desired Model Parameters"]
            types[name] = wanted["DataType"]
            kept = name.endswith(_SUFFIX) or name + _SUFFIX in outputs
            allowed = _STATE_TYPES if kept else (np.dtype(tensors[name].dtype).name,)
            if types[name] not in allowed:
                yield Violation("qnn-io", f"{name} is {types[name]}, not {' or '.join(allowed)}")
            if tensors is inputs and wanted["Shape"] != (shapes := _shapes(tensors[name], sizes)):
                yield Violation("qnn-io", f"{name} has the shape {wanted['Shape']}, not {shapes}")
    pairs = {name for name in types if name + _SUFFIX in types and types[name] != types[name + _SUFFIX]}
    for name in sorted(pairs):
        yield Violation("qnn-io", f"{name} is {types[name]}, and what it becomes is {types[name + _SUFFIX]}")
    return types


def _shapes(tensor: Any, sizes: Sequence[Mapping[str, int]]) -> str:
    """``(1, 32), (1, 1)``: the sizes in each specialization, once where they are the same."""
    found = [tuple(int(symbols.get(d, 0)) if isinstance(d, str) else d for d in tensor.shape) for symbols in sizes]
    return ", ".join(str(shape) for shape in dict.fromkeys(found))


def _formats(data: Any, named: bool, compressed: set[str], names: list[str]) -> Iterator[Violation]:
    """MXINT8 caches, and only those, are listed for each graph, and the command names the list."""
    if named != bool(compressed):
        yield Violation("qnn-formats", "the command names qnn_data_format_config.json just where caches are MXINT8")
    if not compressed:
        return
    graphs = cast("dict[str, Any]", data).get("graphs", []) if isinstance(data, dict) else []
    listed = {
        g["graph_name"]: {t["tensor_name"] for t in g["tensors"] if t["dataFormat"] == "QNN_TENSOR_DATA_FORMAT_MX"}
        for g in graphs
    }
    if listed != dict.fromkeys(names, compressed):
        yield Violation("qnn-formats", "qnn_data_format_config.json does not list the MXINT8 caches of each graph")


def _json(path: Path) -> Any:
    try:
        return read_json(path, error=PackageError)
    except PackageError:
        return None
