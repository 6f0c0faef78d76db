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
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from qeff_ir.frontend.layers.recorder import Label, Prepared, Record, Recorder

INPUT, OUTPUT = "LayerInput", "LayerOutput"
"""What the marks of `marked` are in the graph; `qeff_ir.frontend.layers.stamp` takes them out."""

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


def find_fold(model: PreTrainedModel, run: Run) -> Fold | None:
    """Find the kinds of decoder layers of a model whose weights are fake tensors.

    Args:
        model: The model.
        run: Prepares a run on fake inputs.

    Returns:
        What to trace, or `None` when no two layers are shown to be alike.
    """
    return next((fold for path in layer_lists(model) if (fold := _fold(model, path, run)) is not None), None)


def _fold(model: PreTrainedModel, path: str, run: Run) -> Fold | None:
    count = len(members(model, path))
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
        for layer in members(model, path)
        for handle in (layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def members(model: PreTrainedModel, path: str) -> list[torch.nn.Module]:
    """The layers in a list of the model."""
    layers = model.get_submodule(path)
    assert isinstance(layers, torch.nn.ModuleList)
    return list(layers)


def layer_lists(model: PreTrainedModel) -> list[str]:
    """Names of the lists that may be the layers: as many as the configuration says, or else any outermost list."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1}
    outer = [n for n in lists if not any(n.startswith(o + ".") for o in lists)]
    return [n for n in outer if lists[n] == count] or outer


def _does_the_same(model: PreTrainedModel, path: str, traced: list[int], run: Prepared, whole: Record) -> bool:
    try:
        with cut(model, path, traced):
            part = _record(model, path, traced, run)
    except Exception:  # whatever a model's code raises that finds fewer layers than it looks for
        return False
    same = all(part.layers[i] == whole.layers[i] for i in traced)
    return same and (part.head, part.tail) == (whole.head, whole.tail)


def _record(model: PreTrainedModel, path: str, indices: Iterable[int], run: Prepared) -> Record:
    """Run the model as it is and write down what it does; `indices` are those of its layers in the whole model."""
    layers = dict(zip(indices, members(model, path), strict=True))
    inputs, work = run
    recorder = Recorder(model, path, layers, inputs)
    with recorder.watching(), recorder:
        results = work()
    return recorder.finish(results)
