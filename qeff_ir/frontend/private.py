# pyright: reportPrivateUsage=false
"""Everything private of transformers and torch that the frontend touches, in one place.

``tests/frontend/test_private.py`` tells when one of these moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

TensorTable = dict[str, torch.Tensor | None]
Registries = tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]


def onnx_translations() -> Mapping[Any, Any]:
    """transformers' own translations of torch operators to ONNX."""
    return _ONNX_TRANSLATION_TABLE


def snapshot_registries() -> Registries:
    """Copies of transformers' attention and mask functions by name."""
    return dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)


def restore_registries(saved: Registries) -> None:
    """Put the registries back as `snapshot_registries` found them."""
    for interface, before in zip((AttentionInterface, AttentionMaskInterface), saved, strict=True):
        mapping: dict[str, Any] = interface._global_mapping
        mapping.clear()
        mapping.update(before)


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention function that a model uses."""
    return model.config._attn_implementation or "eager"


def supports_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through `AttentionInterface`."""
    return bool(getattr(model, "_supports_attention_backend", False))


def has_experts(model: PreTrainedModel) -> bool:
    """Whether the model's experts go through `ExpertsInterface`."""
    return model._can_set_experts_implementation()


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


def loads(auto: Any, config: PreTrainedConfig) -> bool:
    """Whether one of transformers' auto classes has a model for a configuration."""
    return type(config) in auto._model_mapping


def changes_arguments(operator: Any) -> bool:
    """Whether a torch operator writes into one of its arguments."""
    return bool(operator._schema.is_mutable)


@dataclass(frozen=True, slots=True)
class FakeMold:
    """Shape, strides, type and device of a fake tensor, to make others like it without asking torch what an op does."""

    mode: FakeTensorMode
    meta: torch.Tensor
    device: torch.device

    @classmethod
    def new(cls, mode: FakeTensorMode, shape: torch.Size, dtype: torch.dtype) -> FakeMold:
        """Of contiguous tensors on the CPU."""
        return cls(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))

    @classmethod
    def of(cls, tensor: Any) -> FakeMold | None:
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
