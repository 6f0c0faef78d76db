"""The weights of a model from a GGUF file, as transformers' own reading has them, one tensor at a time.

Every tensor of the file becomes a parameter or a part of one: what transformers would leave out in silence (frequencies
of a rotary embedding, say) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from qeff_ir.arrays import Array
from qeff_ir.errors import ModelLoadError, QeffError, UnsupportedModelError, first_line
from qeff_ir.frontend.checkpoint.formats import Decoded
from qeff_ir.frontend.checkpoint.references import Checkpoint
from qeff_ir.frontend.checkpoint.weights import Weights, checkpoint_weights
from qeff_ir.frontend.gguf.blocks import check_kind, numbers, parts
from qeff_ir.frontend.gguf.header import PLAIN, GgufFile, GgufTensor
from qeff_ir.frontend.gguf.transformers_reading import Made, Processor, conversions
from qeff_ir.quantized import dequantized, lazy
from qeff_ir.ranges import widened


def gguf_weights(
    model: PreTrainedModel,
    file: GgufFile,
    checkpoint: Checkpoint,
    fields: Mapping[str, Any],
    *,
    partial: bool = False,
) -> Weights:
    """Find every parameter of `model` in a GGUF file, see `checkpoint_weights`.

    Args:
        model: A skeleton.
        file: The file.
        checkpoint: Where its tensors lie.
        fields: What transformers reads in it as configuration.
        partial: Whether parameters may be missing.

    Raises:
        ModelLoadError: See `checkpoint_weights`; or a tensor becomes no parameter.
        UnsupportedModelError: A tensor has a type that is not known.
    """
    for name, tensor in file.tensors.items():
        check_kind(name, tensor)
    mapping = conversions(file.architecture, model)
    try:
        found = _one_by_one(file) if mapping is not None else _processed(model, file, fields)
    except QeffError:
        raise
    except Exception as error:  # transformers raises whatever does not fit it
        raise ModelLoadError(
            f"transformers cannot read the tensors of {file.path} as those of {type(model).__name__} "
            f"({first_line(error)}): convert the model again"
        ) from error
    decoded = replace(checkpoint, decoded={weight.key: weight for weight in found})
    return checkpoint_weights(model, decoded, partial=partial, mapping=mapping)


def _one_by_one(file: GgufFile) -> list[Decoded]:
    linked = _is_plain(file)
    return [Decoded(name, _whole(name, tensor, linked), (name,)) for name, tensor in file.tensors.items()]


def _processed(model: PreTrainedModel, file: GgufFile, fields: Mapping[str, Any]) -> list[Decoded]:
    """The parameters of an architecture of transformers' older way, by transformers' names."""
    process, linked = Processor(file.architecture, fields, model), _is_plain(file)
    sources: dict[str, dict[str, Made | None]] = {}
    unused: list[str] = []
    for name, tensor in file.tensors.items():
        targets = process.targets(name, tensor.shape)
        unused += [] if targets else [name]
        for target, made in targets.items():
            sources.setdefault(target, {})[name] = made
    if unused:
        raise UnsupportedModelError(
            f"{len(unused)} tensors of {file.path} are no parameters of {type(model).__name__}, the first is "
            f"'{unused[0]}', and transformers would leave them out: use the model's safetensors"
        )
    wanted, found = model.state_dict(), list[Decoded]()
    for target, names in sources.items():
        tensors, made = {name: file.tensors[name] for name in names}, next(iter(names.values()))
        shape = made.shape if made is not None else tuple(wanted[target].shape) if target in wanted else ()
        if math.prod(shape) != sum(math.prod(tensor.shape) for tensor in tensors.values()):
            raise ModelLoadError(
                f"{', '.join(names)} of {file.path} are not all of '{target}' of {type(model).__name__}, which has "
                f"the sizes {list(shape)}: the file is incomplete or of another model"
            )
        if made is not None and made.same:
            tensor = _whole(target, next(iter(tensors.values())), linked)
        else:
            tensor = _made(target, tensors, shape, process)
        found.append(Decoded(target, tensor, tuple(names)))
    return found


def _is_plain(file: GgufFile) -> bool:
    """Whether a package takes the file itself: most of it are numbers that stay as they are."""
    plain = [tensor.where.length for tensor in file.tensors.values() if tensor.kind in PLAIN]
    return 2 * sum(plain) >= sum(tensor.where.length for tensor in file.tensors.values())


def _whole(name: str, tensor: GgufTensor, linked: bool) -> ir.LazyTensor:
    """A tensor of the file as it is: where it lies, or its numbers."""
    stored, blocks = PLAIN.get(tensor.kind), parts(tensor)
    if blocks is not None:
        return dequantized(name, blocks)
    if stored is None:
        return _single(name, tensor.shape, lambda: numbers(tensor))
    own = tensor.where.tensor(name) if linked else lazy(name, stored, tensor.shape, lambda: numbers(tensor))
    return own if stored == ir.DataType.FLOAT else widened(_single(name, tensor.shape, lambda: numbers(tensor)), own)


def _made(target: str, tensors: Mapping[str, GgufTensor], shape: tuple[int, ...], process: Processor) -> ir.LazyTensor:
    """What transformers makes of tensors of the file; codes of one whose rows it only moves are moved alike."""
    if len(tensors) == 1:
        ((name, only),) = tensors.items()
        rows = process.rows(name, target, only.shape)
        blocks = None if rows is None else parts(only, rows)
        if blocks is not None:
            return dequantized(target, blocks)

    def make() -> Array:
        made = process({name: np.asarray(numbers(tensor), np.float32) for name, tensor in tensors.items()})[target]
        if made.shape != shape:
            raise ModelLoadError(
                f"{', '.join(tensors)} become '{target}' of {list(made.shape)}, and not of {list(shape)}: the file is "
                "of another model"
            )
        return made

    return _single(target, shape, make)


def _single(name: str, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.LazyTensor:
    return lazy(name, ir.DataType.FLOAT, shape, lambda: np.asarray(make(), np.float32))
