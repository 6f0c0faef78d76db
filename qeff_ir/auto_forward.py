"""`QEFFAutoModel` and its heads: every model without a cache, compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from backends import find_backend
from backends.base import CompileOptions
from qeff_ir.auto import hub_arguments
from qeff_ir.compiler import Compiled, Watch, choose_target, compile_model
from qeff_ir.errors import ModelLoadError, PackageError, PassError, RuntimeInputError
from qeff_ir.frontend.forward_source import (
    CTC,
    EMBEDDING,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    ForwardFolder,
    ForwardMemory,
    ForwardOptions,
    Task,
)
from qeff_ir.frontend.source import find_folder
from qeff_ir.package import SIDE_FOLDER, open_package
from qeff_ir.passing.pipeline import Pipeline

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from passes.embedding import Embedding
    from qeff_ir.frontend.inputs import Wanted
    from qeff_ir.runtime.encoder import Encoder
    from qeff_ir.runtime.session import Array

Self = TypeVar("Self", bound="ForwardModel")
Pooling = Any
"""A mode of the pass `embedding`, or a torch module of the user's (``last_hidden_states, attention_mask``)."""


class ForwardModel:
    """A model without a cache that is compiled instead of run by torch; see its subclasses.

    Args:
        model: A transformers model in memory, which stays unchanged.
        inputs: Names of the inputs to compile with, or an example tensor for each; the main input (and the attention
            mask of token ids) by default.

    Raises:
        ModelLoadError: It is no transformers model.
    """

    task: ClassVar[Task]
    default_length: ClassVar[int] = 32

    def __init__(self, model: PreTrainedModel, *, inputs: Wanted | None = None) -> None:
        self._open(_in_memory(model, ForwardOptions(self.task, inputs)))

    def _open(self, source: ForwardFolder | ForwardMemory | None) -> None:
        self._source = source
        self._compiled: Compiled | None = None
        self._encoder: Encoder | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | Path,
        *,
        inputs: Wanted | None = None,
        part: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Open a model folder or a hub id; no weight is loaded.

        Args:
            pretrained_model_name_or_path: The folder or id.
            inputs: As for the class.
            part: A part of a model of several, by the name of its configuration: ``vision`` or ``text``, say.
            trust_remote_code: Whether code that comes with the model may run.
            kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for the hub.

        Raises:
            ModelLoadError: There is no such model, it cannot be read, or an argument asks for what is not supported.
        """
        folder = find_folder(pretrained_model_name_or_path, **hub_arguments(kwargs))
        self = cls.__new__(cls)
        options = ForwardOptions(cls.task, inputs, part)
        self._open(ForwardFolder(folder, options, trust_remote_code=trust_remote_code))
        return self

    @classmethod
    def from_package(cls: type[Self], folder: str | Path) -> Self:
        """Open a compiled package; it can run, and cannot be compiled again.

        Raises:
            PackageError: The folder is no whole package of this version.
        """
        self = cls.__new__(cls)
        self._open(None)
        path = Path(folder)
        self._compiled = Compiled(path, open_package(path), cached=True)
        return self

    @property
    def package(self) -> Compiled:
        """The compiled package.

        Raises:
            PackageError: There is none yet.
        """
        if self._compiled is None:
            raise PackageError("the model is not compiled yet: call compile() first")
        return self._compiled

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        if self._source is not None:
            return self._source.config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.package.folder / SIDE_FOLDER)

    def compile(
        self,
        *,
        target: str = "auto",
        seq_len: int | Sequence[int] | None = None,
        batch_size: int = 1,
        num_cores: int = 16,
        num_devices: int = 1,
        mxfp6_matmul: bool = False,
        weight_free: bool = False,
        compile_dir: str | Path | None = None,
        pipeline: str | None = None,
        emit_only: bool = False,
        force_flags: bool = False,
        watch: Watch | None = None,
        **compiler_options: Any,
    ) -> str:
        """Compile for a target; an equal package in the cache is used as it is.

        Args:
            target: ``auto`` (AI 100 when its SDK is installed, else ONNX Runtime), ``onnxruntime`` or ``ai100``.
            seq_len: Lengths of the inputs, one specialization for each; a run takes the smallest that fits.
            batch_size: Rows of a run.
            num_cores: Cores of the device.
            num_devices: Devices that share the model.
            mxfp6_matmul: Compress constant matmul weights on the device.
            weight_free: Emit the AI 100 graph without weights; its compiler binds them from safetensors by itself.
            compile_dir: Folder of the package; one in the cache when not given.
            pipeline: Text of another pipeline than `pipeline_for` makes.
            emit_only: Write the package without running the target's compiler.
            force_flags: Hand unknown compiler flags on instead of refusing them.
            watch: Told of every step, see `qeff_ir.compiler.Watch`.
            compiler_options: Any other flag of the target's compiler (``aic_enable_depth_first=True``).

        Returns:
            Path of the package (AI 100, compiled: of the ``qpc`` folder in it, as the contract has it).

        Raises:
            QeffError: See `qeff_ir.compiler.compile_model`.
        """
        if self._source is None:
            raise PackageError("a model opened from a package cannot be compiled again: open the model itself")
        lengths = self.default_length if seq_len is None else seq_len
        options = CompileOptions(
            seq_len=tuple(lengths) if isinstance(lengths, Sequence) else (lengths,),
            graph_name=self.task.graph_name,
            batch_size=batch_size,
            num_cores=num_cores,
            num_devices=num_devices,
            mxfp6_matmul=mxfp6_matmul,
            weight_free=weight_free,
            flags=compiler_options,
            force_flags=force_flags,
        )
        target, _ = choose_target(target)
        self._encoder = None
        self._compiled = compile_model(
            self._source,
            options,
            target=target,
            out=None if compile_dir is None else Path(compile_dir),
            pipeline=pipeline or str(self.pipeline_for(target)),
            emit_only=emit_only,
            watch=watch,
        )
        qpc = self._compiled.folder / "qpc"
        return str(qpc if qpc.is_dir() else self._compiled.folder)

    def pipeline_for(self, target: str) -> Pipeline:
        """The pipeline that `compile` runs: the target's own, without what only token by token generation needs."""
        return Pipeline.parse(find_backend(target).pipeline).without("last-logits")

    def generate(self, inputs: Any = None, **kwargs: Any) -> dict[str, Array]:
        """Run the forward pass once on a batch of any size.

        Args:
            inputs: What a tokenizer or processor returns.
            kwargs: The same, input by input (``input_ids=``).

        Returns:
            Outputs by name, float32; see `qeff_ir.runtime.encoder.Encoder.run`.

        Raises:
            RuntimeInputError: An input does not fit the compiled model.
            PackageError: The model is not compiled.
        """
        if inputs is not None and not isinstance(inputs, Mapping):
            raise RuntimeInputError(f"inputs is a {type(inputs).__name__}: give arrays by name, as a tokenizer does")
        return self.encoder().run({**(inputs or {}), **kwargs})

    def encoder(self, threads: int | None = None) -> Encoder:
        """The session that `generate` uses, opened on first use.

        Raises:
            PackageError: The model is not compiled, or its package is damaged.
        """
        if self._encoder is None:
            from qeff_ir.runtime.encoder import Encoder
            from qeff_ir.runtime.interface import read_interface

            package = self.package
            session = find_backend(package.manifest.target).open_forward(package.folder, threads=threads)
            self._encoder = Encoder(session, read_interface(package.folder))
        return self._encoder


