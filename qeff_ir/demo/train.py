"""Train the bundled demo model: ``python -m qeff_ir.demo.train [--out FOLDER]``, seven minutes on one core.

The model reads chains such as ``12+34=46;47+38=``, writes the last sum digit by digit and ends. A tenth of the problems
is never trained on; the right answers to those show that the model adds and does not recite.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from qeff_ir.demo import MODEL_FOLDER

Problem = tuple[int, int]
"""Two numbers to add."""

PAD, BOS, EOS, UNK = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
IDS = {token: number for number, token in enumerate((*SPECIALS, *"0123456789+=;"))}
"""The vocabulary: one token per character."""

SEED = 0
STEPS = 2000
REPORT_EVERY = 250
PROBLEMS_PER_STEP = 512
LEARNING_RATE = 3e-3
CONTEXT = 256
LONGEST_CHAIN = (CONTEXT - 1) // len("99+99=198;")
"""Problems that surely fit the context, after `BOS`."""

_IGNORED = -100
"""Label of a position that carries no loss, as transformers defines it."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that puts `BOS` in front and decodes without adding spaces."""
    # BPE without merges never leaves single characters, and so needs no pre-tokenizer.
    tokenizer = Tokenizer(models.BPE(vocab=IDS, merges=[], unk_token=UNK))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """The untrained model: grouped heads, and about 1.2 MB of weights."""
    config = LlamaConfig(
        vocab_size=len(IDS),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
        # The default of 0.02 suits models that are forty times as wide.
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=IDS[PAD], bos_token_id=IDS[BOS], eos_token_id=IDS[EOS]
    )
    return model


def split_problems(rng: random.Random) -> tuple[list[Problem], list[Problem]]:
    """All sums of numbers below 100: nine tenths to train on, and the held-out rest."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    rng.shuffle(pairs)
    return pairs[1000:], pairs[:1000]


def encode(chains: Sequence[Sequence[Problem]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of chains, padded on the right, where causal attention never looks.

    Only answers carry loss, since nobody can foresee a question. Each answer is to be followed by `EOS`, though the
    chain itself goes on with a semicolon: the model learns to stop after one answer, wherever in a chain it stands.
    """
    ids: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for chain in chains:
        row, wanted = [IDS[BOS]], [_IGNORED]
        for a, b in chain:
            question, answer = ([IDS[c] for c in text] for text in (f"{a}+{b}=", str(a + b)))
            row += [*question, *answer, IDS[";"]]
            wanted += [*[_IGNORED] * len(question), *answer, IDS[EOS]]
        ids.append(torch.tensor(row))
        labels.append(torch.tensor(wanted))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=IDS[PAD]), pad(labels, batch_first=True, padding_value=_IGNORED)


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, problems: Sequence[Problem]) -> float:
    """Share of problems, each alone, that greedy decoding answers without any mistake."""
    # One forward pass over the right answers decides it: greedy decoding sees the same tokens up to its first mistake.
    ids, labels = encode([[problem] for problem in problems])
    found, wanted = model(input_ids=ids).logits.argmax(-1)[:, :-1], labels[:, 1:]
    return ((found == wanted) | (wanted == _IGNORED)).all(1).double().mean().item()


def train(out: Path) -> None:
    """Train from scratch and write the model to a folder, at every report anew so that an early end loses little."""
    # One thread sums in one order, so that a second run yields the same weights.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    trained, held_out = split_problems(rng)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, STEPS, pct_start=0.05, cycle_momentum=False
    )
    build_tokenizer().save_pretrained(out)
    # Few sums have a number of one digit; drawn no more often than others, they are the last to come right.
    odds = [3 if min(problem) < 10 else 1 for problem in trained]
    for step in range(1, STEPS + 1):
        # All chains of a step are equally long, and fewer the longer they are, so that little is padding and every
        # step costs about the same.
        length = rng.randint(1, LONGEST_CHAIN)
        ids, labels = encode([rng.choices(trained, odds, k=length) for _ in range(PROBLEMS_PER_STEP // length)])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0:
            model.save_pretrained(out)
            shares = f"{accuracy(model, trained):.2%} of trained, {accuracy(model, held_out):.2%} of held-out sums"
            print(f"step {step}: loss {loss.item():.5f}, right: {shares}", flush=True)


def run(train: Callable[[Path], None], folder: Path, what: str | None) -> None:
    """Read the command line and train a model into a folder, this one by default."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--out", type=Path, default=folder, help="folder to write the model to")
    disable_progress_bar()
    train(parser.parse_args().out)


if __name__ == "__main__":
    run(train, MODEL_FOLDER, __doc__)
