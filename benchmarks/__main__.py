"""``python -m benchmarks SUITE``."""

from __future__ import annotations

import typer

from benchmarks import (
    compare,
    coverage,
    embed,
    every,
    lora,
    lowering,
    package,
    passes,
    pipeline,
    race,
    serve,
    table,
    vision,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_show_locals=False)
app.command("lowering")(lowering.main)
app.command("pipeline")(pipeline.main)
app.command("decode")(race.decode)
app.command("prefill")(race.prefill)
app.command("embed")(embed.main)
app.command("lora")(lora.main)
app.command("vision")(vision.main)
app.command("serve")(serve.main)
app.command("coverage")(coverage.main)
app.command("package")(package.main)
app.command("passes")(passes.main)
app.command("all")(every.main)
app.command("table")(table.main)
app.command("compare")(compare.main)

if __name__ == "__main__":
    app()
