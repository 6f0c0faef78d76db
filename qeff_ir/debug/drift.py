"""How far a package drifts that is fast and not exact: measured on texts, beside its speed, and never called proved.

An *exact* package answers as transformers does on the same weights, within the bound of rounding
(`qeff_ir.numerics`). A *fast* one computes other numbers on purpose: weights, activations or caches of fewer bits. A
pass says so by establishing the property `FAST`, an option of a target by ``"fast"`` in its field's metadata.

Of each text, the first half is the prompt, and every token of the rest is fed as it stands, so that one other choice
does not make all that follows incomparable. What is compared is the whole of it: weights, activations and caches.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from backends import find_backend
from qeff_ir.arrays import Array
from qeff_ir.package import Manifest
from qeff_ir.passing.base import registered_passes
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.properties import FAST
from qeff_ir.runtime.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Drift:
    """What a package answers otherwise than transformers does, on all tokens that were compared.

    Attributes:
        tokens: How many.
        agreement: Share of them for which the first choice is the same, 0 to 1.
        divergence: Mean Kullback-Leibler divergence of the package's next token from transformers', in nats:
            ``sum p log(p / q)`` with transformers' p.
        perplexity: ``exp`` of the package's mean ``-log q`` of the text's own next token.
        reference: transformers' own perplexity.
        rate: Tokens per second of the package, all rows together, one at a time.
    """

    tokens: int
    agreement: float
    divergence: float
    perplexity: float
    reference: float
    rate: float


def fast_parts(manifest: Manifest) -> list[str]:
    """What makes a package fast and not exact, in words; an exact one has none.

    Options of a target with a compiler count where that has run, and where ``"fast": "always"`` says that sessions act
    on them without it; what other targets are asked for, a pass does.
    """
    found: list[str] = []
    for program in manifest.programs.values():
        pipeline = Pipeline.parse(program.report["pipeline"])
        found += [f"the pass {id}" for id, item in pipeline if FAST in item.established()]
    backend = find_backend(manifest.target)
    for option in fields(backend.Options) if backend.ahead_of_time else ():
        fast = option.metadata.get("fast")
        if manifest.options.get(option.name) and (fast == "always" or (fast and manifest.compiled)):
            found.append(f"the option {option.name}")
    return list(dict.fromkeys(found))


def built_in_text() -> str:
    """A text that every installation has: what the passes say of themselves, in English."""
    own = (cls for cls in registered_passes().values() if cls.__module__.startswith("passes."))
    return "\n\n".join(inspect.getdoc(cls) or "" for cls in own)


def pieces(tokens: Sequence[int], rows: int, length: int) -> list[list[int]]:
    """Cut the tokens of a text into rows of one length, from its start.

    Args:
        tokens: Of the text.
        rows: How many.
        length: Tokens of each; fewer where the text is too short.

    Raises:
        ValueError: The text is too short for four tokens in each.
    """
    length = min(length, len(tokens) // rows)
    if length < _SHORTEST:
        raise ValueError(f"a text of {len(tokens)} tokens is too short for {rows} rows of {_SHORTEST}: give more")
    return [list(tokens[row * length : (row + 1) * length]) for row in range(rows)]


_SHORTEST = 4


def measure_drift(decoder: Decoder, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Drift:
    """Compare a package with transformers on texts.

    Args:
        decoder: Of the package; a request of this thread starts.
        model: The model in transformers.
        rows: Tokens of as many texts as the batch has rows, all of one length.

    Raises:
        ValueError: The rows are of several lengths or too short, or logits are constant or not finite: a comparison
            would mean nothing.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or min(lengths) < _SHORTEST:
        raise ValueError(f"rows of {sorted(lengths)} tokens cannot be compared: give rows of one length, 4 or more")
    start, texts = min(lengths) // 2, np.array(rows)
    ours = [decoder.prefill([row[:start].tolist() for row in texts])]
    began = time.perf_counter()
    ours += [decoder.decode(texts[:, at].tolist()) for at in range(start, texts.shape[1] - 1)]
    seconds, steps = time.perf_counter() - began, len(ours) - 1
    theirs = _reference(model, texts, start)
    answered = np.stack([logits.reshape(len(rows), -1) for logits in ours], axis=1)
    return drift(answered, theirs, texts[:, start:], steps * len(rows) / seconds)


def drift(ours: Array, theirs: Array, following: Array, rate: float) -> Drift:
    """The drift of logits.

    Args:
        ours: Of the package, ``[rows, tokens, vocab]``.
        theirs: Of transformers, likewise.
        following: The text's own next tokens, int64 ``[rows, tokens]``.
        rate: See `Drift`.

    Raises:
        ValueError: Logits are constant or not finite.
    """
    q, p, own = _log_odds(ours), _log_odds(theirs), following[:, :, None]
    return Drift(
        tokens=following.size,
        agreement=float((q.argmax(-1) == p.argmax(-1)).mean()),
        divergence=float((np.exp(p) * (p - q)).sum(-1).mean()),
        perplexity=_perplexity(q, own),
        reference=_perplexity(p, own),
        rate=rate,
    )


def _reference(model: PreTrainedModel, texts: Array, start: int) -> Array:
    """transformers' logits for the tokens from `start` on, ``[rows, tokens, vocab]``, in one pass without a cache."""
    import torch

    with torch.no_grad():
        rows = [model(torch.from_numpy(row[None, :-1]), use_cache=False).logits[0, start - 1 :] for row in texts]
    return np.stack([row.float().numpy() for row in rows])


def _log_odds(logits: Array) -> Array:
    """Natural logarithms of the probabilities, float64."""
    numbers = logits.astype(np.float64)
    if not np.isfinite(numbers).all() or np.ptp(numbers) == 0.0:
        raise ValueError("the logits are constant or not finite, so that a comparison would mean nothing")
    numbers -= numbers.max(-1, keepdims=True)
    return numbers - np.log(np.exp(numbers).sum(-1, keepdims=True))


def _perplexity(odds: Array, following: Array) -> float:
    return math.exp(-float(np.take_along_axis(odds, following, -1).mean()))
