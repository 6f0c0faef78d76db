from __future__ import annotations

import pytest
import typer

from qeff_ir.cli.flags import split_flags

OWN = {"--ctx-len": True, "--emit-only": False, "-o": True, "--help": False}


@pytest.mark.parametrize(
    ("words", "flags", "rest"),
    [
        ("m --mos 1", {"mos": 1}, "m"),
        ("m --mos=1 -o out", {"mos": 1}, "m -o out"),
        ("m --aic-enable-depth-first", {"aic_enable_depth_first": True}, "m"),
        ("m --deep --mos 2 --emit-only", {"deep": True, "mos": 2}, "m --emit-only"),
        ("m --shift -3 --name a-b --empty=", {"shift": -3, "name": "a-b", "empty": ""}, "m"),
        ("m --ctx-len 64 --ctx-len=65", {}, "m --ctx-len 64 --ctx-len=65"),
        ("-o --strange m", {}, "-o --strange m"),
        ("m -- --mos 1", {}, "m -- --mos 1"),
    ],
)
def test_split(words: str, flags: dict[str, object], rest: str) -> None:
    assert split_flags(words.split(), OWN) == (flags, rest.split())


def test_a_bare_flag_is_true_not_one() -> None:
    assert split_flags(["--deep"], OWN)[0]["deep"] is True


def test_a_misspelled_option_is_no_flag() -> None:
    with pytest.raises(typer.BadParameter, match="did you mean --ctx-len"):
        split_flags(["m", "--ctx-lenn", "64"], OWN)
