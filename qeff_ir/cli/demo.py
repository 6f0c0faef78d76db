"""``qeff demo``: the whole way, on the bundled model, with answers that can be checked."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from qeff_ir.cli.models import compile_source, encode, open_model, open_tokenizer
from qeff_ir.cli.request import Request
from qeff_ir.cli.tables import agreement_table, grid, pipeline_table
from qeff_ir.cli.terminal import line, seconds, show, working
from qeff_ir.errors import CompileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qeff_ir.cli.lowered import LoweredOnce
    from qeff_ir.testing.trace import Comparison, Trace

_STEPS = 4
"""Tokens that are compared after each question: the longest answer, and its stop token."""


@dataclass(frozen=True)
class _Outcome:
    """What one target made of the questions."""

    target: str
    answers: list[str]
    comparison: Comparison


def command(
    target: Annotated[str | None, typer.Option(help="Only this target.", show_default="all")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep the packages in this folder.", show_default=False)
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Switch between adapters of the model instead.")] = False,
    vision: Annotated[
        bool, typer.Option("--vision", help="Ask about pictures instead, another bundled model.")
    ] = False,
) -> None:
    """Compile the bundled model, run it, and hold every token and logit against transformers."""
    from backends import backend_names

    names = backend_names()
    if target is not None and target not in names:
        raise CompileError(f"the demo has no target '{target}': use {' or '.join(names)}, or leave it out for all")
    if lora and vision:
        raise CompileError("--lora and --vision are two demos: take one of them")
    if lora:
        import qeff_ir.cli.demo_lora as demo_lora

        demo_lora.command([target] if target else names, out)
        return
    if vision:
        import qeff_ir.cli.demo_pictures as demo_pictures

        demo_pictures.command([target] if target else names, out)
        return
    from qeff_ir.demo import MODEL_FOLDER, problems

    started = time.perf_counter()
    questions = problems()
    show(Text("A small causal LM, trained to add two-digit numbers, comes with qeff-ir:", style="bold"))
    line(str(MODEL_FOLDER))
    show()
    source = open_model(str(MODEL_FOLDER), Request())
    with working("Lowering the model to ONNX") as say:
        from qeff_ir.cli.lowered import LoweredOnce
        from qeff_ir.cli.yardstick import measure
        from qeff_ir.testing.trace import reference_trace

        once = LoweredOnce(source)
        module = once.lower()
        lowered = time.perf_counter() - started
        say("Asking transformers")
        tokenizer = open_tokenizer(MODEL_FOLDER)
        rows = encode(tokenizer, [q for q, _ in questions])
        theirs = once.reference()
        reference = reference_trace(theirs, rows, _STEPS)
        yardstick = measure(module, theirs, rows, reference)
    show(
        f"Lowered to {len(module.graph)} ONNX nodes, {len(module.states)} caches, no weight loaded: {seconds(lowered)}"
    )
    folders = tempfile.TemporaryDirectory(prefix="qeff-demo-") if out is None else nullcontext(str(out))
    with folders as folder:
        outcomes = [
            _try(name, once, Path(folder) / name, tokenizer, [q for q, _ in questions], reference)
            for name in ([target] if target else names)
        ]
    if out is not None:
        show()
        line("The packages stay in ", (str(out), "bold"))
    show()
    right = [answer for _, answer in questions]
    show(Text("Questions and answers", style="bold"))
    show()
    show(_answers_table([q for q, _ in questions], right, outcomes))
    show()
    show(Text(f"Against transformers: {len(rows)} prompts in a batch, {_STEPS} tokens each", style="bold"))
    show()
    show(agreement_table({o.target: o.comparison for o in outcomes}, yardstick.limit))
    show()
    show(str(yardstick))
    wrong = [o.target for o in outcomes if o.answers != right or not o.comparison.equal(yardstick.limit)]
    if wrong:
        line(("Something is wrong", "bold red"), f" on {' and '.join(wrong)}: see the tables above.")
        raise typer.Exit(1)
    show(Text("All answers are right, and every token and logit agrees with transformers.", style="bold green"))
    show(f"That took {seconds(time.perf_counter() - started)}.")
    line("Next: ", ("qeff compile MODEL -o OUT", "bold"), " with a model of your own.")


def _try(
    target: str,
    source: LoweredOnce,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    reference: Trace,
) -> _Outcome:
    """Compile for a target, show what the passes did, ask the questions, and compare."""
    from backends import find_backend
    from qeff_ir.package import MAIN

    backend = find_backend(target)
    show()
    show(Text(f"Target {target}: {backend.title}", style="bold"))
    show()
    request = Request(target=target, emit_only=backend.ahead_of_time, batch_size=len(questions))
    compiled = compile_source(source, request, folder, announce=False)
    show(pipeline_table(compiled.manifest.programs[MAIN].report))
    show()
    show(f"Package: {', '.join(_top_files(compiled.folder))}")
    with working(f"Asking {backend.runner}"):
        from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
        from qeff_ir.testing.trace import compare, session_trace

        model = QEFFAutoModelForCausalLM.from_package(compiled.folder)
        result = model.generate(prompts=questions, tokenizer=tokenizer)
        rows = encode(tokenizer, questions)
        comparison = compare(session_trace(model.runner().decoder, rows, reference.tokens), reference)
    show(f"Ran in {backend.runner}: {result}.")
    return _Outcome(target, result.generated_texts, comparison)


def _top_files(folder: Path) -> list[str]:
    return sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir())


def _answers_table(questions: Sequence[str], right: Sequence[str], outcomes: Sequence[_Outcome]) -> Table:
    table = grid("question", "right", *(o.target for o in outcomes), right=("right", *(o.target for o in outcomes)))
    for index, question in enumerate(questions):
        answers = [o.answers[index] for o in outcomes]
        marks = [
            Text(f"{a} ✓", style="green") if a == right[index] else Text(f"{a} ✗", style="bold red") for a in answers
        ]
        table.add_row(Text(question), right[index], *marks)
    return table
