"""What the AI 100 contract says of an encoder in its decoder's graph (§1.7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from backends.ai100.violation import Violation

# Written out again: this module checks what the others make, and shares no names with them.
SUFFIX = "_RetainedState"
CROSSED = ("past_key_self", "past_value_self", "past_key_cross", "past_value_cross")
"""States of a layer that reads an encoder's output, in order."""
FEATURES = ("input_features", "input_values", "encoder_input_ids")
"""What an encoder in a decoder's graph is given, by the kind of model, and those like it."""
SEEN = "encoder_attention_mask"
"""What of it is real, beside the positions."""


def encoder_interface(inputs: Mapping[str, Any], states: Mapping[str, str]) -> Iterator[Violation]:
    """Its features, and four states in each layer that reads them.

    Args:
        inputs: Of the graph, by name.
        states: Names of the retained states, and their kinds.
    """
    kinds, features = list(states.values()), [name for name in FEATURES if name in inputs]
    crossed = [kind for kind in kinds if kind in CROSSED]
    if bool(crossed) != bool(features) or (crossed and kinds != [*CROSSED] * (len(kinds) // len(CROSSED))):
        yield Violation(
            "inputs",
            f"features, and {', '.join(CROSSED)} of each layer, belong together: keep all or none",
        )
    for name in features:
        shape, wanted = list(inputs[name].shape or []), np.int64 if name == FEATURES[2] else np.float32
        open_sizes = [size for size in shape[1:] if not isinstance(size, int)]
        if inputs[name].dtype != wanted or shape[:1] != ["batch_size"] or open_sizes != ["feature_len"]:
            found = f"{inputs[name].dtype} {shape}"
            yield Violation("dtype-shape", f"{name} is {found}, not {np.dtype(wanted)} [batch_size, ..., feature_len]")
    if SEEN in inputs:
        shape = list(inputs[SEEN].shape or [])
        if inputs[SEEN].dtype != np.int64 or shape[:1] != ["batch_size"] or not isinstance(shape[-1], int):
            yield Violation("dtype-shape", f"{SEEN} is {inputs[SEEN].dtype} {shape}, not int64 [batch_size, length]")
    for name in states:
        length = "encoder_ctx_len" if "_cross." in name else "decoder_ctx_len" if "_self." in name else None
        shape = list(inputs[name].shape or [])
        slots = shape[2] if len(shape) == 4 else None
        window = length == "decoder_ctx_len" and str(slots).startswith("sliding_window")
        if length is not None and slots != length and not window:
            yield Violation("dtype-shape", f"{name} is {shape}, not [batch_size, heads, {length}, width]")


def written_once(graph: gs.Graph) -> Iterator[Violation]:
    """What an encoder makes is written by runs with features, and kept by those without."""
    outputs: list[Any] = list(graph.outputs)
    for tensor in outputs:
        if "_cross." in tensor.name and tensor.name.endswith(SUFFIX):
            node = tensor.inputs[0] if tensor.inputs else None
            kept = node.inputs[1].name if node is not None and node.op == "Where" else ""
            if kept != tensor.name.removesuffix(SUFFIX):
                yield Violation("cross-state", f"{tensor.name} is not Where(feature_len == 1, old, new): emit again")


def runs_of_encoder(entries: Sequence[Mapping[str, str]]) -> Iterator[Violation]:
    """One specialization has features, one has a single entry, and the contexts are the same in both."""
    lengths = [entry["feature_len"] for entry in entries if "feature_len" in entry]
    contexts = {tuple(entry.get(f"{part}_ctx_len") for part in ("encoder", "decoder")) for entry in entries}
    if lengths and (lengths.count("1") != 1 or len(lengths) != 2 or len(contexts) != 1):
        yield Violation(
            "encoder-runs", f"feature_len is {', '.join(lengths)}: give one specialization with features and one with 1"
        )
