"""Models without weights: built from a configuration, with only the computed buffers real."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend import private
from qeff_ir.frontend.capture.own_thread import alone, replaced

_PARAMETERS_PER_TENSOR = 16
"""Parameters that a model may have for each tensor of its checkpoint: some conversions take a tensor apart."""

_MOST_PARAMETERS = 2_000
"""Parameters that a model may have whatever its checkpoint holds; building as many takes no second."""

_MOST_TABLE_BYTES = 2 << 30
"""Bytes of the tables that a model computes for itself (rotary frequencies, masks, positions), all together."""

_FACTORIES = frozenset({"empty", "zeros", "ones", "full", "rand", "randn"})
"""What parameters are made by."""


def build_skeleton(
    config: PreTrainedConfig, *, trust_remote_code: bool = False, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The model that one of transformers' auto classes makes of a configuration: float32, on the meta device.

    Buffers that a checkpoint does not hold (rotary frequencies, say) are computed as transformers computes them after
    loading.

    Raises:
        ModelLoadError: See `compute_buffers`.
    """
    model = empty_model(config, trust_remote_code=trust_remote_code, auto=auto)
    compute_buffers(model)
    return model


def empty_model(
    config: PreTrainedConfig,
    *,
    trust_remote_code: bool = False,
    auto: Any = AutoModelForCausalLM,
    tensors: int | None = None,
) -> PreTrainedModel:
    """A model all on the meta device, which costs no memory whatever sizes its configuration has.

    Args:
        config: The configuration, unchanged on return.
        trust_remote_code: Whether code that comes with the model may run.
        auto: transformers' auto class.
        tensors: How many the checkpoint has: a model of many more parameters is not of it.

    Raises:
        ModelLoadError: It has.
    """
    most = None if tensors is None else max(_MOST_PARAMETERS, _PARAMETERS_PER_TENSOR * tensors)
    with alone(), torch.device("meta"), _Counted(most):  # transformers sets torch's default type meanwhile
        model = auto.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code)
    for parameter in model.state_dict(keep_vars=True).values():
        private.mark_initialized(parameter, True)
    return model.eval()


class _Counted(TorchFunctionMode):
    """Ends the construction of a model that gets more parameters than it may have."""

    def __init__(self, most: int | None) -> None:
        super().__init__()
        self.most = most
        self.made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += getattr(func, "__name__", "") in _FACTORIES
        if self.most is not None and self.made > self.most:
            raise ModelLoadError(
                f"config.json asks for more than {self.most:,} parameters, of which the checkpoint has not nearly as "
                "many: the weights belong to another configuration"
            )
        return func(*args, **(kwargs or {}))


def compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds, in place.

    Raises:
        ModelLoadError: They would take gigabytes.
    """
    tables = [private.tensor_tables(module)[1] for module in model.modules()]
    names = [private.computed_buffers(module) for module in model.modules()]
    wanted = [(table, name) for table, own in zip(tables, names, strict=True) for name in own]
    missing = [(table, name, buffer) for table, name in wanted if (buffer := table[name]) is not None]
    total = sum(buffer.nbytes for _, _, buffer in missing)
    if total > _MOST_TABLE_BYTES:
        raise ModelLoadError(
            f"config.json asks for tables of {total / 1e9:,.0f} GB in {type(model).__name__}, which computes them for "
            "itself: make its sizes smaller (the largest position, say)"
        )
    for table, name, buffer in missing:
        if buffer.is_meta:
            table[name] = torch.empty_like(buffer, device="cpu")
    _initialize(model)


def initial_values(model: PreTrainedModel, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The values that transformers gives to weights that a checkpoint lacks, where they are not left to chance.

    Args:
        model: A skeleton; unchanged on return.
        names: Parameters and persistent buffers.
    """
    places: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    for name in names:
        parent, _, own = name.rpartition(".")
        parameters, buffers = private.tensor_tables(model.get_submodule(parent))
        table = parameters if own in parameters else buffers
        places.append((table, own, cast("torch.Tensor", table[own])))
    rounds: list[list[torch.Tensor]] = []
    try:
        with torch.random.fork_rng(devices=[]):
            for seed in range(2):
                torch.manual_seed(seed)
                for table, own, old in places:
                    new = torch.full_like(old, seed, device="cpu")
                    table[own] = torch.nn.Parameter(new, False) if isinstance(old, torch.nn.Parameter) else new
                _initialize(model)
                rounds.append([cast("torch.Tensor", table[own]).detach() for table, own, _ in places])
    finally:
        for table, own, old in places:
            table[own] = old
    same = [torch.equal(one, other) for one, other in zip(*rounds, strict=True)]
    return {name: value for name, value, certain in zip(names, rounds[0], same, strict=True) if certain}


def _initialize(model: PreTrainedModel) -> None:
    """Run the model's own initialization on all that is not marked as initialized."""
    for module in model.modules():
        private.mark_initialized(module, False)
    model.initialize_weights()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Generator[None]:
    """Evaluation mode for as long as the block lasts; afterwards, each module is in the mode that it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _kept(to: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """`torch.nn.Module.to`, which leaves alone what is of the type: torch makes parameters anew, and no fake ones."""

    def kept(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        types = [value for value in (*args, *kwargs.values()) if value is not None]
        return self if types and all(p.dtype is types[0] for p in self.parameters()) else to(self, *args, **kwargs)

    return kept


@contextlib.contextmanager
def fake_weights(model: PreTrainedModel) -> Generator[FakeTensorMode]:
    """Replace parameters (and buffers on the meta device) by fake float32 ones for as long as the block lasts.

    Tied parameters stay tied. Yields the fake mode, for making inputs in.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: dict[int, torch.Tensor] = {}
    specs: dict[tuple[torch.Size, torch.dtype], private.FakeSpec] = {}
    saved: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    try:
        for module in model.modules():
            for table, is_buffer in zip(private.tensor_tables(module), (False, True), strict=True):
                for name, tensor in list(table.items()):
                    half = tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)
                    if tensor is None or (is_buffer and not tensor.is_meta and not half):
                        continue
                    saved.append((table, name, tensor))
                    if is_buffer and not tensor.is_meta:
                        table[name] = tensor.float()
                        continue
                    if id(tensor) not in fakes:
                        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                        form = (tensor.shape, dtype)
                        if form not in specs:
                            specs[form] = private.FakeSpec.new(mode, *form)
                        fake = specs[form].fake()
                        fakes[id(tensor)] = fake if is_buffer else torch.nn.Parameter(fake, requires_grad=False)
                    table[name] = fakes[id(tensor)]
        with replaced(torch.nn.Module, "to", _kept):
            yield mode
    finally:
        for table, name, tensor in saved:
            table[name] = tensor
