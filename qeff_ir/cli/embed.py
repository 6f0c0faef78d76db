"""``qeff embed``: embeddings of texts, from a package or from a model that is compiled into the cache first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qeff_ir.cli.models import refuse_options
from qeff_ir.cli.terminal import line, working
from qeff_ir.errors import PackageError, RuntimeInputError

if TYPE_CHECKING:
    from qeff_ir.auto.embedding import QEFFAutoModel

_OF_COMPILING = ("out", "target", "emit_only", "pooling", "normalize", "dim", "seq_len", "batch_size")
"""Options that say what to compile, and nothing to a package."""


def command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A package, a model folder or a hub id.", metavar="MODEL_OR_OUT", show_default=False)
    ],
    text: Annotated[list[str] | None, typer.Option(help="A text; may be given more than once.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with a text on each line.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the package; in the cache by default.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write float32 [texts, features] here as .npy.")] = None,
    target: Annotated[str, typer.Option(help="A target, or auto.")] = "auto",
    emit_only: Annotated[bool, typer.Option("--emit-only", help="Stop before the AI 100 compiler.")] = False,
    pooling: Annotated[
        str | None, typer.Option(help="How tokens become one vector; the model's own, or mean, by default.")
    ] = None,
    normalize: Annotated[bool | None, typer.Option(help="Scale to unit length; the model's own by default.")] = None,
    dim: Annotated[int | None, typer.Option(help="Features to keep.", min=1)] = None,
    seq_len: Annotated[
        list[int] | None, typer.Option(help="A length to compile for; may be given more than once.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in one run.", min=1)] = 1,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    prompt: Annotated[
        str | None, typer.Option(help="What every text starts with; what the model says, by default.")
    ] = None,
    prompt_name: Annotated[str | None, typer.Option(help="A prompt of the model, by its name.")] = None,
) -> None:
    """Embed texts; without --save, print one JSON list for each."""
    texts = [*(text or []), *(_lines(file) if file is not None else [])]
    folder = Path(model).expanduser()
    from qeff_ir.package import is_package

    if is_package(folder):
        opened = _open_package(folder, context)
    else:
        with working(f"Compiling {model}"):
            opened = compile_embedder(
                folder if folder.is_dir() else model,
                pooling,
                normalize,
                dim,
                seq_len=seq_len or [32, 128, 512],
                target=target,
                emit_only=emit_only,
                batch_size=batch_size,
                compile_dir=out,
            )
    if not texts:
        line("Package:  ", (str(opened.package.folder), "bold"))
        return
    vectors = opened.encode(texts, truncate=truncate, prompt=prompt, prompt_name=prompt_name)
    if save is None:
        for vector in vectors:
            print(json.dumps([round(float(x), 7) for x in vector]))
        return
    import numpy as np

    try:
        with save.open("wb") as handle:
            np.save(handle, vectors)
    except OSError as error:
        raise PackageError(f"{save} cannot be written ({error.strerror}): choose another --save") from error
    line("Saved:    ", (str(save), "bold"), f" float32 {list(vectors.shape)}")


def compile_embedder(
    name: str | Path, pooling: str | None, normalize: bool | None, dim: int | None, **options: object
) -> QEFFAutoModel:
    """Compile a model that embeds; one without a pooling of its own takes the mean.

    Raises:
        QeffError: See `qeff_ir.auto.embedding.QEFFAutoModel`.
    """
    from qeff_ir.auto.embedding import QEFFAutoModel

    opened = QEFFAutoModel.from_pretrained(name, pooling=pooling, normalize=normalize, dim=dim)
    if not opened.pools:
        opened = QEFFAutoModel.from_pretrained(name, pooling="mean", normalize=normalize, dim=dim)
    opened.compile(**options)  # pyright: ignore[reportArgumentType]
    return opened


def _open_package(folder: Path, context: typer.Context) -> QEFFAutoModel:
    from qeff_ir.auto.embedding import QEFFAutoModel

    sources = {name: context.get_parameter_source(name) for name in _OF_COMPILING}
    given = [name for name, where in sources.items() if where is not None and where.name != "DEFAULT"]
    refuse_options(folder, given)
    return QEFFAutoModel.from_package(folder)


def _lines(file: Path) -> list[str]:
    """The lines of a file; characters that only Python takes for ends of lines (U+2028, a form feed) are text."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RuntimeInputError(f"{file} cannot be read as text ({error}): give a UTF-8 file") from error
    return text.removesuffix("\n").split("\n") if text else []
