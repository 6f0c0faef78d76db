"""What padding does to a forward pass, found by running it: which token fills a row, which outputs stay as they are.

A session of fixed lengths fills inputs up to a length that was compiled for. That changes nothing only where the model
learns of the padding: through an attention mask, or because it knows its padding token. Which of it holds is not
written in a configuration, so the model is run on short inputs, alone and filled up, with random weights where its own
are not in memory, and the outputs are compared.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from qeff_ir.frontend import private
from qeff_ir.frontend.checkpoint.skeleton import evaluating
from qeff_ir.frontend.export.forward_step import ForwardStep
from qeff_ir.frontend.export.quiet import quiet
from qeff_ir.frontend.inputs import BATCH, LENGTH, InputSpec, positions
from qeff_ir.frontend.layers.kinds import cut, layer_lists, members
from qeff_ir.frontend.layers.probing import structure
from qeff_ir.ir.ports import EMBEDDINGS, name_of

_TOKENS, _FRAMES, _SAMPLES = (7, 12, 15), (29, 43), (2003, 2512)
"""Lengths of the runs, by what an input has along its length: the first one alone, then filled up to the others."""
_TOLERANCE = 1e-3
"""Of an output's root mean square. Rounding differs by a millionth, padding that takes part by a tenth or so."""
_MANY = 50_000_000
"""Weights of a model of which one layer of each kind is run, not all of them."""


@dataclass(frozen=True, slots=True)
class Found:
    """What padding on the right does to a model.

    Attributes:
        sound: Names of the outputs of which padding changes nothing: those of the input alone are at their beginning.
        fill: The token that fills rows of ``input_ids``.
        one_row: Whether the model takes a single row only.
        longest: Tokens that its learned positions have room for; `None` where there are none.
    """

    sound: frozenset[str] = frozenset()
    fill: int = 0
    one_row: bool = False
    longest: int | None = None


def find_padding(
    model: PreTrainedModel, inputs: Sequence[InputSpec], pooling: Callable[..., torch.Tensor] | None = None
) -> Found:
    """What padding does to a model, found by running it.

    Args:
        model: The model; parameters may be on the meta device. Unchanged on return.
        inputs: What it is lowered with.
        pooling: See `qeff_ir.frontend.export.forward_step.ForwardStep`.
    """
    if not any(LENGTH in spec.shape for spec in inputs):
        return Found()
    names: list[str] = []
    step = ForwardStep(model, pooling, names)
    with evaluating(step), torch.no_grad(), quiet(), _weights(model), _few_layers(model):
        for rows in (2, 1):
            trial = _Trial(step, names, model, inputs, rows)
            if trial.works:
                return Found(*trial.best_fill(), one_row=rows == 1, longest=trial.longest())
    return Found()


