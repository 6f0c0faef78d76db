"""`QEFFAutoModel`: hidden states, or one embedding of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from backends import find_backend
from qeff_ir.auto.arguments import hub_arguments
from qeff_ir.auto.forward import ForwardModel, in_memory, named
from qeff_ir.auto.picture_sizes import asks_for_pictures
from qeff_ir.errors import CompileError, ModelLoadError, PassError, RuntimeInputError
from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource
from qeff_ir.frontend.headless import without_head
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.providers.opening import find_folder
from qeff_ir.frontend.tasks import EMBEDDING, Task
from qeff_ir.package import SIDE_FOLDER
from qeff_ir.runtime.text_settings import TextSettings
from qeff_ir.side_files import read_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from passes.embedding import Embedding
    from qeff_ir.arrays import Array
    from qeff_ir.auto.picture_embedding import PictureEmbedder
    from qeff_ir.compiler import Compiled
    from qeff_ir.frontend.inputs import Wanted
    from qeff_ir.frontend.sentence import SentenceConfig
    from qeff_ir.frontend.source import Source
    from qeff_ir.passing.pipeline import Pipeline

Pooling = Any
"""A mode of the pass `embedding`, or a torch module of the user's (``last_hidden_states, attention_mask``)."""


_OF_WRITERS = ("prefill_only", "num_speculative_tokens")
"""Options of a language model that make no sense for an embedding."""


