"""Embeddings of pictures and text: the language model of `QEFFAutoModelForImageTextToText` without its LM head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from backends import find_backend
from qeff_ir.auto.image_text import QEFFAutoModelForImageTextToText
from qeff_ir.compiler import Pipelines, choose_target, chosen
from qeff_ir.errors import CompileError, PackageError
from qeff_ir.frontend.forward_source import ForwardSource
from qeff_ir.frontend.headless import with_head
from qeff_ir.frontend.picture_source import PictureSource
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.providers.opening import find_folder
from qeff_ir.frontend.source import Source
from qeff_ir.frontend.tasks import IMAGE_TEXT_TO_TEXT
from qeff_ir.package import MAIN, SIDE_FOLDER
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.picture_form import FILE

if TYPE_CHECKING:
    from passes.embedding import Embedding
    from qeff_ir.arrays import Array
    from qeff_ir.auto.picture_runner import PictureRunner


def is_for_pictures(folder: Path) -> bool:
    """Whether a package has encoders of pictures."""
    return (folder / SIDE_FOLDER / FILE).exists()


class PictureEmbedder(QEFFAutoModelForImageTextToText):
    """A model of pictures and text that returns one embedding of each row, for `QEFFAutoModel`."""

    _embedding: Embedding | None = None

    @classmethod
    def of(cls, source: ForwardSource | None, processor: Any, embedding: Embedding | None) -> Self:
        """The same model as that of a forward pass.

        Args:
            source: Where it comes from.
            processor: Its processor, of a model in memory.
            embedding: What is made of its last hidden states.

        Raises:
            CompileError: The embedding is another than that of the last token, or there is no processor.
            PackageError: It comes as a package.
        """
        if source is None:
            raise PackageError("a model opened from a package cannot be compiled again: open the model itself")
        pooled = "none" if embedding is None or source.options.pooling is not None else embedding.pooling
        if pooled != "last" or source.options.inputs is not None:
            raise CompileError(
                "pictures and text are embedded by the hidden state of the last token alone, and not by another "
                "pooling or of other inputs: open the model with pooling='last', and without inputs="
            )
        self = cls._opened(_with_pictures(source, processor))
        self._embedding = embedding
        return self

    @classmethod
    def _open_checkpoint(cls, name: str | Path) -> Source:
        return PictureSource(Folder(find_folder(name)), headless=True)

    def compile_with(
        self,
        options: Mapping[str, Any],
        *,
        target: str = "auto",
        pipeline: Pipelines = None,
        **rest: Any,
    ) -> dict[str, str] | str:
        """See `QEFFAutoModelForImageTextToText.compile_with`; the embedding takes the place of the logits."""
        from passes.embedding_output import EmbeddingOutput

        assert self._embedding is not None
        target, _ = choose_target(target)
        own = EmbeddingOutput(self._embedding.normalize, self._embedding.dim)
        stock = Pipeline.parse(find_backend(target).pipeline).add(own)
        each = isinstance(pipeline, Mapping)
        steps = {**pipeline, MAIN: chosen(pipeline.get(MAIN), stock)} if each else chosen(pipeline, stock)
        return super().compile_with(options, target=target, pipeline=steps, **rest)

    def embed(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        images: Any = None,
        processor: Any = None,
        resize: bool = False,
    ) -> Array:
        """Embeddings of what a processor returns, or of texts and their pictures; any number.

        Returns:
            float32 ``[rows, features]``.

        Raises:
            RuntimeInputError: The request does not fit the compiled model.
        """
        runner, given = self.runner(), dict(inputs or {})
        texts = self._read_texts(prompts, images, given, resize=resize)
        with runner.decoder.request():
            return self._last(runner, texts, images, processor, given, resize=resize)

    def _open_runner(self, threads: int | None) -> PictureRunner:
        runner = super()._open_runner(threads)
        if not runner.decoder.embeds:
            raise PackageError(
                "the package returns logits, and no embedding: open it with QEFFAutoModelForImageTextToText"
            )
        return runner


def _with_pictures(source: ForwardSource, processor: Any) -> PictureSource:
    if source.options.part is not None:
        raise CompileError(f"part={source.options.part!r} takes one part of the model: leave it out for image_size")
    provider = source.provider
    if isinstance(provider, Memory):
        if processor is None:
            raise CompileError("a model in memory needs processor=, the model's, to be compiled for pictures: give it")
        provider = Memory(with_head(provider.model, IMAGE_TEXT_TO_TEXT), processor)
    return PictureSource(provider, headless=True)
