"""``qeff demo --vision``: questions about drawn pictures, whose answers follow from what was drawn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from qeff_ir.cli.blocks import Blocks
from qeff_ir.cli.tables import agreement_table
from qeff_ir.cli.terminal import line, quiet_transformers, seconds, show, working

if TYPE_CHECKING:
    from qeff_ir.arrays import Array
    from qeff_ir.cli.yardstick import Yardstick
    from qeff_ir.demo.pictures import Drawn, Question
    from qeff_ir.testing.trace import Comparison

Asked = Sequence[tuple["Drawn", "Question"]]
"""Questions, each with its picture."""


@dataclass(frozen=True)
class Answer:
    """What transformers says to one question.

    Attributes:
        tokens: int64 ``[steps]``; the last ends the answer.
        logits: float32 ``[steps, vocab]``.
    """

    tokens: Array
    logits: Array


def command(targets: Sequence[str], out: Path | None) -> None:
    """Compile the bundled model of pictures and text, ask it about drawn pictures, and compare with transformers.

    Raises:
        typer.Exit: An answer is wrong, or differs from that of transformers.
        RuntimeInputError: Pillow is not installed.
    """
    from qeff_ir.cli.pictures import need_pillow

    need_pillow()
    from qeff_ir.demo.pictures import DEMO_SEED, PICTURE_MODEL_FOLDER, demo_pictures, demo_questions

    started = time.perf_counter()
    show(Text("A small model of pictures and text, trained on drawn shapes and digits:", style="bold"))
    line(str(PICTURE_MODEL_FOLDER))
    pictures = demo_pictures()
    asked = [(picture, question) for picture in pictures for question in demo_questions(picture)]
    with working("Asking transformers"):
        quiet_transformers()
        from qeff_ir.side_files import read_processor

        processor = read_processor(PICTURE_MODEL_FOLDER)
        reference, yardstick = _transformers(processor, asked)
    answers: dict[str, list[str]] = {}
    agreement: dict[str, Comparison] = {}
    folders = tempfile.TemporaryDirectory(prefix="qeff-demo-") if out is None else nullcontext(str(out))
    with folders as folder:
        for target in targets:
            answers[target], agreement[target] = _try(target, Path(folder), processor, asked, reference)
    show()
    show(
        f"Pictures of seed {DEMO_SEED}, as they came. No picture of the training has the same set of shapes; of "
        "digits, the drawing is new."
    )
    for picture in pictures:
        show()
        own = [number for number, (shown, _) in enumerate(asked) if shown is picture]
        given = [(asked[number][1], {target: answers[target][number] for target in targets}) for number in own]
        _show_picture(picture, given)
    show()
    show(Text(f"Against transformers: {len(asked)} questions in a batch, each token of the answers", style="bold"))
    show()
    show(agreement_table(agreement, yardstick.limit))
    show()
    show(str(yardstick))
    right = [question.answer for _, question in asked]
    wrong = [t for t in targets if answers[t] != right or not agreement[t].equal(yardstick.limit)]
    if wrong:
        line(("Something is wrong", "bold red"), f" on {' and '.join(wrong)}: see above.")
        raise typer.Exit(1)
    show(Text("All answers are right, and every token and logit agrees with transformers.", style="bold green"))
    show(f"That took {seconds(time.perf_counter() - started)}.")


def _try(
    target: str, folder: Path, processor: Any, asked: Asked, reference: Sequence[Answer]
) -> tuple[list[str], Comparison]:
    """Compile for a target, ask the questions in one batch, and compare."""
    from backends import find_backend
    from qeff_ir.auto.image_text import QEFFAutoModelForImageTextToText
    from qeff_ir.demo.pictures import PICTURE_MODEL_FOLDER, SIZE

    backend = find_backend(target)
    with working(f"Compiling for {target}") as say:
        model = QEFFAutoModelForImageTextToText.from_pretrained(PICTURE_MODEL_FOLDER)
        model.compile(
            target=target,
            emit_only=backend.ahead_of_time,
            image_size=(SIZE, SIZE),
            prefill_seq_len=32,
            ctx_len=64,
            batch_size=len(asked),
            compile_dir=folder / f"{target}-vision",
        )
        say(f"Asking {backend.runner}")
        result = model.generate(
            prompts=[question.text for _, question in asked],
            images=[[picture.pixels] for picture, _ in asked],
            processor=processor,
        )
        comparison = compared(_scored(model, _read(processor, asked)), reference)
    show()
    programs = model.package.manifest.programs
    show(Text(f"Target {target}: {backend.title}", style="bold"))
    show(f"Programs: {', '.join(programs)}. Ran in {backend.runner}: {result}.")
    return result.generated_texts, comparison


def _read(processor: Any, asked: Asked) -> dict[str, Any]:
    """What a processor makes of questions about pictures."""
    from qeff_ir.runtime.picture_prompts import asked as prompt_of

    texts = [prompt_of(processor, question.text, 1) for _, question in asked]
    return dict(processor(text=texts, images=[[p.pixels] for p, _ in asked], padding=True, return_tensors="pt"))


def _scored(model: Any, inputs: dict[str, Any], **more: Any) -> tuple[Array, Array]:
    """Tokens ``[steps, batch]`` and logits ``[steps, batch, vocab]`` of a model's ``generate``, greedy."""
    import torch

    with torch.no_grad():
        made = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, do_sample=False, **more)
    logits = torch.stack(made.logits)
    return made.sequences[:, -len(logits) :].T.numpy(), logits.float().numpy()


