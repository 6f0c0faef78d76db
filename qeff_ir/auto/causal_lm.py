"""`QEFFAutoModelForCausalLM`: load, compile and generate in three calls, as its users already write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from backends import find_backend
from qeff_ir.auto.arguments import hub_arguments, model_name
from qeff_ir.auto.generative import GenerativeModel
from qeff_ir.auto.qaic_config import loaded
from qeff_ir.compiler import Pipelines, TokenEmbedding, Watch
from qeff_ir.errors import ModelLoadError, PackageError, RuntimeInputError
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source, open_source
from qeff_ir.ir.ports import NEXT_TOKENS
from qeff_ir.package import SIDE_FOLDER, opened
from qeff_ir.side_files import read_generation_config

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.continuous_batching.requests import GenerationOutput

    from qeff_ir.arrays import Array
    from qeff_ir.runtime.engine import Engine
    from qeff_ir.runtime.generation import SessionLM
    from qeff_ir.runtime.speculation import Drafter


class QEFFAutoModelForCausalLM(GenerativeModel[Source, "SessionLM"]):
    """A causal LM that is compiled instead of run by torch.

        model = QEFFAutoModelForCausalLM.from_pretrained("my-model")
        model.compile(num_cores=16)
        model.generate(**tokenizer(["My name is"], return_tensors="pt"), max_new_tokens=20)

    Several threads may use one object: their requests wait for each other, each from its prefill to its last token, and
    a request that is running while another thread compiles finishes with the package that it began with. Sampling takes
    torch's one generator of random numbers, so a seed repeats an answer only where no other thread samples. A session
    does not live on in a forked process: fork first, then open.

    Args:
        model: A transformers causal LM in memory, which stays unchanged.
        asked: ``continuous_batching`` and ``qaic_config``, see `from_pretrained`.

    Raises:
        ModelLoadError: It is something else.
    """

    def __init__(self, model: PreTrainedModel, **asked: Any) -> None:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ModelLoadError(
                f"{type(model).__name__} is not a transformers model: use from_pretrained() for a folder or hub id"
            )
        rest, asked = loaded(asked)
        hub_arguments(rest)
        self._open(Source(Memory(model)))
        self._asking(asked)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Open a model folder, a hub id or a GGUF file; no weight is loaded.

        Args:
            pretrained_model_name_or_path: The folder or id; or the path of a GGUF file.
            gguf_file: The name of a GGUF file in the folder or on the hub, which is the model with its tokenizer.
            trust_remote_code: Whether code that comes with the model may run.
            kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for the hub; and the incumbent's
                ``continuous_batching`` and ``qaic_config``, which `compile` reads (`qeff_ir.auto.qaic_config`).

        Raises:
            ModelLoadError: There is no such model, it cannot be read, or an argument asks for what is not supported.
        """
        rest, asked = loaded(kwargs)
        hub = hub_arguments(rest)
        name = model_name(pretrained_model_name_or_path)
        source = open_source(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code, **hub)
        return cls._opened(source)._asking(asked)

    @classmethod
    def _open_checkpoint(cls, name: str | Path) -> Source:
        return open_source(name)

    def compile(
        self,
        *,
        target: str = "auto",
        prefill_seq_len: int | None = None,
        ctx_len: int = 128,
        batch_size: int = 1,
        compile_dir: str | Path | None = None,
        pipeline: Pipelines = None,
        token_embedding: TokenEmbedding = "graph",
        emit_only: bool = False,
        watch: Watch | None = None,
        **options: Any,
    ) -> str:
        """Compile for a target; an equal package in the cache is used as it is.

        Args:
            target: ``auto`` (AI 100 when its SDK is installed, else ONNX Runtime), ``onnxruntime`` or ``ai100``.
            prefill_seq_len: Tokens of a prompt that one prefill run takes; 32 by default, or `ctx_len` where that is
                less.
            ctx_len: Prompt and new tokens together.
            batch_size: Rows of a run.
            compile_dir: Folder of the package; one in the cache when not given.
            pipeline: Another pipeline than the target's own, or edits of it (``+my-pass,-fuse-rotary``).
            token_embedding: Who looks up the vectors of the tokens. ``host``: the package leaves their table out, and
                its rows are read from the checkpoint.
            emit_only: Write the package without running the target's compiler.
            watch: Told of every step, see `qeff_ir.compiler.Watch`.
            options: What the target takes beside that, by name: the other fields of
                `backends.options.CompileOptions` (``full_batch_size``, ``dtype``, …), and of the AI 100
                (`backends.ai100.options.Ai100Options`) ``num_cores``, ``num_devices``, ``mxfp6_matmul``,
                ``mxint8_kv_cache``, ``weight_free``, ``enable_qnn``, any flag of its compiler
                (``aic_enable_depth_first=True``), and ``force_flags`` for those not known.

        Returns:
            Path of the package (AI 100, compiled: of the ``qpc`` folder in it, as the contract has it).

        Raises:
            QeffError: See `qeff_ir.compiler.compile_model`.
        """
        given = {
            "prefill_seq_len": prefill_seq_len,
            "ctx_len": ctx_len,
            "batch_size": batch_size,
            **self._flags(options),
        }
        return self._compile(
            given,
            compile_dir,
            target=target,
            pipeline=pipeline,
            edits=self._edits(options),
            token_embedding=token_embedding,
            emit_only=emit_only,
            watch=watch,
        )

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        prompts: Sequence[str] | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> Any:
        """`transformers.generate` over the compiled model, or texts for a list of prompts.

        Args:
            inputs: Token ids, int64 ``[batch, tokens]``; also as ``input_ids=``, with ``attention_mask=``.
            prompts: Texts instead of token ids; any number, run in batches of the compiled size.
            tokenizer: The model's tokenizer, needed with `prompts`.
            kwargs: Everything else that transformers' ``generate`` takes.

        Returns:
            Token ids as transformers returns them; a `qeff_ir.runtime.texts.GenerationResult` for `prompts`.

        Raises:
            RuntimeInputError: The request does not fit the compiled model, or comes from within a request to it.
            PackageError: The model is not compiled.
        """
        runner = self.runner()
        if prompts is not None:
            from qeff_ir.runtime.texts import as_texts

            prompts = as_texts(prompts)  # before the turn: a generator may run anything
        with runner.decoder.request():
            return self._answer(runner, inputs, prompts, tokenizer, kwargs)

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: object = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """transformers' ``generate_batch``: any number of rows share the runs of the compiled model.

        Rows beyond its slots (``full_batch_size``, or ``batch_size``) wait until one is free.

        Args:
            inputs: Token ids of each row.
            generation_config: Settings; the model's own by default.
            continuous_batching_config: ``return_logprobs`` of it is heeded; the rest is about a cache that is compiled
                here.
            record_timestamps: Whether outputs tell when each token came.
            progress_bar: Changes no answer.
            persistent_manager: Changes no answer.
            warmup: Changes no answer.
            kwargs: Fields of a `GenerationConfig`: lengths, stop tokens, sampling, the repetition penalty.

        Returns:
            Outputs as transformers has them, by request id (``req_0``), in the order of the rows.

        Raises:
            RuntimeInputError: A row does not fit, or a setting is not for requests that share runs.
            PackageError: The model is not compiled.
        """
        from qeff_ir.runtime.batch_outputs import as_rows, generate_rows

        rows, runner = as_rows(inputs), self.runner()
        with runner.decoder.request():
            return generate_rows(
                runner, rows, generation_config, continuous_batching_config, kwargs, timestamps=record_timestamps
            )

    def engine(self, *, queue: int = 256, prefixes: bool = True, drafter: Drafter | None = None) -> Engine:
        """An engine over the session of this object, for requests of any number of threads.

        As long as it has work, other requests to this object wait.

        Args:
            queue: How many requests may wait for a slot.
            prefixes: Whether what earlier requests left in the caches is used again.
            drafter: Guesses what follows (`qeff_ir.runtime.speculation`), where the model was compiled with
                ``num_speculative_tokens``; answers stay the same.

        Raises:
            PackageError: The model is not compiled, or verifies no drafts.
        """
        from qeff_ir.runtime.engine import Engine

        decoder = self.runner().decoder
        return Engine(
            decoder.session, decoder.table, queue=queue, prefixes=prefixes, drafter=drafter, turns=decoder.turns
        )

    def _answer(
        self,
        runner: SessionLM,
        inputs: torch.Tensor | None,
        prompts: Sequence[str] | str | None,
        tokenizer: PreTrainedTokenizerBase | None,
        kwargs: dict[str, Any],
        slots: list[int] | None = None,
    ) -> Any:
        """See `generate`; the thread has its turn. `slots` are those of the adapters of prompts."""
        if prompts is None:
            if tokenizer is not None:  # transformers takes it, for stop strings
                kwargs["tokenizer"] = tokenizer
            return runner.generate_now(inputs, **kwargs)
        if tokenizer is None:
            raise RuntimeInputError("prompts need tokenizer=: pass the model's tokenizer, or token ids")
        from qeff_ir.runtime.texts import generate_texts

        if inputs is not None:
            raise RuntimeInputError("prompts cannot be combined with inputs: give token ids, or texts")
        return generate_texts(runner, prompts, tokenizer, kwargs, slots)

    def score(
        self,
        *,
        tokens: Sequence[int | str],
        prompts: Sequence[str] | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Array:
        """How the probability of the next token is shared among some tokens, as rerankers are read ("no" and "yes").

        Args:
            tokens: By id, or with `tokenizer` as texts of one token each.
            prompts: Texts; any number.
            tokenizer: The model's, for texts.
            input_ids: Token ids instead of prompts, int64 ``[rows, tokens]``; any number of rows.
            attention_mask: 1 for text and 0 for padding, on either side.

        Returns:
            float32 ``[rows, tokens]``, see `qeff_ir.runtime.read_out.shares`.

        Raises:
            RuntimeInputError: The request does not fit the compiled model, or a token is none.
            PackageError: The model is not compiled.
        """
        from qeff_ir.runtime.read_out import read_out, shares

        runner = self.runner()
        rows = self._rows(runner, prompts, tokenizer, input_ids, attention_mask)
        with runner.decoder.request():
            logits = read_out(runner.decoder, len(rows), lambda batch: [rows[number] for number in batch])
        return shares(logits, tokens, tokenizer)

    def _rows(
        self,
        runner: SessionLM,
        prompts: Sequence[str] | str | None,
        tokenizer: PreTrainedTokenizerBase | None,
        ids: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> list[list[int]]:
        """The tokens of rows to score.

        Raises:
            RuntimeInputError: They are none, or the package has no logits.
        """
        from qeff_ir.runtime.read_out import real_rows, tensors
        from qeff_ir.runtime.texts import as_texts, encode

        runner.decoder.check_scores()
        if (prompts is None) == (ids is None):
            raise RuntimeInputError("give prompts and tokenizer, or input_ids")
        if prompts is None:
            return real_rows(*tensors(ids, mask), runner.vocabulary)
        if tokenizer is None or mask is not None:
            raise RuntimeInputError("prompts need tokenizer=, the model's, and no attention_mask")
        return [encode(tokenizer, text) for text in as_texts(prompts)]

    def _open_runner(self, threads: int | None) -> SessionLM:
        from qeff_ir.runtime.decoder import Decoder
        from qeff_ir.runtime.drawing_decoder import DrawingDecoder
        from qeff_ir.runtime.drawing_generation import DrawingLM
        from qeff_ir.runtime.generation import SessionLM

        package = self.package
        with opened(package.folder, package.manifest.key):
            config, defaults = self.config, read_generation_config(package.folder / SIDE_FOLDER)
            if not isinstance(getattr(config.get_text_config(decoder=True), "vocab_size", None), int):
                raise PackageError(f"the configuration in {package.folder} has no vocab_size: compile the model again")
            session = find_backend(package.manifest.target).open(package.folder, threads=threads)
            table = self._table(session.interface)
            if session.interface.output(NEXT_TOKENS) is not None:
                return DrawingLM(DrawingDecoder(session, table), config, defaults)
            return SessionLM(Decoder(session, table), config, defaults)