class _Trial:
    """Runs of one model on inputs of some rows.

    Attributes:
        works: Whether the model takes that many rows.
    """

    def __init__(
        self, step: ForwardStep, names: list[str], model: PreTrainedModel, inputs: Sequence[InputSpec], rows: int
    ) -> None:
        self._step, self._names, self._inputs, self._rows = step, names, inputs, rows
        self._lengths = _lengths(model, inputs)
        self._vocab = _vocabulary(model)
        pad, self._eos, self._bos = (self._special(model, name) for name in ("pad", "eos", "bos"))
        self._fills = list(dict.fromkeys(token for token in (pad, 0, 1) if token is not None))
        # A text may or may not end in the token that some models look for.
        self._alone = {ending: self._run(ending=ending) for ending in (False, True)}
        self.works = all(outputs is not None for outputs in self._alone.values())

    def best_fill(self) -> tuple[frozenset[str], int]:
        """The outputs that padding leaves alone, and the token to pad with for it."""
        best: tuple[frozenset[str], int] = (frozenset(), self._fills[0])
        for fill in self._fills:
            sound = frozenset(self._alone[False] or ())
            for ending, alone in self._alone.items():
                for length in self._lengths[1:]:
                    filled = self._run(ending=ending, length=length, fill=fill) or {}
                    sound &= {name for name, part in (alone or {}).items() if _begins(filled.get(name), part)}
            if len(sound) > len(best[0]):
                best = sound, fill
            if len(sound) == len(self._alone[False] or ()):
                break
        return best

    def longest(self) -> int | None:
        """Tokens that the tables have room for of which one more row is taken for each token more."""
        short, long = self._lengths[0], self._lengths[-1]
        seen: list[list[tuple[int, int]]] = []
        for length in (short, long):
            with _Tables() as tables:
                self._run(length=length, alike=True)
            seen.append(tables.found)
        found = [
            rows - top - 1 + short
            for (rows, top), (_, further) in zip(*seen, strict=False)
            if 0 < further - top == long - short
        ]
        return min(found, default=None)

    def _special(self, model: PreTrainedModel, name: str) -> int | None:
        """A token that the configuration names, where the model knows it."""
        token: Any = getattr(model.config.get_text_config(), f"{name}_token_id", None)
        token = token[0] if isinstance(token, list) and token else token
        return token if type(token) is int and 0 <= token < self._vocab else None

    def _run(
        self, *, ending: bool = False, length: int | None = None, fill: int | None = None, alike: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """The outputs by name; `None` when the model does not take the inputs.

        Args:
            ending: Whether texts begin and end with the tokens that the configuration names.
            length: Of the inputs; the shortest one when not given.
            fill: What inputs of the shortest length are filled up with to `length`; with none, all of it is real.
            alike: Whether a row has one token all along, so that only its position changes.
        """
        length = self._lengths[0] if length is None else length
        real = length if fill is None else self._lengths[0]
        try:
            inputs = {spec.name: self._input(spec, ending, real, length, fill or 0) for spec in self._inputs}
            if alike and "input_ids" in inputs:
                inputs["input_ids"][:] = inputs["input_ids"][:, :1].clone()
            outputs = self._step(inputs)
        except Exception:  # whatever a model's code raises; tracing it will tell
            return None
        return dict(zip(self._names, outputs, strict=True))

    def _input(self, spec: InputSpec, ending: bool, real: int, length: int, fill: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        sizes = [{BATCH: self._rows, LENGTH: real}[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.dtype.is_floating_point:
            value = torch.randn(sizes, generator=generator, dtype=spec.dtype)
        elif spec.name == "input_ids":
            special = {self._eos, self._bos, *self._fills}
            ordinary = torch.tensor([t for t in range(min(self._vocab, 1000)) if t not in special] or [0])
            value = ordinary[torch.randint(len(ordinary), sizes, generator=generator)]
            if ending and self._bos is not None:
                value[:, 0] = self._bos
            if ending and self._eos is not None:
                value[:, -1] = self._eos
        elif spec.name == "position_ids":
            value = torch.arange(real).expand(sizes)
        else:
            value = torch.full(sizes, int("mask" in spec.name), dtype=spec.dtype)
        if LENGTH not in spec.shape or real == length:
            return value
        axis = spec.shape.index(LENGTH)
        sizes[axis] = length - real
        padding = torch.full(sizes, fill if spec.name == "input_ids" else 0, dtype=value.dtype)
        return torch.cat([value, padding], dim=axis)


def _lengths(model: PreTrainedModel, inputs: Sequence[InputSpec]) -> tuple[int, ...]:
    vectors = name_of(EMBEDDINGS)
    floats = [len(i.shape) for i in inputs if LENGTH in i.shape and i.dtype.is_floating_point and i.name != vectors]
    if floats:
        return _SAMPLES if 2 in floats else _FRAMES
    limit = positions(model)
    return _TOKENS if limit is None else tuple(min(length, limit) for length in _TOKENS)


class _Tables(TorchFunctionMode):
    """Notes how far each table of vectors is read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.nn.functional.embedding:
            indices, table = (*args, *(given[n] for n in ("input", "weight")[len(args) :]))[:2]
            self.found.append((len(table), int(indices.max())))
        return func(*args, **given)


def _begins(whole: torch.Tensor | None, part: torch.Tensor) -> bool:
    """Whether a tensor begins with another, along each axis."""
    if whole is None or whole.dim() != part.dim() or any(w < p for w, p in zip(whole.shape, part.shape, strict=True)):
        return False
    whole = whole[tuple(slice(0, size) for size in part.shape)]
    if not part.is_floating_point():
        return torch.equal(whole, part)
    if not part.numel() or not bool(part.isfinite().all()):
        return not part.numel()
    return bool((whole - part).abs().max() <= _TOLERANCE * part.pow(2).mean().sqrt())


def _vocabulary(model: PreTrainedModel) -> int:
    try:
        table: Any = model.get_input_embeddings()
        return int(table.weight.shape[0])
    except (NotImplementedError, AttributeError, TypeError):  # a model without tokens
        return int(getattr(model.config.get_text_config(), "vocab_size", None) or 2)


@contextlib.contextmanager
def _weights(model: PreTrainedModel) -> Generator[None]:
    """Random numbers in place of weights that are not in memory, or not in float32, for as long as the block lasts."""
    saved: list[tuple[private.TensorTable, str, torch.Tensor]] = []
    made: dict[int, torch.Tensor] = {}
    try:
        for module in model.modules():
            for table, is_buffer in zip(private.tensor_tables(module), (False, True), strict=True):
                for name, tensor in list(table.items()):
                    if tensor is None or (not tensor.is_meta and tensor.dtype not in (torch.float16, torch.bfloat16)):
                        continue
                    saved.append((table, name, tensor))
                    if id(tensor) not in made:
                        value = tensor.float() if is_buffer and not tensor.is_meta else _random(tensor, len(made))
                        made[id(tensor)] = value if is_buffer else torch.nn.Parameter(value, requires_grad=False)
                    table[name] = made[id(tensor)]
        yield
    finally:
        for table, name, tensor in saved:
            table[name] = tensor


def _random(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Numbers of a weight's usual size; zeros for a buffer of integers.

    A matrix is a view of few numbers, its rows being shifted copies of each other, so that it takes no memory.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    strides = [1 + 2 * behind for behind in range(tensor.dim())][::-1]
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    if tensor.dim() < 2:
        return 1.0 + numbers.clamp(-2, 2) / 4
    return (numbers * (tensor.shape[0] / tensor.numel()) ** 0.5).as_strided(tensor.shape, strides)


@contextlib.contextmanager
def _few_layers(model: PreTrainedModel) -> Generator[None]:
    """One layer of each kind of a large model, for as long as the block lasts."""
    path = next(iter(layer_lists(model)), None)
    if path is None or sum(math.prod(p.shape) for p in model.parameters()) < _MANY:
        yield
        return
    firsts: dict[Any, int] = {}
    for index, layer in enumerate(members(model, path)):
        firsts.setdefault(structure(layer), index)
    with cut(model, path, sorted(firsts.values())):
        yield
