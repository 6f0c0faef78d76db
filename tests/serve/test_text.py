"""Pieces of text add up to the tokenizer's own text, and end before the first stop string."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qeff_ir.serve.text import Detokenizer, StopStrings

from .servers import of_bytes

WORDS = ["▁the", "▁cat", "s", "▁", "é", "<0xE2>", "<0x82>", "<0xAC>", "▁€", "."]


def of_words() -> PreTrainedTokenizerFast:
    """As SentencePiece writes it: the first space goes, and bytes stand for what is no word."""
    made = Tokenizer(models.WordLevel({**{w: n for n, w in enumerate(WORDS)}, "<eos>": len(WORDS)}, unk_token="."))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token=".")


@pytest.mark.parametrize("make", [of_bytes, of_words])
def test_pieces_are_the_tokenizers_text(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    """However bytes are broken; with SentencePiece's, a broken character would change whole ones before it."""
    tokenizer = make()
    units = (
        [[token] for token in range(len(tokenizer))] if make is of_bytes else [[0], [1], [2], [3], [4], [5, 6, 7], [8]]
    )
    several = 0
    for drawn in np.random.default_rng(0).integers(0, len(units), (200, 12)):
        row = [token for number in drawn for token in units[number]]
        pieces = Detokenizer(tokenizer)
        made = [pieces.add(token) for token in row]
        assert "".join([*made, pieces.rest()]) == tokenizer.decode(row, skip_special_tokens=True)
        several += sum(map(bool, made)) > 1
    assert several > 100


def test_a_character_comes_when_it_is_whole() -> None:
    tokenizer, pieces = of_bytes(), Detokenizer(of_bytes())
    assert [pieces.add(token) for token in tokenizer.encode("é!→", add_special_tokens=False)] == [
        "",
        "é",
        "!",
        "",
        "",
        "→",
    ]


def test_a_text_ends_before_its_first_stop_string_however_it_comes() -> None:
    stops, text = ["ab", "bcd", "xyz"], "aabcabab"
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        found = StopStrings(stops)
        parts = "".join(letter + ("|" if cut else "") for letter, cut in zip(text, [*cuts, False], strict=True)).split(
            "|"
        )
        made = ""
        for part in parts:
            if not found.met:
                made += found.add(part)
                assert made in ("", "a")  # never a part of what ends it
        assert (made, found.met) == ("a", True)
    never = StopStrings(stops)
    assert [never.add("xy"), never.add("b"), never.rest()] == ["", "xy", "b"]
    assert not never.met