def _transformers(processor: Any, asked: Asked) -> tuple[list[Answer], Yardstick]:
    """What transformers answers to each question alone and without a cache, and how far it differs with a cache."""
    from transformers import AutoModelForImageTextToText

    from qeff_ir.cli.yardstick import Yardstick
    from qeff_ir.demo.pictures import PICTURE_MODEL_FOLDER, SIZE
    from qeff_ir.frontend.picture_source import VISION, PictureSource
    from qeff_ir.frontend.providers.folder import Folder
    from qeff_ir.numerics import bound, depth, error_over_rms

    loader: Any = AutoModelForImageTextToText
    model = loader.from_pretrained(PICTURE_MODEL_FOLDER)
    answers: list[Answer] = []
    own = 0.0
    for one in asked:
        inputs = _read(processor, [one])
        tokens, logits = _scored(model, inputs, use_cache=False)
        answers.append(Answer(tokens[:, 0], logits[:, 0]))
        own = max(own, error_over_rms(_scored(model, inputs, use_cache=True)[1], logits))
    source = PictureSource(Folder(PICTURE_MODEL_FOLDER)).for_pictures([(SIZE, SIZE)], 1)
    vision = source.lower_vision(VISION)
    products = depth(source.lower()) + depth(vision, vision.graph.outputs[0].name or "")
    return answers, Yardstick(bound(products), own)


def compared(found: tuple[Array, Array], reference: Sequence[Answer]) -> Comparison:
    """Compare step by step, each row up to the end of its answer."""
    import numpy as np

    from qeff_ir.numerics import error_over_rms
    from qeff_ir.testing.trace import Comparison

    tokens, logits = found
    errors: list[float] = []
    agreement = 0
    for step in range(max(len(answer.tokens) for answer in reference)):
        rows = [row for row, answer in enumerate(reference) if step < len(answer.tokens)]
        right = [reference[row] for row in rows]
        if step >= len(tokens):  # all have ended too early
            errors.append(float("inf"))
            continue
        errors.append(error_over_rms(logits[step, rows], np.stack([answer.logits[step] for answer in right])))
        same = tokens[step, rows].tolist() == [int(answer.tokens[step]) for answer in right]
        agreement += same and agreement == step
    return Comparison(errors, agreement)


def _show_picture(picture: Drawn, given: Sequence[tuple[Question, dict[str, str]]]) -> None:
    """A picture, and beside it the questions with their answers."""
    from qeff_ir.demo.pictures import COLORS

    said = Text()
    for question, answers in given:
        said.append(f"{question.text}\n")
        for answer in dict.fromkeys(answers.values()):
            who = [target for target, text in answers.items() if text == answer]
            good = answer == question.answer
            said.append(f"{answer} {'✓' * len(who) if good else '✗'}", style="green" if good else "bold red")
            said.append(f"  {', '.join(who)}; right: {question.answer}\n" if not good else "\n")
    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Blocks(picture.pixels, {name[0]: rgb for name, rgb in COLORS.items()}), said)
    show(table)
