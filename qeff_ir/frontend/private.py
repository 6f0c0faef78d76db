# pyright: reportPrivateUsage=false
"""Everything private of transformers and torch that the frontend touches, in one place.

``tests/frontend/test_private.py`` tells when one of these moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.export import ExportedProgram
from torch.fx import _symbolic_trace
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE
from transformers.exporters.utils import _PATCHES, import_dotted_path
from transformers.integrations.compressed_tensors import CompressedTensorsDequantize
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import ModelOutput

from qeff_ir.frontend.capture.own_thread import Function, Overlaid, here, replaced

TensorTable = dict[str, torch.Tensor | None]


def onnx_translations() -> Mapping[Any, Any]:
    """transformers' own translations of torch operators to ONNX."""
    return _ONNX_TRANSLATION_TABLE


@contextlib.contextmanager
def registered(attention: Mapping[str, Function], masks: Mapping[str, Function]) -> Generator[None]:
    """Let transformers find these attention and mask functions by name, in this thread, while the block lasts."""
    changed: list[tuple[Any, Mapping[str, Function]]]
    changed = [(AttentionInterface, attention), (AttentionMaskInterface, masks)]
    before = [interface._global_mapping for interface, _ in changed]
    try:
        for (interface, ours), mapping in zip(changed, before, strict=True):
            interface._global_mapping = Overlaid(mapping, ours)
        yield
    finally:
        for (interface, _), mapping in zip(changed, before, strict=True):
            interface._global_mapping = mapping


@contextlib.contextmanager
def export_patches(*, segments: bool = True) -> Generator[None]:
    """transformers' own export patches, and those of torch's tracer, in this thread, while the block lasts.

    Those for `segments` want parts of a picture that are alike; at a fixed size they need not be.

    Each is a function that is put in the place of another, in a module or class of the whole process. Of what torch
    says about itself meanwhile (that it is compiling, exporting, tracing), other threads hear nothing either.
    """
    with contextlib.ExitStack() as stack:
        for path, name, factory in (*_PATCHES["onnx"], *(_PATCHES["dynamo"] if segments else ())):
            owner = import_dotted_path(path, missing_ok=True)
            if owner is not None:
                stack.enter_context(replaced(owner, name, factory))
        for owner, name in _TOLD:
            stack.enter_context(replaced(owner, name, lambda told: told, others=lambda: False))
        stack.enter_context(replaced(_symbolic_trace._Patcher, "patch_method", _for_this_thread))
        yield


