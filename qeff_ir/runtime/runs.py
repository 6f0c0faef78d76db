"""One run of a decoder on a session: in the smallest compiled shapes that take it, and the logits that it asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.module import Specialization
from qeff_ir.ir.ports import FEATURES, LOGITS, Port, Run
from qeff_ir.runtime.interface import BATCH, LENGTH
from qeff_ir.runtime.session import Session


def logits_of(session: Session, run: Run) -> Array:
    """Run once.

    Returns:
        The logits of each row's last real tokens, float32 ``[batch, run.keep, vocab]``, the last of them at the end;
        those of a row of padding, and of tokens before its first in the run, mean nothing.

    Raises:
        RuntimeInputError: No specialization takes the run.
        PackageError: The session returns no logits.
    """
    output = session.interface.output(LOGITS)
    if output is None:
        raise PackageError("the package returns no logits, so that it is not that of a causal LM: compile one")
    inputs = session.interface.inputs
    given = fitted(run, inputs, session.specializations)
    return last(session.run({port.name: port.feed(given) for port in inputs})[output.name], given)


def fitted(run: Run, inputs: Sequence[Port], specializations: Sequence[Specialization]) -> Run:
    """The run with the sizes of the smallest specialization that takes it, and with its padding on the right.

    Raises:
        RuntimeInputError: None takes it: it has too many columns or another number of rows, or one of the lengths that
            it needs is compiled for none of them.
    """
    rows, columns = run.tokens.shape
    needs = {LENGTH: columns}
    for port in inputs:
        if port.role is not None and port.role.needs is not None:
            symbol = str(port.shape[0])
            needs[symbol] = max(needs.get(symbol, 0), port.role.needs(run))
        if port.role is FEATURES:
            if run.features.ndim != len(port.shape):
                raise RuntimeInputError(
                    f"{port.name} has {len(port.shape)} axes, and the run gives {list(run.features.shape)}: give what "
                    "the model's processor makes"
                )
            sized = zip(port.shape[1:], run.features.shape[1:], strict=True)
            needs |= {symbol: size for symbol, size in sized if isinstance(symbol, str)}
    of_rows = [s for s in specializations if s.symbols.get(BATCH, rows) == rows]
    fitting = [s for s in of_rows if all(s.symbols.get(n, 0) >= least for n, least in needs.items())]
    if not fitting:
        wanted = ", ".join(f"{name}={least}" for name, least in needs.items())
        raise RuntimeInputError(
            f"no compiled shapes take a run of {rows} rows and {wanted} or more: compile for such sizes"
        )
    best = min(fitting, key=lambda s: [s.symbols[name] for name in needs])
    longer = best.symbols[LENGTH] - columns
    if not longer:  # each decode run; to pad it by nothing would cost as much as all else here
        return dataclasses.replace(run, sizes=best.symbols)
    more = ((0, 0), (0, longer))
    return dataclasses.replace(
        run,
        tokens=np.pad(run.tokens, more),
        positions=np.pad(run.positions, more, constant_values=-1),
        planes=None if run.planes is None else np.pad(run.planes, ((0, 0), *more)),
        types=None if run.types is None else np.pad(run.types, more),
        sizes=best.symbols,
    )


def last(logits: Array, run: Run) -> Array:
    """The logits of the last real tokens, ``[batch, run.keep, vocab]``, of those that a graph returns for a run.

    A graph returns those of all tokens, or those of as many of the last ones as it keeps, from the first column on
    where the row has fewer (AI 100 contract §1.2).
    """
    if run.keep == logits.shape[1] == 1:
        return logits
    end = np.minimum(run.positions.argmax(axis=1), logits.shape[1] - 1)
    columns = np.maximum(end[:, None] - np.arange(run.keep)[::-1], 0)
    return np.take_along_axis(logits, columns[:, :, None], axis=1)
