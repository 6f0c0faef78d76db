"""The public names of the pass infrastructure; everything else below `qeff_ir.passing` may change.

    from qeff_ir.passing import AllSites, Pass, register

A pass is a frozen dataclass (`Pass`), or one made of onnxscript's rewrite rules (`RulePass`) or of a function over an
onnx-graphsurgeon graph (`SurgeonPass`). `Pipeline` is an ordered list of passes, read from text; `run_pipeline` runs
it on a module and returns a `Report`. The names are imported on first use; ``__init__.pyi`` tells type checkers.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AllSites": "expect",
    "AnyNumber": "expect",
    "AtLeast": "expect",
    "Dump": "instrument",
    "Exactly": "expect",
    "Expect": "expect",
    "Instrument": "instrument",
    "Missed": "report",
    "OpBuilder": "rewriter",
    "Pass": "base",
    "PassRun": "report",
    "Phase": "base",
    "Pipeline": "pipeline",
    "PrintIR": "instrument",
    "Report": "report",
    "Rewriter": "rewriter",
    "RulePass": "rules",
    "SurgeonPass": "surgeon",
    "register": "base",
    "run_pipeline": "manager",
}
"""The module here that each public name lives in."""

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import the heavy parts on first use only."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
