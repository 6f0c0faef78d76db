"""What every Auto class has: a model that was opened, and the package that it was compiled into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from qeff_ir.compiler import Compiled, compile_model
from qeff_ir.errors import PackageError
from qeff_ir.frontend.source import Source
from qeff_ir.package import SIDE_FOLDER, open_package
from qeff_ir.side_files import read_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from backends.base import CompileOptions

SourceT = TypeVar("SourceT", bound=Source)


class CompiledModel(Generic[SourceT]):
    """A model that is compiled instead of run by torch; see its subclasses."""

    def _open(self, source: SourceT | None) -> None:
        """Start with a model, or, for one that comes as a package, with none."""
        self._source = source
        self._compiled: Compiled | None = None

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
        path = Path(folder)
        self._compiled = Compiled(path, open_package(path), cached=True)
        return self

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

    def _compile(self, options: CompileOptions, compile_dir: str | Path | None, **rest: Any) -> str:
        """Compile; returns the path that `compile` is to return."""
        if self._source is None:
            raise PackageError("a model opened from a package cannot be compiled again: open the model itself")
        out = None if compile_dir is None else Path(compile_dir)
        self._compiled = compile_model(self._source, options, out=out, **rest)
        qpc = self._compiled.folder / "qpc"
        return str(qpc if qpc.is_dir() else self._compiled.folder)
