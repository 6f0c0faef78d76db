"""`QEFFAutoModelForSeq2SeqLM` and `QEFFAutoModelForSpeechSeq2Seq`: models of an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from backends import find_backend
from qeff_ir.auto.arguments import hub_arguments, model_name
from qeff_ir.auto.compile_arguments import compiler_flags
from qeff_ir.auto.compiled_model import CompiledModel
from qeff_ir.auto.encoded_runner import EncodedRunner
from qeff_ir.compiler import Watch
from qeff_ir.errors import CompileError, ModelLoadError
from qeff_ir.frontend.encoded_source import EncodedSource
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.providers.opening import find_folder
from qeff_ir.frontend.tasks import SEQ2SEQ, SPEECH_SEQ2SEQ, Task
from qeff_ir.package import DECODER, MAIN, SIDE_FOLDER, encoder_of, opened, program_folder
from qeff_ir.side_files import read_generation_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qeff_ir.passing.pipeline import Pipeline
    from qeff_ir.runtime.encoded_decoder import EncodedDecoder


class QEFFAutoModelForSeq2SeqLM(CompiledModel[EncodedSource, EncodedRunner]):
    """A model that reads a text and writes one, compiled instead of run by torch.

        model = QEFFAutoModelForSeq2SeqLM.from_pretrained("my-model")
        model.compile(ctx_len=128, encoder_ctx_len=256)
        model.generate(**tokenizer(["translate: My name is"], return_tensors="pt"), max_new_tokens=50)

    Args:
        model: A transformers model in memory, which stays unchanged.

    Raises:
        ModelLoadError: It is something else.
    """

    task: ClassVar[Task] = SEQ2SEQ

    def __init__(self, model: PreTrainedModel) -> None:
        self._open(EncodedSource(Memory(model), self.task))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, trust_remote_code: bool = False, **kwargs: Any
    ) -> Self:
        """Open a model folder or a hub id; no weight is loaded.

        Args:
            pretrained_model_name_or_path: The folder or id.
            trust_remote_code: Whether code that comes with the model may run.
            kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for the hub.

        Raises:
            ModelLoadError: There is no such model, it cannot be read, or an argument asks for what is not supported.
        """
        folder = find_folder(model_name(pretrained_model_name_or_path), **hub_arguments(kwargs))
        return cls._opened(EncodedSource(Folder(folder, trust_remote_code=trust_remote_code), cls.task))

    def compile(
        self,
        *,
        ctx_len: int | None = None,
        encoder_ctx_len: int | Sequence[int] | None = None,
        target: str = "auto",
        prefill_seq_len: int = 1,
        batch_size: int = 1,
        compile_dir: str | Path | None = None,
        pipeline: Pipeline | str | None = None,
        emit_only: bool = False,
        watch: Watch | None = None,
        **options: Any,
    ) -> str:
        """Compile for a target; an equal package in the cache is used as it is.

        Args:
            ctx_len: Tokens that the decoder's cache holds: its prompt and what it writes; 128 by default, or as many as
                the model has positions.
            encoder_ctx_len: Tokens of a text that is read (128 by default), or positions that the encoder makes of a
                recording (by default, of the longest that the feature extractor takes); or several of them, each with
                programs of its own. Shorter texts are padded; a recording needs just its length, as encoders make
                something else of a padded one: they normalize over the whole length, and their convolutions reach
                into the padding.
            target: See `qeff_ir.auto.causal_lm.QEFFAutoModelForCausalLM.compile`, as for all others.
            prefill_seq_len: Tokens of the decoder's prompt that one run takes; most models have one start token.
            batch_size: Rows of a run.
            compile_dir: Folder of the package; one in the cache when not given.
            pipeline: Another pipeline than the target's own, or edits of it, for both programs.
            emit_only: Write the package without running the target's compiler.
            watch: Told of every step.
            options: What the target takes beside that, by name, flags of its compiler too.

        Returns:
            Path of the compiled package, or of its ``qpc``.

        Raises:
            QeffError: See `qeff_ir.compiler.compile_model`.
        """
        given = {
            "ctx_len": ctx_len,
            "prefill_seq_len": prefill_seq_len,
            "batch_size": batch_size,
            **compiler_flags(options),
        }
        rest = {"target": target, "pipeline": pipeline, "emit_only": emit_only, "watch": watch}
        return self.compile_with(given, encoder_ctx_len=encoder_ctx_len, compile_dir=compile_dir, **rest)

    def compile_with(
        self,
        options: Mapping[str, Any],
        *,
        encoder_ctx_len: int | Sequence[int] | None = None,
        compile_dir: str | Path | None = None,
        **rest: Any,
    ) -> str:
        """`compile` with its options by name.

        Args:
            options: Shapes, and what the target takes beside them, compiler flags too.
            encoder_ctx_len: See `compile`, as for all others.
            compile_dir: Folder of the package.
            rest: ``target``, ``pipeline``, ``emit_only`` and ``watch``.
        """
        _check_lengths(encoder_ctx_len)
        source = self._source
        if source is not None:
            source = source.for_length(encoder_ctx_len)  # another object: this one may be compiled by other threads
            if options.get("ctx_len") is None:
                options = {**options, "ctx_len": _default_context(source)}
        return self._compile(options, compile_dir, source, **rest)

    def generate(self, inputs: torch.Tensor | Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """``generate`` of the model's own class in transformers, over the compiled model.

        Args:
            inputs: What is read: all that the tokenizer or the processor returns, or the tokens or features alone; also
                by name, with ``attention_mask=``. A batch may have fewer rows than compiled.
            kwargs: Everything that ``generate`` of the model's class takes.

        Returns:
            Token ids as transformers returns them.

        Raises:
            RuntimeInputError: The request does not fit the compiled model.
            PackageError: The model is not compiled.
        """
        return self.runner().generate(inputs, kwargs)

    def _open_runner(self, threads: int | None) -> EncodedRunner:
        """The models that `generate` uses, and their sessions."""
        from qeff_ir.frontend.checkpoint.skeleton import empty_model
        from qeff_ir.runtime.encoded_decoder import EncodedDecoder
        from qeff_ir.runtime.encoded_generation import on_session

        package = self.package
        with opened(package.folder, package.manifest.key):
            backend, programs = find_backend(package.manifest.target), package.manifest.programs
            trust = self._source is not None and self._source.provider.trust_remote_code
            lengths: list[tuple[PreTrainedModel, EncodedDecoder]] = []
            for name in (MAIN, *(name for name in programs if name.startswith(f"{DECODER}_"))):
                parts = [part for part in (name, encoder_of(name)) if part in programs]
                sessions = [backend.open(program_folder(package.folder, part), threads=threads) for part in parts]
                decoder = EncodedDecoder(sessions[0], sessions[1] if len(sessions) > 1 else None)
                skeleton = empty_model(self.config, auto=self.task.auto_class(), trust_remote_code=trust)
                settings = read_generation_config(package.folder / SIDE_FOLDER)
                lengths.append((on_session(skeleton, decoder, settings), decoder))
            return EncodedRunner(lengths)


class QEFFAutoModelForSpeechSeq2Seq(QEFFAutoModelForSeq2SeqLM):
    """A model that hears a recording and writes a text, compiled instead of run by torch.

        model = QEFFAutoModelForSpeechSeq2Seq.from_pretrained("my-model")
        model.compile(ctx_len=256)
        model.generate(**processor(recording, sampling_rate=16000, return_tensors="pt"))

    Args:
        model: A transformers model in memory, which stays unchanged.
        processor: Its processor or feature extractor, which says what it makes of a recording.

    Raises:
        ModelLoadError: It is something else.
    """

    task: ClassVar[Task] = SPEECH_SEQ2SEQ

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        if not callable(processor) or not hasattr(processor, "save_pretrained"):
            raise ModelLoadError(
                f"the processor is of type {type(processor).__name__}: give that of the model, as "
                "AutoProcessor.from_pretrained returns it"
            )
        self._open(EncodedSource(Memory(model, processor), self.task))


def _check_lengths(given: object) -> None:
    lengths: list[Any] = list(given) if isinstance(given, list | tuple) else [given]  # pyright: ignore[reportUnknownArgumentType]
    if given is not None and (not lengths or any(type(n) is not int or n < 1 for n in lengths)):
        raise CompileError(f"encoder_ctx_len must be a whole number of at least 1, or several, not {given!r}")


_CONTEXT = 128
"""Tokens of the decoder where nobody says."""


def _default_context(source: EncodedSource) -> int:
    """No more than the decoder has positions."""
    config = source.config.get_text_config(decoder=True)
    named = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    return min([_CONTEXT, *(n for n in named if isinstance(n, int))])
