"""``python -m benchmarks <name>``."""

from __future__ import annotations

import typer

from benchmarks import coverage, decode, embed, lora, memory, passes

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_show_locals=False)
app.command("coverage")(coverage.main)
app.command("decode")(decode.main)
app.command("embed")(embed.main)
app.command("lora")(lora.main)
app.command("memory")(memory.main)
app.command("passes")(passes.main)

if __name__ == "__main__":
    app()
