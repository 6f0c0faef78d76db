"""What only a Cloud AI 100 is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from backends.options import CompileOptions


@dataclass(frozen=True)
class Ai100Options(CompileOptions):
    """Devices, precision, the choice of the compiler, and its flags.

    Attributes:
        num_cores: Cores of the device.
        num_devices: Devices that share the model.
        mxfp6_matmul: Compress constant matmul weights to MXFP6 on the device.
        weight_free: Emit graphs without weights, which the compiler binds from safetensors files by itself.
        enable_qnn: Compile through QNN's tools.
        qnn_config: JSON file of arguments and settings for them (contract §4.7).
        flags: Any other flag of the compiler, by its Python name (``aic_enable_depth_first``).
        force_flags: Hand unknown flags to the compiler instead of refusing them.
    """

    title: ClassVar[str] = "Cloud AI 100"

    num_cores: int = field(default=16, metadata={"help": "Cores of the device."})
    num_devices: int = field(default=1, metadata={"help": "Devices that share the model."})
    mxfp6_matmul: bool = field(default=False, metadata={"help": "Compress the weights.", "fast": True})
    weight_free: bool = field(default=False, metadata={"help": "Let the compiler read weights from safetensors."})
    enable_qnn: bool = field(default=False, metadata={"help": "Compile by QNN's tools, below $QNN_SDK_ROOT."})
    qnn_config: str | None = field(
        default=None, metadata={"help": "JSON file of arguments and settings for QNN's tools.", "path": True}
    )
    flags: Mapping[str, Any] = field(default_factory=dict[str, Any])
    force_flags: bool = field(
        default=False, metadata={"help": "Hand unknown compiler flags on instead of refusing them."}
    )

    def __post_init__(self) -> None:
        flags = {name: str(value) if isinstance(value, Path) else value for name, value in self.flags.items()}
        object.__setattr__(self, "flags", flags)  # the package keeps them as JSON


def own(options: CompileOptions) -> Ai100Options:
    """The options of this target: as they are, or what every target has with the defaults of this one."""
    if isinstance(options, Ai100Options):
        return options
    return Ai100Options(**{item.name: getattr(options, item.name) for item in fields(CompileOptions)})


Options = Ai100Options
"""By this name, the command line finds the options of a target in its folder."""
