"""Which decoder layers are copies of each other, shown by what they do.

The model is run once on fake tensors, and every operation is written down: inside a layer, relative to the layer (its
own weights and states by their names in it, its input, what it made itself), so that two layers have equal records just
when they do the same with different weights and states. A record holds every number that the layer's code computed in
Python, so a factor, a branch or a slice that depends on the layer's index tells the layers apart.

One layer of each kind is then enough to trace. That the shorter model does the same with these layers is shown in the
same way: its run must leave the same records, of the layers and of all that is around them.
"""

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
from qeff_ir.module import State

INPUT, OUTPUT = "LayerInput", "LayerOutput"
"""What the marks of `marked` are in the graph; `qeff_ir.frontend.stamp` takes them out."""

Label = tuple[Any, ...]
"""What a tensor is, told without its name in this run."""

Name = str | State
"""What an input of the run is."""

Prepared = tuple[Mapping[Name, torch.Tensor], Callable[[], Sequence[torch.Tensor]]]
"""A run's inputs, and the run itself, which returns logits and new states."""

Run = Callable[[frozenset[int] | None], Prepared]
"""Prepares a run with the states of some layers of the cache, or of all."""


@dataclass(frozen=True)
class Fold:
    """One layer of each kind, and which layers it stands for.

    Attributes:
        path: Name of the layer list in the model, for example ``model.layers``.
        traced: Indices of the layers that are traced, ascending.
        states: Layers of the cache that these use.
        kinds: For each layer of the model, the position in `traced` of the layer that stands for it.
    """

    path: str
    traced: tuple[int, ...]
    states: frozenset[int]
    kinds: tuple[int, ...]


@dataclass
class _Record:
    """What one run did: before the first layer, in each layer, after the last."""

    head: list[Label] = field(default_factory=list[Label])
    layers: dict[int, list[Label]] = field(default_factory=dict[int, list[Label]])
    tail: list[Label] = field(default_factory=list[Label])
    states: dict[int, int] = field(default_factory=dict[int, int])
    """The layer that uses each layer of the cache."""


class _NotShown(Exception):  # noqa: N818  # not an error: the model is then traced in full
    """The layers cannot be shown to be independent copies."""


def find_fold(model: PreTrainedModel, run: Run) -> Fold | None:
    """Find the kinds of decoder layers of a model whose weights are fake tensors.

    Args:
        model: The model.
        run: Prepares a run on fake inputs.

    Returns:
        What to trace, or `None` when no two layers are shown to be alike.
    """
    return next((fold for path in _layer_lists(model) if (fold := _fold(model, path, run)) is not None), None)


def _fold(model: PreTrainedModel, path: str, run: Run) -> Fold | None:
    count = len(_list(model, path))
    try:
        whole = _record(model, path, range(count), run(None))
    except Exception:  # not shown, or the model's own code raised something, which the full trace will tell
        return None
    known: dict[tuple[Label, ...], int] = {}
    stands = [known.setdefault(tuple(whole.layers[i]), i) for i in range(count)]
    firsts = sorted(known.values())
    # The layers alone, or all that come before the last of them: a model may look its layers up by their index.
    for traced in (firsts, list(range(firsts[-1] + 1))):
        states = frozenset(state for state, layer in whole.states.items() if layer in traced)
        if len(traced) < count and _does_the_same(model, path, traced, run(states), whole):
            kinds = tuple(traced.index(i if i in traced else stands[i]) for i in range(count))
            return Fold(path, tuple(traced), states, kinds)
    return None


@contextlib.contextmanager
def cut(model: PreTrainedModel, path: str, kept: Sequence[int]) -> Generator[None]:
    """Leave only some layers in the model's list for as long as the block lasts."""
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    layers = getattr(owner, name)
    setattr(owner, name, torch.nn.ModuleList([layers[i] for i in kept]))
    try:
        yield
    finally:
        setattr(owner, name, layers)


