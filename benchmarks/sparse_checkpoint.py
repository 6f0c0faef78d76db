"""A checkpoint of any size that takes no disk: valid safetensors files whose data are holes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from qeff_ir.frontend.checkpoint.skeleton import build_skeleton

_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def write_checkpoint(config: PreTrainedConfig, folder: Path, *, dtype: str = "F32", shards: int = 4) -> int:
    """Write ``config.json``, the shards and their index into `folder`; every weight reads as zero.

    Args:
        config: Whose parameters to write.
        folder: An empty folder.
        dtype: Element type as safetensors spells it.
        shards: Number of files.

    Returns:
        Number of parameters.
    """
    config.save_pretrained(folder)
    model = build_skeleton(config)
    tied = set(model.all_tied_weights_keys or {})
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}
    names = list(shapes)
    size = math.ceil(len(names) / shards)
    places: dict[str, str] = {}
    for index, start in enumerate(range(0, len(names), size)):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        chosen = names[start : start + size]
        _write_shard(folder / file, {name: shapes[name] for name in chosen}, dtype)
        places |= dict.fromkeys(chosen, file)
    total = _count(shapes.values())
    data = {"metadata": {"total_size": total * _BYTES[dtype]}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))
    return total


def _write_shard(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _count([shape]) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of eight, as the format wants
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _count(shapes: Iterable[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
