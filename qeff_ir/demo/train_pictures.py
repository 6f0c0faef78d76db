"""Train the bundled model of pictures and text: ``python -m qeff_ir.demo.train_pictures [--out FOLDER]``.

It takes ten minutes on one core. The model answers questions about drawn pictures (`qeff_ir.demo.pictures`). A tenth
of the sets of shapes is never trained on; the right answers about those show that the model looks and does not recite.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from qeff_ir.demo.pictures import COLORS, COUNTS, PICTURE_MODEL_FOLDER, SHAPES, SIZE, Drawn, Question, draw
from qeff_ir.demo.train import run

PAD, BOS, EOS, UNK, IMAGE = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
_WORDS = (
    *("Which", "digit", "is", "this", "What", "color", "the", "How", "many", "shapes", "are", "there", "shape"),
    *("from", "left", "to", "right", "?", ","),
)
IDS = {
    token: number
    for number, token in enumerate(
        dict.fromkeys((*SPECIALS, *"0123456789", *_WORDS, *COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES)))
    )
}
"""The vocabulary: one token per word."""

SEED = 0
STEPS = 2500
REPORT_EVERY = 250
PICTURES_PER_STEP = 64
QUESTIONS_PER_PICTURE = 6
JUDGED = 1000
"""Held-out pictures of a report."""
LEARNING_RATE = 2e-3
MATRIX_RATE = 4e-3
PATCH = 8
PLACES = (SIZE // PATCH) ** 2
"""Tokens of a picture."""
CONTEXT = 128
WIDTH = 96

_IGNORED = -100
"""Label of a position that carries no loss, as transformers defines it."""
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
"""Chat template: the pictures, then the question; the answer follows."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that puts `BOS` in front."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])])
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # which sets no space before a comma
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=CONTEXT,
    )


def build_processor() -> LlavaProcessor:
    """The processor: pictures of one size, whose values become -1 to 1, and a question behind each."""
    images = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=_TEMPLATE,
    )


def build_model() -> LlavaForConditionalGeneration:
    """The untrained model: a tower of four layers, and a decoder of two with grouped heads; about 2.5 MB of weights."""
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(IDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
        # The default of 0.02 suits models that are forty times as wide.
        initializer_range=0.1,
    )
    more: dict[str, Any] = {"initializer_range": 0.1}  # which the class knows, and does not declare
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS[IMAGE],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **more,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=16, pad_token_id=IDS[PAD], bos_token_id=IDS[BOS], eos_token_id=IDS[EOS]
    )
    return model


