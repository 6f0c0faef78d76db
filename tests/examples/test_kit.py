"""The kit for authors of passes: what it holds, what it tells, and faults that are planted in a pass from outside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from passes.fuse_products import FuseProducts
from qeff_ir.errors import PipelineError
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import LOGITS
from qeff_ir.passing import Pass, Rewriter
from qeff_ir.testing import kit
from qeff_ir.testing.edits import EditError
from qeff_ir.testing.kit import NotHeldError, hold_package, hold_pass, planted


def test_a_pass_holds_and_what_was_exercised_is_told() -> None:
    seen: list[int] = []
    held = hold_pass(FuseProducts(), examples=8, seen=seen.append)
    assert held.decoders == len(seen) >= 8 and held.changed > 4 and held.fired["3 products"] > 0
    assert str(held).startswith(f"{held.decoders} decoders, {held.changed} changed; fired: ")


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_packages_hold(target: str) -> None:
    assert hold_package(FuseProducts(), target=target, examples=4).changed > 1


@pytest.mark.parametrize("hold", [hold_pass, hold_package])
def test_a_fault_is_told_with_the_decoder_that_shows_it(hold: Callable[..., Any]) -> None:
    old = "parts = [part for node in group if (part := stored(node)) is not None]"
    with planted(FuseProducts._fuse, old, f"{old}[::-1]"), pytest.raises(NotHeldError) as caught:
        hold(FuseProducts(), examples=12)
    assert str(caught.value).startswith("fuse-products does not hold: ")
    cause: Any = caught.value.__cause__
    note = "\n".join(cause.__notes__)
    assert "recipe:   Recipe(" in note and "fuse-products" in note and "bundle: " in note
    assert hold(FuseProducts(), examples=4).changed > 0  # the fault has gone with the block


@dataclass(frozen=True, slots=True)
class Idle(Pass):
    """Does nothing."""

    name: ClassVar[str] = "idle"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Nothing."""


def test_a_pass_that_changes_nothing_is_not_held() -> None:
    with pytest.raises(NotHeldError, match=r"idle changed none of \d+ decoders: nothing was tried"):
        hold_pass(Idle(), examples=3)


@dataclass(frozen=True, slots=True)
class Louder(Pass):
    """Scales what becomes the logits: nothing but the numbers tells."""

    name: ClassVar[str] = "louder"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Scale it."""
        node = module.port(LOGITS).producer()
        assert node is not None and node.inputs[0] is not None
        value = node.inputs[0]
        b = rewriter.at(node)
        scaled = b("Mul", value, b.const(1.01, "float32"))
        if rewriter.rewrite("logits"):
            node.replace_input_with(0, scaled)


def test_packages_of_other_numbers_are_told() -> None:
    with pytest.raises(NotHeldError, match=r"the error is .* of the rms of the answers, of .* allowed"):
        hold_package(Louder(), examples=3, shrink=False)


def test_a_stock_pass_is_held_in_its_place() -> None:
    before, made, after = kit._placed("attention{impl=grouped}", "onnxruntime", None)
    assert made.name == "attention" and before.passes[-1].name == "kv-retention" and after.passes[0].name != "attention"
    before, made, after = kit._placed("merge-lora{adapter=FOLDER}", "ai100", None)
    assert made.name == "merge-lora" and after.passes[0].name == "image-merge"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert kit.main(["fuse-norms", "--target", "onnxruntime", "--examples", "3"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("onnxruntime: the pass held on ") and second.startswith("onnxruntime: packages held on ")
    assert kit.main(["no-such-pass"]) == 1
    assert "no-such-pass" in capsys.readouterr().err


def test_calls_that_hold_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PipelineError, match="'fuse-norms,unflatten' has 2 passes: give one"):
        hold_pass("fuse-norms,unflatten")
    with pytest.raises(ValueError, match="examples must be at least 1, not 0"):
        hold_package(Idle(), examples=0)
    with pytest.raises(SystemExit):
        kit.main(["fuse-norms", "--examples", "0"])
    assert "--examples must be at least 1, not 0" in capsys.readouterr().err


def around(number: int) -> Callable[[], int]:
    def inner() -> int:
        return number + 1

    return inner


def decorated(function: Callable[[], int]) -> Callable[[], int]:
    return functools.wraps(function)(lambda: function() * 10)


@decorated
def wrapped() -> int:
    return 1 + 1


def test_edits_reach_every_kind_of_function() -> None:
    held = around(4)
    with planted(held, "number + 1", "number + 2"):
        assert held() == 6
    assert held() == 5
    with planted(wrapped, "1 + 1", "1 + 2"):
        assert wrapped() == 30
    assert wrapped() == 20
    with pytest.raises(ZeroDivisionError), planted(kit.Held.count, "self.decoders += 1", "self.decoders += 2"):
        raise ZeroDivisionError
    item = kit.Held()
    with planted(item.__str__, "self.decoders", "17"):
        assert str(item) == "17 decoders, 0 changed"
    assert str(item) == "0 decoders, 0 changed"


@pytest.mark.parametrize(
    ("function", "old", "new", "message"),
    [
        (len, "1", "2", "is not a function that is written in Python"),
        (around(1), "number + 2", "1", "'number \\+ 2' stands 0 times in 'inner', not once"),
        (around(1), "number + 1", "1", "uses other variables of the functions around it"),
        (around(1), "number + 1", "number + 1", "what is put there is what stands there"),
        (eval("lambda: 1"), "1", "2", "has no source"),
    ],
)
def test_edits_that_cannot_be_planted(function: Callable[..., Any], old: str, new: str, message: str) -> None:
    with pytest.raises(EditError, match=message), planted(function, old, new):
        pytest.fail("it was planted")
