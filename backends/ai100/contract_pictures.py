"""What the AI 100 contract says of vision programs, and of rows or pixels in language programs (§1.8 and §1.9)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from backends.ai100.violation import Violation

# Written out again: this module checks what the others make, and shares no names with them.
ROWS = ("vision_embeds", "deepstack_features")
"""Rows that a vision program makes and a language program keeps, in the order of its inputs."""
PIXELS = "pixel_values"
"""What a language program with the encoder in its graph keeps instead."""
BESIDE = ("image_idx", "mm_token_type_ids")
"""What a language program is given beside positions."""
NEXT = "image_idx_output"


def vision_interface(inputs: dict[str, Any], outputs: dict[str, Any]) -> Iterator[Violation]:
    """A vision program: all sizes are fixed, and so are the names of what it makes (§1.8 and §1.9)."""
    for name, tensor in (*inputs.items(), *outputs.items()):
        shape = list(tensor.shape or [])
        if not shape or not all(isinstance(size, int) for size in shape):
            yield Violation("dtype-shape", f"{name} is {shape}, not of a fixed size")
    if list(outputs) != [name for name in ROWS if name in outputs]:
        yield Violation("outputs", f"the outputs of a vision program must be {', '.join(ROWS)} in order")
    yield from rows({name: outputs[name] for name in ROWS if name in outputs}, 1)


def rows(tensors: dict[str, Any], batch: int | str) -> Iterator[Violation]:
    """Rows are ``[batch, rows, hidden]``, those for layers as many and as wide."""
    whole = list(tensors[ROWS[0]].shape or []) if ROWS[0] in tensors else []
    for name, tensor in tensors.items():
        shape = list(tensor.shape or [])
        inner = shape if name == ROWS[0] else shape[1:]
        fixed = all(isinstance(size, int) for size in [*shape[: len(shape) - len(inner)], *inner[1:]])
        if tensor.dtype != np.float32 or len(inner) != 3 or inner[0] != batch or inner != whole or not fixed:
            wanted = f"[{batch}, rows, hidden]" if name == ROWS[0] else f"[layers, *{whole}]"
            yield Violation("dtype-shape", f"{name} is {tensor.dtype} {shape}, not float32 {wanted}")


def language_interface(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Iterator[Violation]:
    """Rows, or the pixels that are encoded in the graph, and the row that a run begins with, belong together."""
    held = [name for name in (*ROWS, PIXELS) if name in inputs]
    if bool(held) != (BESIDE[0] in inputs) or bool(held) != (NEXT in outputs) or (PIXELS in held and len(held) > 1):
        yield Violation(
            "inputs",
            f"{ROWS[0]} (or {PIXELS}), {BESIDE[0]} and the output {NEXT} belong together: keep all or none",
        )
    yield from rows({name: inputs[name] for name in held if name != PIXELS}, "batch_size")
    if PIXELS in held:
        tensor, shape = inputs[PIXELS], list(inputs[PIXELS].shape or [])
        sizes = shape[1:] if shape[:1] == ["batch_size"] else shape
        fixed = all(isinstance(size, int) for size in sizes)
        if tensor.dtype != np.float32 or len(shape) < 2 or not fixed:
            yield Violation("dtype-shape", f"{PIXELS} is {tensor.dtype} {shape}, not float32 [batch_size, ...]")


def runs_of_pixels(graph: gs.Graph, entries: Sequence[Mapping[str, str]]) -> Iterator[Violation]:
    """A run of several tokens reads what an encoder in the graph makes, and one of a single token does not.

    The compiler finds the latter by the shape alone: all that pixels lead to ends in ``Where(seq_len == 1, ...)``.
    """
    held: list[Any] = list(graph.inputs)
    inputs = {tensor.name: tensor for tensor in held}
    if PIXELS not in inputs or BESIDE[0] not in inputs:  # an encoder by itself
        return
    if all(entry.get("seq_len") == "1" for entry in entries):
        yield Violation("encoder-runs", f"no specialization has a seq_len above 1: {PIXELS} would never be read")
    reached: dict[int, Any] = {}
    outputs: list[Any] = list(graph.outputs)
    waiting: list[Any] = [inputs[PIXELS]]
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in reached:
            continue
        reached[id(tensor)] = tensor
        for node in tensor.outputs:
            at = [index for index, given in enumerate(node.inputs) if given is tensor]
            if node.op != "Where" or at != [2] or not _is_one_token(node.inputs[0]):
                waiting += node.outputs
    for tensor in outputs:
        if id(tensor) in reached and not tensor.name.startswith(PIXELS):
            yield Violation("encoder-runs", f"{tensor.name} of a run of one token depends on {PIXELS}: emit again")


def _is_one_token(tensor: Any) -> bool:
    """Whether it is ``seq_len == 1``, of the shape of something."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op != "Equal":
        return False
    made = [i.inputs[0].op for i in node.inputs if i.inputs]
    values = [np.asarray(i.values).reshape(-1).tolist() for i in node.inputs if isinstance(i, gs.Constant)]
    return made == ["Shape"] and values == [[1]]
