"""Names are taken once: of passes and of properties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from qeff_ir.errors import PipelineError
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass, Rewriter, register, registered_passes
from qeff_ir.passing.options import options
from qeff_ir.passing.properties import define


def test_a_second_pass_of_a_name_is_refused() -> None:
    @dataclass(frozen=True, slots=True)
    class Second(Pass):
        """Not the pass of that name."""

        name: ClassVar[str] = "canonicalize"

        def run(self, module: Module, rewriter: Rewriter) -> None:
            """Do nothing."""

    assert "canonicalize" in registered_passes()
    with pytest.raises(PipelineError) as error:
        register(Second)
    assert str(error.value) == (f"two passes are named 'canonicalize': passes.canonicalize and {__name__}; rename one")


def test_a_second_checker_of_a_property_is_refused() -> None:
    with pytest.raises(PipelineError) as error:
        define("canonical")(lambda module: None)
    assert str(error.value) == "two checkers define the property 'canonical'; rename one"


def test_every_option_says_what_it_is_for() -> None:
    found = [(name, option) for name, made in registered_passes().items() for option in options(made).values()]
    assert len(found) > 15
    assert not [(name, option.name) for name, option in found if not option.help]
