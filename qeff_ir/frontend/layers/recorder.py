"""What one run of a model does, operation by operation, as each of its layers sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from qeff_ir.frontend import private
from qeff_ir.ir.residents import Resident

Label = tuple[Any, ...]
"""What a tensor is, told without its name in this run."""

Name = str | Resident
"""What an input of the run is."""

Prepared = tuple[Mapping[Name, torch.Tensor], Callable[[], Sequence[torch.Tensor]]]
"""A run's inputs, and the run itself, which returns logits and new states."""


@dataclass
class Record:
    """What one run did: before the first layer, in each layer, after the last."""

    head: list[Label] = field(default_factory=list[Label])
    layers: dict[int, list[Label]] = field(default_factory=dict[int, list[Label]])
    tail: list[Label] = field(default_factory=list[Label])
    states: dict[int, int] = field(default_factory=dict[int, int])
    """The layer that uses each layer of the cache."""


class NotShown(Exception):  # noqa: N818  # not an error: the model is then traced in full
    """The layers cannot be shown to be independent copies."""


@dataclass(slots=True)
class _Step:
    """An operation, after all that a layer did before it.

    Attributes:
        made: What it makes; `None` when that has to be asked each time.
        after: What some layer did next, by what is written down about it.
    """

    made: list[private.FakeSpec] | private.FakeSpec | None = None
    after: dict[Label, _Step] = field(default_factory=dict["Label", "_Step"])


