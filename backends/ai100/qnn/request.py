"""What a user asks of QNN: ``enable_qnn=True``, a configuration file, and the few flags that it has settings for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from backends.ai100.options import Ai100Options
from qeff_ir.errors import CompileError
from qeff_ir.reading import read_json

_TAKEN = {
    "aic_enable_depth_first": bool, "allow_mxint8_mdp_io": bool, "mos": int, "mdp_load_partition_config": str,
}  # fmt: skip
"""Flags of the AI 100 compiler that QNN has settings for, and what they take."""

_OWN_ARGUMENTS = {
    "converter_args_extension": (
        "--input_network", "--output_path", "--config", "--float_bias_bitwidth", "--float_bitwidth",
        "--preserve_io_datatype", "--onnx_skip_simplification", "--target_backend",
    ),
    "context_binary_generator_args_extension": (
        "--binary_file", "--backend_binary", "--output_dir", "--backend", "--model", "--dlc_path", "--config_file",
        "--data_format_config",
    ),
}  # fmt: skip
"""Keys of the user's file with further arguments of a tool, and the arguments that follow from the model."""

_OWN_SETTINGS = ("graph_names", "compiler_retained_state", "compiler_mdp_load_partition_config")
_SETTINGS, _SKIP = "qnn_compilation_backend", "SKIP_QNN_CONVERTER_STEP"


@dataclass(frozen=True)
class Request:
    """What a user asks of QNN.

    Attributes:
        converter: Further arguments of the converter.
        generator: Further arguments of the context binary generator.
        settings: Settings of the AIC backend that take the place of ours.
        depth_first: Whether the device computes depth first.
        mxint8_io: Whether devices hand each other MXINT8.
        mos: Most splits of output channels; the compiler's choice when it is not positive.
        partition: The user's own partition config.
    """

    converter: tuple[str, ...] = ()
    generator: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    depth_first: bool = False
    mxint8_io: bool = False
    mos: int = 0
    partition: Path | None = None


def requested(options: Ai100Options) -> Request | None:
    """What the options ask of QNN; `None` where they ask for the AI 100 compiler.

    Raises:
        CompileError: A flag is of the wrong type, or one that QNN has no setting for; the user's file is wrong; or an
            option asks for what the converter cannot do.
    """
    if not options.enable_qnn:
        if options.qnn_config is not None:
            raise CompileError("qnn_config is for QNN: give enable_qnn=True too, or leave it out")
        return None
    if options.weight_free:
        raise CompileError("QNN's converter reads weights from the ONNX file: leave out weight_free, or enable_qnn")
    flags = options.flags
    for name, value in flags.items():
        kind = _TAKEN.get(name)
        if kind is None:
            raise CompileError(f"QNN has no setting for {name}: it takes {', '.join(_TAKEN)}")
        if type(value) is not kind or (name == "mdp_load_partition_config" and not Path(str(value)).is_file()):
            wanted = {bool: "True or False", int: "a whole number", str: "the path of an existing file"}[kind]
            raise CompileError(f"the flag {name} takes {wanted}, not {value!r}")
    partition = flags.get("mdp_load_partition_config")
    return Request(
        **_read_config(options.qnn_config),
        depth_first=flags.get("aic_enable_depth_first", False),
        mxint8_io=flags.get("allow_mxint8_mdp_io", False),
        mos=flags.get("mos", 0),
        partition=None if partition is None else Path(partition),
    )


def _read_config(path: str | None) -> dict[str, Any]:
    """The user's file.

    Raises:
        CompileError: It is not there or no JSON object, or says what follows from the model.
    """
    if path is None:
        return {}
    if not Path(path).is_file():
        raise CompileError(f"qnn_config is {path!r}: give the path of an existing file")
    data = read_json(Path(path), error=CompileError)
    known = (*_OWN_ARGUMENTS, _SETTINGS, _SKIP)
    if not isinstance(data, dict) or any(name not in known for name in cast("dict[str, Any]", data)):
        raise CompileError(f"{path} is no configuration of QNN: it is a JSON object of {', '.join(known)}")
    fields = cast("dict[str, Any]", data)
    if str(fields.get(_SKIP, False)).lower() == "true":
        raise CompileError(f"{path} asks for {_SKIP}, and a package is always made anew: take it out")
    settings = fields.get(_SETTINGS, {})
    if not isinstance(settings, dict):
        raise CompileError(f"{_SETTINGS} in {path} is no JSON object: give settings by name")
    fixed = [name for name in _OWN_SETTINGS if name in settings]
    if fixed:
        raise CompileError(f"{_SETTINGS} in {path} has {fixed[0]}, which follows from the rest: take it out")
    found: dict[str, Any] = {"settings": cast("dict[str, Any]", settings)}
    for name, argument in zip(_OWN_ARGUMENTS, ("converter", "generator"), strict=True):
        text = fields.get(name, "")
        try:
            words = shlex.split(text)
        except (ValueError, AttributeError, TypeError) as error:
            raise CompileError(f"{name} in {path} is {text!r}: give the arguments as one text") from error
        fixed = [word for word in words if word.partition("=")[0] in _OWN_ARGUMENTS[name]]
        if fixed:
            raise CompileError(f"{name} in {path} has {fixed[0]}, which follows from the model: take it out")
        found[argument] = tuple(words)
    return found