class QEFFAutoModel(ForwardModel):
    """Any model that transformers' `AutoModel` loads, for its hidden states or one embedding of each row.

        model = QEFFAutoModel.from_pretrained("my-model", pooling="mean", normalize=True)
        model.compile(seq_len=[32, 128, 512])
        model.generate(tokenizer("My name is", return_tensors="pt"))["output"]  # float32 [1, features]
        model.encode(["My name is", "Hello"])  # float32 [2, features]

    A model of pictures and text embeds both once it is compiled for a size of pictures::

        model = QEFFAutoModel.from_pretrained("my-model", pooling="last", normalize=True)
        model.compile(image_size=(336, 336), num_images=1, ctx_len=1024)
        model.generate(processor(images=images, text=texts, return_tensors="pt", padding=True))["output"]
        model.encode(texts, images=images, processor=processor)

    Without a pooling, the outputs are those of the model's forward pass (on AI 100, for token ids: the first one only,
    called ``output``, as its contract has it). A sentence-transformers folder brings its own pooling and normalization.

    Args:
        model: A transformers model in memory, which stays unchanged. Of an encoder-decoder, the encoder is taken; with
            a mode of pooling, of a model with an LM head, the base model.
        inputs: As for `ForwardModel`.
        pooling: A mode of the pass `embedding` (``mean``, ``max``, ``cls``, ``last``, ``mean-sqrt-len``,
            ``weighted-mean``), or a torch module or function of ``(last_hidden_states, attention_mask)``.
        normalize: Whether embeddings are scaled to unit length.
        dim: How many of an embedding's features are kept, before it is scaled.
        processor: Of a model of pictures and text: its processor.

    Raises:
        ModelLoadError: The pooling is unknown or does not take two tensors.
    """

    task: ClassVar[Task] = EMBEDDING
    _embedding: Embedding | None = None
    _tokenizer: PreTrainedTokenizerBase | None = None
    _processor: Any = None
    _pictures: PictureEmbedder | None = None
    """What runs the package where that is for pictures."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        inputs: Wanted | None = None,
        pooling: Pooling = None,
        normalize: bool = False,
        dim: int | None = None,
        processor: Any = None,
    ) -> None:
        options = ForwardOptions(self.task, inputs, pooling=_own(pooling))
        pooled = isinstance(pooling, str) and pooling != "none"
        self._open(in_memory(without_head(model) if pooled else model, options))
        self._processor = processor
        self._set_embedding(pooling, normalize, dim)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        inputs: Wanted | None = None,
        part: str | None = None,
        trust_remote_code: bool = False,
        pooling: Pooling = None,
        normalize: bool | None = None,
        dim: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Open a model folder or a hub id; no weight is loaded.

        Args:
            pretrained_model_name_or_path: The folder or id.
            inputs: As for the class.
            part: As for `ForwardModel.from_pretrained`.
            trust_remote_code: Whether code that comes with the model may run.
            pooling: As for the class; ``none`` for the hidden states of a sentence-transformers folder. A mode takes
                the place of the folder's pooling, a module that of all that follows the transformer but Normalize.
            normalize: As for the class; the folder's own by default.
            dim: As for the class; the folder's own (``truncate_dim``) by default, which is cut after scaling, as
                sentence-transformers does it.
            kwargs: As for `ForwardModel.from_pretrained`.

        Raises:
            ModelLoadError: See `ForwardModel.from_pretrained`; or the pooling cannot be used.
            UnsupportedModelError: A sentence-transformers folder asks for what is not done, see
                `qeff_ir.frontend.sentence`.
        """
        from qeff_ir.frontend.sentence import read_sentence_config

        folder = find_folder(pretrained_model_name_or_path, **hub_arguments(kwargs))
        own, texts = _own(pooling), TextSettings()
        sentence = read_sentence_config(folder, pooling)
        if sentence is not None:
            folder, texts = sentence.folder, sentence.texts
            pooling, normalize, dim = _as_the_folder(sentence, pooling, normalize, dim)
            own = _own(pooling)
        options = ForwardOptions(cls.task, inputs, part, own, texts)
        self = cls._opened(ForwardSource(Folder(folder, trust_remote_code=trust_remote_code), options))
        self._set_embedding(pooling, False if normalize is None else normalize, dim)
        return self

    @classmethod
    def from_package(cls, folder: str | Path, *, checkpoint: str | Path | Source | None = None) -> Self:
        """See `ForwardModel.from_package`.

        Args:
            folder: The package.
            checkpoint: Of a package for pictures, see `qeff_ir.auto.generative.GenerativeModel.from_package`.
        """
        from qeff_ir.auto.picture_embedding import PictureEmbedder, is_for_pictures

        self = super().from_package(folder)
        if is_for_pictures(self.package.folder):
            self._pictures = PictureEmbedder.from_package(folder, checkpoint=checkpoint)
        return self

    def compile(
        self,
        *,
        image_size: int | tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        num_images: int = 1,
        prefill_seq_len: int | None = None,
        ctx_len: int | None = None,
        **options: Any,
    ) -> str:
        """See `ForwardModel.compile`; with a size of pictures, for pictures and text.

        Args:
            image_size: As for `qeff_ir.auto.image_text.QEFFAutoModelForImageTextToText.compile`, as for the others.
            num_images: Pictures that a row may have.
            prefill_seq_len: Tokens of one run; a longer row takes several.
            ctx_len: The longest row, in the place of ``seq_len``.
            options: What `ForwardModel.compile` takes.

        Returns:
            As `ForwardModel.compile`; of a package for pictures, the path of its language model.

        Raises:
            QeffError: See `qeff_ir.compiler.compile_model`.
        """
        from qeff_ir.auto.picture_embedding import PictureEmbedder

        if not asks_for_pictures({"image_size": image_size, **options}):
            if (num_images, prefill_seq_len, ctx_len) != (1, None, None):
                raise CompileError("num_images, prefill_seq_len and ctx_len are for pictures: give image_size as well")
            return super().compile(**options)
        if options.pop("seq_len", None) is not None:
            raise CompileError("seq_len is for text alone: with image_size, give ctx_len (and prefill_seq_len)")
        odd = next((n for n in _OF_WRITERS if options.get(n) not in (None, (), [])), None)
        if odd is not None:
            raise CompileError(f"{odd} is for models that write, and an embedding is of a prompt alone: leave it out")
        embedder = PictureEmbedder.of(self._source, self._processor, self._embedding)
        given: dict[str, Any] = {"prefill_seq_len": prefill_seq_len, "ctx_len": ctx_len, **options}
        paths = embedder.compile(image_size=image_size, num_images=num_images, **given)
        with self._lock:
            self._accept(embedder.package)
            self._pictures = embedder
        return paths if isinstance(paths, str) else paths["lang_qpc_path"]

    def _accept(self, made: Compiled) -> None:
        super()._accept(made)
        self._pictures = None

    def generate(self, inputs: Any = None, **kwargs: Any) -> dict[str, Array]:
        """See `ForwardModel.generate`; of a package for pictures, ``output`` is the embedding of each row."""
        pictures = self._pictures
        if pictures is None:
            return super().generate(inputs, **kwargs)
        return {"output": pictures.embed(named(inputs, kwargs))}

    def _set_embedding(self, pooling: Pooling, normalize: bool, dim: int | None) -> None:
        from passes.embedding import Embedding, check_pooling

        if not isinstance(normalize, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ModelLoadError(f"normalize is {normalize!r}: give True or False")
        wanted = pooling is not None or normalize or dim is not None
        mode = pooling if isinstance(pooling, str) else "none"
        try:
            check_pooling(mode)
        except PassError as error:
            raise ModelLoadError(str(error)) from error
        self._embedding = Embedding(mode, normalize, dim) if wanted else None

    @property
    def pools(self) -> bool:
        """Whether `encode` will work once it is compiled: there is a pooling."""
        if self._pictures is not None:
            return True
        if self._source is None:
            return self.encoder().pools
        own = self._source.options.pooling is not None
        return own or (self._embedding is not None and self._embedding.pooling != "none")

    def pipeline_for(self, target: str) -> Pipeline:
        """See `ForwardModel.pipeline_for`; with `embedding` where it is asked for."""
        from passes.embedding import Embedding

        made = super().pipeline_for(target)
        embedding = self._embedding
        if embedding is None and find_backend(target).names_hidden_states and self._takes_tokens():
            embedding = Embedding("none")
        return made if embedding is None else made.add(embedding)

    def _takes_tokens(self) -> bool:
        return self._source is not None and self._source.takes_tokens()

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        images: Any = None,
        processor: Any = None,
        resize: bool = False,
        batch_size: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        truncate: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        show_progress: bool | None = None,
    ) -> Array:
        """Embed texts, as sentence-transformers does it: sorted by length, in batches, returned in their order.

        Unlike there, a prompt is only the one given here, and nothing is cut that `truncate` does not ask for.

        Args:
            sentences: One text, or any number of them; of a package for pictures, as the ``prompts`` of
                `qeff_ir.auto.image_text.QEFFAutoModelForImageTextToText.generate`, in which pictures have places.
            images: Of a package for pictures: a list of pictures for each text, as there.
            processor: Of a package for pictures: the model's processor, in the place of `tokenizer`.
            resize: Whether pictures that have none of the compiled sizes are resized to the nearest.
            batch_size: Texts of a run; 32 where any number runs, else what the model is compiled for.
            tokenizer: The model's own by default.
            truncate: Whether a text is cut that is longer than the largest ``seq_len``, or than what a
                sentence-transformers folder reads (``max_seq_length``); otherwise it is refused.
            prompt: What every text starts with; by default what the model's folder says.
            prompt_name: Name of a prompt of the model's folder instead; see `text_settings`.
            show_progress: Whether to show a progress bar; by default when it takes over two seconds, in a terminal.

        Returns:
            float32 ``[texts, features]``; ``[features]`` for one text.

        Raises:
            RuntimeInputError: A text has no token or is too long, or the model was compiled without a pooling.
        """
        from qeff_ir.runtime.sentences import encode
        from qeff_ir.runtime.texts import as_texts

        if not isinstance(sentences, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RuntimeInputError(f"sentences is a {type(sentences).__name__}: give a text, or several")
        if isinstance(sentences, Mapping | bytes | bytearray):
            raise RuntimeInputError(f"sentences is {type(sentences).__name__}: give a text, or a list of texts")
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        settings = self.text_settings
        if (pictures := self._pictures) is not None:
            texts, first = as_texts(texts), settings.prompt(prompt, prompt_name)
            for name, value in (("batch_size", batch_size), ("tokenizer", tokenizer), ("truncate", truncate or None)):
                if value is not None:
                    raise RuntimeInputError(f"{name} is for text alone, and the package is for pictures: leave it out")
            found = pictures.embed(
                prompts=[first + text for text in texts], images=images, processor=processor, resize=resize
            )
            return found[0] if isinstance(sentences, str) else found
        if images is not None or processor is not None:
            raise RuntimeInputError("the package is for text alone: compile it with image_size to give images")
        found = encode(
            self.encoder(),
            texts,
            tokenizer or self.tokenizer(),
            batch_size=batch_size,
            truncate=truncate,
            prompt=settings.prompt(prompt, prompt_name),
            max_length=settings.max_length,
            show_progress=show_progress,
        )
        return found[0] if isinstance(sentences, str) else found

    @property
    def text_settings(self) -> TextSettings:
        """What is done to texts: the prompts by name, and so on.

        Raises:
            PackageError: The model is not compiled, or its package is damaged.
        """
        return TextSettings.read(self.package.folder / SIDE_FOLDER)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that is in the package.

        Raises:
            RuntimeInputError: There is none.
        """
        with self._lock:
            if self._tokenizer is None:
                tokenizer = read_tokenizer(self.package.folder / SIDE_FOLDER, RuntimeInputError)
                self.text_settings.apply(tokenizer)
                self._tokenizer = tokenizer
            return self._tokenizer


def _as_the_folder(
    sentence: SentenceConfig, pooling: Pooling, normalize: bool | None, dim: int | None
) -> tuple[Pooling, bool | None, int | None]:
    """Pooling, normalization and size, with the folder's own where nothing else is wanted.

    Linear layers become a part of the pooling. So does a scaling before the embedding is cut; one that comes last is
    left to the pass.
    """
    from qeff_ir.frontend.sentence_head import SentenceHead

    first = sentence.pooling if pooling is None or isinstance(pooling, str) else pooling
    if first == "none":
        return first, normalize, dim
    steps = list(sentence.steps)
    ends_in_unit = steps[-1:] == [None]
    if ends_in_unit and (normalize is not None or dim is not None or sentence.dim is None):
        steps.pop()
        normalize = True if normalize is None else normalize
    return SentenceHead(first, steps) if steps else first, normalize, sentence.dim if dim is None else dim


def _own(pooling: Pooling) -> Callable[..., torch.Tensor] | None:
    """The user's own pooling, or `None` for a mode of the pass.

    Raises:
        ModelLoadError: It is neither a text nor something to call with two tensors.
    """
    if pooling is None or isinstance(pooling, str):
        return None
    import inspect

    call = getattr(pooling, "forward", pooling)
    if not callable(call):
        raise ModelLoadError(
            f"pooling is {pooling!r}: give the name of a pooling, or a torch module of (last_hidden_states, "
            "attention_mask)"
        )
    try:
        inspect.signature(call).bind(None, None)
    except TypeError as error:
        raise ModelLoadError(
            f"the pooling {type(pooling).__name__} cannot be called with (last_hidden_states, attention_mask): {error}"
        ) from error
    return pooling