@contextlib.contextmanager
def float32_scales() -> Generator[None]:
    """Give transformers' decoder of compressed-tensors float32 scales, in this thread: it multiplies in their type."""

    def make(convert: Function) -> Function:
        def wide(self: Any, tensors: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            return convert(self, {name: _float32(name, value) for name, value in tensors.items()}, *args, **kwargs)

        return wide

    with replaced(CompressedTensorsDequantize, "convert", make):
        yield


def _float32(name: str, value: Any) -> Any:
    if not name.endswith("_scale"):
        return value
    return [scale.float() for scale in value] if isinstance(value, list) else value.float()


_TOLD = (
    (torch.compiler, "is_compiling"),
    (torch.compiler, "is_exporting"),
    (torch.onnx, "is_in_onnx_export"),
)
"""What code asks to take another way while it is traced."""


def _for_this_thread(patch_method: Function) -> Function:
    """How torch's tracer puts its functions into `torch.nn.Module`."""

    def patch(self: Any, cls: type, name: str, new: Function, **kwargs: Any) -> None:
        _symbolic_trace._is_fx_tracing_flag = False  # the tracer sets it, asks not for it, and puts it back
        patch_method(self, cls, name, here(new, getattr(cls, name)), **kwargs)

    return patch


def attention_implementations(config: PreTrainedConfig) -> dict[str, Any]:
    """The names of the attention functions that a model and the models in it use, as it takes them back."""
    found: dict[str, Any] = {"": config._attn_implementation or "eager"}
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            found[name] = attention_implementations(inner)
    return found


def supports_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through `AttentionInterface`."""
    return bool(getattr(model, "_supports_attention_backend", False))


def has_experts(model: PreTrainedModel) -> bool:
    """Whether experts of the model, or of a model in it, go through `ExpertsInterface`."""
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return any(part._can_set_experts_implementation() for part in parts)


def axes_of_positions(
    model: PreTrainedModel, ids: torch.Tensor | None = None, arguments: Mapping[str, torch.Tensor] | None = None
) -> int:
    """On how many axes a model gives each token a place while it generates, its position in the text included.

    Some tell only for a prompt with pictures: its tokens, ``[1, tokens]``, and arguments as for `places`.
    """
    found = places(model, torch.ones((1, 4), dtype=torch.long) if ids is None else ids, arguments or {})
    return 1 if found.dim() < 3 else int(found.shape[0])


def places(model: PreTrainedModel, ids: torch.Tensor, arguments: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Where a model puts the tokens of a prompt, ``[1, tokens]``, while it generates: ``[axes, 1, tokens]``."""
    mixin: Any = model
    given = {**arguments, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return mixin._prepare_position_ids_for_generation(ids, given)


def with_new_tokens(model: PreTrainedModel, types: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Types of tokens, ``[batch, seq]`` by argument, with those that a model gives to `count` tokens that it makes.

    They are made one at a time: of several at once, transformers gives them the types of as many tokens before.
    """
    mixin: Any = model
    made: dict[str, Any] = {**types, "attention_mask": torch.ones_like(next(iter(types.values()), torch.zeros(1, 0)))}
    for _ in range(count):
        made = mixin._update_model_kwargs_for_generation(ModelOutput(), made, num_new_tokens=1)
    return {name: made[name] for name in types}


def unchecked(told: Function) -> Function:
    """`os.getenv` as transformers asks it whether to check that placeholders and rows are as many: no trace knows."""

    def answer(name: str, default: str | None = None) -> str | None:
        return "1" if name == "TRANSFORMERS_DISABLE_TORCH_CHECK" else told(name, default)

    return answer


def tensor_tables(module: torch.nn.Module) -> tuple[TensorTable, TensorTable]:
    """A module's own parameters and buffers by name, as the dictionaries that it reads."""
    return module._parameters, module._buffers  # pyright: ignore[reportReturnType]


def computed_buffers(module: torch.nn.Module) -> set[str]:
    """Names of a module's own buffers that no checkpoint holds."""
    return module._non_persistent_buffers_set


def mark_initialized(item: torch.nn.Module | torch.Tensor, done: bool) -> None:
    """Tell `PreTrainedModel.initialize_weights` whether a module or parameter has its values already."""
    item._is_hf_initialized = done  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def ignored_when_missing(model: PreTrainedModel) -> list[str]:
    """Patterns of the names that transformers expects no checkpoint to have."""
    return sorted(model._keys_to_ignore_on_load_missing or ())


def ignored_when_unexpected(model: PreTrainedModel) -> list[str]:
    """Patterns of the names that a checkpoint may have and transformers leaves alone."""
    return sorted(model._keys_to_ignore_on_load_unexpected or ())


def loads(auto: Any, config: PreTrainedConfig) -> bool:
    """Whether one of transformers' auto classes has a model for a configuration."""
    return type(config) in auto._model_mapping


def symbols_of(size: Any) -> set[Any]:
    """The symbols in a size of a traced tensor; none in a plain number."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def with_sizes(size: Any, known: Mapping[Any, int]) -> int:
    """A size of a traced tensor, its symbols replaced by numbers."""
    return int(size.node.expr.subs(known)) if isinstance(size, torch.SymInt) else int(size)


def questions(program: ExportedProgram, tokens: set[Any]) -> list[Any]:
    """What the traced code asked of sizes and how torch answered, as comparisons by order that hold for the trace.

    Equalities are left out: shapes that must fit each other make them. That there are not too few is only asked of
    `tokens`, sizes that can be small, and by others than torch, which asks so of any window.
    """
    env = next(
        node.meta["val"].fake_mode.shape_env
        for node in program.graph_module.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta["val"], FakeTensor)
    )
    asked = [a.expr for asserts in env.deferred_runtime_asserts.values() for a in asserts]
    asked += [guard.expr for guard in env.guards]
    order = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)
    asked = [a for a in asked if a.free_symbols and all(isinstance(atom, order) for atom in a.atoms(sympy.Rel))]
    for symbol, bounds in program.range_constraints.items():
        if bounds.upper.is_Integer and not any(_implies(a, symbol, bounds.upper) for a in asked):
            asked.append(sympy.Le(symbol, bounds.upper))
        if symbol in tokens and bounds.lower > _FEWEST and not _torch_asked(env.var_to_range_sloc[symbol].lower):
            asked.append(sympy.Ge(symbol, bounds.lower))
    return asked


def _torch_asked(location: Any) -> bool:
    """Whether it was torch's own code that asked; places read ``(path from its package:line in function)``."""
    path = str(location).lstrip("(").partition(":")[0]
    return (Path(torch.__file__).parent / path).is_file()


def _implies(question: Any, symbol: Any, most: Any) -> bool:
    """Whether torch found the most that a size can be from a question about several sizes, all others the fewest."""
    others = dict.fromkeys(question.free_symbols - {symbol}, _FEWEST)
    at = [question.subs({**others, symbol: number}) for number in (most, most + 1)]
    return bool(others) and at == [sympy.true, sympy.false]


_FEWEST = 2
"""What torch takes for granted of any size that may change."""


def python_dispatcher() -> AbstractContextManager[None]:
    """What tracing tensors with symbolic sizes takes, so that composite operators do not fix the sizes."""
    return enable_python_dispatcher()


def without_modes() -> AbstractContextManager[Any]:
    """What it takes to compute with real tensors while torch traces."""
    return _disable_current_modes()


def version_of(tensor: torch.Tensor) -> int:
    """How many times something has been written into a tensor, or into another of the same memory."""
    return tensor._version


def storage_of(tensor: torch.Tensor) -> int:
    """Which memory a tensor has, fake ones too: views have that of what they are views of."""
    return tensor.untyped_storage()._cdata


def changes_arguments(operator: Any) -> bool:
    """Whether a torch operator writes into one of its arguments."""
    return bool(operator._schema.is_mutable)


@dataclass(frozen=True, slots=True)
class FakeSpec:
    """Shape, strides, type and device of a fake tensor, to make others like it without asking torch what an op does."""

    mode: FakeTensorMode
    meta: torch.Tensor
    device: torch.device

    @classmethod
    def new(cls, mode: FakeTensorMode, shape: torch.Size, dtype: torch.dtype) -> FakeSpec:
        """Of contiguous tensors on the CPU."""
        return cls(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))

    @classmethod
    def of(cls, tensor: Any) -> FakeSpec | None:
        """Of a fake tensor; `None` for one with known numbers, or with more to it than can be made again."""
        if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.layout is not torch.strided:
            return None
        if tensor.is_complex() or tensor.is_neg() or not all(type(n) is int for n in (*tensor.shape, *tensor.stride())):
            return None
        with unset_fake_temporarily():
            meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return cls(tensor.fake_mode, meta, tensor.device)

    def fake(self) -> FakeTensor:
        """Another one."""
        return FakeTensor(self.mode, self.meta, self.device)
