"""``qeff verify --image-size``: prompts about pictures of noise, through transformers and the compiled sessions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qeff_ir.cli.asked import Asked, check_room
from qeff_ir.cli.models import program_module
from qeff_ir.cli.pictures import compile_pictures
from qeff_ir.cli.request import Request
from qeff_ir.cli.tables import show_programs
from qeff_ir.cli.terminal import working
from qeff_ir.errors import RuntimeInputError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qeff_ir.arrays import Array
    from qeff_ir.compiler import Compiled
    from qeff_ir.testing.trace import Trace

Beside = Mapping[str, "torch.Tensor"]
"""What a processor makes of a prompt beside its tokens."""

_PROMPT = "What is this?"


def asked_about_pictures(
    model: str,
    request: Request,
    sizes: Sequence[tuple[int, int]],
    count: int,
    steps: int,
    prompts: Sequence[str] | None,
    *,
    single_program: bool,
) -> Asked:
    """Ask both about pictures of noise: one prompt has as many as it may, one has none, one has one, and so on.

    Args:
        model: A model folder or hub id.
        request: The shared options.
        sizes: Height and width of pictures.
        count: Pictures of a prompt.
        steps: Tokens to compare after each prompt.
        prompts: The prompts; one with tokens for pictures has as many.
        single_program: Whether one program takes pixels and tokens.

    Raises:
        QeffError: The model cannot be compiled or asked, or its processor takes no such prompt.
    """
    found = compile_pictures(model, request, sizes, count, single_program=single_program)
    package = found.package
    show_programs(package.manifest)
    from qeff_ir.debug.drift import fast_parts

    if parts := fast_parts(package.manifest):
        raise RuntimeInputError(
            f"the package is fast and not exact ({', '.join(parts)}), and of pictures only exact ones are compared: "
            "leave that out"
        )
    runner = found.runner()
    from transformers import GenerationConfig

    from qeff_ir.cli.yardstick import Yardstick
    from qeff_ir.frontend.picture_source import PictureSource
    from qeff_ir.frontend.providers.folder import Folder
    from qeff_ir.frontend.providers.opening import find_folder
    from qeff_ir.package import SIDE_FOLDER
    from qeff_ir.runtime.picture_prompts import processed
    from qeff_ir.side_files import read_processor
    from qeff_ir.testing.trace import reference_trace, session_trace

    processor = read_processor(package.folder / SIDE_FOLDER)
    texts = list(prompts or [_PROMPT] * request.batch_size)
    pictures = _pictures(processor, texts, sizes, count)
    rows = runner.reader(texts, pictures, processor, resize=False)(range(len(texts)))
    check_room(max(map(len, rows)), steps, runner.decoder.ctx_len)
    beside = [_beside(processed(processor, *one)) for one in zip(texts, pictures, strict=True)]
    with working("Asking transformers") as say:
        source = PictureSource(Folder(find_folder(model), trust_remote_code=request.trust_remote_code))
        theirs = source.reference()
        theirs.generation_config = GenerationConfig()  # nothing ends an answer before its last step
        reference = reference_trace(theirs, rows, steps, beside)
        say("Asking the compiled model")
        trace = session_trace(runner.decoder, rows, reference.tokens)

    return Asked(
        package.manifest.target,
        list(map(len, rows)),
        trace,
        reference,
        lambda: Yardstick.of(_depth(package), _generated(theirs, rows, beside, reference), reference),
        source.decoded_here(),
    )


def _pictures(processor: Any, texts: Sequence[str], sizes: Sequence[tuple[int, int]], count: int) -> list[list[Any]]:
    """Pictures of noise for each prompt, uint8 ``[height, width, 3]``, of one size after the other."""
    import numpy as np

    from qeff_ir.runtime.picture_prompts import place_of

    random, of_size, wanted = np.random.default_rng(0), itertools.cycle(sizes), itertools.cycle((count, 0, 1))
    numbers = [text.count(place_of(processor)) or next(wanted) for text in texts]
    return [[random.integers(0, 256, (*next(of_size), 3), dtype=np.uint8) for _ in range(number)] for number in numbers]


def _beside(made: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a processor made of a prompt, without padding and without what only tells of it."""
    mask = made.get("attention_mask")
    kept = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}
    if mask is None:
        return kept
    return {name: v[mask.bool()][None] if name.endswith("token_type_ids") else v for name, v in kept.items()}


def _generated(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], beside: Sequence[Beside], reference: Trace
) -> Trace:
    """What transformers' own ``generate``, which has a cache, answers along the tokens of the reference.

    Raises:
        RuntimeInputError: ``generate`` of the model fails.
    """
    import numpy as np
    import torch

    from qeff_ir.testing.trace import Trace

    steps, found = len(reference.tokens), list[Any]()
    generate: Any = model.generate
    for number, (row, given) in enumerate(zip(rows, beside, strict=True)):
        ids, processors = torch.tensor([row]), [_follow(reference.tokens[:, number], len(row))]
        try:
            out = generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **given, max_new_tokens=steps, do_sample=False,
                logits_processor=processors, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        except Exception as error:  # it is the model's own code
            raise RuntimeInputError(
                f"transformers' generate of {type(model).__name__} fails ({first_line(error)}): there is nothing to "
                "compare with"
            ) from error
        found.append(torch.cat(out.logits).float().numpy())
    logits = np.stack(found, axis=1)
    return Trace(logits.argmax(-1), logits)


def _follow(tokens: Array, start: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What lets ``generate`` answer a prompt of `start` tokens with these."""
    import torch

    def follow(done: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = torch.tensor([int(tokens[done.shape[1] - start])])
        return torch.full_like(scores, -torch.inf).index_fill(1, token, 0.0)

    return follow


def _depth(package: Compiled) -> int:
    """Matrix products from pixels to logits, through the deepest encoder."""
    from qeff_ir.numerics import depth
    from qeff_ir.package import MAIN

    modules = {name: program_module(package.folder, package.manifest, name) for name in package.manifest.programs}
    main = depth(modules.pop(MAIN))
    encoders = (depth(module, str(out.name)) for module in modules.values() for out in module.graph.outputs)
    return main + max(encoders, default=0)
