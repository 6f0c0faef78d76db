"""Sources of a node: the Hugging Face modules that it stands for, one or, where a pass made one node of several, all.

They are metadata of the node (`qeff_ir.ir.module.SOURCE_KEY`): full paths, in the order in which they were given.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from qeff_ir.ir.module import SOURCE_KEY

_BETWEEN = ".."
"""Between two paths; none contains it, for torch's names of modules have no dot and are not empty."""


def sources_of(node: ir.Node) -> tuple[str, ...]:
    """Paths of the Hugging Face modules that a node stands for; none when they are not known."""
    text = node.metadata_props.get(SOURCE_KEY, "")
    return tuple(text.split(_BETWEEN)) if text else ()


def set_sources(node: ir.Node, sources: Iterable[str]) -> None:
    """Record on a node which modules it stands for, each once."""
    node.metadata_props[SOURCE_KEY] = _BETWEEN.join(dict.fromkeys(sources))


def source_text(node: ir.Node) -> str:
    """What a reader is shown: ``model.layers.0.mlp.gate_proj+up_proj``, a shared owner once; empty when unknown."""
    paths = sources_of(node)
    owners = {path.rpartition(".")[0] for path in paths}
    if len(owners) == 1:
        return "+".join([*paths[:1], *(path.rpartition(".")[2] for path in paths[1:])])
    return "+".join(paths)
