"""``qeff run``: answer prompts, from a package or from a model that is compiled into the cache first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qeff_ir.cli.encoded import answer_encoded, open_encoded
from qeff_ir.cli.models import compile_source, open_model, open_tokenizer, refuse_options
from qeff_ir.cli.pictures import answer_about, is_of_pictures
from qeff_ir.cli.request import Request, with_request
from qeff_ir.cli.terminal import line, seconds, show, working
from qeff_ir.errors import RuntimeInputError
from qeff_ir.reading import path_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
    from qeff_ir.runtime.texts import GenerationResult

_SAMPLING = "Sampling (any of these but --repetition-penalty turns it on)"


@with_request
def command(
    model: Annotated[
        str, typer.Argument(help="A package, a model folder or a hub id.", metavar="MODEL_OR_OUT", show_default=False)
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given more than once.", show_default=False)
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(help="A recording (WAV) for a model that hears; may be given more than once.", metavar="FILE"),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture that the prompt is about; may be given more than once.", metavar="FILE"),
    ] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Resize pictures that have none of the compiled sizes to the nearest.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length of the answers; else the model's own default.", min=1)
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it grows; one prompt only.")] = False,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Sample instead of taking the best.", rich_help_panel=_SAMPLING)
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Above 0; 1 leaves the model's odds.", rich_help_panel=_SAMPLING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Choose among so many tokens.", min=1, rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among tokens of this share.", max=1, rich_help_panel=_SAMPLING)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes repeats rarer.", rich_help_panel=_SAMPLING)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes sampling repeatable.", min=0, max=2**32 - 1, rich_help_panel=_SAMPLING),
    ] = None,
    *,
    request: Request,
) -> None:
    """Answer prompts with a package, or with a model (compiled into the cache first)."""
    settings = _settings(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    prompt, audio = prompt or [], audio or []
    if not prompt and not audio:
        raise RuntimeInputError("missing option '--prompt': give a prompt (--audio FILE for a model that hears)")
    if stream and len(prompt) + len(audio) > 1:
        raise RuntimeInputError(
            f"--stream shows one prompt, but got {len(prompt) + len(audio)}: leave it out, or give one prompt"
        )
    if image and len(prompt) > 1:
        raise RuntimeInputError(f"--image belongs to one prompt, but got {len(prompt)}: give one prompt")
    if resize and not image:
        raise RuntimeInputError("--resize is for the pictures of --image: give one, or leave it out")
    if image or is_of_pictures(model):
        _seed(seed)
        answer_about(model, image or (), prompt, request, {**settings, "stream": stream}, resize=resize)
        return
    encoded = open_encoded(model, request)
    if encoded is not None:
        _seed(seed)
        answer_encoded(encoded, prompt, audio, {**settings, "stream": stream})
        return
    if audio:
        raise RuntimeInputError("--audio is for models that hear recordings: leave it out")
    opened = open_runnable(model, request)
    with working("Opening the session"):
        from qeff_ir.package import SIDE_FOLDER

        tokenizer = open_tokenizer(opened.package.folder / SIDE_FOLDER)
        runner = opened.runner()
    if stream and runner.decoder.batch_size != 1:
        raise RuntimeInputError(
            f"--stream needs a batch of 1, the package is compiled for {runner.decoder.batch_size}: leave it out"
        )
    _seed(seed)
    if stream:
        result = _stream(opened, tokenizer, prompt[0], settings)
    else:
        with working(f"Answering {len(prompt)} prompts" if len(prompt) > 1 else "Answering"):
            result = opened.generate(prompts=prompt, tokenizer=tokenizer, **settings)
        for asked, answer in zip(prompt, result.generated_texts, strict=True):
            line((asked, "cyan"), answer)
    show()
    line((_timing(result), "dim"))


def _seed(seed: int | None) -> None:
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)


def open_runnable(name: str, request: Request) -> QEFFAutoModelForCausalLM:
    """A package as it is, or a model, compiled into the cache.

    Raises:
        PackageError: The package is damaged, or an option asks for something that it was not compiled for.
        QeffError: The model cannot be opened or compiled.
    """
    from qeff_ir.package import SIDE_FOLDER, is_package, open_package

    folder, source = path_of(name, "the model"), None
    packaged = is_package(folder) or (folder / SIDE_FOLDER).is_dir()  # one without its manifest is a damaged package
    if packaged:
        open_package(folder)
        refuse_options(name, request.given)
    else:
        source = open_model(name, request)
        folder = compile_source(source, request).folder
    with working("Opening the package"):
        from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM

        return QEFFAutoModelForCausalLM.from_package(folder, checkpoint=source)


def _settings(**given: Any) -> dict[str, Any]:
    """The arguments of `generate`.

    Raises:
        RuntimeInputError: One is outside its range.
    """
    for name in ("temperature", "top_p", "repetition_penalty"):
        if given[name] is not None and not given[name] > 0:
            raise RuntimeInputError(f"--{name.replace('_', '-')} must be above 0, not {given[name]}")
    seed = given.pop("seed")
    sampling = (given["temperature"], given["top_k"], given["top_p"], seed)
    given["do_sample"] = given["do_sample"] or any(v is not None for v in sampling) or None
    return {name: value for name, value in given.items() if value is not None}


def _stream(
    model: QEFFAutoModelForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: dict[str, Any]
) -> GenerationResult:
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(prompt, end="", flush=True)
    return model.generate(prompts=prompt, tokenizer=tokenizer, streamer=streamer, **settings)


def _timing(result: GenerationResult) -> str:
    first = f"time to first token {seconds(result.time_to_first_token)}"
    decoded = sum(t.tokens for t in result.timings)
    return f"{first}, {result.tokens_per_second:.0f} tokens/s" if decoded else f"{first}, nothing decoded after it"
