"""A decoder through one of transformers' own exporters, in the form that suits a race best."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel
from transformers.exporters.auto import AutoHfExporter
from transformers.exporters.base import ExportedModel
from transformers.exporters.configs import DynamoConfig

from benchmarks.peers.contender import Rows
from benchmarks.peers.silence import silence
from qeff_ir.frontend.versions import CACHE

_PAST, _NEW = 5, 3
"""Tokens of the example, cached and new: neither 0 nor 1, which an export would take for constants, and different."""


def export(model: PreTrainedModel, config: DynamoConfig, batch: int, *, vectors: bool = False) -> ExportedModel:
    """One graph that reads any number of tokens after a past of any length, so that it prefills and decodes.

    `export_for_generation` would make two graphs, and logits of every token of a prompt; this one computes those of
    the last token alone, as `generate` asks of eager.

    Args:
        model: The model.
        config: Of the exporter.
        batch: Rows.
        vectors: Whether it takes vectors instead of tokens, as ``inputs_embeds``.
    """
    ids = torch.zeros((batch, _PAST + _NEW), dtype=torch.int64)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :_PAST], use_cache=True, **{CACHE: cache})
    example: dict[str, Any] = {**inputs(ids[:, _PAST:].tolist(), _PAST), CACHE: cache}
    if vectors:
        with torch.no_grad():
            example = {"inputs_embeds": model.get_input_embeddings()(example.pop("input_ids")), **example}
    # Naming what varies spares the exporter to find out; rows and heads are fixed in a race.
    tokens, slots = {1: Dim.AUTO}, {2: Dim.AUTO}
    config.dynamic = True
    config.dynamic_shapes = {
        "inputs_embeds" if vectors else "input_ids": tokens,
        "position_ids": tokens,
        "logits_to_keep": None,
        CACHE: [slots] * (2 * len(cache.layers)),
    }
    with silence():
        return AutoHfExporter.from_config(config).export(model, example, config)


def inputs(rows: Rows, start: int) -> dict[str, Any]:
    """Arguments of the forward pass, the cache apart.

    Args:
        rows: New tokens, each row as many.
        start: Tokens that the cache holds.
    """
    ids = torch.tensor(rows)
    positions = torch.arange(start, start + ids.shape[1]).expand(len(rows), -1).contiguous()
    return {"input_ids": ids, "position_ids": positions, "logits_to_keep": 1}
