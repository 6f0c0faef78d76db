"""From prompts to texts: any number of prompts, in batches of the compiled size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import RuntimeInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qeff_ir.runtime.decoder import Timings
    from qeff_ir.runtime.generation import SessionLM


@dataclass(frozen=True)
class GenerationResult:
    """Texts and timings of a list of prompts.

    Attributes:
        generated_texts: The new text of each prompt.
        generated_ids: The new tokens of each prompt, its stop token included.
        timings: Of each batch that ran.
    """

    generated_texts: list[str]
    generated_ids: list[list[int]]
    timings: list[Timings]

    @property
    def time_to_first_token(self) -> float:
        """Mean seconds from the request to the first token's logits."""
        return sum(t.prefill for t in self.timings) / len(self.timings)

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, all rows together; 0 when nothing was decoded."""
        seconds = sum(sum(t.steps) for t in self.timings)
        return sum(t.tokens for t in self.timings) / seconds if seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{len(self.generated_texts)} prompts, time to first token {self.time_to_first_token * 1e3:.1f} ms, "
            f"{self.tokens_per_second:.1f} tokens/s"
        )


def generate_texts(
    runner: SessionLM,
    prompts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    kwargs: dict[str, Any],
    lora_ids: list[int] | None = None,
) -> GenerationResult:
    """Answer every prompt; the last batch is filled up with its last prompt, whose copies are dropped.

    Without a length in `kwargs` or the model's defaults, answers end with their stop token or with the context.

    Args:
        runner: The session.
        prompts: At least one.
        tokenizer: The model's.
        kwargs: For transformers' ``generate``; ``num_return_sequences`` and tensors of one batch make no sense here.
        lora_ids: Slot of each prompt's adapter; those of the decoder stay by default.

    Raises:
        RuntimeInputError: There is no prompt, or one of no token, or a request does not fit the compiled model.
    """
    refused = [name for name in ("input_ids", "attention_mask") if kwargs.get(name) is not None]
    if refused or (kwargs.get("num_return_sequences") or 1) > 1:
        name = refused[0] if refused else "num_return_sequences"
        raise RuntimeInputError(f"prompts cannot be combined with {name}: give token ids instead of prompts")
    if not prompts:
        raise RuntimeInputError("there is no prompt: give at least one")
    rows: list[list[int]] = [tokenizer(p)["input_ids"] for p in prompts]  # pyright: ignore[reportAssignmentType]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise RuntimeInputError(f"the prompt {prompt!r} has no token: give some text")
    size = runner.decoder.batch_size
    ids: list[list[int]] = []
    timings: list[Timings] = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        filled = batch + [batch[-1]] * (size - len(batch))
        if lora_ids is not None:
            slots = lora_ids[start : start + size]
            runner.decoder.lora_ids[:] = slots + slots[-1:] * (size - len(slots))
        ids += _run(runner, filled, {"tokenizer": tokenizer, **kwargs})[: len(batch)]
        timings.append(runner.decoder.timings)
    texts = [str(tokenizer.decode(i, skip_special_tokens=True)) for i in ids]
    return GenerationResult(texts, ids, timings)


def _run(runner: SessionLM, rows: list[list[int]], kwargs: dict[str, Any]) -> list[list[int]]:
    """The new tokens of each row, without what follows its stop token, or fills it up where it stopped otherwise."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    config = kwargs.get("generation_config") or runner.generation_config
    lengths = ("max_new_tokens", "max_length")
    if all(kwargs.get(n) is None and getattr(config, n) is None for n in lengths):
        kwargs = {**kwargs, "max_new_tokens": max(runner.decoder.ctx_len - width, 1)}
    out = runner.generate(ids, attention_mask=mask, **{**kwargs, "return_dict_in_generate": False})
    stop = kwargs.get("eos_token_id", config.eos_token_id)
    stops = set(stop if isinstance(stop, list) else [stop])
    new: list[list[int]] = out[:, width:].tolist()
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    ends = [next((i + 1 for i, t in enumerate(row) if t in stops), _filled(row, pad)) for row in new]
    return [row[:end] for row, end in zip(new, ends, strict=True)]


def _filled(row: list[int], pad: int | None) -> int:
    """How many tokens stand before those that fill a row up."""
    end = len(row)
    while end and row[end - 1] == pad:
        end -= 1
    return end
