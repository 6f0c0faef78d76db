"""What Auto classes that generate have in common: the checkpoint in which a package finds its token embeddings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qeff_ir.auto.arguments import model_name
from qeff_ir.auto.compile_arguments import compiler_flags
from qeff_ir.auto.compiled_model import CompiledModel, RunnerT, SourceT
from qeff_ir.auto.qaic_config import compile_options, pipeline_edits
from qeff_ir.compiler import table_record
from qeff_ir.errors import PackageError
from qeff_ir.frontend.source import Source
from qeff_ir.ir.ports import EMBEDDINGS

if TYPE_CHECKING:
    from qeff_ir.runtime.interface import Interface
    from qeff_ir.runtime.token_table import TokenTable


class GenerativeModel(CompiledModel[SourceT, RunnerT]):
    """A compiled model that reads tokens, whose embeddings may stay in the checkpoint (``token_embedding="host"``)."""

    _asked: Mapping[str, Any] = {}
    """``continuous_batching`` and ``qaic_config``, see `qeff_ir.auto.qaic_config`."""

    def _asking(self, asked: Mapping[str, Any]) -> Self:
        """The model, of which `asked` is asked when it is compiled."""
        self._asked = dict(asked)
        return self

    def _flags(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a call of `compile` beside its shapes, with what was asked for when the model was opened.

        Raises:
            CompileError: One asks for something that a compiled model cannot do.
        """
        return compiler_flags(compile_options(self._asked, options))

    def _edits(self, options: Mapping[str, Any]) -> str:
        """The passes that were asked for when the model was opened, see `qeff_ir.auto.qaic_config.pipeline_edits`."""
        return pipeline_edits(self._asked, options)

    def _open(self, source: SourceT | None) -> None:
        super()._open(source)
        self._checkpoint: Source | None = source

    @classmethod
    def from_package(cls, folder: str | Path, *, checkpoint: str | Path | Source | None = None) -> Self:
        """Open a compiled package; it can generate, and cannot be compiled again.

        Args:
            folder: The package.
            checkpoint: The model that it was made from, or its folder or hub id: where a package compiled with
                ``token_embedding="host"`` finds its token embeddings. Others need none.

        Raises:
            PackageError: The folder is no whole package of this version.
            ModelLoadError: There is no such checkpoint.
        """
        self = super().from_package(folder)
        if checkpoint is not None and not isinstance(checkpoint, Source):
            checkpoint = self._open_checkpoint(model_name(checkpoint))
        self._checkpoint = checkpoint
        return self

    @classmethod
    @abstractmethod
    def _open_checkpoint(cls, name: str | Path) -> Source:
        """A model folder or a hub id."""

    def _table(self, interface: Interface) -> TokenTable | None:
        """The table of a package that takes vectors; its rows stay in the checkpoint.

        Raises:
            PackageError: There is no checkpoint, or it is of another model.
        """
        from qeff_ir.runtime.token_table import TokenTable

        vectors, folder = interface.input(EMBEDDINGS), self.package.folder
        if vectors is None or (name := vectors.weight) is None:
            return None
        if self._checkpoint is None:
            raise PackageError(
                f"the token embeddings of {folder} stay in the model's checkpoint: open the package with "
                "from_package(…, checkpoint=…), or compile the model itself again, which finds the package"
            )
        table, wanted = self._checkpoint.weights().get(name), vectors.shape[-1]
        found = None if table is None else list(table.shape)
        if table is None or len(table.shape) != 2 or table.shape[1] != wanted:
            raise PackageError(
                f"{folder} wants the table {name} of [tokens, {wanted}], and the checkpoint's is {found}: give the "
                "model that the package was made from"
            )
        rows = TokenTable(table)
        if self.package.manifest.tables.get(name) != table_record(table):
            raise PackageError(
                f"the table {name} of the checkpoint has other numbers than the one that {folder} was compiled with: "
                "give the model that the package was made from, or compile this one"
            )
        return rows
