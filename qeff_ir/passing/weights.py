"""Weights that a pass derives from others: the stored matrix behind a product, and new weights that are computed late.

A derived weight takes no memory: its numbers are computed when somebody asks for them, which is when a package is
written, one weight after the other. A pass that makes one says so (`Pass.changes_weights`). A weight that is derived
from quantized ones is float32, unless features of the output are only moved (`side_by_side`, `repeated`): then it has
their codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.errors import PassError
from qeff_ir.ir.module import CHANGED_KEY, PARTS_KEY, WEIGHT_KEY
from qeff_ir.passing.matching import made_by
from qeff_ir.passing.rewriter import Rewriter
from qeff_ir.quantized import Quantized, dequantized, lazy, quantized, single


@dataclass(frozen=True, slots=True)
class Stored:
    """The weight behind a matrix product, as the checkpoint has it.

    Attributes:
        value: The initializer, ``[in, out]`` or ``[out, in]``.
        transposed: Whether it is stored ``[out, in]``, as linear layers are, and read through a `Transpose`.
    """

    value: ir.Value
    transposed: bool

    @property
    def features(self) -> tuple[int, int]:
        """``(in, out)``."""
        assert self.value.shape is not None
        rows, columns = (int(d) for d in self.value.shape.numpy())
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def out_axis(self) -> int:
        """The axis of the output features."""
        return 0 if self.transposed else 1


def stored(product: ir.Node) -> Stored | None:
    """The stored weight of a ``MatMul``; `None` where its second operand is not a weight of two axes."""
    if product.op_type != "MatMul" or product.domain != "":
        return None
    transpose = made_by(product.inputs[1], "Transpose")
    value = product.inputs[1] if transpose is None else transpose.inputs[0]
    if value is None or not value.is_initializer() or WEIGHT_KEY not in value.metadata_props:
        return None
    if value.shape is None or len(value.shape) != 2:
        return None
    if transpose is not None and list(transpose.attributes.get_ints("perm", [1, 0])) != [1, 0]:
        return None
    return Stored(value, transpose is not None)


def weights_beside(product: ir.Node) -> list[ir.Value]:
    """The weights of a product that reads several side by side, through a `Concat`; none of any other node."""
    if product.op_type != "MatMul" or product.domain != "":
        return []
    transpose = made_by(product.inputs[1], "Transpose")
    both = made_by(product.inputs[1] if transpose is None else transpose.inputs[0], "Concat")
    found = [v for v in both.inputs if v is not None and WEIGHT_KEY in v.metadata_props] if both is not None else []
    return found if both is not None and len(found) == len(both.inputs) else []


def parameters(value: ir.Value) -> tuple[str, ...]:
    """The parameters of the Hugging Face model that a weight is, or is computed from; none of a constant."""
    name = value.metadata_props.get(WEIGHT_KEY, "")
    return tuple(value.metadata_props.get(PARTS_KEY, name).split(",")) if name else ()


def derived(
    rewriter: Rewriter,
    name: str,
    of: Sequence[ir.Value],
    shape: Sequence[int],
    compute: Callable[..., Array],
) -> ir.Value:
    """A new weight of the graph that is computed from others.

    Args:
        rewriter: Of the pass that makes it.
        name: Of the parameter that it stands for (``model.layers.0.mlp.gate_up_proj.weight``).
        of: The weights that it is computed from; its element type is that of the first.
        shape: Sizes.
        compute: Gets the numbers of the weights in their order, and returns those of the new one.

    Returns:
        The initializer.

    Raises:
        PassError: There is a weight of that name already, or one that it is computed from has no numbers. When the
            numbers are asked for: they have another shape than was said.
    """
    tensors = [value.const_value for value in of]
    absent = [str(value.name) for value, tensor in zip(of, tensors, strict=True) if tensor is None]
    if absent or not of:
        what = f"{absent[0]} has no numbers" if absent else "it is computed from nothing"
        raise PassError(f"the weight {name} cannot be derived: {what}")
    found = [tensor for tensor in tensors if tensor is not None]
    dtype = found[0].dtype

    def numbers() -> ir.Tensor[Array]:
        made = np.ascontiguousarray(compute(*(tensor.numpy() for tensor in found)), dtype=dtype.numpy())
        if made.shape != tuple(shape):
            raise PassError(f"the weight {name} was said to be {list(shape)}, and is {list(made.shape)}")
        return ir.Tensor(made, dtype=dtype, name=name)

    return added(rewriter, name, ir.LazyTensor(numbers, dtype, ir.Shape(shape), name=name), of)


def added(rewriter: Rewriter, name: str, tensor: ir.TensorProtocol, of: Sequence[ir.Value]) -> ir.Value:
    """A tensor as a new weight of the graph.

    Args:
        rewriter: Of the pass that makes it.
        name: See `derived`.
        tensor: The weight.
        of: The weights that it is computed from.

    Raises:
        PassError: There is a weight of that name already.
    """
    if name in rewriter.graph.initializers:
        raise PassError(f"there is a weight {name} already: give the derived one another name")
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    value.metadata_props.update({WEIGHT_KEY: name, CHANGED_KEY: rewriter.pass_id})
    value.metadata_props[PARTS_KEY] = ",".join(dict.fromkeys(part for old in of for part in parameters(old)))
    rewriter.graph.register_initializer(value)
    return value


def _moved(
    rewriter: Rewriter,
    name: str,
    of: Sequence[ir.Value],
    shape: Sequence[int],
    compute: Callable[..., Array],
    axis: int,
) -> ir.Value:
    """What `derived` makes, where numbers are only moved along one axis: of quantized weights, codes are moved."""
    parts = [found for value in of if (found := quantized(value.const_value)) is not None]
    grids = {(p.codes.dtype, p.axis, p.block, p.zeros is None) for p in parts}
    if len(parts) < len(of) or len(grids) > 1 or parts[0].axis == axis:
        return derived(rewriter, name, of, shape, compute)

    def move(dtype: ir.DataType, tensors: list[ir.TensorProtocol]) -> ir.LazyTensor:
        sizes = list(shape)
        sizes[parts[0].axis] = int(tensors[0].shape.numpy()[parts[0].axis])
        return lazy(name, dtype, tuple(sizes), lambda: compute(*(tensor.numpy() for tensor in tensors)))

    codes = move(parts[0].codes.dtype, [p.codes for p in parts])
    scales = [p.scales for p in parts]
    if len({tensor.dtype for tensor in scales}) > 1:
        scales = [single(tensor) for tensor in scales]
    zeros = [p.zeros for p in parts if p.zeros is not None]
    made = Quantized(
        codes,
        move(scales[0].dtype, scales),
        move(zeros[0].dtype, zeros) if zeros else None,
        parts[0].axis,
        parts[0].block,
    )
    return added(rewriter, name, dequantized(name, made), of)


def side_by_side(rewriter: Rewriter, name: str, parts: Sequence[Stored]) -> Stored:
    """One weight whose product gives the outputs of several, in their order: ``[in, out 1 + out 2 + …]``.

    Args:
        rewriter: See `derived`.
        name: See `derived`.
        parts: Weights of equal input features; they may be stored in different ways.

    Raises:
        PassError: See `derived`; or the input features differ.
    """
    first = parts[0]
    if any(part.features[0] != first.features[0] for part in parts):
        raise PassError(f"the weights of {name} take different numbers of features: they cannot stand side by side")
    outputs = sum(part.features[1] for part in parts)
    shape = (outputs, first.features[0]) if first.transposed else (first.features[0], outputs)
    values = [part.value for part in parts]
    flips = [part.transposed != first.transposed for part in parts]

    def compute(*arrays: Array) -> Array:
        turned = [array.T if flip else array for array, flip in zip(arrays, flips, strict=True)]
        return np.concatenate(turned, axis=first.out_axis)

    if any(flips):
        return Stored(derived(rewriter, name, values, shape, compute), first.transposed)
    return Stored(_moved(rewriter, name, values, shape, compute, first.out_axis), first.transposed)


def repeated(rewriter: Rewriter, name: str, value: ir.Value, axis: int, block: int, times: int) -> ir.Value:
    """A weight in which each block of features stands several times in a row: ``a a b b`` of ``a b``.

    Args:
        rewriter: See `derived`.
        name: See `derived`.
        value: The weight.
        axis: Of the features, not negative.
        block: Features of a block: the width of a head, say.
        times: How often each block stands there.

    Raises:
        PassError: See `derived`; or the features are not whole blocks.
    """
    assert value.shape is not None
    shape = [int(d) for d in value.shape.numpy()]
    if shape[axis] % block:
        raise PassError(f"axis {axis} of {value.name} has {shape[axis]} features: they are not blocks of {block}")
    made = [*shape[:axis], shape[axis] * times, *shape[axis + 1 :]]

    def compute(array: Array) -> Array:
        sizes = array.shape
        blocks = array.reshape(*sizes[:axis], -1, block, *sizes[axis + 1 :])
        return np.repeat(blocks, times, axis=axis).reshape(*sizes[:axis], -1, *sizes[axis + 1 :])

    return _moved(rewriter, name, [value], made, compute, axis)
