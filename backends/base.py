"""What a backend declares: its pipeline, how to emit a package, how to compile it, how to open a session on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from backends.options import CompileOptions
from qeff_ir.ir.module import Module
from qeff_ir.runtime.session import Session

if TYPE_CHECKING:
    from qeff_ir.cost import Storage
    from qeff_ir.passing.pipeline import Pipeline


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
        dtypes: What models may be computed in (`CompileOptions.dtype`).
        lengths_behind: The pass of the pipeline behind which caches are read in part (`passes.compute_context_length`).
        rounds_caches: Whether it keeps caches in 8 bits where it is asked to (`CompileOptions.mxint8_kv_cache`).
        names_hidden_states: Whether a host reads the hidden states of a text encoder by one name (`passes.embedding`).
        Options: What a user can ask of the target: the methods below get one of these.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    title: ClassVar[str]
    runner: ClassVar[str]
    priority: ClassVar[int] = 0
    ahead_of_time: ClassVar[bool] = False
    emitted: ClassVar[str] = ""
    retains_adapters: ClassVar[bool] = False
    dtypes: ClassVar[frozenset[str]] = frozenset({"float32"})
    lengths_behind: ClassVar[str] = "kv-retention"
    rounds_caches: ClassVar[bool] = False
    names_hidden_states: ClassVar[bool] = False
    Options: ClassVar[type[CompileOptions]] = CompileOptions

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

    def programs(self, lower: Mapping[str, Callable[[], Module]]) -> Mapping[str, Callable[[], Module]]:
        """The programs of a package, each with what lowers it, out of those of a model; these, by default."""
        return lower

    def asked(self, pipeline: Pipeline, options: CompileOptions) -> Pipeline:
        """The pipeline with what the options ask of its passes; as it is, by default.

        Raises:
            PipelineError: It lacks a pass that an option is for.
        """
        return pipeline

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
