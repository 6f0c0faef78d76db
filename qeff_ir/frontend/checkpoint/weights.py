"""From the model's parameter names to the checkpoint's tensors.

transformers renames, stacks, splits and permutes tensors while it loads. A rename stays a reference into the
checkpoint; a change of layout or of element type becomes a lazy tensor, computed when it is written, one at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from qeff_ir.arrays import Array
from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.checkpoint.conversion import Loader, converted, floating, lazy_torch
from qeff_ir.frontend.checkpoint.references import Checkpoint
from qeff_ir.frontend.checkpoint.skeleton import initial_values
from qeff_ir.frontend.checkpoint.ties import tie
from qeff_ir.frontend.private import ignored_when_missing, ignored_when_unexpected

Weights = dict[str, ir.TensorProtocol]
"""Parameter or persistent buffer name to its tensor."""


def checkpoint_weights(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    *,
    partial: bool = False,
    mapping: Sequence[WeightTransform] | None = None,
) -> Weights:
    """Find every parameter and persistent buffer of `model` in the checkpoint, as transformers would load them.

    Args:
        model: A skeleton; its names are wanted. Weights that the checkpoint unties are untied in it.
        checkpoint: Where to look.
        partial: Whether parameters may be missing.
        mapping: transformers' conversions of the checkpoint's tensors; those of the model's own form by default.

    Raises:
        ModelLoadError: A parameter is missing or has another shape, or the tensors of several cannot be made one.
        UnsupportedModelError: See `_refuse_transposed`.
    """
    wanted = model.state_dict()
    weights: Weights = {}
    for name, found in _collected(model, wanted, checkpoint, mapping).items():
        if isinstance(found, Loader):
            if mapping is None and found.key in checkpoint.decoded:
                _refuse_transposed(model, name, checkpoint)
            weights[name] = found.tensor(name)
        else:
            weights.update({n: t for n, t in converted(model, name, found, checkpoint.folder).items() if n in wanted})
    _check_shapes(wanted, weights, checkpoint)
    tie(model, weights)
    if missing := _missing(model, weights):
        weights.update(_computed(model, missing))
        missing = [name for name in missing if name not in weights]
    if missing and not partial:
        raise ModelLoadError(
            f"{checkpoint.folder} lacks {len(missing)} tensors of {type(model).__name__}, the first is "
            f"'{min(missing, key=dot_natural_key)}': the checkpoint is incomplete or of another model"
        )
    return weights


def _collected(
    model: PreTrainedModel,
    wanted: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    mapping: Sequence[WeightTransform] | None,
) -> dict[str, Loader | WeightConverter]:
    """What becomes of the checkpoint's tensors: the one that is a parameter, or those that a conversion makes it of.

    Names are found in transformers' own order, which tells what is stacked first, and which of two tensors for one
    parameter is taken: the first.
    """
    mapping = get_model_conversion_mapping(model) if mapping is None else mapping
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, Loader | WeightConverter] = {}
    tensors, unexpected, taken = checkpoint.weights, list[str](), set[str]()
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            unexpected.append(key)
            continue
        taken.add(key.rpartition(".")[0])
        loader = Loader(tensors[key], key, wanted[name].dtype)
        group = found.setdefault(name, loader if pattern is None else copy.deepcopy(by_pattern[pattern]))
        if isinstance(group, WeightConverter):
            group.add_tensor(name, key, key if pattern is None else pattern, loader)  # pyright: ignore[reportArgumentType]
        elif group is not loader:
            unexpected.append(key)
    if checkpoint.decoded:
        _refuse_unexpected(model, unexpected, taken, checkpoint)
    return found


def _refuse_transposed(model: PreTrainedModel, name: str, checkpoint: Checkpoint) -> None:
    """Formats have codes ``[out, in]``; of a `Conv1D` the weight is ``[in, out]``, and a square one would fit unseen.

    Raises:
        UnsupportedModelError: The parameter is of such a layer.
    """
    layer = name.rpartition(".")[0]
    if isinstance(model.get_submodule(layer), Conv1D):
        raise UnsupportedModelError(
            f"the layer '{layer}' of {checkpoint.folder} is a Conv1D, whose weight is the other way round than the "
            "codes of a quantized checkpoint: use the unquantized checkpoint, and round it by the pass quantize-weights"
        )


def _refuse_unexpected(model: PreTrainedModel, keys: list[str], taken: set[str], checkpoint: Checkpoint) -> None:
    """Of a quantized checkpoint, a tensor that nobody takes may be the scale of one that somebody takes.

    The weight or bias of a module none of whose tensors is taken is not: the head, say, where only the body is loaded.
    """
    known = ignored_when_unexpected(model)

    def stray(key: str) -> bool:
        module, _, last = key.rpartition(".")
        apart = last in ("weight", "bias") and module not in taken
        return not apart and not any(re.search(pattern, key) for pattern in known)

    strange = next(filter(stray, keys), None)
    if strange is not None:
        raise ModelLoadError(
            f"the quantized checkpoint {checkpoint.folder} has the tensor '{strange}', which {type(model).__name__} "
            "does not take: it is of another model, or of a format that is not read"
        )


def memory_weights(model: PreTrainedModel) -> Weights:
    """The parameters and persistent buffers of a model in memory, shared, not copied (floats become float32).

    Raises:
        ModelLoadError: One has no data.
        UnsupportedModelError: transformers has quantized them.
    """
    if getattr(model, "is_quantized", False):  # as transformers marks a model whose layers compute with codes
        raise UnsupportedModelError(
            f"the weights of this {type(model).__name__} are quantized in memory: give the folder of its checkpoint, "
            "or call dequantize() on it first"
        )
    weights: Weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        data = tensor.detach()
        if data.is_meta:
            raise ModelLoadError(f"parameter '{name}' of the model has no data (it is on the meta device)")
        if data.dtype in (torch.float16, torch.bfloat16):
            weights[name] = floating(name, data, lambda data=data: data.contiguous())
        elif data.is_floating_point() and data.dtype != torch.float32:
            weights[name] = lazy_torch(name, tuple(data.shape), torch.float32, lambda data=data: data.float())
        else:
            weights[name] = _Shared(data.contiguous(), name=name)
    return weights


class _Shared(tensor_adapters.TorchTensor):
    """A tensor of the user's model: its numbers can be read, and written by nobody."""

    def numpy(self) -> Array:
        """A read-only view."""
        view = super().numpy().view()
        view.flags.writeable = False
        return view


