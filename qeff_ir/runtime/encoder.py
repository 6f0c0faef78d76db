"""A forward pass over a session: any number of rows, of any length that was compiled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.module import Specialization
from qeff_ir.ir.ports import MASK, TOKEN_TYPES, TOKENS, Port, name_of
from qeff_ir.ir.residents import DimValue
from qeff_ir.runtime.interface import BATCH, LENGTH
from qeff_ir.runtime.session import Session
from qeff_ir.runtime.sizes import evaluate


class Encoder:
    """Drives one session: picks the smallest specialization that fits, pads to it, and takes the padding off again.

    Attributes:
        batch_size: Rows of a run.
        longest: The largest length; `None` for a model whose inputs have none.
        pads: Whether inputs may be filled up to another length: no output changes by it.
        fill: The token that fills them up.

    Raises:
        PackageError: The model retains states.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.interface = session, session.interface
        if any(resident.part is None for resident in self.interface.residents):  # they would survive from call to call
            raise PackageError("the package is that of a causal LM: open it with QEFFAutoModelForCausalLM")
        sizes = [s.symbols for s in session.specializations]
        self.batch_size = max(s[BATCH] for s in sizes)
        lengths = [s[LENGTH] for s in sizes if LENGTH in s]
        self.longest = max(lengths) if lengths else None
        padding = self.interface.padding
        self.pads = all(padding.sizes(output.name) is not None for output in self.interface.outputs)
        self.fill = padding.fill

    @property
    def pools(self) -> bool:
        """Whether the model returns one embedding of each row, and no more."""
        output = self.interface.outputs[0]
        return output.name == "output" and len(output.shape) == 2

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Run a batch of any size.

        Rows are filled up on the right, which an ``attention_mask`` marks as padding, where that changes nothing; a
        mask that is not given marks all tokens as real ones. ``token_type_ids`` may be given to a model without them
        while they are all 0.

        Args:
            inputs: Arrays or tensors by the names of the forward pass, with a batch axis.

        Returns:
            Outputs by name, float32, of the sizes that the model gives them for inputs of this length.

        Raises:
            RuntimeInputError: An input is missing, unknown, empty, of another type or size, too long, or a number is
                none that the model knows; or it is of another length than the compiled ones, and filling it up would
                change an output.
        """
        given = self._checked(inputs)
        rows, length = self._sizes(given)
        size, padded = self._shape(rows, length)
        results: list[dict[str, Array]] = []
        counts: list[int] = []
        for start in range(0, rows, size):
            part = {n: a[start : start + size] for n, a in given.items()}
            counts.append(len(next(iter(part.values()))))
            run = {t.name: self._padded(part[t.name], t, size, padded) for t in self.interface.inputs}
            results.append(self.session.run(run))
        symbols = {BATCH: rows} | ({} if length is None else {LENGTH: length})
        found: dict[str, Array] = {}
        for tensor in self.interface.outputs:
            array = _rows([r[tensor.name] for r in results], tensor, counts, size)
            sizes = self.interface.padding.sizes(tensor.name) or ()
            found[tensor.name] = array if padded == length else _begin(array, sizes, symbols)
        return found

    def frames(self, name: str, length: int) -> int | None:
        """How many entries an output has along its axis 1 for an input of a length; `None` if that is not known."""
        sizes = self.interface.padding.sizes(name)
        return None if sizes is None else evaluate(str(sizes[1]), {BATCH: 1, LENGTH: length})

    def _checked(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        known = {t.name: t for t in self.interface.inputs}
        arrays = {n: _array(n, v) for n, v in inputs.items() if v is not None}
        types = name_of(TOKEN_TYPES)
        if types in arrays and types not in known and not arrays[types].any():
            del arrays[types]  # tokenizers add them
        mask = self.interface.input(MASK)
        if mask is not None and mask.name not in arrays:  # all of it is real
            given = [dict(zip(t.shape, arrays[n].shape, strict=False)) for n, t in known.items() if n in arrays]
            sizes = {dim: size for found in given for dim, size in found.items() if isinstance(dim, str)}
            shape = [sizes.get(d) if isinstance(d, str) else d for d in mask.shape]
            if None not in shape:
                arrays[mask.name] = np.ones([int(size or 0) for size in shape], dtype=np.int64)
        if not set(known) & set(arrays):
            raise RuntimeInputError(f"there is no input: give {_and(known)}")
        for name in arrays:
            if name not in known:
                raise RuntimeInputError(
                    f"the model is compiled without the input '{name}': it takes {_and(known)}; to give it, open the "
                    f"model with inputs={[*known, name]}"
                )
        for name, tensor in known.items():
            if name not in arrays:
                raise RuntimeInputError(f"the input '{name}' is missing: the model takes {_and(known)}")
            arrays[name] = _typed(arrays[name], tensor)
        return {name: arrays[name] for name in known}

    def _sizes(self, given: Mapping[str, Array]) -> tuple[int, int | None]:
        """Rows, and the length where there is one; checks every axis."""
        found: dict[str, int] = {}
        for tensor in self.interface.inputs:
            array = given[tensor.name]
            before = dict(found)
            wrong = len(array.shape) != len(tensor.shape)
            for dim, size in zip(tensor.shape, array.shape, strict=False):
                wrong |= size != (found.setdefault(dim, size) if isinstance(dim, str) else dim)
            if wrong:
                wanted = ", ".join(map(str, tensor.shape))
                told = ", ".join(f"{n}={before[n]}" for n in tensor.shape if isinstance(n, str) and n in before)
                raise RuntimeInputError(
                    f"{tensor.name} is {list(array.shape)}, the model takes [{wanted}]"
                    + (f", here with {told}" if told else "")
                )
        if 0 in found.values():
            raise RuntimeInputError(f"the inputs are empty ({_counts(found)}): give at least one row and one token")
        if self.interface.padding.one_row and found.get(BATCH, 1) != 1:
            raise RuntimeInputError(
                f"the inputs have {found[BATCH]} rows, the model takes one at a time (it has no padding token, and "
                "reads the last column of each): give one, or set pad_token_id in its configuration"
            )
        length = found.get(LENGTH)
        if length is not None and self.longest is not None and length > self.longest:
            raise RuntimeInputError(
                f"the inputs have {length} tokens, the model is compiled for {self.longest}: compile with "
                f"seq_len={length} or more, or truncate them"
            )
        return found.get(BATCH, 1), length

    def _shape(self, rows: int, length: int | None) -> tuple[int, int | None]:
        """Rows and length of each run."""
        if self.session.free:
            return rows, length
        fitting = [s for s in self.session.specializations if length is None or s.symbols[LENGTH] >= length]
        best = min(fitting, key=_cost)
        padded = best.symbols.get(LENGTH)
        if padded != length and not self.pads:
            changed = next(t.name for t in self.interface.outputs if self.interface.padding.sizes(t.name) is None)
            lengths = sorted({s.symbols[LENGTH] for s in self.session.specializations})
            raise RuntimeInputError(
                f"the inputs have {length} tokens, and filling them up to {padded} would change '{changed}' of this "
                f"model: give {' or '.join(map(str, lengths))}, or compile with seq_len={length}"
            )
        return best.symbols[BATCH], padded

    def _padded(self, array: Array, port: Port, rows: int, length: int | None) -> Array:
        """The array filled up to the compiled length, and its last row repeated up to the compiled batch."""
        widths = [(0, 0)] * array.ndim
        for axis, dim in enumerate(port.shape):
            if dim == LENGTH and length is not None:
                widths[axis] = (0, length - array.shape[axis])
        if any(after for _, after in widths):
            array = np.pad(array, widths, constant_values=self.fill if port.role is TOKENS else 0)
        missing = rows - len(array) if BATCH in port.shape else 0
        array = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array
        return np.ascontiguousarray(array)


def _cost(item: Specialization) -> int:
    return item.symbols.get(LENGTH, 1)


def _array(name: str, value: Any) -> Array:
    """An array or tensor of numbers as an array.

    Raises:
        RuntimeInputError: It is something else.
    """
    if hasattr(value, "detach"):  # a tensor
        value = value.detach()
        value = value.float() if value.is_floating_point() else value  # NumPy has no bfloat16
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:  # torch has an error for each device
        raise RuntimeInputError(f"{name} cannot be read as an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise RuntimeInputError(f"{name} is {array.dtype}: give numbers")
    return array


def _typed(array: Array, port: Port) -> Array:
    """The array in the input's type.

    Raises:
        RuntimeInputError: It holds another kind of numbers; or rows that a table of the model does not have, or neither
            0 nor 1 in a mask, which a session would answer with some other number's result.
    """
    floats = np.issubdtype(port.dtype, np.floating)
    if floats != np.issubdtype(array.dtype, np.floating):
        raise RuntimeInputError(f"{port.name} is {array.dtype}, the model takes {port.dtype}")
    if array.size and port.rows is not None and not 0 <= int(array.min()) <= int(array.max()) < port.rows:
        wrong = int(array.min()) if array.min() < 0 else int(array.max())
        raise RuntimeInputError(f"{port.name} has {wrong}, the model knows 0 to {port.rows - 1}")
    if port.role is MASK and not floats and not np.isin(array, (0, 1)).all():
        raise RuntimeInputError(f"{port.name} has other numbers than 0 and 1")
    return array.astype(port.dtype, copy=False)


def _rows(results: list[Array], port: Port, counts: list[int], size: int) -> Array:
    """An output of several runs as one, without the rows that fill up a run.

    Raises:
        RuntimeInputError: Its rows are spread over an axis, so that they cannot be told apart.
    """
    if BATCH in port.shape:
        axis = port.shape.index(BATCH)
        array = np.concatenate([r.take(range(n), axis=axis) for r, n in zip(results, counts, strict=True)], axis=axis)
    else:
        if (len(results) > 1 or counts[0] < size) and None in port.shape:
            raise RuntimeInputError(
                f"the output '{port.name}' has no axis of rows, so it is right for {size} rows at once only: give "
                f"{size}, or compile with another batch_size"
            )
        array = results[0]  # the same for all rows
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _begin(array: Array, sizes: Sequence[DimValue], symbols: Mapping[str, int]) -> Array:
    """An output of a filled up input as the input alone gives it."""
    for axis, size in enumerate(sizes):
        if isinstance(size, str) and LENGTH in size:
            array = array.take(range(evaluate(size, symbols)), axis=axis)
    return array


def _and(names: Any) -> str:
    return " and ".join(names)


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in found.items())