class QEFFAutoModel(ForwardModel):
    """Any model that transformers' `AutoModel` loads, for its hidden states or one embedding of each row.

        model = QEFFAutoModel.from_pretrained("my-model", pooling="mean", normalize=True)
        model.compile(seq_len=[32, 128, 512])
        model.generate(tokenizer("My name is", return_tensors="pt"))["output"]  # float32 [1, features]
        model.encode(["My name is", "Hello"])  # float32 [2, features]

    Without a pooling, the outputs are those of the model's forward pass (on AI 100, for token ids: the first one only,
    called ``output``, as its contract has it). A sentence-transformers folder brings its own pooling and normalization.

    Args:
        model: A transformers model in memory, which stays unchanged. Of an encoder-decoder, the encoder is taken.
        inputs: As for `ForwardModel`.
        pooling: A mode of the pass `embedding` (``mean``, ``max``, ``cls``, ``last``, ``mean-sqrt-len``,
            ``weighted-mean``), or a torch module or function of ``(last_hidden_states, attention_mask)``.
        normalize: Whether embeddings are scaled to unit length.
        dim: How many of an embedding's features are kept, before it is scaled.

    Raises:
        ModelLoadError: The pooling is unknown or does not take two tensors.
    """

    task: ClassVar[Task] = EMBEDDING
    _embedding: Embedding | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        inputs: Wanted | None = None,
        pooling: Pooling = None,
        normalize: bool = False,
        dim: int | None = None,
    ) -> None:
        options = ForwardOptions(self.task, inputs, pooling=_own(pooling))
        self._open(_in_memory(model, options))
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
    ) -> QEFFAutoModel:
        """Open a model folder or a hub id; no weight is loaded.

        Args:
            pretrained_model_name_or_path: The folder or id.
            inputs: As for the class.
            part: As for `ForwardModel.from_pretrained`.
            trust_remote_code: Whether code that comes with the model may run.
            pooling: As for the class; ``none`` for the hidden states of a sentence-transformers folder.
            normalize: As for the class; the folder's own by default.
            dim: As for the class.
            kwargs: As for `ForwardModel.from_pretrained`.

        Raises:
            ModelLoadError: See `ForwardModel.from_pretrained`; or the pooling cannot be used.
        """
        from qeff_ir.frontend.sentence import read_sentence_config

        folder = find_folder(pretrained_model_name_or_path, **hub_arguments(kwargs))
        own = _own(pooling)
        sentence = read_sentence_config(folder) if pooling is None else None
        if sentence is not None:
            pooling = sentence.pooling
            normalize = sentence.normalize if normalize is None else normalize
        self = cls.__new__(cls)
        options = ForwardOptions(cls.task, inputs, part, own)
        inner = sentence.folder if sentence is not None else folder
        self._open(ForwardFolder(inner, options, trust_remote_code=trust_remote_code))
        self._set_embedding(pooling, False if normalize is None else normalize, dim)
        return self

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
        if self._source is None:
            return self.encoder().pools
        own = self._source.options.pooling is not None
        return own or (self._embedding is not None and self._embedding.pooling != "none")

    def pipeline_for(self, target: str) -> Pipeline:
        """See `ForwardModel.pipeline_for`; with `embedding` where it is asked for."""
        from passes.embedding import Embedding

        made = super().pipeline_for(target)
        embedding = self._embedding
        if embedding is None and target == "ai100" and self._takes_tokens():
            embedding = Embedding("none")
        return made if embedding is None else made.insert_before("fuse-norms", embedding)

    def _takes_tokens(self) -> bool:
        return self._source is not None and self._source.takes_tokens()

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        batch_size: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        truncate: bool = False,
        prompt: str = "",
        show_progress: bool | None = None,
    ) -> Array:
        """Embed texts, as sentence-transformers does it: sorted by length, in batches, returned in their order.

        Unlike there, a prompt is only the one given here, and nothing is cut that `truncate` does not ask for.

        Args:
            sentences: One text, or any number of them.
            batch_size: Texts of a run; 32 where any number runs, else what the model is compiled for.
            tokenizer: The model's own by default.
            truncate: Whether a text longer than the largest ``seq_len`` is cut; otherwise it is refused.
            prompt: What every text starts with.
            show_progress: Whether to show a progress bar; by default when it takes over two seconds, in a terminal.

        Returns:
            float32 ``[texts, features]``; ``[features]`` for one text.

        Raises:
            RuntimeInputError: A text has no token or is too long, or the model was compiled without a pooling.
        """
        from qeff_ir.runtime.sentences import encode

        if not isinstance(sentences, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RuntimeInputError(f"sentences is a {type(sentences).__name__}: give a text, or several")
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        found = encode(
            self.encoder(),
            texts,
            tokenizer or self.tokenizer(),
            batch_size=batch_size,
            truncate=truncate,
            prompt=prompt,
            show_progress=show_progress,
        )
        return found[0] if isinstance(sentences, str) else found

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that is in the package.

        Raises:
            RuntimeInputError: There is none.
        """
        if self._tokenizer is None:
            from qeff_ir.runtime.sentences import open_tokenizer

            self._tokenizer = open_tokenizer(self.package.folder / SIDE_FOLDER)
        return self._tokenizer


class QEFFAutoModelForSequenceClassification(ForwardModel):
    """Any model that transformers' `AutoModelForSequenceClassification` loads; `generate` returns ``logits``.

    A cross-encoder of pairs needs ``inputs=["input_ids", "attention_mask", "token_type_ids"]`` where its tokenizer
    tells the two texts apart.
    """

    task: ClassVar[Task] = SEQUENCE_CLASSIFICATION


class QEFFAutoModelForTokenClassification(ForwardModel):
    """Any model that transformers' `AutoModelForTokenClassification` loads; `generate` returns ``logits``."""

    task: ClassVar[Task] = TOKEN_CLASSIFICATION


class QEFFAutoModelForCTC(ForwardModel):
    """Any model that transformers' `AutoModelForCTC` loads: speech to text without a decoder.

    The length is in samples: a recording is padded with silence to the smallest ``seq_len`` that fits.
    """

    task: ClassVar[Task] = CTC
    default_length: ClassVar[int] = 480_000
    """30 seconds at 16 kHz (AI 100 contract §4.6)."""

    def transcribe(self, processor: Any, inputs: Any = None, **kwargs: Any) -> list[str]:
        """The text of each recording.

        Args:
            processor: The model's, which turns token ids into texts.
            inputs: What it made of the recordings.
            kwargs: The same, input by input.

        Raises:
            RuntimeInputError: An input does not fit the compiled model.
        """
        logits = self.generate(inputs, **kwargs)["logits"]
        return list(processor.batch_decode(logits.argmax(axis=-1)))


def _in_memory(model: PreTrainedModel, options: ForwardOptions) -> ForwardMemory:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelLoadError(f"{type(model).__name__} is no transformers model: use from_pretrained() for a folder")
    return ForwardMemory(model, options)


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
