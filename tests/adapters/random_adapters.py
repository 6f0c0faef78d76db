"""Random adapters of tiny models, made and saved by PEFT itself, and PEFT's answers with them."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel

from qeff_ir.testing.trace import Trace, reference_trace
from tests import support

SIZE = 0.03
"""Standard deviation of what an adapter adds to a weight."""


def make(model: PreTrainedModel, folder: Path, seed: int, **config: Any) -> PeftModel:
    """PEFT's model with a random adapter, saved to `folder`; `model` stays as it is.

    What it adds to a weight is about as large as the weight: by far more than rounding, and no reason for more of it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **config))
        generator = torch.Generator().manual_seed(seed)
        layers = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
        scaling = {id(p): m for m in layers for p in m.parameters()}
        with torch.no_grad():
            for key, tensor in peft_model.named_parameters():
                if "lora_" in key:
                    layer = scaling[id(tensor)]
                    size = (SIZE / (layer.scaling["default"] * layer.r["default"] ** 0.5)) ** 0.5
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
                elif tensor.requires_grad:  # biases
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        peft_model.save_pretrained(str(folder))
    return peft_model.eval()


def rows_reference(models: Sequence[Any], prompts: Sequence[Sequence[int]], steps: int) -> Trace:
    """The trace of a batch whose rows are answered by different models."""
    traces = [reference_trace(model, [row], steps) for model, row in zip(models, prompts, strict=True)]
    return Trace(np.concatenate([t.tokens for t in traces], axis=1), np.concatenate([t.logits for t in traces], axis=1))


@functools.cache
def base(name: str) -> PreTrainedModel:
    """A tiny model; do not change it."""
    return support.tiny(name)[1]
