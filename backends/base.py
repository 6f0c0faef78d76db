"""What a backend declares: its pipeline, how to emit a package, how to compile it, how to open a session on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qeff_ir.ir.module import Module
from qeff_ir.runtime.session import Session

if TYPE_CHECKING:
    from qeff_ir.cost import Storage


@dataclass(frozen=True)
class CompileOptions:
    """What a user asks of `compile`, target-independent names first.

    Attributes:
        prefill_seq_len: Tokens of a prompt that one prefill run takes.
        ctx_len: Slots of the KV cache: prompt and generated tokens together.
        batch_size: Rows of a run.
        seq_len: Lengths of the inputs of a model without a cache, one specialization for each.
        graph_name: What such a specialization is called.
        num_cores: Cores of the device.
        num_devices: Devices that share the model.
        mxfp6_matmul: Compress constant matmul weights to MXFP6 on the device.
        mxint8_kv_cache: Keep the KV cache as MXINT8 on the device.
        weight_free: Emit graphs without weights, which the AI 100 compiler binds from safetensors files by itself.
        flags: Any other flag of the target's compiler, by its Python name (``aic_enable_depth_first``).
        force_flags: Hand unknown flags to the compiler instead of refusing them.
    """

    prefill_seq_len: int = 32
    ctx_len: int = 128
    batch_size: int = 1
    seq_len: tuple[int, ...] = ()
    graph_name: str = "Embedding"
    num_cores: int = 16
    num_devices: int = 1
    mxfp6_matmul: bool = False
    mxint8_kv_cache: bool = False
    weight_free: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict[str, Any])
    force_flags: bool = False

    def __post_init__(self) -> None:
        flags = {name: str(value) if isinstance(value, Path) else value for name, value in self.flags.items()}
        object.__setattr__(self, "flags", flags)  # the package keeps them as JSON


def default_prefill(ctx_len: object) -> int:
    """Tokens of a prefill run where nobody says how many: no more than the context has."""
    most = CompileOptions.prefill_seq_len
    return min(most, ctx_len) if type(ctx_len) is int and ctx_len > 0 else most


class Backend(ABC):
    """One target. The module ``backend`` of its folder has an instance called `BACKEND`.

    Attributes:
        name: The name of the folder.
        pipeline: Stock pipeline as text.
        title: What a package is for, after "Target NAME:" (``this CPU``).
        runner: What runs a package where the target's device is not (``ONNX Runtime``).
        priority: ``auto`` takes the target with the highest priority that nothing is missing for.
        ahead_of_time: Whether there is a compiler to run over what was emitted, and flags for it.
        emitted: What to do with a package that was emitted but not compiled, as a clause.
        retains_adapters: Whether the factors of a single adapter are kept between runs as retained states.
        names_hidden_states: Whether a host reads the hidden states of a text encoder by one name (`passes.embedding`).
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    title: ClassVar[str]
    runner: ClassVar[str]
    priority: ClassVar[int] = 0
    ahead_of_time: ClassVar[bool] = False
    emitted: ClassVar[str] = ""
    retains_adapters: ClassVar[bool] = False
    names_hidden_states: ClassVar[bool] = False

    @abstractmethod
    def missing(self, options: CompileOptions | None = None) -> str | None:
        """Why models cannot be compiled here, as a clause that names what was looked for, or `None`.

        Args:
            options: What is to be compiled for; a target may have several compilers.
        """

    def check_options(self, options: CompileOptions) -> None:
        """Refuse options that the target cannot take, before anything is lowered.

        Raises:
            CompileError: An unknown or malformed flag, or a combination that the target cannot take.
        """

    @abstractmethod
    def check(self, module: Module, options: CompileOptions) -> None:
        """Refuse a module or options that the target cannot take.

        Raises:
            CompileError: With a code, what is wrong, and the Hugging Face module that it comes from.
        """

    @abstractmethod
    def emit(self, module: Module, folder: Path, options: CompileOptions) -> None:
        """Write the target's files into a folder that has no files of the target's yet."""

    @abstractmethod
    def compile(self, folder: Path, options: CompileOptions) -> None:
        """Run the target's compiler over an emitted folder, adding its result to the folder.

        Raises:
            CompileError: The compiler is missing or failed.
        """

    @abstractmethod
    def open(self, folder: Path, *, threads: int | None = None) -> Session:
        """Open a session on a verified package folder.

        Args:
            folder: The package.
            threads: Threads of a runtime on the CPU; its own choice by default.

        Raises:
            PackageError: The package has no ONNX file, or cannot be loaded.
        """

    @abstractmethod
    def model_file(self, folder: Path) -> Path:
        """The ONNX file of an emitted folder.

        Raises:
            PackageError: There is none, or more than one.
        """

    def storage(self, options: Mapping[str, Any]) -> Storage:
        """How many bytes the target needs for a number.

        Args:
            options: The compile options of a package, as its manifest has them.
        """
        from qeff_ir.cost import Storage

        return Storage()

    def devices(self) -> dict[str, Path]:
        """The files that describe the target's devices (`qeff_ir.roofline.read_device`), by name."""
        return {}

    def versions(self) -> dict[str, str]:
        """Whatever of the target's own can change the artifact, by name: part of the cache key."""
        return {}
