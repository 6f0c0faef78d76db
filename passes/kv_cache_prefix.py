"""Names by which another host finds the caches of a package (AI 100 contract §1.2)."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import ClassVar

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass, Phase, Rewriter, register


@register
@dataclass(frozen=True, slots=True)
class KVCachePrefix(Pass):
    """Put ``prefix`` into the names of all states that runs write: ``past_key.0_<prefix>_RetainedState``.

    A host that hands caches from one package to another selects them by it. What the host itself writes, rows of
    pictures and adapters, keeps its names.
    """

    name: ClassVar[str] = "kv-cache-prefix"
    phase: ClassVar[Phase] = Phase.LOWER
    changes_interface: ClassVar[bool] = True

    prefix: str = field(default="kv", metadata={"help": "letters and digits"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Rename both ends of each state.

        Raises:
            PassError: The prefix has other characters, or the states have one already.
        """
        if re.fullmatch("[A-Za-z0-9]{1,60}", self.prefix) is None:
            raise PassError(f"the prefix of caches is {self.prefix!r}: give letters and digits")
        if any(state.prefix is not None for state in module.states):
            raise PassError("the caches have a prefix already: kv-cache-prefix has run before")
        ours = [state for state in module.states if not state.written_by_host]
        if not ours or not rewriter.rewrite("names"):
            return
        named = {state.input: dataclasses.replace(state, prefix=self.prefix) for state in ours}
        for name, state in named.items():
            past, kept = module.input(name), module.output(name + state.SUFFIX)
            past.name, kept.name = state.input, state.output
        module.residents = [named.get(state.input, state) for state in module.residents]
