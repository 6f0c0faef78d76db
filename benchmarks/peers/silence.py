"""Quiet for what prints while it prepares: the table of figures is all that a race shows."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Generator

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def silence() -> Generator[None]:
    """Drop advice, warnings and progress; errors and exceptions still tell."""
    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()
