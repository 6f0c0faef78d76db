"""Tiny random encoder-decoder models, as data: a configuration, and what their encoder reads.

Weights are drawn large, so that answers change from token to token and with what is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VOCAB, LENGTH = 99, 17
"""Tokens, and those of the longest text to compile for."""


@dataclass(frozen=True)
class TinySeq2Seq:
    """A configuration of a tiny model.

    Attributes:
        model_type: transformers' name of the architecture.
        config: What differs from the architecture's defaults.
        features: Shape of the features of one recording; none for a model of texts.
        length: The axis of `features` that is its length.
        masked: Whether shorter recordings have a mask.
        positions: Positions of the encoder's output.
    """

    model_type: str
    config: dict[str, Any]
    features: tuple[int, ...] = ()
    length: int = 0
    masked: bool = True
    positions: int = LENGTH


_FLAT: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
_HEADS = {
    f"{part}_{name}": n
    for part in ("encoder", "decoder")
    for name, n in (("num_hidden_layers", 2), ("num_attention_heads", 4), ("num_key_value_heads", 4))
}

MODELS: dict[str, TinySeq2Seq] = {
    "bart": TinySeq2Seq("bart", {**_FLAT, "forced_eos_token_id": 2}),
    "marian": TinySeq2Seq("marian", _FLAT),
    "pegasus": TinySeq2Seq("pegasus", _FLAT),
    "t5": TinySeq2Seq("t5", _T5),
    "whisper": TinySeq2Seq(
        "whisper",
        {
            **_FLAT, "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 64,
            "begin_suppress_tokens": [5], "suppress_tokens": [7, 8],
        },
        (8, 60), 1, masked=False, positions=30,
    ),
    "speech_to_text": TinySeq2Seq(
        "speech_to_text",
        {
            **_FLAT, "input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64,
            "max_target_positions": 64, "conv_kernel_sizes": [3, 3], "num_conv_layers": 2,
        },
        (60, 8), positions=15,
    ),
    "moonshine": TinySeq2Seq(
        "moonshine",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, **_HEADS, "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        },
        (6400,), positions=15,
    ),
}  # fmt: skip


class Extractor:
    """Stands for a feature extractor: features of silence, in their longest form."""

    sampling_rate = 100

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, recording: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        import torch

        case = MODELS[self.name]
        mask = torch.ones((1, case.features[case.length]), dtype=torch.long)
        return {main_input(self.name): torch.zeros((1, *case.features)), "attention_mask": mask}

    def save_pretrained(self, folder: Path) -> None:
        """Nothing is saved of it."""


def main_input(name: str) -> str:
    """What the encoder of a model is given."""
    return tiny(name).main_input_name


@functools.cache
def tiny(name: str) -> PreTrainedModel:
    """A tiny model; do not change it."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    case = MODELS[name]
    make: Callable[..., Any] = (AutoModelForSpeechSeq2Seq if case.features else AutoModelForSeq2SeqLM).from_config
    torch.manual_seed(0)
    model = make(AutoConfig.for_model(case.model_type, **case.config), dtype=torch.float32).eval()
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.3)
    return model


def read(name: str, seed: int = 1, length: int | None = None) -> dict[str, torch.Tensor]:
    """What two rows read, the second one shorter; `length` of the longer, the longest by default."""
    import torch

    case, drawn = MODELS[name], torch.Generator().manual_seed(seed)
    if not case.features:
        length = LENGTH - 3 if length is None else length
        ids = torch.randint(5, VOCAB, (2, length), generator=drawn)
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        ids[1, length // 2 :] = int(case.config["pad_token_id"])
        return {"input_ids": ids, "attention_mask": mask}
    shape = [length if at == case.length and length else n for at, n in enumerate(case.features)]
    given = {main_input(name): torch.randn((2, *shape), generator=drawn)}
    if case.masked:
        given["attention_mask"] = torch.ones((2, shape[case.length]), dtype=torch.long)
        given["attention_mask"][1, shape[case.length] * 3 // 4 :] = 0
    return given