def _check_shapes(wanted: dict[str, torch.Tensor], weights: Weights, checkpoint: Checkpoint) -> None:
    for name, tensor in weights.items():
        shape = tuple(tensor.shape.numpy())
        if shape != tuple(wanted[name].shape):
            raise ModelLoadError(
                f"tensor '{name}' in {checkpoint.folder} has shape {list(shape)}, the configuration asks for "
                f"{list(wanted[name].shape)}: the weights belong to another configuration"
            )


def _missing(model: PreTrainedModel, weights: Weights) -> list[str]:
    """Parameters that have no tensor, and buffers that are expected to have none."""
    saved = model.state_dict().keys()
    parameters = [name for name, _ in model.named_parameters() if name not in weights]
    buffers = [name for name, _ in model.named_buffers() if name in saved and name not in weights]
    return parameters + _expected(model, buffers)


def _computed(model: PreTrainedModel, missing: list[str]) -> Weights:
    """Of missing tensors those that transformers expects to be missing, and always gives the same values."""
    names = _expected(model, missing)
    return {n: _Shared(tensor, name=n) for n, tensor in initial_values(model, names).items()} if names else {}


def _expected(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Those that transformers expects to be missing; its patterns are of the whole model's names."""
    patterns = ignored_when_missing(model)
    prefix = f"{model.base_model_prefix}."
    return [n for n in names if any(re.search(p, n) or re.search(p, prefix + n) for p in patterns)]