@contextlib.contextmanager
def marked(model: PreTrainedModel, path: str) -> Generator[None]:
    """Put an op where the hidden states enter a layer of the list, and one where they leave it."""

    def enter(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args and isinstance(args[0], torch.Tensor):
            return (torch.ops.qeff.layer_input(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": torch.ops.qeff.layer_input(kwargs["hidden_states"])}

    def leave(_: torch.nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if isinstance(out, torch.Tensor):
            return torch.ops.qeff.layer_output(out)
        return type(out)((torch.ops.qeff.layer_output(out[0]), *out[1:]))

    handles = [
        handle
        for layer in _list(model, path)
        for handle in (layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _list(model: PreTrainedModel, path: str) -> list[torch.nn.Module]:
    layers = model.get_submodule(path)
    assert isinstance(layers, torch.nn.ModuleList)
    return list(layers)


def _layer_lists(model: PreTrainedModel) -> list[str]:
    """Names of the lists that may be the layers: as many as the configuration says, or else any outermost list."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1}
    outer = [n for n in lists if not any(n.startswith(o + ".") for o in lists)]
    return [n for n in outer if lists[n] == count] or outer


def _does_the_same(model: PreTrainedModel, path: str, traced: list[int], run: Prepared, whole: _Record) -> bool:
    try:
        with cut(model, path, traced):
            part = _record(model, path, traced, run)
    except Exception:  # whatever a model's code raises that finds fewer layers than it looks for
        return False
    same = all(part.layers[i] == whole.layers[i] for i in traced)
    return same and (part.head, part.tail) == (whole.head, whole.tail)


def _record(model: PreTrainedModel, path: str, indices: Iterable[int], run: Prepared) -> _Record:
    """Run the model as it is and write down what it does; `indices` are those of its layers in the whole model."""
    layers = dict(zip(indices, _list(model, path), strict=True))
    inputs, work = run
    recorder = _Recorder(model, path, layers, inputs)
    with recorder.watching(), recorder:
        results = work()
    return recorder.finish(results)


class _Recorder(TorchDispatchMode):
    """Writes down operations, each under the layer that runs it."""

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        layers: Mapping[int, torch.nn.Module],
        inputs: Mapping[Name, torch.Tensor],
    ) -> None:
        super().__init__()
        self.layers = dict(layers)
        self.record = _Record()
        self.at: int | str = "head"
        self.hidden: torch.Tensor | None = None
        self.made: dict[int, tuple[int | str, int, int]] = {}
        self.kept: list[Any] = [*inputs.values()]  # an id is only good for as long as its object lives
        self.inputs = {id(tensor): name for name, tensor in inputs.items()}
        self.outside = {id(t): name for name, t in _tensors(model) if not name.startswith(path + ".")}
        self.own: dict[int, tuple[int, str]] = {}
        for index, layer in self.layers.items():
            for name, tensor in _tensors(layer):
                if id(tensor) in self.own or id(tensor) in self.outside:
                    raise _NotShown("a weight has two places")
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
                raise _NotShown("something happens between two layers, or they do not run in order")
            tensors = [a for a in (*args[:1], kwargs.get("hidden_states")) if isinstance(a, torch.Tensor)]
            if not tensors or (self.hidden is not None and tensors[0] is not self.hidden):
                raise _NotShown("a layer does not start from the result of the one before")
            if expected == 0:
                self.record.head.append(("hidden", self.label(tensors[0])))
            self.hidden, self.at = tensors[0], index

        def leave(index: int, out: Any) -> None:
            if not isinstance(out, torch.Tensor) and (type(out) not in (tuple, list) or not out):
                raise _NotShown("a layer returns something else than tensors")
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
            raise _NotShown("a layer changes what is not its own")
        out = func(*args, **kwargs)
        place: list[Label] = self.record.layers[self.at] if isinstance(self.at, int) else getattr(self.record, self.at)
        for position, tensor in enumerate(out if isinstance(out, tuple | list) else (out,)):
            if isinstance(tensor, torch.Tensor):
                self.kept.append(tensor)
                self.made.setdefault(id(tensor), (self.at, len(place), position))
        place.append(said)
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
            return ("own", self.own[key][1], tuple(tensor.shape), tensor.dtype, *_numbers(tensor))
        if key in self.outside:
            return ("weight", self.outside[key])
        if key in self.inputs:
            return self._relative(self.inputs[key])
        if made is None and (numbers := _numbers(tensor)):
            return ("constant", tensor.dtype, tuple(tensor.shape), *numbers)
        raise _NotShown("something crosses from layer to layer beside the hidden states")

    def finish(self, results: Sequence[torch.Tensor]) -> _Record:
        """Write down which results came from where."""
        logits, *states = results
        self.record.tail.append(("logits", self.label(logits)))
        held = [name for name in self.inputs.values() if isinstance(name, State)]
        for state, tensor in zip(held, states, strict=True):
            place, *result = self.made.get(id(tensor), ("", 0))
            if not isinstance(place, int):
                raise _NotShown("a state is not written by a layer")
            self.at = place
            if self.record.states.setdefault(state.layer, place) != place:
                raise _NotShown("two layers write to one layer of the cache")
            self.record.layers[place].append(("state", self._relative(state), tuple(result)))
        return self.record

    def _relative(self, name: Name) -> Label:
        """What an input is; a state as seen from its layer."""
        if isinstance(name, State) and isinstance(self.at, int):
            return ("state", dataclasses.replace(name, layer=name.layer - self.at))
        return ("input", name)


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
