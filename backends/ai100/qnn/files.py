"""The files and the commands of QNN's two tools: one converts the ONNX file, the other makes the binary.

No file names the SDK's place, which is ``$QNN_SDK_ROOT`` when the commands run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import yaml

from backends.ai100.options import Ai100Options
from backends.ai100.qnn.request import Request
from qeff_ir.errors import CompileError
from qeff_ir.ir.module import Module, Specialization

ROOT_VARIABLE = "QNN_SDK_ROOT"
PLATFORM = "x86_64-linux-clang"
TOOLS = f"${ROOT_VARIABLE}/bin/{PLATFORM}"
LIBRARIES = f"${ROOT_VARIABLE}/lib/{PLATFORM}"

IO_CONFIG = "custom_io_config.yaml"
AIC_SETTINGS = "qnn_compile_backend.json"
EXTENSIONS = "qnn_compiler_config.json"
FORMATS = "qnn_data_format_config.json"
PARTITION = "tensor_slicing.json"
CONVERTED = "model.dlc"


def emit(module: Module, model: str, folder: Path, options: Ai100Options, request: Request) -> list[list[str]]:
    """Write the files that the two tools read.

    Args:
        module: A checked module.
        model: File name of its ONNX file.
        folder: Where to write.
        options: What the user asked for.
        request: What the user asked of QNN.

    Returns:
        The commands, to be run inside of the folder.

    Raises:
        CompileError: There are more than two specializations.
    """
    if len(module.specializations) > 2:
        raise CompileError(
            f"QNN takes two specializations, not {len(module.specializations)}: compile for fewer lengths"
        )
    graphs = _graph_names(module)
    (folder / IO_CONFIG).write_text(yaml.safe_dump(_io_config(module, options), sort_keys=False, width=1000))
    partition = None
    if request.partition is not None:
        partition = f"mdp_load_partition_config{request.partition.suffix}"
        shutil.copyfile(request.partition, folder / partition)
    elif options.num_devices > 1:
        partition = PARTITION
        devices = list(range(options.num_devices))
        parts = [{"name": "Partition0", "devices": [{"deviceId": d} for d in devices]}]
        _write(folder / partition, {"connections": [{"devices": devices, "type": "p2p"}], "partitions": parts})
    _write(folder / AIC_SETTINGS, _settings(module, options, request, graphs, partition))
    extensions = {"config_file_path": AIC_SETTINGS, "shared_library_path": f"{LIBRARIES}/libQnnAicNetRunExtensions.so"}
    _write(folder / EXTENSIONS, {"backend_extensions": extensions})
    formats: list[str] = []
    names = _compressible(module) if options.mxint8_kv_cache else []
    if names:
        tensors = [{"tensor_name": name, "dataFormat": "QNN_TENSOR_DATA_FORMAT_MX"} for name in names]
        _write(folder / FORMATS, {"graphs": [{"graph_name": name, "tensors": tensors} for name in graphs]})
        formats = ["--data_format_config", FORMATS]
    convert = [
        f"{TOOLS}/qairt-converter", "--input_network", model, "--output_path", CONVERTED, "--config", IO_CONFIG,
        "--float_bias_bitwidth", "32", "--float_bitwidth", "16", "--preserve_io_datatype",
        "--onnx_skip_simplification", "--target_backend", "AIC", *request.converter,
    ]  # fmt: skip
    generate = [
        f"{TOOLS}/qnn-context-binary-generator", "--binary_file", "qnngraph.serialized",
        "--backend_binary", "programqpc.bin", "--output_dir", "qpc", "--backend", f"{LIBRARIES}/libQnnAic.so",
        "--dlc_path", CONVERTED, "--config_file", EXTENSIONS, *formats, "--log_level", "error", *request.generator,
    ]  # fmt: skip
    return [convert, generate]


def _compressible(module: Module) -> list[str]:
    """Inputs and outputs of keys and values; what a recurrence keeps is no cache of tokens."""
    return [name for s in module.states if s.kind in ("key", "value") for name in (s.input, s.output)]


def _graph_names(module: Module) -> list[str]:
    count = len(module.specializations)
    return ["model"] if count == 1 else [f"model_configuration_{i}" for i in range(1, count + 1)]


def _settings(
    module: Module, options: Ai100Options, request: Request, graphs: list[str], partition: str | None
) -> dict[str, Any]:
    """Settings of the AIC backend, in the contract's order; the user's take their places."""
    return {
        "compiler_compilation_target": "hardware",
        "compiler_hardware_version": "2.0",
        "compiler_convert_to_FP16": True,
        "compiler_retained_state": bool(module.states),
        "graph_names": graphs,
        "compiler_enable_depth_first": request.depth_first,
        "compiler_mxfp6_matmul_weights": options.mxfp6_matmul,
        "compiler_num_of_cores": options.num_cores,
        "compiler_do_DDR_to_multicast": True,
        "compiler_perfWarnings": False,
        "compiler_printDDRStats": False,
        "compiler_printPerfMetrics": False,
        "compiler_stat_level": 10,
        "compiler_stats_batch_size": 1,
        "compiler_time_passes": False,
        "compiler_mxint8_mdp_io": request.mxint8_io,
        **({"compiler_max_out_channel_split": str(request.mos)} if request.mos > 0 else {}),
        **({"compiler_mdp_load_partition_config": partition} if partition is not None else {}),
        **request.settings,
    }


def _io_config(module: Module, options: Ai100Options) -> dict[str, Any]:
    """Types of all inputs and outputs, and shapes of the inputs in each specialization."""
    kept = {name for resident in module.residents for name in resident.names}
    caches = set(_compressible(module))

    def dtype(value: ir.Value) -> str:
        if value.name in kept:
            return "uint8" if options.mxint8_kv_cache and value.name in caches else "float16"
        assert value.dtype is not None
        return value.dtype.numpy().name

    inputs: list[dict[str, Any]] = []
    for value in module.graph.inputs:
        dims = ir.Shape([]) if value.shape is None else value.shape
        shapes = list(dict.fromkeys(_sizes(dims, item) for item in module.specializations))
        wanted = {"DataType": dtype(value), "Shape": ", ".join(shapes)}
        inputs.append({"Name": value.name, "Desired Model Parameters": wanted})
    outputs = [
        {"Name": value.name, "Desired Model Parameters": {"DataType": dtype(value)}} for value in module.graph.outputs
    ]
    return {"Input Tensor Configuration": inputs, "Output Tensor Configuration": outputs}


def _sizes(dims: ir.Shape, item: Specialization) -> str:
    sizes = [str(dim if isinstance(dim, int) else item.symbols[str(dim)]) for dim in dims]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=4) + "\n")