class Recorder(TorchDispatchMode):
    """Writes down operations, each under the layer that runs it.

    A layer that has done the same as another one so far, and does the same next, makes a tensor of the same shape and
    type: only the first of the two asks torch for it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        layers: Mapping[int, torch.nn.Module],
        inputs: Mapping[Name, torch.Tensor],
    ) -> None:
        super().__init__()
        self.layers = dict(layers)
        self.record = Record()
        self.at: int | str = "head"
        self.hidden: torch.Tensor | None = None
        self.first = _Step()
        self.step = self.first
        self.made: dict[int, tuple[int | str, int, int]] = {}
        self.kept: list[Any] = [*inputs.values()]  # an id is only good for as long as its object lives
        self.inputs = {id(tensor): name for name, tensor in inputs.items()}
        self.outside = {id(t): name for name, t in _tensors(model) if not name.startswith(path + ".")}
        self.own: dict[int, tuple[int, str]] = {}
        for index, layer in self.layers.items():
            for name, tensor in _tensors(layer):
                if id(tensor) in self.own or id(tensor) in self.outside:
                    raise NotShown("a weight has two places")
                self.own[id(tensor)] = index, name
        for index, layer in self.layers.items():
            classes = tuple((name, type(module)) for name, module in layer.named_modules())
            self.record.layers[index] = [("classes", classes)]

    @contextlib.contextmanager
    def watching(self) -> Generator[None]:
        """Follow the run from layer to layer."""
        order = list(self.layers)
        handles: list[Any] = []

        def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            expected = order.index(index)
            if self.at != ("head" if expected == 0 else "tail") or self.record.tail:
                raise NotShown("something happens between two layers, or they do not run in order")
            tensors = [a for a in (*args[:1], kwargs.get("hidden_states")) if isinstance(a, torch.Tensor)]
            if not tensors or (self.hidden is not None and tensors[0] is not self.hidden):
                raise NotShown("a layer does not start from the result of the one before")
            if expected == 0:
                self.record.head.append(("hidden", self.label(tensors[0])))
            self.hidden, self.at = tensors[0], index
            start = (*self.record.layers[index], _form(self.hidden))
            self.step = self.first.after.setdefault(start, _Step())

        def leave(index: int, out: Any) -> None:
            if not isinstance(out, torch.Tensor) and (type(out) not in (tuple, list) or not out):
                raise NotShown("a layer returns something else than tensors")
            result = out if isinstance(out, torch.Tensor) else out[0]
            self.record.layers[index].append(("hidden", self.label(result)))
            self.hidden, self.at = result, "tail"

        for index, layer in self.layers.items():
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index: enter(index, args, kwargs), with_kwargs=True
                )
            )
            handles.append(layer.register_forward_hook(lambda _, args, out, index=index: leave(index, out)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        said = (str(func), self.told(args), self.told(sorted(kwargs.items())))
        if private.changes_arguments(func) and not (args and self.told(args[0])[0] == "made"):
            raise NotShown("a layer changes what is not its own")
        out = self._result(func, args, kwargs, said)
        place: list[Label] = self.record.layers[self.at] if isinstance(self.at, int) else getattr(self.record, self.at)
        for position, tensor in enumerate(out if isinstance(out, tuple | list) else (out,)):
            if isinstance(tensor, torch.Tensor):
                self.kept.append(tensor)
                self.made.setdefault(id(tensor), (self.at, len(place), position))
        place.append(said)
        return out

    def _result(self, func: Any, args: Any, kwargs: Any, said: Label) -> Any:
        """What an operation makes, of torch or as another layer has got it."""
        if not isinstance(self.at, int):
            return func(*args, **kwargs)
        known = self.step.after.get(said)
        if known is not None and known.made is not None:
            self.step, made = known, known.made
            return [spec.fake() for spec in made] if isinstance(made, list) else made.fake()
        out = func(*args, **kwargs)
        if known is None:
            known = self.step.after[said] = _Step(_specs(func, args, out))
        self.step = known
        return out

    def told(self, value: Any) -> Label:
        """An argument of an operation, in a form that can be compared."""
        if isinstance(value, torch.Tensor):
            return self.label(value)
        if isinstance(value, tuple | list):
            return ("list", *(self.told(item) for item in value))
        return ("is", repr(value))

    def label(self, tensor: torch.Tensor) -> Label:
        """What a tensor is, as seen from where the run is."""
        key = id(tensor)
        made = self.made.get(key)
        if made is not None and made[0] == self.at:
            return ("made", *made[1:])
        if tensor is self.hidden:
            return ("hidden",)
        if made is not None and made[0] == "head":
            return ("head", *made[1:])
        if key in self.own and self.own[key][0] == self.at:
            # What is computed with is the layer's own, but what is read while tracing must be the same in all copies.
            return ("own", self.own[key][1], _form(tensor), *_numbers(tensor))
        if key in self.outside:
            return ("weight", self.outside[key])
        if key in self.inputs:
            return self._relative(self.inputs[key])
        if made is None and (numbers := _numbers(tensor)):
            return ("constant", tensor.dtype, tuple(tensor.shape), *numbers)
        raise NotShown("something crosses from layer to layer beside the hidden states")

    def finish(self, results: Sequence[torch.Tensor]) -> Record:
        """Write down which results came from where."""
        logits, *states = results
        self.record.tail.append(("logits", self.label(logits)))
        held = [name for name in self.inputs.values() if isinstance(name, Resident)]
        for state, tensor in zip(held, states, strict=True):
            place, *result = self.made.get(id(tensor), ("", 0))
            if not isinstance(place, int):
                raise NotShown("a state is not written by a layer")
            self.at = place
            if self.record.states.setdefault(state.layer, place) != place:
                raise NotShown("two layers write to one layer of the cache")
            self.record.layers[place].append(("state", self._relative(state), tuple(result)))
        return self.record

    def _relative(self, name: Name) -> Label:
        """What an input is; a state as seen from its layer."""
        if isinstance(name, Resident) and isinstance(self.at, int):
            return ("state", dataclasses.replace(name, layer=name.layer - self.at))
        return ("input", name)


def _specs(func: Any, args: Any, out: Any) -> list[private.FakeSpec] | private.FakeSpec | None:
    """How to make again what an operation made; `None` for numbers, for what it was given, and for what holds data."""
    tensors = out if isinstance(out, tuple | list) else (out,)
    if private.changes_arguments(func) or any(t is a for t in tensors for a in args):
        return None
    specs = [private.FakeSpec.of(t) for t in tensors]
    if any(spec is None for spec in specs):
        return None
    return [m for m in specs if m is not None] if isinstance(out, tuple | list) else specs[0]


def _form(tensor: torch.Tensor) -> Label:
    """What operations on a tensor can tell of it without its numbers."""
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _numbers(tensor: torch.Tensor) -> tuple[str, ...]:
    """A digest of a tensor's numbers; nothing for a fake one."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return ()
    with unset_fake_temporarily():
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return (hashlib.sha256(data).hexdigest(),)


def _tensors(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
