"""The options that all suites share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[Path | None, typer.Option(help="Write the figures here.", metavar="FILE")]
Plot = Annotated[Path | None, typer.Option(help="Draw the figures here.", metavar="FILE")]
Quick = Annotated[bool, typer.Option("--quick", help="Small models and few runs: shows that it works.")]
Runs = Annotated[int, typer.Option(help="Measured runs; a figure is their median.", min=1)]
Target = Annotated[str, typer.Option(help="Backend whose pipeline is run.")]
Peers = Annotated[str, typer.Option(help="Who else runs: names with commas, 'all' or 'none'.")]