def encode(pictures: Sequence[Drawn], asked: Sequence[Sequence[Question]]) -> dict[str, Any]:
    """Arguments of the model for pictures, each with several questions that do not see one another.

    Args:
        pictures: The pictures.
        asked: The questions about each. Only answers carry loss, and the `EOS` after them.
    """
    read = [[(words(question.text), words(question.answer)) for question in own] for own in asked]
    prefix = [IDS[BOS], *[IDS[IMAGE]] * PLACES]
    longest = len(prefix) + max(sum(len(q) + len(a) for q, a in own) for own in read)
    shape = len(pictures), longest
    ids, labels = torch.full(shape, IDS[PAD]), torch.full(shape, _IGNORED)
    places, owner = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)  # -1: padding, which sees only itself
    for row, own in enumerate(read):
        at = len(prefix)
        ids[row, :at], places[row, :at], owner[row, :at] = torch.tensor(prefix), torch.arange(at), 0
        for number, (question, answer) in enumerate(own, 1):
            end = at + len(question) + len(answer)
            ids[row, at:end] = torch.tensor(question + answer)
            labels[row, at:end] = torch.tensor([_IGNORED] * (len(question) - 1) + [*answer, IDS[EOS]])
            places[row, at:end], owner[row, at:end] = torch.arange(len(prefix), len(prefix) + end - at), number
            at = end
    same = (owner[:, :, None] == owner[:, None]) | ((owner[:, None] == 0) & (owner[:, :, None] > 0))
    seen = (same & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
    pixels = torch.stack([torch.from_numpy(picture.pixels) for picture in pictures])
    return {
        "input_ids": ids,
        "wanted": labels,
        "position_ids": places,
        "attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        "pixel_values": pixels.permute(0, 3, 1, 2) / 127.5 - 1,
    }


def words(text: str) -> list[int]:
    """Token ids of a text."""
    return [IDS[word] for word in text.replace("?", " ?").replace(",", " ,").split()]


def logits_of(model: LlavaForConditionalGeneration, given: dict[str, Any]) -> torch.Tensor:
    """Logits, ``[batch, tokens, vocab]``."""
    return model(**{name: value for name, value in given.items() if name != "wanted"}, use_cache=False).logits


@torch.inference_mode()
def accuracy(model: LlavaForConditionalGeneration, count: int, *, kept: bool, seed: int = SEED + 1) -> dict[str, float]:
    """Share of questions about new pictures, by kind, that greedy decoding answers without any mistake."""
    # One forward pass over the right answers decides it: greedy decoding sees the same tokens up to its first mistake.
    rng, right = random.Random(seed), defaultdict[str, list[bool]](list)
    for start in range(0, count, PICTURES_PER_STEP):
        size = min(PICTURES_PER_STEP, count - start)
        pictures = [draw(rng, kept=kept, count=rng.choice(COUNTS)) for _ in range(size)]
        asked = [picture.questions() for picture in pictures]
        given = encode(pictures, asked)
        same = ((logits_of(model, given).argmax(-1) == given["wanted"]) | (given["wanted"] == _IGNORED)).tolist()
        for row, own in enumerate(asked):
            at = 1 + PLACES
            for question in own:
                end = at + len(words(question.text)) + len(words(question.answer))
                right[question.kind].append(all(same[row][at:end]))
                at = end
    shares = {kind: sum(found) / len(found) for kind, found in right.items()}
    return {"all": sum(map(sum, right.values())) / sum(map(len, right.values())), **shares}


def some(questions: Sequence[Question], rng: random.Random) -> list[Question]:
    """A few of the questions about a picture, each kind as often as the others."""
    kinds = [rng.choice([q for q in questions if q.kind == kind]) for kind in dict.fromkeys(q.kind for q in questions)]
    return rng.sample(kinds, min(len(kinds), QUESTIONS_PER_PICTURE))


def train(out: Path) -> None:
    """Train from scratch and write the model to a folder, at every report anew so that an early end loses little."""
    # One thread sums in one order, so that a second run yields the same weights.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(IDS)} tokens", flush=True)
    matrices = [
        p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "head" not in name
    ]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, o.param_groups[0]["lr"], STEPS, pct_start=0.1, cycle_momentum=False)
        for o in optimizers
    ]
    build_processor().save_pretrained(out)
    for step in range(1, STEPS + 1):
        pictures = [draw(rng, kept=False) for _ in range(PICTURES_PER_STEP)]
        given = encode(pictures, [some(picture.questions(), rng) for picture in pictures])
        logits = logits_of(model, given)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["wanted"].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        if step % REPORT_EVERY == 0 or step == STEPS:
            model.save_pretrained(out)
            shares = accuracy(model, JUDGED, kept=True)
            told = ", ".join(f"{kind} {share:.2%}" for kind, share in shares.items())
            print(f"step {step}: loss {loss.item():.5f}, right of held-out: {told}", flush=True)
    write_card(out, model)


def write_card(folder: Path, model: LlavaForConditionalGeneration) -> None:
    """Write the model's card: where it comes from, the digest of its weights, and how often it is right."""
    weights = folder / "model.safetensors"
    weights.chmod(0o644)
    trained, kept = (accuracy(model, 3 * JUDGED, kept=kept) for kept in (False, True))
    rows = [f"| {kind} | {trained[kind]:.2%} | {share:.2%} |" for kind, share in kept.items()]
    (folder / "README.md").write_text(
        f"""# Questions about drawn pictures

Written by `python -m qeff_ir.demo.train_pictures`, which trains this model from scratch on pictures of
`qeff_ir.demo.pictures`, {STEPS:,} steps of {PICTURES_PER_STEP} pictures, seed {SEED}. It knows nothing else.

Right answers about {3 * JUDGED:,} new pictures each, all questions that have one answer (greedy, seed {SEED + 1}).
Held-out: the set of shapes on the picture, with their colors, was on no picture of the training; of digits, the
drawing is new.

| question | sets of the training | held-out sets |
| --- | ---: | ---: |
{chr(10).join(rows)}

SHA-256 of `model.safetensors`: `{hashlib.sha256(weights.read_bytes()).hexdigest()}`
"""
    )


if __name__ == "__main__":
    run(train, PICTURE_MODEL_FOLDER, __doc__)
