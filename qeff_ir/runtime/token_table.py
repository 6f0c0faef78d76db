"""The token embeddings of a model whose graph takes vectors: rows of the checkpoint's table, looked up by the host."""

from __future__ import annotations

import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.digests import stamp
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ranges import stored, stored_in


class TokenTable:
    """A table ``[vocab, hidden]``; of one in a file, only the rows that are asked for are read.

    Args:
        table: The table, in memory or in a file of the checkpoint.
    """

    def __init__(self, table: ir.TensorProtocol) -> None:
        self._table = table
        self._rows: Array | None = None
        where = stored_in(table)
        self._file = None if where is None else where.file
        self._stamp = self._changes()

    def vectors(self, ids: Array) -> Array:
        """What the graph takes in place of tokens.

        Args:
            ids: int64 ``[batch, seq]``.

        Returns:
            Their rows, float32 ``[batch, seq, hidden]``.

        Raises:
            RuntimeInputError: A token is outside the table.
            PackageError: The checkpoint was rewritten since the table was opened.
        """
        if self._changes() != self._stamp:  # mapped memory would answer with other rows, or end the process
            raise PackageError(f"{self._file} was changed since the model was opened: open the model again")
        if self._rows is None:
            self._rows = stored(self._table)
        if ids.min() < 0 or ids.max() >= len(self._rows):
            raise RuntimeInputError(f"a token is outside the table of {len(self._rows)}: use the model's tokenizer")
        return self._rows[ids].astype("float32")

    def _changes(self) -> object:
        """Inode, size and time of the table's file; its ctime changes with every hard link too."""
        if self._file is None:
            return None
        try:
            return stamp(self._file)[1:4]
        except OSError:
            return "gone"
