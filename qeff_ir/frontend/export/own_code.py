"""A model's own code while it runs on fake tensors: what it stores is taken back, what it raises is one sentence."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Generator

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedModel

from qeff_ir.errors import QeffError, UnsupportedModelError

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
"""Color codes of a terminal."""
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
"""What of a module holds the functions that run after it: transformers records hidden states by some of its own."""


@contextlib.contextmanager
def attributes_kept(model: PreTrainedModel) -> Generator[None]:
    """Take back what the model's own code stores on its modules while it runs on fake tensors, hooks included."""
    own = [vars(module) for module in model.modules()]
    hooks = [attributes[name] for attributes in own for name in _HOOKS]
    saved = [(held, dict(held)) for held in (*own, *hooks)]
    try:
        yield
    finally:
        for held, before in saved:
            held.clear()
            held.update(before)


@contextlib.contextmanager
def as_unsupported(model: PreTrainedModel, what: str) -> Generator[None]:
    """Turn whatever a model's own code raises into one sentence; the cause stays chained."""
    try:
        yield
    except QeffError:
        raise
    except Exception as error:
        # The exporter wraps what happened in advice about itself; the first cause is what tells.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, GuardOnDataDependentSymNode):
            raise UnsupportedModelError(
                f"{type(model).__name__} {what}: it branches on what only a run knows, such as how long its longest "
                f"position is ({_code_of(cause)}); give it a form without such a branch, for rotary embeddings a "
                "rope_type that is not dynamic"
            ) from error
        first = next((line for line in str(cause).splitlines() if line.strip()), "no message")
        raise UnsupportedModelError(
            f"{type(model).__name__} {what}: {type(cause).__name__}: {_ESCAPES.sub('', first)[:300]}"
        ) from error


def _code_of(error: BaseException) -> str:
    """File and line of the last code that is not torch's own, as ``name.py:line``."""
    places = [p for p in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in p.filename]
    return f"{os.path.basename(places[-1].filename)}:{places[-1].lineno}" if places else "in torch itself"
