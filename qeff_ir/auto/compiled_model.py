"""What every Auto class has: a model that was opened, and the package that it was compiled into."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from qeff_ir.auto.arguments import check_compile_arguments
from qeff_ir.compiler import Compiled, compile_model
from qeff_ir.errors import PackageError
from qeff_ir.frontend.source import Source
from qeff_ir.package import SIDE_FOLDER, open_package
from qeff_ir.reading import path_of
from qeff_ir.side_files import read_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


SourceT = TypeVar("SourceT", bound=Source)
RunnerT = TypeVar("RunnerT")


class CompiledModel(ABC, Generic[SourceT, RunnerT]):
    """A model that is compiled instead of run by torch; see its subclasses.

    Several threads may use one object. The package and what runs it change together, under `_lock`; whoever takes both
    this lock and a turn of the session takes the turn first.
    """

    def _open(self, source: SourceT | None) -> None:
        """Start with a model, or, for one that comes as a package, with none."""
        self._lock = threading.RLock()
        self._source = source
        self._compiled: Compiled | None = None
        self._runner: RunnerT | None = None

    @classmethod
    def _opened(cls, source: SourceT | None) -> Self:
        self = cls.__new__(cls)
        self._open(source)
        return self

    @classmethod
    def from_package(cls, folder: str | Path) -> Self:
        """Open a compiled package; it can run, and cannot be compiled again.

        Raises:
            PackageError: The folder is no whole package of this version.
        """
        self = cls._opened(None)
        path = path_of(folder, "the package", PackageError)
        self._compiled = Compiled(path, open_package(path), cached=True)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Sessions stay in this process, and are opened again where the object is copied to.
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {"_runner": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    @property
    def package(self) -> Compiled:
        """The compiled package.

        Raises:
            PackageError: There is none yet.
        """
        if self._compiled is None:
            raise PackageError("the model is not compiled yet: call compile() first")
        return self._compiled

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration.

        Raises:
            PackageError: That of the package is damaged.
        """
        if self._source is not None:
            return self._source.config
        return read_model_config(self.package.folder / SIDE_FOLDER)

    def _compile(
        self, options: Mapping[str, Any], compile_dir: str | Path | None, source: SourceT | None = None, **rest: Any
    ) -> str:
        """Compile, and let the next request open the package; one that is running finishes in its own session.

        Args:
            options: See `qeff_ir.compiler.compile_model`, as for all others.
            compile_dir: Folder of the package.
            source: The model, prepared for this package; as it was opened by default.
            rest: Further arguments of `qeff_ir.compiler.compile_model`.

        Returns:
            The path that `compile` is to return.
        """
        if (source := source or self._source) is None:
            raise PackageError("a model opened from a package cannot be compiled again: open the model itself")
        out = None if compile_dir is None else path_of(compile_dir, "compile_dir", PackageError)
        check_compile_arguments(rest)
        made = compile_model(source, options, out=out, **rest)
        with self._lock:
            self._accept(made)
        qpc = made.folder / "qpc"
        return str(qpc if qpc.is_dir() else made.folder)

    def _accept(self, made: Compiled) -> None:
        """Take a package in place of the one before, and leave its session."""
        self._compiled, self._runner = made, None

    def runner(self, threads: int | None = None) -> RunnerT:
        """What requests use, its sessions with it, opened on first use.

        Args:
            threads: Threads of the sessions, where they are not open yet; the runtime's own choice by default.

        Raises:
            PackageError: The model is not compiled, or its package is damaged.
        """
        with self._lock:
            if self._runner is None:
                self._runner = self._open_runner(threads)
            return self._runner

    @abstractmethod
    def _open_runner(self, threads: int | None) -> RunnerT:
        """Open the sessions of the package."""
