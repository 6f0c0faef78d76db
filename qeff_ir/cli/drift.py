"""What ``qeff verify`` says of a package that is fast and not exact: its drift on a text, beside its speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from qeff_ir.cli.models import encode, open_tokenizer
from qeff_ir.cli.tables import grid
from qeff_ir.cli.terminal import show, working
from qeff_ir.errors import RuntimeInputError
from qeff_ir.reading import read_bytes

if TYPE_CHECKING:
    from qeff_ir.compiler import Compiled
    from qeff_ir.frontend.source import Source

_MOST = 128
"""Tokens of a row: a decode step for each of its second half."""
_LARGEST = 4 << 20
"""Bytes of a text that is read."""


def show_drift(compiled: Compiled, source: Source, parts: Sequence[str], texts: Path | None) -> None:
    """Measure and show the drift of a fast package.

    Args:
        compiled: The package.
        source: The model that it is of.
        parts: What makes it fast.
        texts: A file with a text; the one that comes along by default.

    Raises:
        RuntimeInputError: There is no tokenizer, or the text is too short or cannot be read.
    """
    from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
    from qeff_ir.debug.drift import built_in_text, measure_drift, pieces
    from qeff_ir.package import SIDE_FOLDER

    text = built_in_text() if texts is None else _read(texts)
    tokens = encode(open_tokenizer(compiled.folder / SIDE_FOLDER), [text])[0]
    with working("Asking the compiled model, and transformers"):
        decoder = QEFFAutoModelForCausalLM.from_package(compiled.folder, checkpoint=source).runner().decoder
        decoder.check_scores()
        try:
            rows = pieces(tokens, decoder.batch_size, min(decoder.ctx_len, _MOST))
            found = measure_drift(decoder, source.reference(), rows)
        except ValueError as error:
            raise RuntimeInputError(f"the drift cannot be measured: {error}") from error
    show(Text.assemble(("Fast, not exact: ", "bold yellow"), f"{' and '.join(parts)}. Nothing is proved."))
    show(f"Its drift from transformers, on {found.tokens} tokens of {'a text' if texts is None else texts}:")
    show()
    table = grid("", "transformers", compiled.manifest.target, right=("transformers", compiled.manifest.target))
    table.add_row("first choice that agrees", "", f"{found.agreement:.1%}")
    table.add_row("KL divergence, nats", "", f"{found.divergence:.2e}")
    table.add_row("perplexity", f"{found.reference:,.2f}", f"{found.perplexity:,.2f}")
    table.add_row("tokens per second", "", f"{found.rate:,.1f}")
    show(table)


def _read(path: Path) -> str:
    try:
        return read_bytes(path, limit=_LARGEST, error=RuntimeInputError).decode()
    except UnicodeDecodeError as error:
        raise RuntimeInputError(f"--texts {path} is not a text in UTF-8 ({error.reason}): give another file") from error
