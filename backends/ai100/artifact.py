"""What an emitted folder holds, as the sessions read it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from qeff_ir.errors import PackageError
from qeff_ir.ir.module import METADATA_KEY, Module
from qeff_ir.ir.verifier import check_order


def model_file(folder: Path) -> Path:
    """The ONNX file of an emitted folder, which is named after the model.

    Raises:
        PackageError: There is none, or more than one.
    """
    models = list(folder.glob("*.onnx"))
    if len(models) != 1:
        raise PackageError(f"{folder} has {len(models)} ONNX files, not one: compile again")
    return models[0]


def read_module(proto: onnx.ModelProto, file: Path) -> Module:
    """What an ONNX file for the AI 100 says of itself, one without our facts too.

    Raises:
        VerificationError: Its facts are damaged, or its nodes are out of order.
    """
    network = ir.from_proto(proto)
    module = Module.with_facts(network) if METADATA_KEY in network.metadata_props else Module(network, file.stem)
    check_order(module)
    return module
