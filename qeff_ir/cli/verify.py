"""``qeff verify``: the same trace through transformers and through the compiled session."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from backends.options import completed
from qeff_ir.cli.asked import Asked, check_room, counted
from qeff_ir.cli.drift import show_drift
from qeff_ir.cli.models import compile_source, encode, open_model, open_tokenizer
from qeff_ir.cli.pictures import size_of
from qeff_ir.cli.request import Request, with_request
from qeff_ir.cli.tables import grid, show_programs
from qeff_ir.cli.terminal import show, working
from qeff_ir.errors import CompileError, RuntimeInputError

if TYPE_CHECKING:
    from qeff_ir.frontend.source import Source
    from qeff_ir.testing.trace import Comparison, Trace

Rows = list[list[int]]

_TYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


@with_request
def command(
    model: Annotated[str, typer.Argument(help="A model folder or a hub id.", show_default=False)],
    steps: Annotated[int, typer.Option(help="Tokens to compare after each prompt.", min=1)] = 8,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt, as many as --batch-size; random tokens by default.", show_default=False),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="A text to measure the drift of a fast package on; one comes along.", metavar="FILE"),
    ] = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(help="Height and width of pictures, for a model of pictures; may be repeated.", metavar="HxW"),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Pictures that a prompt may have.", min=1)] = 1,
    single_program: Annotated[
        bool,
        typer.Option("--single-program", help="Encoder and language model in one program, for a model of pictures."),
    ] = False,
    *,
    request: Request,
) -> None:
    """Compare the compiled model with transformers, token by token and logit by logit; exit 1 on a mismatch.

    Of a package that is fast and not exact, the drift is measured on a text, beside its speed, and nothing is proved.

    Pictures are drawn of noise, in the sizes of --image-size.
    """
    if "batch_size" not in request.given and request.full_batch_size is None:
        request = replace(request, batch_size=len(prompt) if prompt else 3)
    rows = request.full_batch_size or request.batch_size
    if prompt and len(prompt) != rows:
        raise RuntimeInputError(
            f"there are {counted(len(prompt), 'prompt')} for a batch of {rows}: leave out --batch-size"
        )
    if single_program and not image_size:
        raise CompileError("--single-program is for models of pictures and text: give --image-size too")
    if image_size:
        from qeff_ir.cli.verify_pictures import asked_about_pictures

        if texts is not None:
            raise RuntimeInputError("--texts is for models of text alone: leave it out")
        if request.settings.get("dtype", "float32") != "float32":
            raise RuntimeInputError("models of pictures are verified in float32: leave out --dtype")
        sizes = [size_of(size) for size in image_size]
        asked = asked_about_pictures(model, request, sizes, num_images, steps, prompt, single_program=single_program)
    else:
        asked = _asked(model, request, steps, prompt, texts)
    if asked is not None:
        _tell(model, asked)


def _asked(model: str, request: Request, steps: int, prompt: Sequence[str] | None, texts: Path | None) -> Asked | None:
    """Ask both, of a model of text alone; of a fast package, the drift is shown and nothing is left to compare."""
    check_room(1, steps, request.ctx_len)
    opened = open_model(model, request)
    from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
    from qeff_ir.cli.lowered import LoweredOnce

    source = LoweredOnce(opened)
    compiled = compile_source(source, request)
    show_programs(compiled.manifest)
    from qeff_ir.debug.drift import fast_parts

    if parts := fast_parts(compiled.manifest):
        show_drift(compiled, source, parts, texts)
        return None
    if texts is not None:
        raise RuntimeInputError("--texts is for packages that are fast; this one is exact, and is proved: leave it out")
    if prompt:
        from qeff_ir.package import SIDE_FOLDER

        rows = encode(open_tokenizer(compiled.folder / SIDE_FOLDER), prompt)
    else:
        config: Any = source.config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
        rows = random_prompts(request, steps, config.vocab_size)
    check_room(max(map(len, rows)), steps, request.ctx_len)
    with working("Asking transformers") as say:
        import onnx_ir as ir

        from qeff_ir.cli.yardstick import measure
        from qeff_ir.testing.trace import reference_trace, session_trace

        named = compiled.manifest.options["dtype"]
        theirs, dtype = opened.reference(named), ir.DataType[_TYPES[named]]
        reference = reference_trace(theirs, rows, steps)
        say("Asking the compiled model")
        decoder = QEFFAutoModelForCausalLM.from_package(compiled.folder, checkpoint=source).runner().decoder
        decoder.check_scores()
        trace = session_trace(decoder, rows, reference.tokens)
        drift = "" if dtype == ir.DataType.FLOAT else _drift(named, opened, rows, trace, reference)
    return Asked(
        compiled.manifest.target,
        list(map(len, rows)),
        trace,
        reference,
        lambda: measure(source.lower(), theirs, rows, reference, dtype),
        source.decoded_here(),
        drift,
    )


def _drift(dtype: str, source: Source, rows: Rows, ours: Trace, theirs: Trace) -> str:
    """How far both are from the model in float32, on the same tokens."""
    from qeff_ir.testing.trace import compare, reference_trace

    exact = reference_trace(source.reference(), rows, len(theirs.tokens), follow=theirs.tokens)
    mine, own = (compare(trace, exact).error for trace in (ours, theirs))
    return f"Both compute in {dtype}. From float32, the compiled model is {mine:.1e} away, and transformers {own:.1e}."


def _tell(model: str, asked: Asked) -> None:
    """Tell how far both answers lie apart.

    Raises:
        Exit: They differ, with code 1.
    """
    from qeff_ir.testing.trace import compare

    with working("Measuring what rounding explains"):
        try:
            found, yardstick = compare(asked.trace, asked.reference), asked.measure()
        except ValueError as error:
            raise RuntimeInputError(f"{model} cannot be verified: {error}") from error
    limit, rows = yardstick.limit, len(asked.lengths)
    wrong = (asked.trace.tokens != asked.reference.tokens).sum(axis=1).tolist()
    lengths = ", ".join(map(str, asked.lengths))
    show(f"On {asked.target}, {counted(rows, 'prompt')} of {lengths} tokens:")
    show()
    show(steps_table(found.errors, wrong, rows, limit))
    show()
    show(str(yardstick))
    if asked.decoded_here:
        show("transformers does not load these quantized weights here: it was given the numbers that qeff-ir reads.")
    if asked.drift:
        show(asked.drift)
    # Of two tokens that are nearer to each other than a rounding of 16 bits, either may come first.
    if not (found.error <= limit if asked.drift else found.equal(limit)):
        show(Text.assemble(("MISMATCH: ", "bold red"), mismatch(found, limit)))
        raise typer.Exit(1)
    said = agreement(found, limit) if found.equal(limit) else f"the largest error is {found.error / limit:.0%} of it."
    show(Text.assemble(("Agrees with transformers: ", "bold green"), said))


def random_prompts(request: Request, steps: int, vocabulary: int) -> Rows:
    """Prompts of unequal lengths, seeded: the first fills the context, so that its last slot is compared too."""
    import numpy as np

    room = request.ctx_len - steps + 1
    chunk = int(completed(request.options())["prefill_seq_len"])
    wanted = itertools.cycle((room, max(1, chunk // 3), chunk, 2 * chunk + 1, 1))
    random = np.random.default_rng(0)
    lengths = [min(length, room) for length in itertools.islice(wanted, request.full_batch_size or request.batch_size)]
    return [random.integers(0, vocabulary, length).tolist() for length in lengths]


def steps_table(errors: Sequence[float], wrong: Sequence[int], rows: int, limit: float) -> Table:
    """One line for each step: its error against the bound, and how many tokens agree."""
    table = grid("step", "max |error| / rms", "bound", "tokens that agree", right=("max |error| / rms", "bound"))
    for step, (error, differ) in enumerate(zip(errors, wrong, strict=True)):
        table.add_row(
            "prefill" if step == 0 else f"decode {step}",
            Text(f"{error:.1e}", style="" if error <= limit else "bold red"),
            f"{limit:.1e}",
            Text(f"{rows - differ} of {rows}", style="" if not differ else "bold red"),
        )
    return table


def agreement(found: Comparison, limit: float) -> str:
    """One sentence about a comparison that holds."""
    return f"all tokens, and the largest error is {found.error / limit:.0%} of the bound."


def mismatch(found: Comparison, limit: float) -> str:
    """One sentence about what differs."""
    error = f"the largest error is {found.error / limit:.3g} × the bound."
    if found.agreement < found.steps:
        return f"a token of step {found.agreement} differs; {error}"
    return f"the tokens agree, but {error}"
