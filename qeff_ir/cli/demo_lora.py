"""``qeff demo --lora``: one compiled model and three ways to read a question, switched without compiling again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from qeff_ir.cli.models import open_tokenizer
from qeff_ir.cli.tables import grid
from qeff_ir.cli.terminal import line, seconds, show, working

NUMBERS = ((47, 38), (5, 8), (99, 64), (60, 7), (13, 80))
"""Of the questions; each is asked of the base model and of every adapter."""

_SIGNS = {"subtract": "difference", "larger": "larger one"}


def command(targets: Sequence[str], out: Path | None) -> None:
    """Compile the bundled model with branches for adapters, and ask in one batch, row by row, base model and adapters.

    Raises:
        typer.Exit: An answer is wrong, or a switch has compiled again.
    """
    from backends import find_backend
    from qeff_ir.auto.adapters import QEffAutoPeftModelForCausalLM
    from qeff_ir.demo import ADAPTERS_FOLDER, MODEL_FOLDER, TASKS

    started = time.perf_counter()
    show(
        Text(
            "A small causal LM that adds, and adapters trained with PEFT that make it do something else:", style="bold"
        )
    )
    line(str(MODEL_FOLDER))
    names = list(TASKS)
    for name in names:
        line(str(ADAPTERS_FOLDER / name))
    tokenizer = open_tokenizer(MODEL_FOLDER)
    asked = [(pair, name) for pair in NUMBERS for name in (None, *names)]
    prompts = [f"{a}+{b}=" for (a, b), _ in asked]
    right = [str(a + b if name is None else TASKS[name](a, b)) for (a, b), name in asked]
    wrong: list[str] = []
    folders = tempfile.TemporaryDirectory(prefix="qeff-demo-") if out is None else nullcontext(str(out))
    with folders as folder:
        for target in targets:
            with working(f"Compiling for {target}"):
                model = QEffAutoPeftModelForCausalLM.from_pretrained(ADAPTERS_FOLDER / names[0], names[0])
                model.compile(
                    target=target,
                    emit_only=find_backend(target).ahead_of_time,
                    batch_size=len(names) + 1,
                    compile_dir=Path(folder) / f"{target}-lora",
                    lora_targets="all-linear",
                    max_lora_rank=8,
                )
                package, session = model.package, model.runner().decoder.session
                for name in names[1:]:
                    model.load_adapter(ADAPTERS_FOLDER / name, name)
            mixed = model.generate(prompts=prompts, tokenizer=tokenizer, adapters=[name for _, name in asked])
            model.delete_adapter(names[0])
            alone = model.generate(prompts=prompts[: len(names) + 1], tokenizer=tokenizer)
            show()
            show(Text(f"Target {target}: one batch, an adapter for each row", style="bold"))
            show()
            show(_table(names, mixed.generated_texts, right))
            same = model.package is package and model.runner().decoder.session is session
            base_answers = [right[0]] * len(alone.generated_texts)
            if mixed.generated_texts != right or alone.generated_texts != base_answers or not same:
                wrong.append(target)
            show(f"{mixed}; one adapter was loaded and one deleted while the session ran.")
    show()
    if wrong:
        line(("Something is wrong", "bold red"), f" on {' and '.join(wrong)}: see the tables above.")
        raise typer.Exit(1)
    show(Text("All answers are right, and nothing was compiled twice.", style="bold green"))
    show(f"That took {seconds(time.perf_counter() - started)}.")


def _table(names: Sequence[str], answers: Sequence[str], right: Sequence[str]) -> Table:
    heads = ["sum", *(_SIGNS.get(name, name) for name in names)]
    table = grid("question", *heads, right=tuple(heads))
    width = len(heads)
    for row, (a, b) in enumerate(NUMBERS):
        cells = [
            Text(f"{answers[i]} ✓", style="green")
            if answers[i] == right[i]
            else Text(f"{answers[i]} ✗", style="bold red")
            for i in range(row * width, (row + 1) * width)
        ]
        table.add_row(Text(f"{a}+{b}="), *cells)
    return table
